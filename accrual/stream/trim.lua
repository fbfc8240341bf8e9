#!lua flags=allow-oom
-- Removes events that no restart needs, but none that the archive does not have yet.
--
-- The server removes whole nodes of the stream, and only some thousand entries at once: call it again until it removes
-- none.
--
-- KEYS  1 events  2 archive
-- ARGV  1 ID of the first entry that must stay  2 '1' if there is to be an archive, also where none has begun
-- Returns  how many entries were removed, ID of the first entry that had to stay
local events, archive = unpack(KEYS)
local before, wanted = unpack(ARGV)

if wanted == '1' or redis.call('EXISTS', archive) == 1 then
  local archived = redis.call('HGET', archive, 'position') or '0-0'
  if is_after(before, archived) then
    before = archived
  end
end
return { redis.call('XTRIM', events, 'MINID', '~', before), before }
