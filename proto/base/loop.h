/* Loop: the clock, the timers and the executor of one daemon object, as a table with a real fill
 * (transport/daemon/main_loop.c, a GMainContext of its own) and a simulated one (tests/sim).
 *
 * No code calls g_timeout_*, g_get_monotonic_time or the default GMainContext: everything that
 * waits or wakes goes through a Loop, so that whole clusters run in one process under a simulated
 * clock (DESIGN 5). All callbacks run on the loop's one thread. */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef void (*LoopFn)(void *user);
typedef struct Loop Loop;
typedef struct LoopTimer LoopTimer; /* opaque; valid until it fired (one-shot) or was cancelled */

typedef struct LoopOps {
    /* CLOCK_BOOTTIME in microseconds (simulated: virtual). Any thread. */
    int64_t (*now_us)(Loop *loop);
    /* Unix time in microseconds, for certificates, tokens and log lines only. Any thread. */
    int64_t (*wall_us)(Loop *loop);
    /* Runs fn(user) on the loop's thread, in order of posting. Any thread, never blocks. */
    void (*post)(Loop *loop, LoopFn fn, void *user);
    /* One-shot timer after delay_us (>= 0). Loop thread only. */
    LoopTimer *(*timer_start)(Loop *loop, int64_t delay_us, LoopFn fn, void *user);
    /* Forgets a timer that has not fired; NULL is allowed. Loop thread only. */
    void (*timer_cancel)(Loop *loop, LoopTimer *timer);
} LoopOps;

struct Loop {
    const LoopOps *ops;
};

static inline int64_t loop_now_us(Loop *loop)
{
    return loop->ops->now_us(loop);
}
static inline int64_t loop_wall_us(Loop *loop)
{
    return loop->ops->wall_us(loop);
}
static inline void loop_post(Loop *loop, LoopFn fn, void *user)
{
    loop->ops->post(loop, fn, user);
}
static inline LoopTimer *loop_timer_start(Loop *loop, int64_t delay_us, LoopFn fn, void *user)
{
    return loop->ops->timer_start(loop, delay_us, fn, user);
}
static inline void loop_timer_cancel(Loop *loop, LoopTimer *timer)
{
    loop->ops->timer_cancel(loop, timer);
}
