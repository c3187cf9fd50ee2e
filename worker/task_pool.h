/* TaskPool: what must not run on the loop (disks, hashes, packing, mapping memory) runs on a few
 * threads and reports back on the loop. With no threads every task runs on the loop itself, in
 * order: a whole cluster then is deterministic in one thread. */
#pragma once

#include "proto/base/loop.h"

typedef struct TaskPool TaskPool;
typedef void (*TaskFn)(void *user);

TaskPool *task_pool_new(Loop *loop, unsigned n_threads);
/* run(user) on a pool thread, then done(user) on the loop, each exactly once, tasks started in the
 * order of the calls. Loop thread. */
void task_pool_run(TaskPool *pool, TaskFn run, TaskFn done, void *user);
/* Finishes all tasks; their done() have been posted, not run, when this returns. NULL-safe. Loop
 * thread. */
void task_pool_free(TaskPool *pool);
