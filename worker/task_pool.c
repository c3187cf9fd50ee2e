/* POSIX threads and locks, not GLib's pool: ThreadSanitizer sees them. */
#include "worker/task_pool.h"

#include <glib.h>
#include <pthread.h>
#include <stdbool.h>

typedef struct Task {
    TaskPool *pool;
    TaskFn run, done;
    void *user;
} Task;

struct TaskPool {
    Loop *loop;
    unsigned n_threads; /* 0 = on the loop */
    pthread_t *threads;
    pthread_mutex_t mutex; /* of the two below */
    pthread_cond_t changed;
    GQueue waiting; /* of Task */
    bool closing;
};

static void report(void *user)
{
    Task *task = user;
    task->done(task->user);
    g_free(task);
}

/* done() comes after whatever run() posted, on the loop as from a thread. */
static void run_task(void *user)
{
    Task *task = user;
    task->run(task->user);
    loop_post(task->pool->loop, report, task);
}

static void *thread_main(void *user)
{
    TaskPool *pool = user;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        Task *task = g_queue_pop_head(&pool->waiting);
        if (task) {
            pthread_mutex_unlock(&pool->mutex);
            run_task(task);
            pthread_mutex_lock(&pool->mutex);
        } else if (pool->closing) {
            break;
        } else {
            pthread_cond_wait(&pool->changed, &pool->mutex);
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

TaskPool *task_pool_new(Loop *loop, unsigned n_threads)
{
    TaskPool *pool = g_new0(TaskPool, 1);
    pool->loop = loop;
    pool->threads = g_new0(pthread_t, n_threads);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->changed, NULL);
    g_queue_init(&pool->waiting);
    while (pool->n_threads < n_threads &&
           pthread_create(&pool->threads[pool->n_threads], NULL, thread_main, pool) == 0) {
        pool->n_threads++; /* fewer, or none, if the system gives no more: slower, not wrong */
    }
    return pool;
}

void task_pool_run(TaskPool *pool, TaskFn run, TaskFn done, void *user)
{
    Task *task = g_new(Task, 1);
    *task = (Task){pool, run, done, user};
    if (pool->n_threads == 0) {
        loop_post(pool->loop, run_task, task);
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    g_queue_push_tail(&pool->waiting, task);
    pthread_cond_signal(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
}

void task_pool_free(TaskPool *pool)
{
    if (!pool) {
        return;
    }
    pthread_mutex_lock(&pool->mutex);
    pool->closing = true;
    pthread_cond_broadcast(&pool->changed);
    pthread_mutex_unlock(&pool->mutex);
    for (unsigned i = 0; i < pool->n_threads; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    g_assert(g_queue_is_empty(&pool->waiting));
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
    g_free(pool->threads);
    g_free(pool);
}
