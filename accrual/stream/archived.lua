#!lua flags=allow-oom
-- Takes note of a segment that is in the archive, if it continues the one before.
--
-- KEYS  1 archive
-- ARGV  1 digest of the segment before  2 segments with this one  3 its digest  4 its last entry  5 entries with it
-- Returns  1, or 0 where the archive stands elsewhere
local archive = KEYS[1]
local before, segments, digest, position, entries = unpack(ARGV)

local last, last_digest = unpack(redis.call('HMGET', archive, 'segments', 'digest'))
if last == segments and last_digest == digest then
  return 1
end
if tonumber(last or '-1') ~= tonumber(segments) - 1 or last_digest ~= before then
  return 0
end
redis.call('HSET', archive, 'segments', segments, 'digest', digest, 'position', position, 'entries', entries)
return 1
