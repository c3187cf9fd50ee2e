/* What a rank keeps on its device beside weights and KV pages, buffer by buffer: plan_measure()
 * counts it, and the worker's device stage (worker/model/device_stage.h) allocates by the same
 * function, so that what is planned is what is taken. Pure; ranges are clipped to the model, for
 * plan_check() asks about plans that nobody checked. */
#pragma once

#include "proto/plan/device_limits.h"
#include "proto/plan/plan.h"

/* Beside all that, for each rank: kernels that are loaded at their first use, the libraries' own
 * memory, graphs; and for ranks that sum among devices the communicator's. (The context itself is
 * not among it: a worker says what is free with it there.) Reckoned, not measured: 64 MiB each for
 * this project's kernels, cuBLASLt's and graphs; NCCL's buffers by its documented default, 4 MiB a
 * channel and peer, for 24 channels and two neighbours, and a third of that beside. They count
 * until a worker has seen what its device really holds (kernels/device/use.h); then that does
 * (PlanMember.device_rank_bytes). */
#define DEVICE_RANK_BYTES ((uint64_t)192 << 20)
#define DEVICE_GROUP_BYTES ((uint64_t)256 << 20)

/* What a stage asks of its device's ops at most. */
typedef struct DeviceLimits {
    uint32_t max_rows, max_keys, max_segments;
    uint32_t n_heads, n_kv_heads, head_size;
    uint32_t widest_in, widest_out;    /* of any matrix */
    uint32_t sampled_rows, vocabulary; /* of one sample(); 0 = none */
    bool fast;                         /* class fast */
} DeviceLimits;
#define DEVICE_CHECKSUM_BYTES 1024u /* of the workspace, for a checksum */
/* The workspace that every device's ops make do with under these limits. */
uint64_t device_workspace_bytes(const DeviceLimits *limits);

/* A step's numbers, one block: ids, positions, tables and outputs of each row at 0, then: */
typedef struct DeviceInput {
    uint64_t draws, segments, pages; /* where they begin */
    uint32_t pages_ld;               /* entries of a page table */
    uint64_t sum;                    /* a checksum, which comes down */
    uint64_t bytes;
} DeviceInput;

/* Bytes of the buffers, each rounded up to 256. */
typedef struct DeviceSizes {
    uint64_t x;          /* h is as large: [rows][width] */
    uint64_t arriving;   /* the next x from the stage before; 0 on the first */
    uint64_t q, kv, ffn; /* so are attn; v; up: [rows][own] */
    uint64_t partial;    /* [subtrees][rows][width] */
    uint64_t gathered;   /* class exact: those of all ranks */
    uint64_t logits;     /* [logits_rows][own vocabulary] */
    uint64_t drawn;      /* chunks, candidates and most likely ids of each row */
    uint64_t rope;       /* cos; sin is as large */
    uint64_t workspace;
    DeviceInput input;
    uint32_t logits_rows;
    uint32_t subtrees; /* sums of its own that a rank gives at most, the same for all of a stage */
    uint32_t vocabulary; /* own ids of the head; 0: it has none */
    bool draws;          /* tokens can be drawn there */
    DeviceLimits limits; /* of the workspace */
} DeviceSizes;
DeviceSizes device_sizes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                         const PlanStage *stage, const PlanRank *rank);
/* Of all buffers: what the worker allocates beside weights and KV pages. */
uint64_t device_sizes_total(const DeviceSizes *sizes);
/* What is beside, as seen on the member's device or, until then, by the estimates above. */
uint64_t device_beside_bytes(const PlanMember *member, bool grouped);
/* Both together. */
uint64_t device_rank_bytes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                           const PlanStage *stage, const PlanRank *rank, const PlanMember *member);
