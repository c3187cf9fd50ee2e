#include "worker/task_pool.h"

#include <glib.h>

struct TaskPool {
    Loop *loop;
    GThreadPool *threads; /* NULL = on the loop */
};

typedef struct Task {
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
    TaskPool *pool = user;
    task->run(task->user);
    loop_post(pool->loop, report, task);
}

static void run_on_loop(void *user)
{
    Task *task = user;
    task->run(task->user);
    report(task);
}

TaskPool *task_pool_new(Loop *loop, unsigned n_threads)
{
    TaskPool *pool = g_new0(TaskPool, 1);
    pool->loop = loop;
    if (n_threads > 0) {
        pool->threads = g_thread_pool_new(run_on_thread, pool, (int)n_threads, FALSE, NULL);
    }
    return pool;
}

void task_pool_run(TaskPool *pool, TaskFn run, TaskFn done, void *user)
{
    Task *task = g_new(Task, 1);
    *task = (Task){run, done, user};
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
