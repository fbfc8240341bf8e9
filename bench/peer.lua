-- Decides one event of the peer worker (peer_lua.py): what a good team writes first, one call per event.
--
-- KEYS  1 the event's id  2 the member's hash  3 the ledger  then one counter for each limit that applies
-- ARGV  1 event id  2 member  3 kind  4 time in ms  5 base points  6 points with the campaigns that need no member
--       7 most per day or ''  8 '1' if once in a life  9 streak days or ''  10 streak bonus  11 business day
--       then the number, in LIMITS, of each limit that applies
-- LIMITS and CAMPAIGNS, tables of the rulebook's limits and of the campaigns that depend on the member, stand in front.
local id, member, ledger = KEYS[1], KEYS[2], KEYS[3]
local kind, time, points, day = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[6]), ARGV[11]

if not redis.call('SET', id, 1, 'NX', 'EX', 172800) then
  return 'duplicate'
end
local state, tier, card, once, streak = unpack(redis.call('HMGET', member, 'state', 'tier', 'card', 'once:' .. kind, 'streak:' .. kind))

local function write(outcome, earned, reasons)
  redis.call('XADD', ledger, '*', 'event', ARGV[1], 'member', ARGV[2], 'kind', kind, 'outcome', outcome,
    'base', ARGV[5], 'points', earned, 'reasons', reasons)
  return outcome
end

if state == 'blocked' then
  return write('rejected', 0, 'member_blocked')
end
if ARGV[8] == '1' and once then
  return write('rejected', 0, 'once')
end
local count_field = 'count:' .. kind .. ':' .. day
if ARGV[7] ~= '' and tonumber(redis.call('HGET', member, count_field) or '0') >= tonumber(ARGV[7]) then
  return write('rejected', 0, 'max_per_day')
end

if ARGV[9] ~= '' then
  local last, run = string.match(streak or '', '(%d+):(%d+)')
  if not last or tonumber(day) > tonumber(last) then
    run = (last and tonumber(day) == tonumber(last) + 1) and run + 1 or 1
    redis.call('HSET', member, 'streak:' .. kind, day .. ':' .. run)
    if run % tonumber(ARGV[9]) == 0 then
      points = points + tonumber(ARGV[10])
    end
  end
end
for _, campaign in ipairs(CAMPAIGNS) do
  if campaign.kinds[kind] and (not campaign.tiers or (tier and campaign.tiers[tier]))
    and (not campaign.card or time < tonumber(card or '0')) then
    points = points * campaign.multiplier
  end
end
points = math.floor(points + 1e-6)

local reasons, worst = {}, nil
local function trip(limit)
  reasons[#reasons + 1] = limit.id
  if worst ~= 'reject' and (limit.action ~= 'hold' or not worst) then
    worst = limit.action
  end
end

for index = 12, #ARGV do
  local limit, key = LIMITS[tonumber(ARGV[index])], KEYS[index - 8]
  if limit.measure == 'events' then
    local total = redis.call('INCR', key)
    if total == 1 then redis.call('EXPIRE', key, limit.expiry) end
    if total > limit.max then trip(limit) end
  elseif limit.measure == 'members' then
    if redis.call('SADD', key, ARGV[2]) == 1 then redis.call('EXPIRE', key, limit.expiry) end
    if redis.call('SCARD', key) > limit.max then trip(limit) end
  end
end
if worst ~= 'reject' then
  for index = 12, #ARGV do
    local limit, key = LIMITS[tonumber(ARGV[index])], KEYS[index - 8]
    if limit.measure == 'points' then
      local used = tonumber(redis.call('GET', key) or '0')
      if used + points > limit.max then
        if limit.action == 'clamp' then
          reasons[#reasons + 1] = limit.id
          points = math.max(0, limit.max - used)
        else
          trip(limit)
        end
      end
    end
  end
end

if worst == 'freeze' then
  redis.call('HSET', member, 'state', 'frozen')
  state = 'frozen'
end
if worst == 'reject' then
  return write('rejected', 0, table.concat(reasons, ','))
end
for index = 12, #ARGV do
  local limit, key = LIMITS[tonumber(ARGV[index])], KEYS[index - 8]
  if limit.measure == 'points' and redis.call('INCRBY', key, points) == points then
    redis.call('EXPIRE', key, limit.expiry)
  end
end
if ARGV[7] ~= '' then redis.call('HINCRBY', member, count_field, 1) end
if ARGV[8] == '1' then redis.call('HSET', member, 'once:' .. kind, 1) end
local outcome = (state == 'frozen' or worst == 'hold') and 'held' or 'granted'
redis.call('HINCRBY', member, outcome == 'held' and 'held' or 'pending', points)
return write(outcome, points, table.concat(reasons, ','))
