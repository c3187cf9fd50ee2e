#include "worker/serve/engine_state.h"

enum {
    SLOT_PAGES = 8,
    SLOT_TABLE_IDS = 1 << 20,
    SLOTS_AT_MOST = 64,
};

/* The plan has KV memory for `streams` sequences of the whole context; pages are given out as they
 * are needed, so more, shorter ones run at once: as many as have SLOT_PAGES each, while the tables
 * of ids by position stay small. Every rank comes to the same number. */
static uint32_t slots_of(const Plan *plan)
{
    const uint64_t by_pages = plan->kv_pages / SLOT_PAGES,
                   by_tables = SLOT_TABLE_IDS / MAX(plan->definition.context, 1u);
    return (uint32_t)MAX(MIN(MIN(by_pages, by_tables), SLOTS_AT_MOST), MAX(plan->streams, 1u));
}

StepLimits engine_limits(const Plan *plan, const ModelSpec *spec)
{
    return (StepLimits){.max_rows = plan->max_rows,
                        .max_slots = slots_of(plan),
                        .max_pages = (uint32_t)plan->kv_pages,
                        .context = plan->definition.context,
                        .vocab_size = spec->vocab_size};
}

uint32_t engine_limits_flight(const PlanReplica *replica)
{
    return replica->n_stages == 1 ? 1 : replica->n_stages + 1;
}

uint32_t engine_limits_inbox(const PlanReplica *replica)
{
    return engine_limits_flight(replica) + 1;
}

size_t engine_limits_message(const StepLimits *limits, const ModelSpec *spec, uint32_t stage)
{
    return step_wire_limit(limits) +
           (stage == 0 ? 0 : sizeof(float) * (size_t)limits->max_rows * spec->width);
}

size_t engine_buffer_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica,
                           uint32_t stage, uint32_t rank, unsigned threads)
{
    const StepLimits limits = engine_limits(plan, spec);
    return stage_buffer_bytes(spec, plan, replica, stage, rank, threads) +
           inbox_bytes(engine_limits_inbox(&plan->replicas[replica]),
                       engine_limits_message(&limits, spec, stage)) +
           2 * step_wire_limit(&limits) + sequences_bytes(&limits) +
           (stage == 0 && rank == 0 ? leader_bytes(plan->kv_pages) : 0);
}
