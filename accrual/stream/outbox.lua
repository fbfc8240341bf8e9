#!lua
-- Appends one message of the book's outbox, unless it was appended before: the sender may have died behind it.
--
-- KEYS  1 stream  2 outbox
-- ARGV  1 position of the message, one more than that of the one before  2 name of the field  3 value
-- Returns  the ID of the new entry, or nil where the message had been sent
local sent = tonumber(redis.call('HGET', KEYS[2], 'sent') or '0')
if tonumber(ARGV[1]) <= sent then
  return false
end
-- Reads that could fail come before the first write.
redis.call('XLEN', KEYS[1])
local added = redis.call('XADD', KEYS[1], '*', ARGV[2], ARGV[3])
redis.call('HSET', KEYS[2], 'sent', ARGV[1])
return added
