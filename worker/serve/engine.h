/* Engine: one rank of one deployment at work. A thread of its own (or the caller's, step by step:
 * executor inline) owns the link port, the compute pool and the KV pages. The agent (main loop)
 * talks to it through the functions below only, which are safe from any thread and never block.
 *
 * Rank (0,0) leads its replica: scheduler, page allocator, token log (leader.h). All ranks run the
 * same step program (executor.h). */
#pragma once

#include "proto/base/loop.h"
#include "proto/base/step_rows.h"
#include "proto/plan/plan.h"
#include "transport/link/link.h"
#include "worker/model/stage_times.h"
#include "worker/serve/sample.h"
#include "worker/shard/shard.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Engine Engine;

typedef struct EngineOptions {
    const ModelSpec *spec; /* borrowed, like plan and shard, for the engine's life */
    const Plan *plan;
    Shard *shard;
    uint32_t replica, stage, rank;
    uint64_t generation, epoch;
    unsigned threads;
    const int *cpus;               /* `threads` cpu numbers or NULL */
    int isa;                       /* KernelIsa */
    const struct Kernels *kernels; /* borrowed; NULL = those of isa. A test puts another table in */
    const LinkFill *fill;
    bool crowded;            /* more ranks than cores on this host: yield instead of spinning */
    bool inline_run;         /* no thread: the test calls engine_step() */
    size_t direct_trivial;   /* test: DirectOptions.trivial_bytes */
    double predicted_step_s; /* step deadline = max(2 s, 5 x this) */
} EngineOptions;

/* Bytes that engine_new() maps and allocates for a rank beside KV pages and weights: the stage's
 * buffers, the inbox, the tables of sequences. The plan's peak (proto/plan/rank_span.h) is never
 * less. */
size_t engine_buffer_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica,
                           uint32_t stage, uint32_t rank, unsigned threads);
/* Maps KV pages and buffers, opens the port. */
Engine *engine_new(const EngineOptions *options, GError **error);
/* Stops the thread (bounded), closes links, frees. */
void engine_free(Engine *engine);
GBytes *engine_address(Engine *engine); /* the port's, returned */

typedef struct EnginePeer {
    uint32_t stage, rank;
    const char *worker;
    GBytes *address;
    uint8_t boot_id[16];
} EnginePeer;
/* Connects to every rank this one exchanges messages with (own tensor group, previous and next
 * stage, the leader), says hello, starts the thread. ready(error, user) is posted on `loop` once
 * all hellos are in, or with an error naming the peer. */
void engine_start(Engine *engine, const uint8_t secret[32], const uint8_t own_boot_id[16],
                  bool seal, const EnginePeer *peers, uint32_t n_peers, Loop *loop,
                  void (*ready)(const GError *error, void *user), void *user);
/* Before engine_start(), which is when the hosts are known. More ranks than cores turned out to
 * share this host: waits yield instead of spinning (WIRE.md, "Waiting"). */
void engine_set_crowded(Engine *engine);
/* Of the replica's stages only n find CPUs at the same time (scheduler.h; all unless it is told).
 */
void engine_set_stages_at_once(Engine *engine, uint32_t n);
/* Steps are computed in turns with other ranks of this host that were told the same name
 * (cpu_share.h, host_turn.h). Copied; NULL: none. */
void engine_set_cpu_turn(Engine *engine, const char *name);
/* inline_run: does what is there to do; true if anything was done. */
bool engine_step(Engine *engine);

/* A request for the leader. Arrays are copied. */
typedef struct EngineRequest {
    uint32_t kind; /* Weft__V1__RequestKind */
    const uint32_t *prompt;
    uint32_t n_prompt;
    const uint32_t *generated;
    uint32_t n_generated;
    uint32_t choice, max_tokens, score_from, top_logprobs;
    float temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    uint32_t top_k, penalty_window;
    uint64_t seed;
    const SampleBias *bias; /* ids strictly ascending, at most SAMPLE_BIAS_LIMIT */
    uint32_t n_bias;
    const uint32_t *end_ids;
    uint32_t n_end_ids;
    bool want_logits;
    bool trace;           /* generate only; at most TRACE_PROMPT_LIMIT tokens of prompt */
    bool fresh;           /* neither uses nor feeds the prefix cache */
    Hash128 cache_salt;   /* prefixes are shared among requests with equal salts */
    Hash128 share_key;    /* whose it is: keys that wait are served in turn (fair_queue.h) */
    uint64_t deadline_ms; /* from engine_submit() on; 0 = none */
} EngineRequest;

typedef struct EngineToken {
    uint32_t position, id;
    float logprob;
    uint8_t row_hash[16];
    GBytes *logits;          /* or NULL; borrowed in the callback */
    const uint32_t *top_ids; /* n_top */
    const float *top_logprobs;
    uint32_t n_top;
    GBytes *trace; /* or NULL; borrowed in the callback: rows computed since the last token, each
                      u32 position + all sites x 16 bytes */
    bool done;     /* last event of the request: no token in it */
    const char *finish_reason; /* static; with done */
    const GError *error;       /* with done, finish_reason "error" */
    uint64_t prefill_us, decode_us, wire_bytes;
} EngineToken;
typedef void (*EngineTokenFn)(const EngineToken *token, void *user);

/* Leader only. Events are posted on `loop`, in order, done last, exactly once. Returns an id for
 * engine_cancel. */
uint64_t engine_submit(Engine *engine, const EngineRequest *request, Loop *loop, EngineTokenFn fn,
                       void *user);
void engine_cancel(Engine *engine, uint64_t request_id);
/* Leader only: the next Step is due, also when there is nothing to do. It has no rows then, touches
 * no KV and no request, and is run like any other: by every compute thread of every rank, over
 * every link, within the step deadline. So a replica without requests shows that it would serve. */
void engine_canary(Engine *engine);

/* What the leader's scheduler does (scheduler.h). Totals since the engine's start. */
typedef struct EngineLoad {
    uint32_t running, waiting, slots;
    uint64_t kv_pages_total, kv_pages_used, kv_pages_cached; /* used: by running sequences */
    uint64_t prefix_query_tokens, prefix_hit_tokens;         /* asked of the prefix cache, found */
    uint64_t preemptions;
    uint64_t prompt_tokens, generation_tokens;               /* of requests admitted; drawn */
    uint64_t steps_by_rows[STEP_ROWS_BOUNDS + 1], step_rows; /* of steps with rows; their rows */
} EngineLoad;

/* Health and reports (any thread). */
typedef struct EngineStatus {
    bool running;      /* started and not failed */
    uint64_t progress; /* rises at each op and each turn; DESIGN 7.6 */
    bool in_step;
    char operation[64]; /* what the thread is doing */
    bool failed;
    char error[256]; /* why, with worker and operation */
    bool waiting;    /* for a peer */
    uint32_t waits_stage, waits_rank;
    char waits_operation[64];
    int64_t waits_since_us; /* CLOCK_MONOTONIC */
    bool wait_expired;
    int64_t step_deadline_us;   /* max(2 s, 5 x predicted) */
    int64_t flight_deadline_us; /* of all steps that may fly at once: the leader's patience */
    uint64_t steps, rows;
    uint64_t compute_us, wait_us, wire_us, seal_us; /* engine_counters.h says what is what */
    uint64_t op_us[STAGE_OP_LIMIT];
    LinkCounters link;
    const char *activations; /* how they go to and from other stages (direct.h); NULL: nothing to
                                say, or not running yet; static */
    bool leads;              /* load is meaningful */
    EngineLoad load;
} EngineStatus;
void engine_status(Engine *engine, EngineStatus *out);
/* What passed between this rank and another of the replica. */
typedef struct EnginePeerTraffic {
    uint64_t messages_sent, bytes_sent, bytes_received;
    uint64_t wait_us; /* for its activations, on the leader for tokens of steps in flight */
    uint64_t stalls;  /* of these waits, those of ENGINE_STALL_US and more */
} EnginePeerTraffic;
/* By global rank; returns how many ranks there are. Any thread. */
uint32_t engine_peers(Engine *engine, EnginePeerTraffic out[PLAN_RANKS_LIMIT]);
/* The epoch is over: every wait ends at once, open requests end with `why` (WEFT_ERROR_WORKER_LOST
 * or what it says). */
void engine_abort(Engine *engine, const GError *why);
