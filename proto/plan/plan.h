/* Plan: who holds what, as data (DESIGN 1.3). Built by the planner, checked by plan_check(),
 * carried to the workers, shown by `weft plan`. A Plan is immutable once checked. */
#pragma once

#include "proto/base/hash.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define PLAN_RANKS_LIMIT 64u
#define PLAN_CHUNKS_LIMIT 64u

typedef enum NumericsClass { NUMERICS_EXACT = 0, NUMERICS_FAST = 1 } NumericsClass;
const char *numerics_name(NumericsClass numerics); /* "exact" | "fast", static */
/* The class of a plan for which none was asked, wherever that is asked: fast where any rank
 * computes on a device, exact on hosts' cores alone. */
NumericsClass numerics_by_place(bool on_devices);

#define EXACT_KIND_BYTES 96u
/* Settings that define the result (NUMERICS, "Definition"). */
typedef struct Definition {
    uint32_t numerics_version;
    NumericsClass numerics;
    KvType kv_type;
    uint32_t context; /* positions that a sequence may have */
    uint32_t wire;    /* 0 = f32 partial sums */
    Hash128 file_hash;
    /* Class exact on devices: the one kind of them whose bits these are ("NVIDIA H200, sm_90, CUDA
     * 13.0"), zeros behind it; empty: every host's. */
    char exact_kind[EXACT_KIND_BYTES];
} Definition;
/* hash over the fields in declaration order, little-endian; of an exact_kind its letters. */
Hash128 definition_hash(const Definition *d);

/* One tensor rank of one stage: contiguous ranges, [first, first + count). */
typedef struct PlanRank {
    char *worker;                    /* node id */
    uint32_t device;                 /* among the worker's, 0 = the first, or its cores */
    uint32_t attn_first, attn_count; /* attention units */
    uint32_t ffn_first, ffn_count;   /* FFN units */
    uint32_t vocab_first,
        vocab_count; /* vocabulary chunks; used where the stage holds embedding or head; may be 0 */
    /* Filled by plan_measure(): */
    uint64_t weight_bytes; /* packed */
    uint64_t kv_bytes_per_token;
    uint64_t peak_bytes; /* weights + KV + buffers, where it computes */
} PlanRank;

/* A range of layers, both ends included. */
typedef struct PlanLayers {
    uint32_t first, last;
} PlanLayers;

typedef struct PlanStage {
    uint32_t layer_first,
        layer_last;   /* inclusive; all stages together cover 0..n_layers-1 in order */
    uint32_t n_ranks; /* tensor parallel degree of this stage; stages may differ */
    PlanRank *ranks;
    /* Interleaved training: its second, third, ... chunk of layers. First all stages' first chunks,
     * then all their second ones, ... cover the layers in order. */
    uint32_t n_more;
    PlanLayers more[PLAN_CHUNKS_LIMIT - 1];
} PlanStage;

typedef struct PlanReplica {
    uint32_t n_stages;
    PlanStage *stages;
} PlanReplica;

typedef struct PlanPrediction {
    double prefill_tokens_per_s, decode_tokens_per_s;
    const char *bound; /* "memory" | "compute" | "link", static string */
} PlanPrediction;

typedef struct Plan {
    char *job;   /* job id */
    char *model; /* path or name as the user gave it */
    Definition definition;
    uint32_t streams;  /* sequences at once that KV memory is reserved for, per replica */
    uint64_t kv_pages; /* pages (of KV_BLOCK positions) per replica, the same on each rank */
    uint32_t max_rows; /* rows of a step: prefill chunk + decode rows */
    uint32_t n_replicas;
    PlanReplica *replicas;
    PlanPrediction predicted;
    GPtrArray *reasons; /* char *: why this plan, one sentence each, for people; owned */
} Plan;

void plan_free(Plan *plan);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Plan, plan_free)
Plan *plan_copy(const Plan *plan);

/* "dp1 pp2 tp2,3" and back for people; returned. */
char *plan_layout_text(const Plan *plan);
/* dp, pp, tp (the largest over stages) */
void plan_layout(const Plan *plan, uint32_t *dp, uint32_t *pp, uint32_t *tp);

/* What a member offers, as far as plans need it. A worker that leads several devices is as many
 * members, each of which takes a rank. */
typedef struct PlanMember {
    const char *worker;    /* node id, borrowed */
    uint32_t device_index; /* PlanRank.device */
    uint64_t memory_bytes;
    uint32_t numerics_version;
    uint32_t numerics_classes; /* bit per NumericsClass */
    /* bytes of one packed panel row group: packed bytes per weight block of each type, 0 = type not
     * supported */
    uint32_t packed_block_bytes[DTYPE_LIMIT];
    uint32_t threads;
    /* measured at worker start */
    double read_bytes_per_s;                 /* all threads, DRAM */
    double int8_ops_per_s, f32_ops_per_s;    /* multiply-adds x 2, all threads */
    double matmul_ops_per_s[DTYPE_LIMIT];    /* of weights of each type; 0 = the nearer of these */
    double link_latency_s, link_bytes_per_s; /* to a peer, one message */
    bool usable;                             /* attached, not draining */
    const char *host;     /* workers on one host share link cost of shared memory; NULL = unknown */
    bool tcp_only;        /* no shared memory, on one host neither */
    const uint32_t *cpus; /* borrowed, [n_cpus]: where its threads may run; none = not known */
    uint32_t n_cpus;
    const char *device; /* "cuda:0 (NVIDIA H200, 139.8G)", borrowed: where it computes, memory_bytes
                           being that device's; NULL = on its cores */
    /* What the device was seen to hold beside what is allocated there (device_memory.h); 0: not
     * yet. */
    uint64_t device_rank_bytes, device_group_bytes;
    const char *exact_kind; /* Definition.exact_kind of what it computes exactly, borrowed; NULL or
                               empty: every host's */
} PlanMember;
/* member->exact_kind, never NULL. */
const char *plan_member_kind(const PlanMember *member);

/* The member that a rank names; NULL if there is none. */
const PlanMember *plan_member_find(const PlanMember *members, uint32_t n_members,
                                   const char *worker, uint32_t device);

/* Fills weight, KV and peak bytes of each rank; pure. */
void plan_measure(Plan *plan, const ModelSpec *spec, const PlanMember *members, uint32_t n_members);

/* One violation, for people and tests. */
typedef enum PlanRule {
    PLAN_RULE_LAYERS, /* a layer owned by no or by two stages */
    PLAN_RULE_UNITS,  /* an attention or FFN unit owned by no or by two ranks, a rank without any */
    PLAN_RULE_VOCAB, /* a vocabulary chunk owned by no or by two ranks of the first or last stage */
    PLAN_RULE_MEMBER,   /* a rank on an unknown, draining or twice used worker device */
    PLAN_RULE_MEMORY,   /* peak above the member's budget */
    PLAN_RULE_TYPE,     /* a weight type that a member cannot compute */
    PLAN_RULE_NUMERICS, /* another numerics version or class, or another kind of exact bits */
    PLAN_RULE_LIMIT,    /* counts out of range */
} PlanRule;
typedef struct PlanViolation {
    PlanRule rule;
    char *text; /* what, with values, and what to do; owned */
} PlanViolation;

/* Pure, no I/O: appends every violation (PlanViolation *, free with plan_violation_free) to the
 * returned array; empty = legal. */
GPtrArray *plan_check(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                      uint32_t n_members);
void plan_violation_free(PlanViolation *v);

/* Largest legal tensor parallel degree: min(U attention, U FFN). */
uint32_t plan_tp_limit(const ModelSpec *spec);
/* Cuts `n` items into n_parts contiguous ranges in proportion to weight[] (> 0), each part at least
 * `least` items; fills cuts[0..n_parts]. */
void plan_cut(uint32_t n, const double *weight, uint32_t n_parts, uint32_t least, uint32_t *cuts);

/* The slices that a rank needs, as (tensor index, slice) pairs in canonical order. */
typedef struct SliceRef {
    uint32_t tensor, slice;
} SliceRef;
GArray *plan_rank_slices(const Plan *plan, const ModelSpec *spec, uint32_t replica, uint32_t stage,
                         uint32_t rank); /* of SliceRef, returned */
