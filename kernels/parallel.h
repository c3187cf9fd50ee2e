/* The compute thread pool of a rank: n threads, the caller is thread 0. Persistent; between regions
 * threads spin for spin_us, then sleep on a futex. Sets MXCSR = 0x1F80 on every thread. One region
 * at a time; regions may be nested only by calling functions inline. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef struct Pool Pool;

/* cpus: NULL or n cpu numbers to pin to (thread i to cpus[i]; the caller's thread too when
 * pin_caller); a cpu that the process may not use leaves its thread unpinned. spin_us 0: waiters
 * sleep at once (more threads than cores). NULL: no memory or the system refuses a thread. Signals
 * are blocked on the new threads. */
Pool *pool_new(unsigned n_threads, const int *cpus, bool pin_caller, int64_t spin_us);
void pool_free(Pool *pool); /* NULL-safe; not inside a region */
/* All its threads, and the caller's, may run on these cpus from now on, each on any. */
void pool_roam(Pool *pool, const uint32_t *cpus, uint32_t n_cpus);
unsigned pool_threads(const Pool *pool);

/* Sets MXCSR = 0x1F80 on the calling thread, as pool_run does inside regions: for arithmetic
 * outside them. */
void pool_float_control(void);

/* fn(user, thread, n_threads) on every thread; returns when all are done. */
typedef void (*PoolFn)(void *user, unsigned thread, unsigned n_threads);
void pool_run(Pool *pool, PoolFn fn, void *user);
/* Inside a region: all threads meet. */
void pool_barrier(Pool *pool);

/* The contiguous share of `n` items for thread t of T: [first, last), items cut at multiples of
 * `grain`. */
static inline void pool_share(uint32_t n, uint32_t grain, unsigned t, unsigned T, uint32_t *first,
                              uint32_t *last)
{
    uint32_t g = (n + grain - 1) / grain;
    uint64_t a = (uint64_t)g * t / T * grain, b = (uint64_t)g * (t + 1) / T * grain;
    *first = a < n ? (uint32_t)a : n;
    *last = b < n ? (uint32_t)b : n;
}
