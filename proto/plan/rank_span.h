/* What one rank of a plan holds of each tensor, and what that costs in memory: shared by
 * plan_measure(), plan_check() and the planner's cost model. Every function clips the plan's ranges
 * to the model, because plan_check() asks about plans that nobody checked. */
#pragma once

#include "proto/plan/plan.h"

/* Slices [first, first + count) of a tensor. */
typedef struct SliceSpan {
    uint32_t first, count;
} SliceSpan;

/* The slices of tensor `t` that `rank` of `stage` of `replica` holds; count 0 = none. All pointers
 * are into one plan, borrowed. */
SliceSpan rank_span(const ModelSpec *spec, const PlanReplica *replica, const PlanStage *stage,
                    const PlanRank *rank, const TensorSpec *t);
/* Query heads [*first, *first + *count) of a rank. */
void rank_heads(const ModelSpec *spec, const PlanRank *rank, uint32_t *first, uint32_t *count);
/* Packed bytes of a span: 1-D tensors as floats; matrices in panels of 16 rows with the member's
 * packed block size (NULL or 0: the file's); rounded up to 64. */
uint64_t packed_span_bytes(const ModelSpec *spec, const TensorSpec *t, SliceSpan span,
                           const PlanMember *member);
/* Elements of a span. */
uint64_t span_elements(const ModelSpec *spec, const TensorSpec *t, SliceSpan span);
/* Partial sums of so many bytes or more go in two steps, where those send less (GroupOptions): 8 rows
 * of width 2,048. Three ranks on two cores decode 8 streams 17 % faster so, four the same. */
#define PLAN_TWO_SHOT_BYTES (64u << 10)
/* s_r of FORMULAS 7a: of attention, of FFN, the larger of them. */
uint32_t rank_attn_subtrees(const ModelSpec *spec, const PlanRank *rank);
uint32_t rank_ffn_subtrees(const ModelSpec *spec, const PlanRank *rank);
uint32_t rank_subtrees(const ModelSpec *spec, const PlanRank *rank);
/* What a leader keeps to find n_pages KV pages by their content, and to give them out: exactly what
 * the worker allocates (worker/serve/leader.h): n_pages x 201 + 4 x the least power of two that is
 * at least 16 and 2 n_pages. */
uint64_t page_index_bytes(uint64_t n_pages);
/* Memory beside weights and KV, in bytes, for a rank with that many threads:
 *
 *   16 MiB + threads x (4096 x head size + context)
 *   + 4 x (context x rope dims + 16 x own vocabulary ids + max_rows x floats), where floats =
 *       3 width + 2 q + 2 kv + 2 ffn + 2 max(width, q, ffn) + s_r width      the layers' buffers
 *     + [pp > 1] (pp + 4) width                                  steps that wait and travel
 *     + [tp > 1] (4 (sum of the other ranks' s) / tp + s_r + 2) width   partial sums on their way
 *   with q, kv, ffn = this rank's elements;
 *   + [it leads the replica] page_index_bytes(kv_pages). */
uint64_t rank_buffer_bytes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                           const PlanStage *stage, const PlanRank *rank, uint32_t threads);
/* What a row of a step takes of it on a rank that holds whole layers. */
uint64_t plan_row_bytes(const ModelSpec *spec);
