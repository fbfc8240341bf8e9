#!lua flags=allow-oom
-- Renews the lease of the owner, and tells it what it should know.
--
-- A lease that ran out is simply set again as long as nobody else has taken the partition: the nonce in the checkpoint
-- is what fences, the lease only says when another worker may try.
--
-- KEYS  1 checkpoint  2 lease  3 events  4 rulebooks
-- ARGV  1 nonce  2 duration of the lease in ms
-- Returns  'owner', name of the owner
--          'kept' | 'trimmed', why, SHA-256 of the pending rulebook or '', entries added, entries removed
local checkpoint, lease, events, rulebooks = unpack(KEYS)
local nonce, duration_ms = unpack(ARGV)

local owner, name, position, consumed =
  unpack(redis.call('HMGET', checkpoint, 'owner', 'owner_name', 'position', 'stream_entries'))
if owner ~= nonce then
  return { 'owner', name or '' }
end
redis.call('SET', lease, nonce, 'PX', duration_ms)
local why, added, removed = missing(events, position or '0-0', tonumber(consumed or '0'))
return { why and 'trimmed' or 'kept', why or '', redis.call('HGET', rulebooks, 'pending_sha256') or '', added, removed }
