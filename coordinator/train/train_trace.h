/* TrainTrace: what the ranks of an epoch did in the steps that a job file asks to trace, as a file
 * in the Trace Event Format (JSON; Perfetto and Chrome's tracing page show it): a process a
 * replica, a thread a rank, in it the steps, in these the operations of the schedule.
 *
 * The file is of one epoch, the one that ran the last of these steps, and has those of them that it
 * ran. Ranks tell times by the clock of their host; those of other hosts are moved by the smallest
 * difference to the coordinator's clock that was seen, so hosts are apart by no more than the
 * quickest message took. On the loop; train_trace_write() in the pool. */
#pragma once

#include "coordinator/train/train_layout_choice.h"
#include "proto/plan/plan.h"
#include "weft/v1/train.pb-c.h"

#define TRAIN_TRACE_OPS_LIMIT (UINT64_C(1) << 20) /* that are kept, of all ranks */

typedef struct TrainTrace TrainTrace;

/* Of an epoch that begins with step first_step (counted from 0); copies. hosts: by rank, equal
 * where one clock is meant; NULL: not known. NULL: the spec asks for none, or for earlier steps
 * only. */
TrainTrace *train_trace_new(const JobSpec *spec, const TrainLayoutChoice *layout, const Plan *plan,
                            const char *const *hosts, uint64_t first_step);
void train_trace_free(TrainTrace *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TrainTrace, train_trace_free)

/* A rank tells of a step; now_us: the loop's clock. PROTOCOL: no such thing can come now. */
bool train_trace_add(TrainTrace *t, uint32_t rank, const Weft__V1__TrainTrace *m, int64_t now_us,
                     GError **error);
/* Every rank has told of its last traced step. */
bool train_trace_is_whole(const TrainTrace *t);
/* The text; steps that came after TRAIN_TRACE_OPS_LIMIT operations are not in it. Returned. */
char *train_trace_json(const TrainTrace *t);
/* Writes the file; what is to be said of it, returned. Any thread. */
char *train_trace_write(const TrainTrace *t, const char *path);
