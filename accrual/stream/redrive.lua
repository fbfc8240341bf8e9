#!lua
-- Moves one dead letter back into the events stream: at no moment is it in both, or in neither.
--
-- KEYS  1 dead letters  2 events  3 checkpoint
-- ARGV  1 ID of the dead letter
-- Returns  the ID of the new stream entry, or nil where the dead letter is gone
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not found then
  return false
end
local original = {}
for at = 1, #found[2], 2 do
  local name = found[2][at]
  if name:sub(1, 6) == 'field:' then
    original[#original + 1] = name:sub(7)
    original[#original + 1] = found[2][at + 1]
  end
end
-- Reads that could fail come before the first write.
redis.call('HGET', KEYS[3], 'redriven')
local added = redis.call('XADD', KEYS[2], '*', unpack(original))
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[3], 'redriven', 1)
return added
