#!lua
-- Appends messages of the book's outbox in order, but for those that were appended before: their sender may have died
-- behind it.
--
-- KEYS  1 outbox  2 and on: the streams
-- ARGV  for each message: its position (growing), which of the keys is its stream, the name of the field, the value
-- Returns  how many were appended
local sent = tonumber(redis.call('HGET', KEYS[1], 'sent') or '0')
-- Reads that could fail come before the first write.
for key = 2, #KEYS do
  redis.call('XLEN', KEYS[key])
end
local appended = 0
for first = 1, #ARGV, 4 do
  local position = tonumber(ARGV[first])
  if position > sent then
    redis.call('XADD', KEYS[tonumber(ARGV[first + 1])], '*', ARGV[first + 2], ARGV[first + 3])
    redis.call('HSET', KEYS[1], 'sent', ARGV[first])
    sent = position
    appended = appended + 1
  end
end
return appended
