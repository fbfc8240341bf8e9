#!lua
-- Marks a pending rulebook as refused, unless another one has taken its place.
--
-- KEYS  1 rulebooks
-- ARGV  1 SHA-256 of the pending rulebook  2 why
if redis.call('HGET', KEYS[1], 'pending_sha256') ~= ARGV[1] then
  return 0
end
redis.call('HDEL', KEYS[1], 'pending', 'pending_sha256')
return redis.call('HSET', KEYS[1], 'refused_sha256', ARGV[1], 'refused_reason', ARGV[2])
