#!lua flags=allow-oom
-- Tells how far the archive of a partition has come, and whether everything behind that is still on the stream.
--
-- An archive that has not begun begins where ARGV says. From then on nothing is trimmed that it does not have.
--
-- KEYS  1 events  2 archive
-- ARGV  nothing, or where to begin: 1 segments  2 digest  3 position  4 entries
-- Returns  nothing, if it has not begun
--          why entries are missing or '', segments, digest, position, entries
local events, archive = unpack(KEYS)

local begun = redis.call('EXISTS', archive) == 1
if not begun and #ARGV == 0 then
  return false
end
local standing = begun and redis.call('HMGET', archive, 'segments', 'digest', 'position', 'entries') or ARGV
local segments, digest, position, entries = unpack(standing)
local why = missing(events, position, tonumber(entries))
if not begun and not why then
  redis.call('HSET', archive, 'segments', segments, 'digest', digest, 'position', position, 'entries', entries)
end
return { why or '', segments, digest, position, entries }
