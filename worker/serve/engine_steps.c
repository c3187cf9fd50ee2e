#include "worker/serve/engine_state.h"

#include "kernels/parallel.h"
#include "proto/base/error.h"
#include "transport/group/group.h"
#include "worker/host_turn.h"

#define TURN_US 1000000       /* for the CPUs of several stages, ... */
#define TURN_REST_US 10000000 /* ... then without for so long */
#define TURN_LOOK_US 50u      /* between two looks */
#define ROOM_LOOK_US 1000     /* room in a link makes nobody wake */

bool engine_steps_wait(const bool *done, int64_t deadline_us, uint32_t global_rank,
                       const char *operation, void *user)
{
    Engine *e = user;
    const int64_t start = g_get_monotonic_time();
    const NetTime net = net_time_begin(e->port);
    engine_report_wait(e, (int)global_rank, operation, start);
    while (!*done && !atomic_load(&e->abort) && e->state != STATE_FAILED) {
        const int64_t left = start + deadline_us - g_get_monotonic_time();
        if (left <= 0) {
            break;
        }
        link_port_wait(e->port, MIN(left, ENGINE_IDLE_WAIT_US), ENGINE_SPIN_US);
        atomic_fetch_add(&e->progress, 1);
    }
    const uint64_t waited = net_time_us(&net, e->port);
    e->waited_us += waited;
    engine_counters_peer_wait(&e->counters, global_rank, waited);
    if (waited >= ENGINE_STALL_US) {
        engine_counters_peer_stall(&e->counters, global_rank);
    }
    if (*done) {
        engine_report_wait(e, -1, "", 0);
    }
    return *done;
}

bool engine_steps_wait_for_room(int64_t since_us, uint32_t global_rank, const char *operation,
                                void *user)
{
    Engine *e = user;
    if (atomic_load(&e->abort) || e->state == STATE_FAILED ||
        g_get_monotonic_time() - since_us >= e->step_deadline_us) {
        return false;
    }
    const NetTime net = net_time_begin(e->port);
    engine_report_wait(e, (int)global_rank, operation, since_us);
    link_port_wait(e->port, ROOM_LOOK_US, ENGINE_SPIN_US);
    engine_report_wait(e, -1, "", 0);
    atomic_fetch_add(&e->progress, 1);
    const uint64_t waited = net_time_us(&net, e->port);
    e->waited_us += waited;
    engine_counters_peer_wait(&e->counters, global_rank, waited);
    return true;
}

static uint64_t waited_us(const Engine *e)
{
    return e->waited_us + (e->group != NULL ? group_counters(e->group)->wait_us : 0);
}

/* Its CPUs for one step, where other stages have them, too (cpu_share.h): a turn for
 * host_turn_end(). Whoever has them for long may have been stopped: then without. */
static int take_cpus(Engine *e)
{
    const int64_t start_us = g_get_monotonic_time();
    int64_t waited_us = 0;
    int turn = HOST_TURN_WITHOUT;
    if (e->cpu_turn == NULL || start_us < e->no_turn_until_us) {
        return turn;
    }
    while ((turn = host_turn_try(e->cpu_turn)) == HOST_TURN_TAKEN && waited_us < TURN_US &&
           !atomic_load(&e->abort) && e->state != STATE_FAILED) {
        g_usleep(TURN_LOOK_US);
        engine_report_progress(e);
        waited_us = g_get_monotonic_time() - start_us;
    }
    if (waited_us >= TURN_US) {
        e->no_turn_until_us = start_us + waited_us + TURN_REST_US;
    }
    e->waited_us += (uint64_t)waited_us;
    return turn;
}

static void run_step(Engine *e, const float *activations)
{
    const RowResult *results;
    uint32_t n;
    const int64_t start = g_get_monotonic_time();
    const NetTime net = net_time_begin(e->port);
    const uint64_t waited_before = waited_us(e);
    engine_report_wait(e, -1, "", 0);
    atomic_store(&e->step_now, (uint64_t)e->step->number << 32 | e->step->n_rows);
    pool_float_control(); /* for what this thread computes between regions: lookups, draws */
    const int turn = take_cpus(e);
    const ExecutorStatus status = executor_run(e->executor, e->step, activations, &results, &n);
    host_turn_end(turn);
    atomic_store(&e->step_now, 0);
    const uint64_t took = net_time_us(&net, e->port), waited = waited_us(e) - waited_before;
    engine_counters_step(&e->counters, e->step->n_rows, took > waited ? took - waited : 0, waited);
    engine_counters_ops(&e->counters, &e->stage->times);
    engine_links_count(e);
    e->idle_since_us = g_get_monotonic_time();
    if (status == EXECUTOR_DEVICE) {
        GError *error = g_error_copy(e->stage->failure);
        g_prefix_error(&error, "stage %u rank %u: ", e->position.stage, e->position.rank);
        engine_fail(e, error, true);
    } else if (status != EXECUTOR_OK) {
        const char *operation;
        const int blamed = executor_blames(e->executor, &operation);
        if (blamed >= 0 || e->state != STATE_FAILED) { /* or the epoch ended: nobody to blame */
            engine_fail_waiting(e, blamed < 0 ? 0 : (uint32_t)blamed, operation, start,
                                "did not answer");
        }
    } else if (e->leader != NULL && position_is_last(&e->position)) {
        const GByteArray *traced = executor_trace(e->executor);
        if (traced != NULL) {
            leader_trace(e->leader, traced->data, traced->len);
        }
        leader_result(e->leader, e->step->number, results, n);
    }
}

static bool run_inbox(Engine *e)
{
    const InboxSlot *slot = inbox_peek(&e->inbox);
    if (slot == NULL) {
        return false;
    }
    GError *error = NULL;
    size_t used;
    if (!step_decode(e->step, &e->limits, slot->data, slot->size, &used, &error)) {
        engine_fail(e, error, true);
        return true;
    }
    e->step->number = slot->number;
    const bool apart = direct_is_due(e->direct, slot->number);
    const size_t want = e->position.stage == 0 || apart
                            ? 0
                            : sizeof(float) * e->step->n_rows * (size_t)e->o.spec->width;
    if (slot->size - used != want) {
        engine_fail(e,
                    g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                "step %u brings %zu bytes of activations, not %zu", slot->number,
                                slot->size - used, want),
                    true);
        return true;
    }
    run_step(e, apart ? NULL : (const float *)(slot->data + used));
    inbox_pop(&e->inbox);
    return true;
}

uint32_t engine_steps_token_rank(const Engine *e)
{
    const PlanReplica *replica = engine_replica(e);
    return e->n_ranks - replica->stages[e->position.n_stages - 1].n_ranks;
}

/* A leader's step that never comes back (invariant 2). */
static void check_flight(Engine *e)
{
    uint32_t number;
    const int64_t built = leader_oldest_step_us(e->leader, &number);
    const uint32_t last = engine_steps_token_rank(e);
    const int64_t waited_us = g_get_monotonic_time() - built;
    if (built == 0) {
        engine_report_wait(e, -1, "", 0);
        return;
    }
    engine_report_wait(e, (int)last, "tokens of a step", built);
    if (waited_us >= ENGINE_STALL_US && e->stalled_step != number) {
        e->stalled_step = number;
        engine_counters_peer_stall(&e->counters, last);
    }
    if (waited_us > engine_flight_deadline_us(e)) {
        engine_fail_waiting(e, last, "tokens of a step", built, "did not answer");
    }
}

/* What an idle rank waits for: the coordinator follows these edges to the culprit. */
void engine_steps_report_idle(Engine *e)
{
    const Position *p = &e->position;
    if (e->leader != NULL) {
        check_flight(e);
    } else if (p->stage == 0) {
        engine_report_wait(e, (int)p->base, "a step", e->idle_since_us);
    } else {
        engine_report_wait(e, (int)(p->base_previous + p->rank % p->tp_previous), "a step",
                           e->idle_since_us);
    }
}

bool engine_steps_work(Engine *e)
{
    if (e->leader != NULL) {
        EngineLoad load;
        leader_load(e->leader, &load);
        engine_counters_load(&e->counters, &load);
        if (leader_next(e->leader, e->step)) {
            run_step(e, NULL);
            return true;
        }
        return false;
    }
    return run_inbox(e);
}
