/* WorkPool: what must not run on the loop (hashing, tokenizing, planning, reading files) runs on a
 * few threads and reports back on the loop. */
#pragma once

#include "proto/base/loop.h"

#include <glib.h>

typedef struct WorkPool WorkPool;
typedef void (*WorkFn)(void *user);

/* n_threads 0: work runs on the loop itself, in order (simulated clusters). */
WorkPool *work_pool_new(Loop *loop, unsigned n_threads);
/* work(user) on a pool thread, then done(user) on the loop, exactly once unless the pool was freed
 * first. Loop thread. */
void work_pool_run(WorkPool *pool, WorkFn work, WorkFn done, void *user);
/* As above; dropped(user) runs in place of done when the pool is freed before done could run. */
void work_pool_run_full(WorkPool *pool, WorkFn work, WorkFn done, WorkFn dropped, void *user);
/* Waits for work that runs; nothing is reported afterwards. NULL-safe. Loop thread. */
void work_pool_free(WorkPool *pool);
