/* The thread pool: every thread runs, barriers hold, the float control word is right on every
 * thread. */
#include "kernels/parallel.h"

#include <stdint.h>
#include <string.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { ROUNDS = 300, LIMIT = 8 };

typedef struct Job {
    Pool *pool;
    unsigned cells[LIMIT]; /* plain memory: only the barrier orders it */
    unsigned wrong;
    unsigned ran[LIMIT];
} Job;

/* Each thread writes its cell, meets, reads its neighbour's, meets. */
static void exchange(void *user, unsigned thread, unsigned n_threads)
{
    Job *job = user;
    job->ran[thread]++;
    unsigned wrong = 0;
    for (unsigned round = 1; round <= 20; round++) {
        job->cells[thread] = round * 100 + thread;
        pool_barrier(job->pool);
        const unsigned other = (thread + 1) % n_threads;
        wrong += job->cells[other] != round * 100 + other;
        pool_barrier(job->pool);
    }
    if (thread == 0) {
        job->wrong += wrong;
    }
}

static void run_exchange(unsigned n_threads, int64_t spin_us, const int *cpus, unsigned rounds)
{
    Pool *pool = pool_new(n_threads, cpus, false, spin_us);
    assert_non_null(pool);
    assert_int_equal(pool_threads(pool), n_threads);
    Job job = {.pool = pool};
    for (unsigned i = 0; i < rounds; i++) {
        pool_run(pool, exchange, &job);
    }
    assert_int_equal(job.wrong, 0);
    for (unsigned i = 0; i < n_threads; i++) {
        assert_int_equal(job.ran[i], rounds);
    }
    pool_free(pool);
}

static void test_regions_and_barriers(void **state)
{
    const int cpus[LIMIT] = {0, 1, 0, 1, 99999, -1, 0, 1}; /* some that are not there: unpinned */
    run_exchange(1, 50, NULL, ROUNDS);
    run_exchange(2, 50, NULL, ROUNDS);
    run_exchange(2, 0, NULL, ROUNDS);
    run_exchange(3, 0, cpus, ROUNDS / 10);
    run_exchange(LIMIT, 0, cpus, ROUNDS / 10);
    run_exchange(4, 20, NULL, ROUNDS / 10);
    pool_free(NULL);
}

#if defined(__x86_64__)
static void read_control(void *user, unsigned thread, unsigned n_threads)
{
    ((unsigned *)user)[thread] = _mm_getcsr() & 0xffc0u;
}

static void test_float_control_word(void **state)
{
    unsigned seen[3] = {0};
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0u); /* what a library built with -ffast-math leaves: FTZ and DAZ; threads
                            inherit it */
    Pool *pool = pool_new(3, NULL, false, 10);
    pool_run(pool, read_control, seen);
    assert_int_equal(_mm_getcsr() & 0xffc0u, 0x9fc0u); /* the caller's own is back */
    _mm_setcsr(before);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(seen[i], 0x1f80u);
    }
    pool_free(pool);
}
#endif

static void test_shares_cover_everything_once(void **state)
{
    for (uint32_t n = 0; n < 100; n += 7) {
        for (uint32_t grain = 1; grain < 20; grain += 6) {
            for (unsigned threads = 1; threads <= 5; threads++) {
                uint32_t at = 0, first, last;
                for (unsigned t = 0; t < threads; t++) {
                    pool_share(n, grain, t, threads, &first, &last);
                    assert_true(first == at && last >= first && (last == n || last % grain == 0));
                    at = last;
                }
                assert_int_equal(at, n);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_regions_and_barriers),
#if defined(__x86_64__)
        cmocka_unit_test(test_float_control_word),
#endif
        cmocka_unit_test(test_shares_cover_everything_once),
    };
    return cmocka_run_group_tests_name("parallel", tests, NULL, NULL);
}
