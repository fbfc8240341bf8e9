"""Local dates and times, the compiled twin of accrual.rulebook.calendar."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from fastpath.rules cimport Rules

cdef struct Clock:
    # The stretch of time whose offset was looked up last.
    int64_t from_ms
    int64_t until_ms
    int64_t offset_ms


cdef void clock_move(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil
cdef int32_t earliest_day(const Rules* rules, int64_t time_ms, int32_t day) noexcept nogil


cdef inline int32_t local_day(Clock* clock, const Rules* rules, int64_t time_ms, int32_t* minute) noexcept nogil:
    """Return the local day number of ``time_ms`` and leave the minute of that day."""
    cdef int64_t local, day
    if not clock.from_ms <= time_ms < clock.until_ms:
        clock_move(clock, rules, time_ms)
    local = time_ms + clock.offset_ms
    day = local // 86400000
    if local < 0 and day * 86400000 != local:
        day -= 1
    minute[0] = <int32_t>((local - day * 86400000) // 60000)
    return <int32_t>day


cdef inline uint32_t day_of_month(int32_t day) noexcept nogil:
    """Return the day of the month of a day number (after Howard Hinnant's civil_from_days)."""
    cdef int64_t shifted = <int64_t>day + 719468
    cdef int64_t era = (shifted if shifted >= 0 else shifted - 146096) // 146097
    cdef uint32_t day_of_era = <uint32_t>(shifted - era * 146097)
    cdef uint32_t year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    cdef uint32_t day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    return day_of_year - (153 * ((5 * day_of_year + 2) // 153) + 2) // 5 + 1


cdef inline uint32_t day_of_week(int32_t day) noexcept nogil:
    """Return the weekday of a day number: 0 is Monday."""
    cdef int32_t rest = (day + 3) % 7
    return <uint32_t>(rest + 7 if rest < 0 else rest)
