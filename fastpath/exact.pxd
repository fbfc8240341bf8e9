"""Exact arithmetic on 128 and 256 bits, and saturating sums."""

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>

    typedef unsigned __int128 accrual_u128;

    static inline accrual_u128 accrual_join(uint64_t high, uint64_t low) {
        return ((accrual_u128)high << 64) | low;
    }

    /* Divide the 256-bit product of two numbers bit by bit; the quotient is known to fit 64 bits. */
    static uint64_t accrual_divide_wide(accrual_u128 left, accrual_u128 right, accrual_u128 divisor,
                                        accrual_u128 *remainder) {
        uint64_t a[2] = {(uint64_t)left, (uint64_t)(left >> 64)};
        uint64_t b[2] = {(uint64_t)right, (uint64_t)(right >> 64)};
        uint64_t product[4] = {0, 0, 0, 0};
        for (int i = 0; i < 2; i++) {
            uint64_t carry = 0;
            for (int j = 0; j < 2; j++) {
                accrual_u128 sum = (accrual_u128)a[i] * b[j] + product[i + j] + carry;
                product[i + j] = (uint64_t)sum;
                carry = (uint64_t)(sum >> 64);
            }
            product[i + 2] = carry;
        }
        accrual_u128 rest = 0;
        uint64_t quotient = 0;
        for (int bit = 255; bit >= 0; bit--) {
            rest = (rest << 1) | ((product[bit >> 6] >> (bit & 63)) & 1);
            quotient <<= 1;
            if (rest >= divisor) {
                rest -= divisor;
                quotient |= 1;
            }
        }
        *remainder = rest;
        return quotient;
    }

    /* floor(sign * left * right / divisor). The rulebook's bounds prove that the divisor has at most 127 bits and the
       result at most 63. */
    static inline int64_t accrual_floor(uint64_t left_high, uint64_t left_low, uint64_t right_high, uint64_t right_low,
                                        int negative, uint64_t scale, uint64_t divisor_high, uint64_t divisor_low) {
        accrual_u128 divisor = accrual_join(divisor_high, divisor_low) * scale;
        accrual_u128 remainder;
        uint64_t quotient;
        if (left_high == 0 && right_high == 0) {
            accrual_u128 product = (accrual_u128)left_low * right_low;
            if (((product | divisor) >> 32) == 0) {
                /* Nearly always, and several times as fast. */
                quotient = (uint32_t)product / (uint32_t)divisor;
                remainder = (uint32_t)product % (uint32_t)divisor;
            } else if ((product >> 64) == 0 && (divisor >> 64) == 0) {
                quotient = (uint64_t)product / (uint64_t)divisor;
                remainder = (uint64_t)product % (uint64_t)divisor;
            } else {
                quotient = (uint64_t)(product / divisor);
                remainder = product % divisor;
            }
        } else {
            quotient = accrual_divide_wide(accrual_join(left_high, left_low), accrual_join(right_high, right_low),
                                           divisor, &remainder);
        }
        if (!negative)
            return (int64_t)quotient;
        return -(int64_t)quotient - (remainder != 0);
    }

    static inline int64_t accrual_saturated_sum(int64_t left, int64_t right) {
        int64_t sum;
        if (!__builtin_add_overflow(left, right, &sum))
            return sum;
        return left < 0 ? INT64_MIN : INT64_MAX;
    }
    """
    int64_t floor_product "accrual_floor"(
        uint64_t left_high, uint64_t left_low, uint64_t right_high, uint64_t right_low, int negative,
        uint64_t scale, uint64_t divisor_high, uint64_t divisor_low) noexcept nogil
    int64_t saturated_sum "accrual_saturated_sum"(int64_t left, int64_t right) noexcept nogil
