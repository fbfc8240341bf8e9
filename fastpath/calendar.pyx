from libc.stdint cimport int32_t, int64_t

from fastpath.rules cimport Rules

# As in accrual.rulebook.calendar: from 2100 on, everything repeats after 400 years.
cdef int64_t FOLD_START_MS = <int64_t>47482 * 86400000
cdef int64_t CYCLE_MS = <int64_t>146097 * 86400000

# No clock was ever put back by more than a day.
cdef int64_t LOOK_AHEAD_MS = <int64_t>2 * 86400000


cdef void clock_move(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil:
    """Look up the stretch of constant offset around ``time_ms``."""
    cdef int64_t folded = time_ms
    cdef int32_t low = 0, high = rules.transition_count, middle
    cdef int64_t end = FOLD_START_MS + CYCLE_MS
    if folded >= end:
        folded = FOLD_START_MS + (folded - FOLD_START_MS) % CYCLE_MS
    while high - low > 1:
        middle = (low + high) // 2
        if rules.transition_ms[middle] <= folded:
            low = middle
        else:
            high = middle
    clock.offset_ms = rules.transition_offset_ms[low]
    clock.from_ms = rules.transition_ms[low] + (time_ms - folded)
    clock.until_ms = (rules.transition_ms[low + 1] if low + 1 < rules.transition_count else end) + (time_ms - folded)
    if time_ms != folded and clock.from_ms < FOLD_START_MS + (time_ms - folded):
        clock.from_ms = FOLD_START_MS + (time_ms - folded)


cdef void clock_move_day(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil:
    """Look up the local day of ``time_ms``."""
    cdef int64_t local, day
    if not clock.from_ms <= time_ms < clock.until_ms:
        clock_move(clock, rules, time_ms)
    local = time_ms + clock.offset_ms
    day = local // 86400000
    if local < 0 and day * 86400000 != local:
        day -= 1
    clock.day = <int32_t>day
    clock.midnight_ms = day * 86400000 - clock.offset_ms
    clock.day_from_ms = max(clock.from_ms, clock.midnight_ms)
    clock.day_until_ms = min(clock.until_ms, clock.midnight_ms + 86400000)


cdef int32_t earliest_day(const Rules* rules, int64_t time_ms, int32_t day) noexcept nogil:
    """Return the earliest local day that any time from ``time_ms`` on can have; ``day`` is its own.

    Where clocks are put back just after midnight, the day before comes again.
    """
    cdef Clock clock
    cdef int64_t at
    clock.day_from_ms = clock.day_until_ms = 0
    clock_move(&clock, rules, time_ms)
    while clock.until_ms - time_ms < LOOK_AHEAD_MS:
        at = clock.until_ms
        clock_move(&clock, rules, at)
        day = min(day, local_day(&clock, rules, at))
    return day
