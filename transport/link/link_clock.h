/* The clock of the data plane: CLOCK_MONOTONIC, which the deadlines of transport/group are given
 * in. */
#pragma once

#include <stdint.h>
#include <time.h>

static inline uint64_t link_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline int64_t link_clock_us(void)
{
    return (int64_t)(link_clock_ns() / 1000);
}
