#!lua flags=allow-oom
-- Removes events that no restart needs, for the owner: none that was not consumed, whatever it asks for, and none that
-- the archive does not have yet.
--
-- The server removes whole nodes of the stream, and only some thousand entries at once: call it again until it removes
-- none.
--
-- KEYS  1 checkpoint  2 events  3 archive
-- ARGV  1 nonce of the owner  2 ID of the first entry that must stay
--       3 '1' if there is to be an archive, also where none has begun
-- Returns  'owner', name of the owner  |  'trimmed', ID of the first entry that had to stay, how many were removed
local checkpoint, events, archive = unpack(KEYS)
local nonce, before, wanted = unpack(ARGV)

local owner, name, position = unpack(redis.call('HMGET', checkpoint, 'owner', 'owner_name', 'position'))
if owner ~= nonce then
  return { 'owner', name or '' }
end
local function keep_from(id)
  if is_after(before, id) then
    before = id
  end
end
keep_from(position or '0-0')
if wanted == '1' or redis.call('EXISTS', archive) == 1 then
  keep_from(redis.call('HGET', archive, 'position') or '0-0')
end
return { 'trimmed', before, redis.call('XTRIM', events, 'MINID', '~', before) }
