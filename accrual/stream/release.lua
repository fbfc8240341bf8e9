#!lua flags=allow-oom
-- Gives the partition up, so that another worker need not wait for the lease to run out.
--
-- KEYS  1 checkpoint  2 lease
-- ARGV  1 nonce
local checkpoint, lease = KEYS[1], KEYS[2]
if redis.call('HGET', checkpoint, 'owner') ~= ARGV[1] then
  return 0
end
redis.call('HDEL', checkpoint, 'owner', 'owner_name', 'trouble')
return redis.call('DEL', lease)
