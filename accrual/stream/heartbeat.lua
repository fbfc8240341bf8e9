#!lua flags=allow-oom
-- Renews the lease of the owner, tells it what it should know, and leaves word of what keeps it from working.
--
-- A lease that ran out is simply set again as long as nobody else has taken the partition: the nonce in the checkpoint
-- is what fences, the lease only says when another worker may try.
--
-- KEYS  1 checkpoint  2 lease  3 events  4 rulebooks
-- ARGV  1 nonce  2 duration of the lease in ms  3 what keeps the owner from working, or ''
-- Returns  'owner', name of the owner
--          'kept' | 'trimmed', why, SHA-256 of the pending rulebook or '', entries added, entries removed
local checkpoint, lease, events, rulebooks = unpack(KEYS)
local nonce, duration_ms, trouble = unpack(ARGV)

local owner, name, position, consumed, said =
  unpack(redis.call('HMGET', checkpoint, 'owner', 'owner_name', 'position', 'stream_entries', 'trouble'))
if owner ~= nonce then
  return { 'owner', name or '' }
end
redis.call('SET', lease, nonce, 'PX', duration_ms)
if trouble ~= '' and trouble ~= said then
  redis.call('HSET', checkpoint, 'trouble', trouble)
elseif trouble == '' and said then
  redis.call('HDEL', checkpoint, 'trouble')
end
local why, added, removed = missing(events, position or '0-0', tonumber(consumed or '0'))
return { why and 'trimmed' or 'kept', why or '', redis.call('HGET', rulebooks, 'pending_sha256') or '', added, removed }
