#!lua
-- Commits one batch as a whole, or does nothing at all: ledger, dead letters and checkpoint move together.
--
-- Scripts do not roll back, so every check and every read that could fail comes before the first write. The first line
-- makes the server refuse the script, before it starts, when it is out of memory, cannot save, or is a replica.
--
-- KEYS  1 checkpoint  2 ledger  3 events  4 dead letters  5 rulebooks
-- ARGV  1 nonce of the owner  2 number of the batch
--       3 digest, 4 position, 5 stream entries consumed, 6 dead letters: the checkpoint's before this batch
--       7 position, 8 stream entries consumed: the checkpoint's after this batch
--       9 the batch  10 SHA-256 of the rulebook that it adopts, or ''
--       11 how many arguments follow for the checkpoint: its fields and values after this batch
--       then for each dead letter: how many arguments follow for it, and its fields and values
-- Returns  status, batch and digest of the checkpoint as it is now, entries added, entries removed, why
--          status: committed | owner | elsewhere | trimmed | unknown | ledger | deadletters
local checkpoint, ledger, events, deadletters, rulebooks = unpack(KEYS)
local nonce, batch, digest, position, consumed, letters, through, consumed_after, value, adopted, fields =
  unpack(ARGV, 1, 11)
local first_field, last_field = 12, 11 + tonumber(fields)
local first_letter = last_field + 1
local next_letter = tonumber(letters) + 1

local now = redis.call('HMGET', checkpoint, 'owner', 'batch', 'digest', 'position', 'stream_entries', 'dead_letters')
local added, removed, why = 0, 0, nil
local function answer(status, explanation)
  return { status, tonumber(now[2] or '0'), now[3] or '', added, removed, explanation or '' }
end

if now[1] ~= nonce then
  return answer('owner', redis.call('HGET', checkpoint, 'owner_name') or '')
end
if tonumber(now[2] or '0') ~= tonumber(batch) - 1 or (now[3] or digest) ~= digest or (now[4] or '0-0') ~= position
  or (now[5] or '0') ~= consumed or (now[6] or '0') ~= letters then
  return answer('elsewhere')
end
why, added, removed = missing(events, position, tonumber(consumed))
if why then
  return answer('trimmed', why)
end
-- After a failover the entries that were read may not be here, or not as many of them.
if added < tonumber(consumed_after) or (through ~= position and #redis.call('XRANGE', events, through, through) == 0) then
  return answer('unknown', 'the server does not have the stream entries up to ' .. through .. ' that were read')
end
if batch ~= '1' and redis.call('XLEN', ledger) == 0 then
  return answer('ledger', 'the ledger was deleted')
end
if ARGV[first_letter] and not is_after(next_letter .. '-0', information_of(deadletters)['last-generated-id']) then
  return answer('deadletters', 'the dead letters are ahead of the checkpoint')
end
local pending = redis.call('HGET', rulebooks, 'pending_sha256')

redis.call('XADD', ledger, batch .. '-0', 'batch', value)
while ARGV[first_letter] do
  local last = first_letter + tonumber(ARGV[first_letter])
  redis.call('XADD', deadletters, next_letter .. '-0', unpack(ARGV, first_letter + 1, last))
  first_letter, next_letter = last + 1, next_letter + 1
end
redis.call('HSET', checkpoint, unpack(ARGV, first_field, last_field))
if adopted ~= '' and pending == adopted then
  redis.call('HDEL', rulebooks, 'pending', 'pending_sha256')
end
now[2], now[3] = batch, redis.call('HGET', checkpoint, 'digest')
return answer('committed')
