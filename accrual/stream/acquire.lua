#!lua flags=allow-oom
-- Takes the partition, unless another worker's lease on it runs. A worker that could never take it is told at once.
--
-- KEYS  1 checkpoint  2 lease
-- ARGV  1 nonce  2 name of the worker, for people  3 duration of the lease in ms
--       4 check of the configured secret, or ''  5 a new secret, 6 its check: for the first start without a configured one
-- Returns  'held', name of the owner, ms left  |  'secret', why  |  'acquired', fields and values of the checkpoint
local checkpoint, lease = KEYS[1], KEYS[2]
local nonce, name, duration_ms, configured, new_secret, new_check = unpack(ARGV)

local check, secret = unpack(redis.call('HMGET', checkpoint, 'secret_check', 'secret'))
if check and configured ~= '' and configured ~= check then
  return { 'secret', 'the configured secret is not the one that the partition was started with' }
elseif check and configured == '' and not secret then
  return { 'secret', 'the partition was started with a configured secret, and none is configured now' }
end

local holder = redis.call('GET', lease)
if holder and holder ~= nonce then
  return { 'held', redis.call('HGET', checkpoint, 'owner_name') or '', redis.call('PTTL', lease) }
end

redis.call('SET', lease, nonce, 'PX', duration_ms)
redis.call('HSET', checkpoint, 'owner', nonce, 'owner_name', name)
if not check and configured ~= '' then
  redis.call('HSET', checkpoint, 'secret_check', configured)
elseif not check then
  redis.call('HSET', checkpoint, 'secret', new_secret, 'secret_check', new_check)
end
return { 'acquired', redis.call('HGETALL', checkpoint) }
