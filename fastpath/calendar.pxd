"""Local dates and times, the compiled twin of accrual.rulebook.calendar."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from fastpath.rules cimport Rules

cdef struct Clock:
    # The stretch of time whose offset was looked up last, and what of it is the local day that was asked for last.
    int64_t from_ms
    int64_t until_ms
    int64_t offset_ms
    int64_t day_from_ms
    int64_t day_until_ms
    int64_t midnight_ms
    int32_t day


cdef void clock_move(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil
cdef void clock_move_day(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil
cdef int32_t earliest_day(const Rules* rules, int64_t time_ms, int32_t day) noexcept nogil


cdef inline int32_t local_day(Clock* clock, const Rules* rules, int64_t time_ms) noexcept nogil:
    """Return the local day number of ``time_ms``."""
    if not clock.day_from_ms <= time_ms < clock.day_until_ms:
        clock_move_day(clock, rules, time_ms)
    return clock.day


cdef inline int32_t local_minute(const Clock* clock, int64_t time_ms) noexcept nogil:
    """Return the minute of the local day for which the clock was asked last."""
    return <int32_t>(<uint64_t>(time_ms - clock.midnight_ms) // 60000)


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
