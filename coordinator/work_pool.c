/* Problem: a report posted to the loop may arrive after its pool is gone (shutdown, a test's
 * teardown).
 *
 * 1. Every item is on exactly one of: queued (pool's), running (a thread's), finished (list), or
 * reported.
 * 2. The core is shared by the pool and every posted drain; the last one frees it.
 * 3. After work_pool_free() `closed` is set: finished items are dropped, never reported. */
#include "coordinator/work_pool.h"

#include <stdbool.h>
#include <sys/resource.h>
#include <unistd.h>

#define HEAVY_NICE 10 /* a ninth of a busy processor */

typedef struct WorkCore {
    gatomicrefcount refs;
    GMutex lock;
    GQueue finished; /* of Work */
    bool closed;
    Loop *loop;
} WorkCore;

typedef struct Work {
    WorkCore *core; /* referenced */
    WorkFn work, done, dropped;
    void *user;
} Work;

struct WorkPool {
    WorkCore *core;
    GThreadPool *threads, *heavy; /* NULL: on the loop */
};

static void work_core_unref(WorkCore *core)
{
    if (g_atomic_ref_count_dec(&core->refs)) {
        g_mutex_clear(&core->lock);
        g_free(core);
    }
}

static void work_drop(Work *work)
{
    if (work->dropped != NULL) {
        work->dropped(work->user);
    }
    work_core_unref(work->core);
    g_free(work);
}

/* On the loop: reports the oldest finished item. Holds a reference on the core. */
static void work_core_drain(void *user)
{
    WorkCore *core = user;
    g_mutex_lock(&core->lock);
    Work *work = core->closed ? NULL : g_queue_pop_head(&core->finished);
    g_mutex_unlock(&core->lock);
    if (work != NULL) {
        work->done(work->user);
        work_core_unref(core);
        g_free(work);
    }
    work_core_unref(core);
}

static void work_finish(Work *work)
{
    WorkCore *core = work->core;
    g_atomic_ref_count_inc(&core->refs);
    g_mutex_lock(&core->lock);
    g_queue_push_tail(&core->finished, work);
    g_mutex_unlock(&core->lock);
    loop_post(core->loop, work_core_drain, core);
}

static void work_on_thread(void *data, void *user)
{
    Work *work = data;
    work->work(work->user);
    work_finish(work);
}

/* GLib may give the lane another thread each time. On Linux a nice value is a thread's own. */
static void work_on_heavy_thread(void *data, void *user)
{
    if (getpriority(PRIO_PROCESS, (id_t)gettid()) < HEAVY_NICE) {
        setpriority(PRIO_PROCESS, (id_t)gettid(), HEAVY_NICE);
    }
    work_on_thread(data, user);
}

static void work_on_loop(void *user)
{
    Work *work = user;
    g_mutex_lock(&work->core->lock);
    bool closed = work->core->closed;
    g_mutex_unlock(&work->core->lock);
    if (closed) {
        work_drop(work);
        return;
    }
    work->work(work->user);
    work_finish(work);
}

WorkPool *work_pool_new(Loop *loop, unsigned n_threads)
{
    WorkPool *pool = g_new0(WorkPool, 1);
    pool->core = g_new0(WorkCore, 1);
    g_atomic_ref_count_init(&pool->core->refs);
    g_mutex_init(&pool->core->lock);
    g_queue_init(&pool->core->finished);
    pool->core->loop = loop;
    if (n_threads > 0) {
        pool->threads = g_thread_pool_new(work_on_thread, NULL, (int)n_threads, FALSE, NULL);
        /* exclusive: its thread serves nobody else afterwards, whose work would be slow */
        pool->heavy = g_thread_pool_new(work_on_heavy_thread, NULL, 1, TRUE, NULL);
    }
    return pool;
}

static void run_on(WorkPool *pool, GThreadPool *threads, WorkFn work, WorkFn done, WorkFn dropped,
                   void *user)
{
    Work *item = g_new0(Work, 1);
    item->core = pool->core;
    g_atomic_ref_count_inc(&pool->core->refs);
    item->work = work;
    item->done = done;
    item->dropped = dropped;
    item->user = user;
    if (threads != NULL) {
        g_thread_pool_push(threads, item, NULL);
    } else {
        loop_post(pool->core->loop, work_on_loop, item);
    }
}

void work_pool_run(WorkPool *pool, WorkFn work, WorkFn done, WorkFn dropped, void *user)
{
    run_on(pool, pool->threads, work, done, dropped, user);
}

void work_pool_run_heavy(WorkPool *pool, WorkFn work, WorkFn done, WorkFn dropped, void *user)
{
    run_on(pool, pool->heavy, work, done, dropped, user);
}

void work_pool_free(WorkPool *pool)
{
    if (pool == NULL) {
        return;
    }
    if (pool->threads != NULL) {
        g_thread_pool_free(pool->threads, FALSE, TRUE);
        g_thread_pool_free(pool->heavy, FALSE, TRUE);
    }
    WorkCore *core = pool->core;
    GQueue finished = G_QUEUE_INIT;
    g_mutex_lock(&core->lock);
    core->closed = true;
    finished = core->finished;
    g_queue_init(&core->finished);
    g_mutex_unlock(&core->lock);
    Work *work;
    while ((work = g_queue_pop_head(&finished)) != NULL) {
        work_drop(work);
    }
    work_core_unref(core);
    g_free(pool);
}
