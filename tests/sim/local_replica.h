/* LocalReplica: one replica of a real model file on engines in this process, over inproc links: the
 * executor of every layout test. Real plan checks, shards, keys and kernels; only the daemons
 * around the engines are left out. */
#pragma once

#include "proto/model/gguf.h"
#include "proto/plan/plan.h"
#include "worker/serve/engine.h"

typedef struct LocalLayout {
    uint32_t pp;
    uint32_t tp[8]; /* per stage */
    const double
        *weight; /* NULL = even; else relative weights of a stage's ranks, for uneven cuts */
    unsigned threads;
    int isa;                       /* KernelIsa */
    const struct Kernels *kernels; /* NULL = those of isa */
    uint32_t max_rows;             /* prefill chunk; 0 = 64 */
    uint32_t streams, context;     /* 0 = 4, 256 */
    uint64_t kv_pages;             /* 0 = streams x context */
    KvType kv_type;
    NumericsClass numerics;              /* 0 = exact */
    bool plain;                          /* links unsealed */
    size_t direct;                       /* EngineOptions.direct_trivial */
    uint32_t shift;                      /* page numbers start here: other placement of KV pages */
    const struct Device *const *devices; /* by global rank, NULL = the host; or NULL: all hosts */
    Dtype matrices;          /* not 0: those of an F32 file are rounded to it (F8_E4M3, say) */
    double predicted_step_s; /* 0 = 1: the step deadline is 5 of these, at least 2 s */
} LocalLayout;

typedef struct LocalReplica LocalReplica;

LocalReplica *local_replica_new(const Gguf *gguf, const LocalLayout *layout,
                                const LinkFill *fill /* NULL = inproc of its own */,
                                GError **error);
void local_replica_free(LocalReplica *r);
Engine *local_replica_engine(LocalReplica *r, uint32_t global_rank);

typedef struct LocalResult {
    uint32_t *ids;
    uint32_t n;
    float *logprobs;
    uint8_t (*hashes)[16];
    float *logits;  /* [n][vocab] when asked for */
    uint8_t *trace; /* rows of u32 position + all sites, when asked for */
    size_t trace_bytes;
    char digest[33];
    char *finish_reason, *error;
} LocalResult;
void local_result_clear(LocalResult *r);

/* Runs n requests at once and waits for all (at most 60 s; an error says which waited). */
void local_replica_run(LocalReplica *r, const EngineRequest *requests, unsigned n,
                       LocalResult *results);
/* The simple case: greedy, n_tokens after the prompt. */
void local_replica_greedy(LocalReplica *r, const uint32_t *prompt, uint32_t n_prompt,
                          uint32_t n_tokens, LocalResult *result);
