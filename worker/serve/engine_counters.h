/* EngineCounters: what a rank has done and where its time went. The engine thread writes, any
 * thread reads; each number by itself never falls, but those of the load that say what is there
 * now.
 *
 * Every moment of a step belongs to one of four: sealing and opening (seal_us), handing messages to
 * the fill and taking them from it (wire_us), waiting for a peer with nothing arriving (wait_us),
 * and the rest (compute_us). Beside steps, wire and seal count too, and on the leader the wait for
 * tokens of steps in flight; an idle rank's time is in none. */
#pragma once

#include "transport/link/link.h"
#include "worker/serve/engine.h"

#include <stdatomic.h>

#define ENGINE_STALL_US 100000 /* a wait for one peer that is counted as a stall */

typedef struct EngineCounters {
    atomic_ullong steps, rows, compute_us, wait_us, op_ns[STAGE_OP_LIMIT];
    atomic_ullong messages_sent, bytes_sent, messages_received, bytes_received, dropped_stale,
        dropped_replayed, dropped_corrupt, seal_ns, send_ns, receive_ns;
    struct {
        atomic_ullong messages_sent, bytes_sent, bytes_received, wait_us, stalls;
    } peers[PLAN_RANKS_LIMIT]; /* by global rank */
    struct {
        atomic_uint running, waiting, slots;
        atomic_ullong kv_pages_total, kv_pages_used, kv_pages_cached, prefix_query_tokens,
            prefix_hit_tokens, preemptions, prompt_tokens, generation_tokens,
            steps_by_rows[STEP_ROWS_BOUNDS + 1], step_rows;
    } load;
} EngineCounters;

/* An interval without what the port was busy with inside it. */
typedef struct NetTime {
    int64_t start_us;
    uint64_t busy_ns;
} NetTime;
NetTime net_time_begin(const LinkPort *port);
uint64_t net_time_us(const NetTime *begin, const LinkPort *port);

/* Engine thread. */
void engine_counters_step(EngineCounters *c, uint32_t n_rows, uint64_t compute_us,
                          uint64_t wait_us);
void engine_counters_ops(EngineCounters *c, const StageTimes *times);
void engine_counters_wait(EngineCounters *c, uint64_t wait_us);
void engine_counters_link(EngineCounters *c, const LinkCounters *link);
void engine_counters_peer(EngineCounters *c, uint32_t global_rank, const LinkTraffic *traffic);
void engine_counters_peer_wait(EngineCounters *c, uint32_t global_rank, uint64_t wait_us);
void engine_counters_peer_stall(EngineCounters *c, uint32_t global_rank);
void engine_counters_load(EngineCounters *c, const EngineLoad *load);
/* Any thread: fills the counts of a status. */
void engine_counters_read(EngineCounters *c, EngineStatus *out);
void engine_counters_read_peer(EngineCounters *c, uint32_t global_rank, EnginePeerTraffic *out);
