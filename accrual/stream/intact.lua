-- Shared by the scripts: whether the events stream still has everything that was not consumed.

-- Tells whether stream ID `one` comes after `other`. Lua's numbers are doubles, so digits are compared as text.
local function is_after(one, other)
  local function above(a, b)
    return #a > #b or (#a == #b and a > b)
  end
  local one_ms, one_seq = one:match('^(%d+)-(%d+)$')
  local other_ms, other_seq = other:match('^(%d+)-(%d+)$')
  if one_ms ~= other_ms then
    return above(one_ms, other_ms)
  end
  return above(one_seq, other_seq)
end

local function information_of(stream)
  if redis.call('EXISTS', stream) == 0 then
    return { ['length'] = 0, ['entries-added'] = 0, ['max-deleted-entry-id'] = '0-0', ['last-generated-id'] = '0-0' }
  end
  local information = {}
  local pairs_ = redis.call('XINFO', 'STREAM', stream)
  for at = 1, #pairs_, 2 do
    information[pairs_[at]] = pairs_[at + 1]
  end
  return information
end

-- Returns why entries are missing (nil if none are), how many were ever added, and how many of them were removed.
--
-- Trimming removes the oldest first, so as long as no more were removed than were consumed up to `position`, and none
-- was picked out behind it, every one of them had been consumed. A stream that was deleted and made anew has lost the
-- entry at `position` although trimming has not come that far.
local function missing(stream, position, consumed)
  local information = information_of(stream)
  local added = information['entries-added']
  local removed = added - information['length']
  local deleted = information['max-deleted-entry-id']
  local why
  if added < consumed then
    why = 'the stream was deleted: ' .. consumed .. ' entries were consumed, but it has had only ' .. added
  elseif removed > consumed then
    why = (removed - consumed) .. ' entries after ' .. position .. ' were trimmed before they were consumed'
  elseif is_after(deleted, position) then
    why = 'entry ' .. deleted .. ' was deleted before it was consumed'
  elseif removed < consumed and deleted ~= position and #redis.call('XRANGE', stream, position, position) == 0 then
    why = 'the stream was deleted and made anew: entry ' .. position .. ' is gone'
  end
  return why, added, removed
end
