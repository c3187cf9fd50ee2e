#include "worker/task_pool.h"

#include <glib.h>

struct TaskPool {
    Loop *loop;
    GThreadPool *threads; /* NULL = on the loop */
};

typedef struct Task {
    TaskPool *pool;
    TaskFn run, done;
    void *user;
} Task;

static void report(void *user)
{
    Task *task = user;
    task->done(task->user);
    g_free(task);
}

static void run_on_thread(void *data, void *user)
{
    Task *task = data;
    task->run(task->user);
    loop_post(task->pool->loop, report, task);
}

/* done() comes after whatever run() posted, as it does from a thread. */
static void run_on_loop(void *user)
{
    Task *task = user;
    task->run(task->user);
    loop_post(task->pool->loop, report, task);
}

TaskPool *task_pool_new(Loop *loop, unsigned n_threads)
{
    TaskPool *pool = g_new0(TaskPool, 1);
    pool->loop = loop;
    if (n_threads > 0) {
        pool->threads = g_thread_pool_new(run_on_thread, NULL, (int)n_threads, FALSE, NULL);
    }
    return pool;
}

void task_pool_run(TaskPool *pool, TaskFn run, TaskFn done, void *user)
{
    Task *task = g_new(Task, 1);
    *task = (Task){pool, run, done, user};
    if (pool->threads) {
        g_thread_pool_push(pool->threads, task, NULL);
    } else {
        loop_post(pool->loop, run_on_loop, task);
    }
}

void task_pool_free(TaskPool *pool)
{
    if (!pool) {
        return;
    }
    if (pool->threads) {
        g_thread_pool_free(pool->threads, FALSE, TRUE);
    }
    g_free(pool);
}
