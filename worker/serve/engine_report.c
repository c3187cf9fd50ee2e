#include "worker/serve/engine_state.h"

#include "proto/base/error.h"

void engine_report_progress(void *user)
{
    Engine *e = user;
    atomic_fetch_add_explicit(&e->progress, 1, memory_order_relaxed);
    link_port_progress(e->port);
}

const char *engine_worker_name(const Engine *e, uint32_t rank)
{
    return rank < PLAN_RANKS_LIMIT && e->names[rank] != NULL ? e->names[rank] : "?";
}

void engine_report_wait(Engine *e, int global, const char *operation, int64_t since_us)
{
    if (global < 0) {
        atomic_store(&e->waiting, false);
        return;
    }
    uint32_t stage, rank;
    position_split(engine_replica(e), (uint32_t)global, &stage, &rank);
    pthread_mutex_lock(&e->shared.mutex);
    g_strlcpy(e->shared.waits_operation, operation, sizeof e->shared.waits_operation);
    pthread_mutex_unlock(&e->shared.mutex);
    atomic_store(&e->waits_stage, stage);
    atomic_store(&e->waits_rank, rank);
    atomic_store(&e->waits_since_us, since_us);
    atomic_store(&e->waiting, true);
}

/* Invariant 2. The first reason stays. */
void engine_fail(Engine *e, GError *error /* taken */, bool tell)
{
    if (e->state == STATE_FAILED || e->state == STATE_STOPPED) {
        g_error_free(error);
        return;
    }
    e->state = STATE_FAILED;
    pthread_mutex_lock(&e->shared.mutex);
    g_strlcpy(e->shared.error, error->message, sizeof e->shared.error);
    pthread_mutex_unlock(&e->shared.mutex);
    atomic_store(&e->failed, true);
    atomic_store(&e->running, false);
    e->tell = tell; /* by turn(): this may run inside a link callback, where nothing may be sent */
    engine_greeting_end(e, error);
    if (e->leader != NULL) {
        leader_fail(e->leader, error);
    }
    g_error_free(error);
}

void engine_fail_waiting(Engine *e, uint32_t global, const char *operation, int64_t since_us,
                         const char *how)
{
    engine_report_wait(e, (int)global, operation, since_us);
    atomic_store(&e->wait_expired, true);
    engine_fail(e,
                g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                            "worker %s %s during %s (%" G_GINT64_FORMAT " ms)",
                            engine_worker_name(e, global), how, operation,
                            (g_get_monotonic_time() - since_us) / 1000),
                true);
}

static void describe_operation(Engine *e, EngineStatus *out)
{
    const uint64_t step = atomic_load(&e->step_now);
    const uint32_t number = (uint32_t)(step >> 32), n_rows = (uint32_t)step;
    out->in_step = step != 0;
    if (step == 0) {
        g_strlcpy(out->operation, "its turn between steps", sizeof out->operation);
    } else if (n_rows == 0) {
        g_snprintf(out->operation, sizeof out->operation, "step %u without rows", number);
    } else {
        g_snprintf(out->operation, sizeof out->operation, "step %u of %u rows", number, n_rows);
    }
}

void engine_status(Engine *e, EngineStatus *out)
{
    *out = (EngineStatus){
        .running = atomic_load(&e->running),
        .progress = atomic_load(&e->progress),
        .failed = atomic_load(&e->failed),
        .waiting = atomic_load(&e->waiting),
        .waits_stage = atomic_load(&e->waits_stage),
        .waits_rank = atomic_load(&e->waits_rank),
        .waits_since_us = atomic_load(&e->waits_since_us),
        .wait_expired = atomic_load(&e->wait_expired),
        .step_deadline_us = e->step_deadline_us,
        .flight_deadline_us = engine_flight_deadline_us(e),
        .activations = atomic_load(&e->activations),
        .leads = position_leads(&e->position),
    };
    describe_operation(e, out);
    engine_counters_read(&e->counters, out);
    pthread_mutex_lock(&e->shared.mutex);
    g_strlcpy(out->error, e->shared.error, sizeof out->error);
    g_strlcpy(out->waits_operation, e->shared.waits_operation, sizeof out->waits_operation);
    pthread_mutex_unlock(&e->shared.mutex);
}

uint32_t engine_peers(Engine *e, EnginePeerTraffic out[PLAN_RANKS_LIMIT])
{
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        engine_counters_read_peer(&e->counters, r, &out[r]);
    }
    return e->n_ranks;
}
