"""Sliding windows (SPEC section 3): the largest bucket index seen and eight buckets, in a record of their key.

An index is a bucket's number plus one, so that 0 says that nothing was counted yet. Whether a key was seen a moment ago
or not for days is a toss-up for a processor that tries to foresee it, so all cases take the same way: the buckets that
have left the window are masked out, be it none or all of them.
"""

from libc.stdint cimport int64_t

cdef enum:
    BUCKETS = 8

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    enum { ACCRUAL_BUCKETS = 8 };

    typedef struct {
        int64_t latest;          /* as the event at hand leaves it */
        int place;               /* the bucket in which it counts */
        int32_t newest;          /* the bucket that was the latest before */
        int32_t rest;            /* buckets that are still within the window, the latest one first */
    } accrual_window;

    static inline accrual_window accrual_look(const char *at, int64_t index) {
        accrual_window window;
        int64_t before, oldest;
        uint64_t moved;
        memcpy(&before, at, sizeof(before));
        window.latest = index > before ? index : before;
        oldest = window.latest - (ACCRUAL_BUCKETS - 1);
        window.place = (int)((index > oldest ? index : oldest) & (ACCRUAL_BUCKETS - 1));
        window.newest = (int32_t)(before & (ACCRUAL_BUCKETS - 1));
        moved = (uint64_t)window.latest - (uint64_t)before;
        window.rest = ACCRUAL_BUCKETS - (int32_t)(moved < ACCRUAL_BUCKETS ? moved : ACCRUAL_BUCKETS);
        return window;
    }

    /* All bits if the content of a bucket is still within the window, or none. */
    static inline int32_t accrual_kept(const accrual_window *window, int32_t bucket) {
        return -(int32_t)(((window->newest - bucket) & (ACCRUAL_BUCKETS - 1)) < window->rest);
    }

    /* Count one event and return the total. A bucket stays at its largest number. */
    static inline int64_t accrual_count(char *at, int64_t index) {
        const accrual_window window = accrual_look(at, index);
        uint32_t buckets[ACCRUAL_BUCKETS], more;
        uint64_t total = 0;
        memcpy(buckets, at + 8, sizeof(buckets));
        for (int32_t i = 0; i < ACCRUAL_BUCKETS; i++)
            buckets[i] &= (uint32_t)accrual_kept(&window, i);
        for (int32_t i = 0; i < ACCRUAL_BUCKETS; i++)
            total += buckets[i];
        memcpy(at, &window.latest, 8);
        memcpy(at + 8, buckets, sizeof(buckets));
        memcpy(&more, at + 8 + 4 * window.place, 4);
        const uint32_t bucket = more + (more != UINT32_MAX);
        memcpy(at + 8 + 4 * window.place, &bucket, 4);
        return (int64_t)(total + (bucket - more));
    }

    static inline int64_t accrual_saturated(int64_t left, int64_t right) {
        int64_t sum;
        if (!__builtin_add_overflow(left, right, &sum))
            return sum;
        return left < 0 ? INT64_MIN : INT64_MAX;
    }

    static inline void accrual_points_kept(const accrual_window *window, const char *at,
                                           uint64_t buckets[ACCRUAL_BUCKETS]) {
        memcpy(buckets, at + 8, ACCRUAL_BUCKETS * sizeof(uint64_t));
        for (int32_t i = 0; i < ACCRUAL_BUCKETS; i++)
            buckets[i] &= (uint64_t)(int64_t)accrual_kept(window, i);
    }

    /* The total of points as an event would see it; nothing moves. Sums saturate from the oldest bucket on, which makes
       a difference only where a bucket has 2^59 points or more. */
    static inline int64_t accrual_points(const char *at, int64_t index) {
        const accrual_window window = accrual_look(at, index);
        const uint64_t bound = (uint64_t)1 << 59;
        uint64_t buckets[ACCRUAL_BUCKETS], total = 0, large = 0;
        int64_t exact = 0;
        accrual_points_kept(&window, at, buckets);
        for (int32_t i = 0; i < ACCRUAL_BUCKETS; i++) {
            total += buckets[i];
            large |= buckets[i] + bound;
        }
        if (large < 2 * bound)
            return (int64_t)total;
        for (int step = 1; step <= ACCRUAL_BUCKETS; step++)
            exact = accrual_saturated(exact, (int64_t)buckets[(window.latest + step) & (ACCRUAL_BUCKETS - 1)]);
        return exact;
    }

    static inline void accrual_add_points(char *at, int64_t index, int64_t points) {
        const accrual_window window = accrual_look(at, index);
        uint64_t buckets[ACCRUAL_BUCKETS];
        int64_t bucket;
        accrual_points_kept(&window, at, buckets);
        memcpy(at, &window.latest, 8);
        memcpy(at + 8, buckets, sizeof(buckets));
        memcpy(&bucket, at + 8 + 8 * window.place, 8);
        bucket = accrual_saturated(bucket, points);
        memcpy(at + 8 + 8 * window.place, &bucket, 8);
    }
    """
    # Each takes the place of the window and the index of the event's bucket.
    int64_t count_sliding "accrual_count"(char* at, int64_t index) noexcept nogil
    int64_t points_sliding "accrual_points"(const char* at, int64_t index) noexcept nogil
    void add_points_sliding "accrual_add_points"(char* at, int64_t index, int64_t points) noexcept nogil
