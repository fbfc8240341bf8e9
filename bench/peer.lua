-- Decides one event of the peer worker (peer_lua.py).
--
-- KEYS  1 the event's id  2 the ledger  then a hash for each of  3 member  4 device  5 ip  6 phone  ('' where absent)
-- ARGV  1 event id  2 member  3 kind  4 time in ms  5 business day  6 base points
--       7 points with the campaigns that need no member  8 and 9 the new tier and end of the card, of member_updated
--
-- It is a function of a library, and not a script, so that the tables of the rulebook, which stand in front, are made
-- once and not for every event. A hash holds all counters of one device (or member, ...), a field for each limit, as
-- '<window>:<total>', or '<window>:<member> <member> ...'; a counter of another window is as good as none. So an event
-- costs one read and one write for each of its keys, however many limits there are.
local function stored_in(call, key, limits)
  local fields = {}
  for index, limit in ipairs(limits) do
    fields[index] = limit.field
  end
  return call('HMGET', key, unpack(fields))
end

local function decide(KEYS, ARGV)
  local call = redis.call
  local id, ledger, member_key = KEYS[1], KEYS[2], KEYS[3]
  local member, kind, time, day, points = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[7])
  local rule = RULES[kind]

  if not call('SET', id, 1, 'NX', 'EX', 172800) then
    return 'duplicate'
  end

  local function write(outcome, earned, reasons)
    call('XADD', ledger, '*', 'event', ARGV[1], 'member', member, 'kind', kind, 'outcome', outcome,
      'base', ARGV[6], 'points', earned, 'reasons', reasons)
    return outcome
  end

  if kind == 'member_updated' then
    call('HSET', member_key, 'tier', ARGV[8], 'card', ARGV[9])
    return 'applied'
  elseif not rule then
    return write('deferred', 0, '')
  end

  local state, tier, card, pending, held, once, counted, streak =
    unpack(call('HMGET', member_key, 'state', 'tier', 'card', 'pending', 'held', 'once:' .. kind, 'count:' .. kind,
      'streak:' .. kind))
  local count_day, count = string.match(counted or '', '(%d+):(%d+)')
  count = count_day == day and tonumber(count) or 0
  if state == 'blocked' then
    return write('rejected', 0, 'member_blocked')
  elseif rule.once and once then
    return write('rejected', 0, 'once')
  elseif rule.max_per_day and count >= rule.max_per_day then
    return write('rejected', 0, 'max_per_day')
  end

  local kept = {}
  if rule.streak_days then
    local last, run = string.match(streak or '', '(%d+):(%d+)')
    if not last or tonumber(day) > tonumber(last) then
      run = (last and tonumber(day) == tonumber(last) + 1) and run + 1 or 1
      kept = { 'streak:' .. kind, day .. ':' .. run }
      if run % rule.streak_days == 0 then
        points = points + rule.streak_bonus
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

  -- What each limit has counted in its window so far; nil where there is no such key or nothing counted.
  local windows, contents, is_new = {}, {}, {}
  for slot, limits in pairs(rule.by_key) do
    local key = KEYS[slot]
    if key ~= '' then
      local stored = stored_in(call, key, limits)
      is_new[slot] = true
      for index, limit in ipairs(limits) do
        local window = limit.duration and string.format('%d', math.floor(time / limit.duration)) or day
        windows[limit.number] = window
        if stored[index] then
          is_new[slot] = false
          local colon = string.find(stored[index], ':', 1, true)
          if string.sub(stored[index], 1, colon - 1) == window then
            contents[limit.number] = string.sub(stored[index], colon + 1)
          end
        end
      end
    end
  end

  local reasons, worst = {}, nil
  local function trip(limit)
    reasons[#reasons + 1] = limit.id
    if worst ~= 'reject' and (limit.action ~= 'hold' or not worst) then
      worst = limit.action
    end
  end

  for _, limit in ipairs(rule.limits) do
    local number = limit.number
    if windows[number] and limit.measure == 'events' then
      local total = tonumber(contents[number] or '0') + 1
      contents[number] = total
      if total > limit.max then trip(limit) end
    elseif windows[number] and limit.measure == 'members' then
      local content = contents[number] or ' '
      if not string.find(content, ' ' .. member .. ' ', 1, true) then
        content = content .. member .. ' '
      end
      contents[number] = content
      local _, spaces = string.gsub(content, ' ', '')
      if spaces - 1 > limit.max then trip(limit) end
    end
  end
  if worst ~= 'reject' then
    for _, limit in ipairs(rule.limits) do
      if windows[limit.number] and limit.measure == 'points' then
        local before = tonumber(contents[limit.number] or '0')
        if before + points > limit.max then
          if limit.action == 'clamp' then
            reasons[#reasons + 1] = limit.id
            points = math.max(0, limit.max - before)
          else
            trip(limit)
          end
        end
      end
    end
  end

  local outcome = 'granted'
  if worst == 'freeze' then
    kept[#kept + 1], kept[#kept + 2] = 'state', 'frozen'
    state = 'frozen'
  end
  if worst == 'reject' then
    outcome, points, kept = 'rejected', 0, {}
  else
    for _, limit in ipairs(rule.limits) do
      if windows[limit.number] and limit.measure == 'points' then
        contents[limit.number] = tonumber(contents[limit.number] or '0') + points
      end
    end
    if state == 'frozen' or worst == 'hold' then
      outcome = 'held'
      kept[#kept + 1], kept[#kept + 2] = 'held', tonumber(held or '0') + points
    else
      kept[#kept + 1], kept[#kept + 2] = 'pending', tonumber(pending or '0') + points
    end
    if rule.once then
      kept[#kept + 1], kept[#kept + 2] = 'once:' .. kind, 1
    end
    if rule.max_per_day then
      kept[#kept + 1], kept[#kept + 2] = 'count:' .. kind, day .. ':' .. count + 1
    end
  end

  for slot, limits in pairs(rule.by_key) do
    local key = KEYS[slot]
    if key ~= '' then
      local values = slot == 3 and kept or {}
      for _, limit in ipairs(limits) do
        local content = contents[limit.number]
        if content then
          values[#values + 1], values[#values + 2] = limit.field, windows[limit.number] .. ':' .. content
        end
      end
      if #values > 0 then
        call('HSET', key, unpack(values))
      end
      if is_new[slot] and slot ~= 3 then
        call('EXPIRE', key, 172800)
      end
    end
  end
  return write(outcome, points, table.concat(reasons, ','))
end

redis.register_function('decide', decide)
