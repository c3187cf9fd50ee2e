/* WorkPool: what must not run on the loop (hashing, tokenizing, planning, reading files) runs on a
 * few threads and reports back on the loop.
 *
 * Work that is heavy, because a client sent much, has a lane of its own: one thread, one after the
 * other, after everybody else's turn for a processor. So what one client sends delays only others
 * who send as much, and takes little from an engine on the same host. */
#pragma once

#include "proto/base/loop.h"

#include <glib.h>

#define WORK_HEAVY_BYTES ((size_t)128 << 10) /* a client's bytes beyond are heavy */

typedef struct WorkPool WorkPool;
typedef void (*WorkFn)(void *user);

/* n_threads 0: work runs on the loop itself, in order (simulated clusters). */
WorkPool *work_pool_new(Loop *loop, unsigned n_threads);
/* work(user) on a pool thread, then done(user) on the loop, exactly once; dropped(user) runs in
 * place of done when the pool is freed before done could run, and may be NULL. Loop thread. */
void work_pool_run(WorkPool *pool, WorkFn work, WorkFn done, WorkFn dropped, void *user);
/* work_pool_run() on the heavy lane. */
void work_pool_run_heavy(WorkPool *pool, WorkFn work, WorkFn done, WorkFn dropped, void *user);
/* Waits for work that runs; nothing is reported afterwards. NULL-safe. Loop thread. */
void work_pool_free(WorkPool *pool);
