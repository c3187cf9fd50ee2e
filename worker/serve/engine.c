/* The engine's thread: commands in, steps through, events out.
 *
 *   OPENED --engine_start--> GREETING --all hellos--> RUNNING --engine_free--> STOPPED
 *                               |                        |
 *                               '---dead, deadline, abort---> FAILED --engine_free--> STOPPED
 *
 * Invariants
 *   1. Everything but `shared` belongs to the engine thread (inline_run: to the caller of
 * engine_step).
 *   2. No wait is longer than the step deadline, and each names whom it waits for; a failed engine
 * tells its peers (LINK_OP_ABORT) and waits for nothing more.
 *   3. Steps run in the order of their numbers; the inbox never holds more than the leader lets
 * fly.
 *   4. `progress` rises at every op and at least twice a second when idle, so that a still counter
 * means a stuck engine. Steps come at least once a second where the agent asks the leader for
 * canaries (engine_canary), so that none for long means a replica that would not serve. */
#include "worker/serve/engine_state.h"

#include "kernels/parallel.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "transport/group/group.h"

/* Stuck engines, for tests of health: all of the process, or the rank that is named. */
static void stand_still(const Engine *e)
{
    int64_t rank;
    if (failpoint("engine-hold-rank", &rank) && rank != e->position.base + e->position.rank) {
        return;
    }
    while (failpoint("engine-hold", NULL)) {
        g_usleep(10000);
    }
    while (failpoint("engine-spin", NULL)) {
    }
}

/* One turn; *did tells whether anything was done. False = stop. */
static bool turn(Engine *e, bool *did)
{
    atomic_fetch_add(&e->progress, 1);
    stand_still(e);
    *did = link_port_progress(e->port) > 0;
    if (!engine_commands_run(e)) {
        return false;
    }
    if (e->tell) {
        e->tell = false;
        engine_links_tell(e, e->shared.error);
    }
    if (e->state == STATE_GREETING) {
        engine_greeting_check(e);
    } else if (e->state == STATE_RUNNING && !failpoint("engine-skip", NULL)) {
        *did |= engine_steps_work(e);
        if (!*did) {
            engine_steps_report_idle(e);
        }
    }
    return true;
}

/* Sleeps shortly while something is expected, long when nothing is. */
static void rest(Engine *e)
{
    const int64_t now = g_get_monotonic_time();
    const bool busy = e->state == STATE_RUNNING && now - e->idle_since_us < 50000;
    const bool flying = e->leader != NULL && leader_steps_in_flight(e->leader) > 0;
    const NetTime net = net_time_begin(e->port);
    link_port_wait(e->port, e->state == STATE_GREETING ? 20000 : ENGINE_IDLE_WAIT_US,
                   busy ? ENGINE_SPIN_US : 0);
    if (flying) {
        const uint64_t waited = net_time_us(&net, e->port);
        engine_counters_wait(&e->counters, waited);
        engine_counters_peer_wait(&e->counters, engine_steps_token_rank(e), waited);
    }
    engine_links_count(e);
}

static uint64_t sent_bytes(void *user)
{
    return link_port_counters(((Engine *)user)->port)->bytes_sent;
}

static bool open_inbox(Engine *e, GError **error)
{
    return inbox_open(&e->inbox, engine_limits_inbox(&e->o.plan->replicas[e->o.replica]),
                      engine_limits_message(&e->limits, e->o.spec, e->position.stage), error);
}

static bool open_all(Engine *e, GError **error)
{
    const LinkPortOptions port = {
        .fill = e->o.fill, .receive = engine_links_receive, .dead = engine_links_dead, .user = e};
    e->port = link_port_open(&port, error);
    if (e->port == NULL) {
        return false;
    }
    e->pool = pool_new(e->o.threads, e->o.cpus, e->o.cpus != NULL && !e->o.inline_run,
                       e->o.crowded ? 0 : ENGINE_SPIN_US);
    const StageOptions stage = {.spec = e->o.spec,
                                .plan = e->o.plan,
                                .replica = e->o.replica,
                                .stage = e->o.stage,
                                .rank = e->o.rank,
                                .shard = e->o.shard,
                                .pool = e->pool,
                                .kernels = e->o.kernels != NULL ? e->o.kernels
                                                                : kernels_get((KernelIsa)e->o.isa),
                                .progress = engine_report_progress,
                                .progress_user = e,
                                .abort = &e->abort};
    e->stage = stage_new(&stage, error);
    if (e->stage == NULL || !open_inbox(e, error)) {
        return false;
    }
    e->step = step_new(&e->limits);
    if (position_leads(&e->position)) {
        const LeaderOptions leader = {.limits = e->limits,
                                      .kv_pages = e->o.plan->kv_pages,
                                      .definition = definition_hash(&e->o.plan->definition),
                                      .n_stages = e->position.n_stages,
                                      .steps_in_flight = e->steps_in_flight,
                                      .wire_bytes = sent_bytes,
                                      .user = e};
        e->leader = leader_new(&leader);
    }
    e->shared.address = link_port_address(e->port);
    e->shared.wake = e->port;
    return true;
}

static void close_all(Engine *e)
{
    pthread_mutex_lock(&e->shared.mutex);
    e->shared.wake = NULL;
    pthread_mutex_unlock(&e->shared.mutex);
    g_autoptr(GError) why =
        g_error_new(WEFT_ERROR, WEFT_ERROR_STALE,
                    "the deployment's epoch %" G_GUINT64_FORMAT " ended", e->o.epoch);
    engine_greeting_end(e, why);
    e->state = STATE_STOPPED;
    leader_free(e->leader, why);
    executor_free(e->executor);
    group_free(e->group);
    link_port_close(e->port);
    direct_free(e->direct); /* now that nothing is on its way to or from the stage's memory */
    stage_free(e->stage);
    pool_free(e->pool);
    step_free(e->step);
    inbox_clear(&e->inbox);
    e->closed = true;
}

static gpointer thread_main(gpointer user)
{
    Engine *e = user;
    GError *error = NULL;
    const bool open = open_all(e, &error);
    pthread_mutex_lock(&e->shared.mutex);
    e->shared.open_done = true;
    e->shared.open_error = error;
    pthread_cond_signal(&e->shared.opened);
    pthread_mutex_unlock(&e->shared.mutex);
    bool did = false;
    while (open && turn(e, &did)) {
        if (!did) {
            rest(e);
        }
    }
    close_all(e);
    return NULL;
}

Engine *engine_new(const EngineOptions *options, GError **error)
{
    Engine *e = g_new0(Engine, 1);
    const PlanReplica *replica = &options->plan->replicas[options->replica];
    e->o = *options;
    atomic_init(&e->crowded, options->crowded);
    atomic_init(&e->stages_at_once, UINT32_MAX);
    e->position = position_of(options->plan, options->replica, options->stage, options->rank);
    e->limits = engine_limits(options->plan, options->spec);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        e->n_ranks += replica->stages[s].n_ranks;
    }
    e->steps_in_flight = engine_limits_flight(replica);
    e->step_deadline_us =
        MAX((int64_t)ENGINE_STEP_DEADLINE_US, (int64_t)(5e6 * options->predicted_step_s));
    pthread_mutex_init(&e->shared.mutex, NULL);
    pthread_cond_init(&e->shared.opened, NULL);
    g_queue_init(&e->shared.commands);
    GError *failed = NULL;
    if (options->inline_run) {
        open_all(e, &failed);
    } else {
        e->thread = g_thread_new("engine", thread_main, e);
        pthread_mutex_lock(&e->shared.mutex);
        while (!e->shared.open_done) {
            pthread_cond_wait(&e->shared.opened, &e->shared.mutex);
        }
        failed = g_steal_pointer(&e->shared.open_error);
        pthread_mutex_unlock(&e->shared.mutex);
    }
    if (failed != NULL) {
        if (e->thread != NULL) { /* it is closing by itself */
            g_thread_join(g_steal_pointer(&e->thread));
        }
        g_propagate_error(error, failed);
        engine_free(e);
        return NULL;
    }
    return e;
}

void engine_free(Engine *e)
{
    if (e == NULL) {
        return;
    }
    atomic_store(&e->abort, true);
    if (e->thread != NULL) {
        engine_commands_quit(e);
        g_thread_join(e->thread);
    } else if (!e->closed) {
        close_all(e);
    }
    engine_commands_drop(e);
    for (uint32_t r = 0; r < PLAN_RANKS_LIMIT; r++) {
        g_free(e->names[r]);
    }
    g_free(e->cpu_turn);
    g_clear_pointer(&e->shared.address, g_bytes_unref);
    pthread_mutex_destroy(&e->shared.mutex);
    pthread_cond_destroy(&e->shared.opened);
    g_free(e);
}

GBytes *engine_address(Engine *e)
{
    return g_bytes_ref(e->shared.address);
}

void engine_set_crowded(Engine *e)
{
    atomic_store(&e->crowded, true);
}

void engine_set_stages_at_once(Engine *e, uint32_t n)
{
    atomic_store(&e->stages_at_once, n);
}

void engine_set_cpu_turn(Engine *e, const char *name)
{
    g_free(e->cpu_turn);
    e->cpu_turn = g_strdup(name);
}

bool engine_step(Engine *e)
{
    bool did = false;
    turn(e, &did);
    return did;
}
