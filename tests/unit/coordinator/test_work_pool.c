/* What a client sends much of waits for itself only (work_pool.h). */
#include "coordinator/work_pool.h"

#include "transport/daemon/daemon.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

enum { PATIENCE_US = 60000000, N_HEAVY = 5 };

/* Work that begins when the gate is opened. */
typedef struct Gate {
    GMutex lock;
    GCond opened;
    bool is_open;
    unsigned n_begun, n_done; /* begun: under the lock */
    GArray *order;            /* of indices, as they were reported */
} Gate;

typedef struct Item {
    Gate *gate;
    unsigned index;
    bool waits, done;
    int nice;
} Item;

static int own_nice(void)
{
    return getpriority(PRIO_PROCESS, (id_t)gettid());
}

static void work(void *user)
{
    Item *item = user;
    Gate *g = item->gate;
    item->nice = own_nice();
    g_mutex_lock(&g->lock);
    g->n_begun++;
    while (item->waits && !g->is_open) {
        g_cond_wait(&g->opened, &g->lock);
    }
    g_mutex_unlock(&g->lock);
}

static void done(void *user)
{
    Item *item = user;
    item->done = true;
    item->gate->n_done++;
    g_array_append_val(item->gate->order, item->index);
}

static void open_gate(Gate *g)
{
    g_mutex_lock(&g->lock);
    g->is_open = true;
    g_cond_broadcast(&g->opened);
    g_mutex_unlock(&g->lock);
}

/* The heavy lane is full and stands; with one thread for the rest, that is done all the same. */
static void test_heavy_work_delays_nobody(void **state)
{
    Gate gate = {.order = g_array_new(FALSE, FALSE, sizeof(unsigned))};
    MainLoop *loop = main_loop_new();
    WorkPool *pool = work_pool_new(main_loop_loop(loop), 1);
    Item heavy[N_HEAVY], light[3];
    for (unsigned i = 0; i < N_HEAVY; i++) {
        heavy[i] = (Item){.gate = &gate, .index = i, .waits = true};
        work_pool_run_heavy(pool, work, done, NULL, &heavy[i]);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(light); i++) {
        light[i] = (Item){.gate = &gate, .index = 100 + i};
        work_pool_run(pool, work, done, NULL, &light[i]);
    }
    main_loop_run_until(loop, &light[2].done, PATIENCE_US);
    assert_true(light[2].done);
    assert_int_equal(gate.n_done, 3);
    open_gate(&gate);
    main_loop_run_until(loop, &heavy[N_HEAVY - 1].done, PATIENCE_US);
    assert_int_equal(gate.n_done, 3 + N_HEAVY);
    assert_int_equal(gate.n_begun, 3 + N_HEAVY);
    for (unsigned i = 0; i < N_HEAVY; i++) { /* in their order, one at a time */
        assert_int_equal(g_array_index(gate.order, unsigned, 3 + i), i);
        assert_true(heavy[i].nice >= 10);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(light); i++) { /* nobody else's thread became slow */
        assert_int_equal(light[i].nice, own_nice());
    }
    work_pool_free(pool);
    main_loop_free(loop);
    g_array_unref(gate.order);
}

static void drop(void *user)
{
    ((Item *)user)->index = 7;
}

/* What had not been reported when the pool ends is dropped, on either lane. */
static void test_dropped_at_the_end(void **state)
{
    Gate gate = {.is_open = true, .order = g_array_new(FALSE, FALSE, sizeof(unsigned))};
    MainLoop *loop = main_loop_new();
    WorkPool *pool = work_pool_new(main_loop_loop(loop), 1);
    Item heavy = {.gate = &gate}, light = {.gate = &gate};
    work_pool_run_heavy(pool, work, done, drop, &heavy);
    work_pool_run(pool, work, done, drop, &light);
    work_pool_free(pool);
    assert_false(heavy.done || light.done);
    assert_int_equal(heavy.index, 7);
    assert_int_equal(light.index, 7);
    main_loop_free(loop);
    g_array_unref(gate.order);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_heavy_work_delays_nobody),
        cmocka_unit_test(test_dropped_at_the_end),
    };
    return cmocka_run_group_tests_name("work pool", tests, NULL, NULL);
}
