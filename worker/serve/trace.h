/* Trace: the traced rows of a step on their way down the stages (`weft verify` names the first site
 * where two layouts differ). Engine thread.
 *
 * Every tensor rank of a stage hashes the rows of sequences that were admitted with `trace`; the
 * ranks compare by an all-gather after the stage's layers. Rank 0 appends the stage's sites to what
 * came from the stage before and sends it on in front of the step (LINK_OP_TRACE), the last stage
 * to the leader in front of the tokens. Nothing is allocated until a sequence is traced.
 *
 * Message: u32 n_rows, u32 n_sites, then per row u32 slot, u64 uid, u32 position, n_sites x 16
 * bytes. A site where the ranks of a stage hold different values has, in place of a hash,
 * TRACE_SPLIT, u32 the lowest rank that differs from rank 0, u32 0. */
#pragma once

#include "transport/group/group.h"
#include "worker/model/stage_trace.h"
#include "worker/serve/sequences.h"

#include <glib.h>

#define TRACE_SPLIT "weft!=rk"  /* 8 bytes */
#define TRACE_PROMPT_LIMIT 512u /* tokens of a request that asks for a trace */

typedef struct Trace Trace;

Trace *trace_new(uint32_t first_layer, uint32_t n_layers, bool embeds, uint32_t n_ranks);
void trace_free(Trace *trace);
/* The traced rows of a step, NULL = none: cheap. Valid until the next call. */
StageTrace *trace_begin(Trace *trace, const Step *step, const Sequences *sequences);
/* The stage's ranks compare what they hold. */
GroupStatus trace_compare(Trace *trace, Group *group, const GroupWait *wait);
/* From the stage before, for a step that has not run yet. Copied. */
void trace_receive(Trace *trace, uint32_t step, const void *data, size_t size);
/* What goes on: the stages before and this one; borrowed until the next call. NULL: what came from
 * before is missing or malformed. */
const GByteArray *trace_message(Trace *trace, const Step *step, const Sequences *sequences);

/* Calls fn for each row of a message; false: malformed. sites: n_sites x 16 bytes. */
typedef void (*TraceRowFn)(uint32_t slot, uint64_t uid, uint32_t position, const uint8_t *sites,
                           uint32_t n_sites, void *user);
bool trace_each_row(const void *data, size_t size, TraceRowFn fn, void *user);
