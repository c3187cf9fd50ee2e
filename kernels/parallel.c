/* The compute thread pool: one region at a time, handed out by a counter, with a barrier inside.
 *
 *   thread 0                         thread i
 *   pool_run: fn, user, region++ --> sees region change, runs fn(user, i)
 *             runs fn(user, 0)       done++
 *   waits until done = n - 1     <-- (the last one wakes thread 0)
 *
 * Invariants
 *  1. fn and user are written only while every worker waits for `region` (done = n - 1 was seen),
 * and are published by region++.
 *  2. A waiter counts itself in `sleepers` before it asks the kernel to sleep on the word's old
 * value; a changer changes the word before it looks at `sleepers` (both sequentially consistent):
 * either the kernel sees the new value or the changer sees the sleeper.
 *  3. The barrier's `arrived` is reset before `phase` changes, so that the next barrier may begin
 * at once.
 *  4. MXCSR is 0x1F80 while fn runs, on every thread; the caller's own value comes back afterwards
 * (NUMERICS 8). */
#include "kernels/parallel.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PAUSES_PER_LOOK 32u        /* spins between two looks at the clock */
#define FLOAT_CONTROL 0x1F80u      /* all exceptions masked, round to nearest, no FTZ, no DAZ */
#define FLOAT_CONTROL_MASK 0xFFC0u /* without the sticky flags */

/* A word that threads wait on. */
typedef struct Gate {
    alignas(64) atomic_uint word;
    atomic_uint sleepers;
} Gate;

typedef struct PoolThread {
    Pool *pool;
    unsigned index;
    pthread_t handle;
} PoolThread;

struct Pool {
    unsigned n_threads;
    int64_t spin_ns;
    PoolFn fn; /* NULL in a region: the threads end */
    void *user;
    Gate region, done, phase;
    alignas(64) atomic_uint arrived;
    unsigned n_started; /* of threads[1..] */
    PoolThread threads[];
};

static unsigned float_control_get(void)
{
#if defined(__x86_64__)
    return _mm_getcsr();
#else
    return FLOAT_CONTROL;
#endif
}

static void float_control_set(unsigned value)
{
#if defined(__x86_64__)
    _mm_setcsr(value);
#else
    (void)value;
#endif
}

static void pause_cpu(void)
{
#if defined(__x86_64__)
    _mm_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void gate_sleep(Gate *gate, unsigned old)
{
    atomic_fetch_add(&gate->sleepers, 1);
    syscall(SYS_futex, &gate->word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&gate->sleepers, 1);
}

static void gate_wake(Gate *gate)
{
    if (atomic_load(&gate->sleepers) != 0) {
        syscall(SYS_futex, &gate->word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
}

/* Returns once gate->word is no longer `old`: spins for spin_us, then sleeps. */
static void gate_wait(Pool *pool, Gate *gate, unsigned old)
{
    int64_t start = 0;
    for (;;) {
        for (unsigned i = 0; i < PAUSES_PER_LOOK; i++) {
            if (atomic_load_explicit(&gate->word, memory_order_acquire) != old) {
                return;
            }
            pause_cpu();
        }
        const int64_t now = now_ns();
        start = start != 0 ? start : now;
        if (now - start >= pool->spin_ns) {
            gate_sleep(gate, old);
        }
    }
}

static void run_part(Pool *pool, unsigned index)
{
    float_control_set(FLOAT_CONTROL);
    pool->fn(pool->user, index, pool->n_threads);
    assert((float_control_get() & FLOAT_CONTROL_MASK) == FLOAT_CONTROL);
}

static void *thread_main(void *user)
{
    const PoolThread *self = user;
    Pool *pool = self->pool;
    char name[16];
    snprintf(name, sizeof name, "weft-cpu-%u", self->index);
    pthread_setname_np(pthread_self(), name);
    for (unsigned seen = 0;; seen++) {
        gate_wait(pool, &pool->region, seen);
        if (pool->fn == NULL) {
            return NULL;
        }
        run_part(pool, self->index);
        atomic_fetch_add(&pool->done.word, 1);
        gate_wake(&pool->done);
    }
}

static void pin(pthread_t thread, int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu >= 0 && cpu < CPU_SETSIZE) {
        CPU_SET(cpu, &set);
        pthread_setaffinity_np(thread, sizeof set, &set);
    }
}

/* Starts threads[1..]; false if the system refuses one. */
static bool start_threads(Pool *pool, const int *cpus)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = true;
    for (unsigned i = 1; i < pool->n_threads && ok; i++) {
        PoolThread *thread = &pool->threads[i];
        thread->pool = pool;
        thread->index = i;
        ok = pthread_create(&thread->handle, NULL, thread_main, thread) == 0;
        if (ok) {
            pool->n_started = i;
            if (cpus != NULL) {
                pin(thread->handle, cpus[i]);
            }
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

Pool *pool_new(unsigned n_threads, const int *cpus, bool pin_caller, int64_t spin_us)
{
    n_threads = n_threads > 0 ? n_threads : 1;
    const size_t size = sizeof(Pool) + n_threads * sizeof(PoolThread);
    Pool *pool = aligned_alloc(alignof(Pool), (size + alignof(Pool) - 1) & ~(alignof(Pool) - 1));
    if (pool == NULL) {
        return NULL;
    }
    *pool = (Pool){.n_threads = n_threads, .spin_ns = spin_us * 1000};
    if (!start_threads(pool, cpus)) {
        pool_free(pool);
        return NULL;
    }
    if (cpus != NULL && pin_caller) {
        pin(pthread_self(), cpus[0]);
    }
    return pool;
}

void pool_roam(Pool *pool, const uint32_t *cpus, uint32_t n_cpus)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    for (uint32_t i = 0; i < n_cpus; i++) {
        if (cpus[i] < CPU_SETSIZE) {
            CPU_SET(cpus[i], &set);
        }
    }
    for (unsigned i = 1; i <= pool->n_started; i++) {
        pthread_setaffinity_np(pool->threads[i].handle, sizeof set, &set);
    }
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void pool_free(Pool *pool)
{
    if (pool == NULL) {
        return;
    }
    pool->fn = NULL;
    atomic_fetch_add(&pool->region.word, 1);
    gate_wake(&pool->region);
    for (unsigned i = 1; i <= pool->n_started; i++) {
        pthread_join(pool->threads[i].handle, NULL);
    }
    free(pool);
}

unsigned pool_threads(const Pool *pool)
{
    return pool->n_threads;
}

void pool_float_control(void)
{
    float_control_set(FLOAT_CONTROL);
}

void pool_run(Pool *pool, PoolFn fn, void *user)
{
    const unsigned caller_control = float_control_get();
    pool->fn = fn;
    pool->user = user;
    if (pool->n_threads > 1) {
        atomic_store(&pool->done.word, 0);
        atomic_fetch_add(&pool->region.word, 1);
        gate_wake(&pool->region);
    }
    run_part(pool, 0);
    unsigned done;
    while ((done = atomic_load(&pool->done.word)) != pool->n_threads - 1) {
        gate_wait(pool, &pool->done, done);
    }
    float_control_set(caller_control);
}

void pool_barrier(Pool *pool)
{
    if (pool->n_threads == 1) {
        return;
    }
    const unsigned phase = atomic_load(&pool->phase.word);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->n_threads) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->phase.word, 1);
        gate_wake(&pool->phase);
        return;
    }
    gate_wait(pool, &pool->phase, phase);
}
