/* Planner: from a model, members and wishes to the best legal plan, with reasons for people; pure.
 */
#pragma once

#include "proto/plan/plan.h"

#include <glib.h>

typedef struct PlanWish {
    const char *job, *model;
    uint32_t dp, pp, tp; /* 0 = planner's choice */
    uint32_t context;    /* 0 = min(model's, 8192) */
    uint32_t streams;    /* sequences at once per replica that KV is reserved for; 0 = as fits, at
                            least 1 */
    KvType kv_type;
    NumericsClass numerics;
    bool any_numerics;      /* none was asked: numerics_by_place(); `numerics` is not read */
    const char *exact_kind; /* class exact: on members of this kind alone (Definition.exact_kind);
                               NULL = the kind that serves fastest */
    uint32_t max_rows;      /* 0 = 128 to 512, by what a row's buffers take */
    uint64_t kv_memory;     /* 0 = by streams */
    bool one_host_shared;   /* workers on one host may use shared memory */
    bool seal_off;          /* said in the reasons; the bits do not depend on it */
} PlanWish;

/* Where no class was asked: the plan that class fast finds if a rank of it computes on a device;
 * else the exact one, on hosts' cores where those alone serve faster. The plan says which and why.
 * An exact plan has members of one kind: hosts, or devices whose exact bits are the same; of the
 * kinds that can, the one that predicts best.
 * Automatic choice (dp, pp or tp 0): one replica unless dp is given; of all pp x tp that fit, the
 * one with the best predicted decode speed of one request, the fewest workers when several are
 * within 2 %. Workers are taken by measured read bandwidth, or host by host, whichever order
 * predicts best. Layers go to stages and units to ranks by measured speed, within each member's
 * memory. The same input gives the same plan. peak_bytes of each rank = packed weights + kv_pages x
 * 32 x KV bytes per token + step buffers (proto/plan/rank_span.h has that formula). kv_memory is
 * per worker. Both arrays, where asked for, are always set, perhaps to empty ones; returned,
 * g_ptr_array_unref.
 *
 * The plan, checked, measured, predicted and with reasons. NULL + IMPOSSIBLE: the message says how
 * much is missing (memory) or which limit is broken, *violations (may be NULL) gets PlanViolation *
 * of the nearest try, *alternatives (may be NULL) char * of legal flag sets ("--pp 2 --tp 3"). */
Plan *planner_plan(const ModelSpec *spec, const PlanMember *members, uint32_t n_members,
                   const PlanWish *wish, GPtrArray **violations, GPtrArray **alternatives,
                   GError **error);

/* The cost model alone: predicted seconds of one step with `rows` rows at context depth `depth`
 * through one replica (latency: all stages in turn; throughput: the slowest stage), and what bounds
 * it. Up to plan->streams rows are decode steps of as many sequences, each with its own KV to read
 * and its own logits; more rows are a prefill chunk of one sequence. Members that measured nothing
 * count with cautious numbers (cost.c). */
typedef struct PlanCost {
    double latency_s, slowest_stage_s;
    double memory_s, compute_s, link_s; /* shares of latency */
    double sums_bytes;                  /* of partial sums that all ranks send (FORMULAS 7a) */
} PlanCost;
PlanCost planner_cost(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                      uint32_t n_members, uint32_t replica, uint32_t rows, uint32_t depth);
/* Decode tokens/s of one stream (through the first replica) at the memory roof of the layout: bytes
 * that a token must touch / read bandwidth, the slowest rank of each stage, stages in turn. */
double planner_roof(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                    uint32_t n_members);
