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
 * means a stuck engine. */
#include "worker/serve/engine.h"

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "transport/crypto/keys.h"
#include "transport/group/group.h"
#include "worker/serve/engine_counters.h"
#include "worker/serve/executor.h"
#include "worker/serve/inbox.h"
#include "worker/serve/leader.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum {
    STEP_DEADLINE_US = 2000000, /* at least (DESIGN 7.6) */
    HELLO_DEADLINE_US = 10000000,
    IDLE_WAIT_US = 400000, /* invariant 4 */
    SLOT_PAGES = 8,
    SLOT_TABLE_IDS = 1 << 20,
    SLOTS_AT_MOST = 64,
    SPIN_US = 200, /* WIRE.md: longer than the usual wait, shorter than a wake-up hurts */
};

typedef enum EngineState {
    STATE_OPENED,
    STATE_GREETING,
    STATE_RUNNING,
    STATE_FAILED,
    STATE_STOPPED
} EngineState;

typedef enum CommandKind {
    COMMAND_START,
    COMMAND_SUBMIT,
    COMMAND_CANCEL,
    COMMAND_ABORT,
    COMMAND_QUIT
} CommandKind;

typedef struct Greeting {
    uint8_t secret[32], boot_id[16];
    bool seal;
    EnginePeer *peers;
    char **workers;
    uint32_t n_peers;
    Loop *loop;
    void (*ready)(const GError *error, void *user);
    void *user;
} Greeting;

typedef struct Command {
    CommandKind kind;
    Greeting *greeting;
    LeaderRequest *request;
    uint64_t request_id;
    GError *error;
} Command;

struct Engine {
    EngineOptions o;
    Position position;
    StepLimits limits;
    uint32_t n_ranks; /* of the replica */
    GThread *thread;
    /* engine thread */
    EngineState state;
    LinkPort *port;
    Pool *pool;
    Stage *stage;
    Group *group;
    Executor *executor;
    Leader *leader;
    Link *links[PLAN_RANKS_LIMIT];
    char *names[PLAN_RANKS_LIMIT]; /* node ids by global rank */
    bool greeted[PLAN_RANKS_LIMIT];
    Greeting *greeting;
    int64_t greeting_since_us;
    Step *step;
    Inbox inbox;
    uint32_t steps_in_flight;
    uint64_t waited_us; /* in executor_wait() */
    int64_t step_deadline_us;
    int64_t idle_since_us;
    bool closed, tell;
    /* shared */
    struct {
        pthread_mutex_t mutex; /* commands, text of status */
        pthread_cond_t opened;
        LinkPort *wake; /* the port, while it may be interrupted */
        GQueue commands;
        bool open_done;
        GError *open_error;
        GBytes *address;
        char error[256];
        char waits_operation[64];
    } shared;
    EngineCounters counters;
    atomic_bool crowded, abort, running, failed, has_work, waiting, wait_expired;
    atomic_uint waits_stage, waits_rank;
    atomic_llong waits_since_us;
    atomic_ullong progress, next_request;
};

/* ---- small things ---- */

static void count_progress(void *user)
{
    Engine *e = user;
    atomic_fetch_add_explicit(&e->progress, 1, memory_order_relaxed);
    link_port_progress(e->port);
}

static const char *name_of(const Engine *e, uint32_t rank)
{
    return rank < PLAN_RANKS_LIMIT && e->names[rank] != NULL ? e->names[rank] : "?";
}

static const PlanReplica *replica_of(const Engine *e)
{
    return &e->o.plan->replicas[e->o.replica];
}

static void report_wait(Engine *e, int global, const char *operation, int64_t since_us)
{
    if (global < 0) {
        atomic_store(&e->waiting, false);
        return;
    }
    uint32_t stage, rank;
    position_split(replica_of(e), (uint32_t)global, &stage, &rank);
    pthread_mutex_lock(&e->shared.mutex);
    g_strlcpy(e->shared.waits_operation, operation, sizeof e->shared.waits_operation);
    pthread_mutex_unlock(&e->shared.mutex);
    atomic_store(&e->waits_stage, stage);
    atomic_store(&e->waits_rank, rank);
    atomic_store(&e->waits_since_us, since_us);
    atomic_store(&e->waiting, true);
}

static void tell_peers(Engine *e, const char *why)
{
    const LinkPart part = {why, strlen(why)};
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL && !link_is_dead(e->links[r])) {
            link_send(e->links[r], LINK_OP_ABORT, 0, 0, &part, 1);
        }
    }
}

typedef struct ReadyPost {
    void (*ready)(const GError *error, void *user);
    void *user;
    GError *error;
} ReadyPost;

static void ready_deliver(void *user)
{
    ReadyPost *p = user;
    p->ready(p->error, p->user);
    g_clear_error(&p->error);
    g_free(p);
}

static void greeting_free(Greeting *g)
{
    if (g == NULL) {
        return;
    }
    for (uint32_t i = 0; i < g->n_peers; i++) {
        g_bytes_unref(g->peers[i].address);
        g_free(g->workers[i]);
    }
    keys_erase(g->secret, sizeof g->secret);
    g_free(g->peers);
    g_free(g->workers);
    g_free(g);
}

static void greeting_end(Engine *e, const GError *error)
{
    Greeting *g = e->greeting;
    if (g == NULL) {
        return;
    }
    ReadyPost *p = g_new0(ReadyPost, 1);
    *p = (ReadyPost){g->ready, g->user, error != NULL ? g_error_copy(error) : NULL};
    loop_post(g->loop, ready_deliver, p);
    e->greeting = NULL;
    greeting_free(g);
}

/* Invariant 2. The first reason stays. */
static void fail(Engine *e, GError *error /* taken */, bool tell)
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
    atomic_store(&e->has_work, false);
    e->tell = tell; /* by turn(): this may run inside a link callback, where nothing may be sent */
    greeting_end(e, error);
    if (e->leader != NULL) {
        leader_fail(e->leader, error);
    }
    g_error_free(error);
}

static void fail_waiting(Engine *e, uint32_t global, const char *operation, int64_t since_us,
                         const char *how)
{
    report_wait(e, (int)global, operation, since_us);
    atomic_store(&e->wait_expired, true);
    fail(e,
         g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                     "worker %s %s during %s (%" G_GINT64_FORMAT " ms)", name_of(e, global), how,
                     operation, (g_get_monotonic_time() - since_us) / 1000),
         true);
}

/* ---- links ---- */

static void on_step_message(Engine *e, const LinkHeader *header, const void *payload)
{
    GError *error = NULL;
    if (!inbox_push(&e->inbox, header->step, payload, header->length, &error)) {
        fail(e, error, true);
    }
}

static void on_tokens(Engine *e, const LinkHeader *header, const void *payload)
{
    const RowResult *results;
    uint32_t n;
    if (e->leader == NULL ||
        !executor_decode_results(e->executor, payload, header->length, &results, &n)) {
        fail(e,
             g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "malformed token message of %u bytes",
                         header->length),
             true);
        return;
    }
    leader_result(e->leader, header->step, results, n);
}

/* The leader has no stage before it: what it gets is from the last one. */
static void on_trace(Engine *e, const LinkHeader *header, const void *payload)
{
    if (e->leader == NULL) {
        executor_receive_trace(e->executor, header->step, payload, header->length);
    } else if (!leader_trace(e->leader, payload, header->length)) {
        fail(e,
             g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL, "malformed trace message of %u bytes",
                         header->length),
             true);
    }
}

static void on_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    Engine *e = user;
    const uint32_t from = link_peer(link);
    if (e->executor == NULL && header->op != LINK_OP_HELLO && header->op != LINK_OP_ABORT) {
        return; /* the greeting failed: nothing is run any more */
    }
    switch (header->op) {
    case LINK_OP_HELLO:
        e->greeted[from] = true;
        break;
    case LINK_OP_STEP:
        on_step_message(e, header, payload);
        break;
    case LINK_OP_PARTIAL:
        if (e->group != NULL) {
            group_receive(e->group, link, header, payload);
        }
        break;
    case LINK_OP_SAMPLE:
        if (from >= e->position.base && from < e->position.base + e->position.tp) {
            executor_receive_sample(e->executor, from - e->position.base, header->step, payload,
                                    header->length);
        }
        break;
    case LINK_OP_TOKEN:
        on_tokens(e, header, payload);
        break;
    case LINK_OP_TRACE:
        on_trace(e, header, payload);
        break;
    case LINK_OP_ABORT: {
        g_autofree char *why = g_strndup(payload, MIN(header->length, 200u));
        fail(e, g_error_new_literal(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, why), false);
        atomic_store(&e->abort, true); /* a collective that is waiting gives up */
        break;
    }
    default:
        break; /* newer op of the same protocol version: not for this rank */
    }
}

static void on_dead(Link *link, const char *why, void *user)
{
    Engine *e = user;
    const char *operation = "waiting";
    int64_t since = g_get_monotonic_time();
    if (e->group != NULL && group_waits_for(e->group, &operation, &since) < 0) {
        operation = e->state == STATE_GREETING ? "hello" : "a step";
    }
    report_wait(e, (int)link_peer(link), operation, since);
    atomic_store(&e->wait_expired, true);
    fail(e,
         g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                     "worker %s lost its connection during %s (%s)", name_of(e, link_peer(link)),
                     operation, why),
         true);
    atomic_store(&e->abort, true);
}

static bool connect_peer(Engine *e, const Greeting *g, const EnginePeer *peer, GError **error)
{
    const uint32_t mine = position_global(replica_of(e), e->position.stage, e->position.rank);
    const uint32_t other = position_global(replica_of(e), peer->stage, peer->rank);
    const KeyScope scope = {.generation = e->o.generation,
                            .epoch = e->o.epoch,
                            .job = e->o.plan->job,
                            .replica = e->o.replica};
    LinkConnect connect = {.address = peer->address, .peer = other, .seal = g->seal};
    connect.handle = keys_handle(g->secret, &scope, MIN(mine, other), MAX(mine, other));
    keys_derive(g->secret, &scope, g->boot_id, peer->boot_id, mine, other, connect.send_key);
    keys_derive(g->secret, &scope, peer->boot_id, g->boot_id, other, mine, connect.receive_key);
    e->links[other] = link_connect(e->port, &connect, error);
    keys_erase(&connect, sizeof connect);
    return e->links[other] != NULL;
}

static void open_group(Engine *e)
{
    if (e->position.tp < 2) {
        return;
    }
    const GroupOptions options = {
        .port = e->port,
        .n_ranks = e->position.tp,
        .rank = e->position.rank,
        .links = e->links + e->position.base,
        .abort = &e->abort,
        .spin_us = SPIN_US,
        .yield = e->crowded,
        .two_shot_bytes = 256 << 10,
    };
    e->group = group_new(&options);
    stage_set_group(e->stage, e->group);
}

static bool executor_wait(const bool *done, int64_t deadline_us, uint32_t global_rank,
                          const char *operation, void *user)
{
    Engine *e = user;
    const int64_t start = g_get_monotonic_time();
    const NetTime net = net_time_begin(e->port);
    report_wait(e, (int)global_rank, operation, start);
    while (!*done && !atomic_load(&e->abort) && e->state != STATE_FAILED) {
        const int64_t left = start + deadline_us - g_get_monotonic_time();
        if (left <= 0) {
            break;
        }
        link_port_wait(e->port, MIN(left, IDLE_WAIT_US), SPIN_US);
        atomic_fetch_add(&e->progress, 1);
    }
    e->waited_us += net_time_us(&net, e->port);
    if (*done) {
        report_wait(e, -1, "", 0);
    }
    return *done;
}

static void begin_greeting(Engine *e, Greeting *g)
{
    GError *error = NULL;
    e->greeting = g;
    e->greeting_since_us = g_get_monotonic_time();
    link_port_set_crowded(e->port, e->crowded);
    e->state = STATE_GREETING;
    for (uint32_t i = 0; i < g->n_peers; i++) {
        const EnginePeer *peer = &g->peers[i];
        const uint32_t global = position_global(replica_of(e), peer->stage, peer->rank);
        g_free(e->names[global]);
        e->names[global] = g_strdup(g->workers[i]);
        if (position_talks_to(&e->position, peer->stage, peer->rank) &&
            !connect_peer(e, g, peer, &error)) {
            fail(e, error, false);
            return;
        }
    }
    open_group(e);
    const ExecutorOptions options = {.stage = e->stage,
                                     .limits = e->limits,
                                     .position = e->position,
                                     .links = e->links,
                                     .wait = executor_wait,
                                     .user = e,
                                     .deadline_us = e->step_deadline_us};
    e->executor = executor_new(&options);
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL &&
            link_send(e->links[r], LINK_OP_HELLO, 0, 0, NULL, 0) != LINK_OK) {
            fail_waiting(e, r, "hello", e->greeting_since_us, "cannot be reached");
            return;
        }
    }
}

static void check_greeting(Engine *e)
{
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL && !e->greeted[r]) {
            if (g_get_monotonic_time() - e->greeting_since_us > HELLO_DEADLINE_US) {
                fail_waiting(e, r, "hello", e->greeting_since_us, "did not answer");
            }
            return;
        }
    }
    e->state = STATE_RUNNING;
    e->idle_since_us = g_get_monotonic_time();
    atomic_store(&e->running, true);
    greeting_end(e, NULL);
}

/* ---- steps ---- */

static uint64_t waited_us(const Engine *e)
{
    return e->waited_us + (e->group != NULL ? group_counters(e->group)->wait_us : 0);
}

static void run_step(Engine *e, const float *activations)
{
    const RowResult *results;
    uint32_t n;
    const int64_t start = g_get_monotonic_time();
    const NetTime net = net_time_begin(e->port);
    const uint64_t waited_before = waited_us(e);
    report_wait(e, -1, "", 0);
    pool_float_control(); /* for what this thread computes between regions: lookups, draws */
    const ExecutorStatus status = executor_run(e->executor, e->step, activations, &results, &n);
    const uint64_t took = net_time_us(&net, e->port), waited = waited_us(e) - waited_before;
    engine_counters_step(&e->counters, e->step->n_rows, took > waited ? took - waited : 0, waited);
    engine_counters_ops(&e->counters, &e->stage->times);
    engine_counters_link(&e->counters, link_port_counters(e->port));
    e->idle_since_us = g_get_monotonic_time();
    if (status != EXECUTOR_OK) {
        const char *operation;
        const int blamed = executor_blames(e->executor, &operation);
        fail_waiting(e, blamed < 0 ? 0 : (uint32_t)blamed, operation, start, "did not answer");
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
        fail(e, error, true);
        return true;
    }
    e->step->number = slot->number;
    const size_t want =
        e->position.stage == 0 ? 0 : sizeof(float) * e->step->n_rows * (size_t)e->o.spec->width;
    if (slot->size - used != want) {
        fail(e,
             g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                         "step %u brings %zu bytes of activations, not %zu", slot->number,
                         slot->size - used, want),
             true);
        return true;
    }
    run_step(e, (const float *)(slot->data + used));
    inbox_pop(&e->inbox);
    return true;
}

/* A leader's step that never comes back (invariant 2). */
static void check_flight(Engine *e)
{
    uint32_t number;
    const int64_t built = leader_oldest_step_us(e->leader, &number);
    const uint32_t last =
        e->n_ranks - e->o.plan->replicas[e->o.replica].stages[e->position.n_stages - 1].n_ranks;
    if (built == 0) {
        report_wait(e, -1, "", 0);
        return;
    }
    report_wait(e, (int)last, "tokens of a step", built);
    if (g_get_monotonic_time() - built > e->step_deadline_us * (int64_t)e->steps_in_flight) {
        fail_waiting(e, last, "tokens of a step", built, "did not answer");
    }
}

/* What an idle rank waits for: the coordinator follows these edges to the culprit. */
static void report_idle(Engine *e)
{
    const Position *p = &e->position;
    if (e->leader != NULL) {
        check_flight(e);
    } else if (p->stage == 0) {
        report_wait(e, (int)p->base, "a step", e->idle_since_us);
    } else {
        report_wait(e, (int)(p->base_previous + p->rank % p->tp_previous), "a step",
                    e->idle_since_us);
    }
}

static bool work(Engine *e)
{
    if (e->leader != NULL) {
        EngineLoad load;
        leader_load(e->leader, &load);
        engine_counters_load(&e->counters, &load);
        atomic_store(&e->has_work, load.running + load.waiting > 0);
        if (leader_next(e->leader, e->step)) {
            run_step(e, NULL);
            return true;
        }
        return false;
    }
    atomic_store(&e->has_work, inbox_peek(&e->inbox) != NULL);
    return run_inbox(e);
}

/* ---- commands ---- */

static void command_free(Command *c)
{
    greeting_free(c->greeting);
    g_clear_error(&c->error);
    g_free(c);
}

static void push_command(Engine *e, Command *c)
{
    pthread_mutex_lock(&e->shared.mutex);
    g_queue_push_tail(&e->shared.commands, c);
    if (e->shared.wake != NULL) { /* under the lock: the engine thread may be closing the port */
        link_port_interrupt(e->shared.wake);
    }
    pthread_mutex_unlock(&e->shared.mutex);
}

static Command *pop_command(Engine *e)
{
    pthread_mutex_lock(&e->shared.mutex);
    Command *c = g_queue_pop_head(&e->shared.commands);
    pthread_mutex_unlock(&e->shared.mutex);
    return c;
}

static void do_submit(Engine *e, LeaderRequest *request)
{
    if (e->state != STATE_RUNNING || e->leader == NULL) {
        pthread_mutex_lock(&e->shared.mutex);
        g_autoptr(GError) error = g_error_new(
            WEFT_ERROR, WEFT_ERROR_NOT_READY, "the engine does not take requests: %s",
            e->shared.error[0] != '\0' ? e->shared.error : "not started or not the leader");
        pthread_mutex_unlock(&e->shared.mutex);
        leader_request_fail(request, error);
        return;
    }
    leader_submit(e->leader, request);
}

/* False when the engine is to stop. */
static bool do_commands(Engine *e)
{
    Command *c;
    while ((c = pop_command(e)) != NULL) {
        switch (c->kind) {
        case COMMAND_START:
            begin_greeting(e, g_steal_pointer(&c->greeting));
            break;
        case COMMAND_SUBMIT:
            do_submit(e, c->request);
            break;
        case COMMAND_CANCEL:
            if (e->leader != NULL) {
                leader_cancel(e->leader, c->request_id);
            }
            break;
        case COMMAND_ABORT:
            fail(e, g_steal_pointer(&c->error), true);
            break;
        case COMMAND_QUIT:
            command_free(c);
            return false;
        }
        command_free(c);
    }
    return true;
}

/* One turn; *did tells whether anything was done. False = stop. */
static bool turn(Engine *e, bool *did)
{
    atomic_fetch_add(&e->progress, 1);
    while (failpoint("engine-hold", NULL)) {
        g_usleep(10000); /* a stuck engine, for tests of health */
    }
    *did = link_port_progress(e->port) > 0;
    if (!do_commands(e)) {
        return false;
    }
    if (e->tell) {
        e->tell = false;
        tell_peers(e, e->shared.error);
    }
    if (e->state == STATE_GREETING) {
        check_greeting(e);
    } else if (e->state == STATE_RUNNING) {
        *did |= work(e);
        if (!*did) {
            report_idle(e);
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
    link_port_wait(e->port, e->state == STATE_GREETING ? 20000 : IDLE_WAIT_US, busy ? SPIN_US : 0);
    if (flying) {
        engine_counters_wait(&e->counters, net_time_us(&net, e->port));
    }
    engine_counters_link(&e->counters, link_port_counters(e->port));
}

/* ---- opening and closing ---- */

static uint64_t sent_bytes(void *user)
{
    return link_port_counters(((Engine *)user)->port)->bytes_sent;
}

/* The plan has KV memory for `streams` sequences of the whole context; pages are given out as they
 * are needed, so more, shorter ones run at once: as many as have SLOT_PAGES each, while the tables
 * of ids by position stay small. Every rank comes to the same number. */
static uint32_t slots_of(const Plan *plan)
{
    const uint64_t by_pages = plan->kv_pages / SLOT_PAGES,
                   by_tables = SLOT_TABLE_IDS / MAX(plan->definition.context, 1u);
    return (uint32_t)MAX(MIN(MIN(by_pages, by_tables), SLOTS_AT_MOST), MAX(plan->streams, 1u));
}

static StepLimits limits_of(const Plan *plan, const ModelSpec *spec)
{
    return (StepLimits){.max_rows = plan->max_rows,
                        .max_slots = slots_of(plan),
                        .max_pages = (uint32_t)plan->kv_pages,
                        .context = plan->definition.context,
                        .vocab_size = spec->vocab_size};
}

static uint32_t flight_of(const PlanReplica *replica)
{
    return replica->n_stages == 1 ? 1 : replica->n_stages + 1;
}

static uint32_t inbox_slots(const PlanReplica *replica)
{
    return flight_of(replica) + 1;
}

static size_t step_message_limit(const StepLimits *limits, const ModelSpec *spec, uint32_t stage)
{
    return step_wire_limit(limits) +
           (stage == 0 ? 0 : sizeof(float) * (size_t)limits->max_rows * spec->width);
}

size_t engine_buffer_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica,
                           uint32_t stage, uint32_t rank, unsigned threads)
{
    const StepLimits limits = limits_of(plan, spec);
    return stage_buffer_bytes(spec, plan, replica, stage, rank, threads) +
           inbox_bytes(inbox_slots(&plan->replicas[replica]),
                       step_message_limit(&limits, spec, stage)) +
           2 * step_wire_limit(&limits) + sequences_bytes(&limits) +
           (stage == 0 && rank == 0 ? leader_bytes(plan->kv_pages) : 0);
}

static bool open_inbox(Engine *e, GError **error)
{
    return inbox_open(&e->inbox, inbox_slots(&e->o.plan->replicas[e->o.replica]),
                      step_message_limit(&e->limits, e->o.spec, e->position.stage), error);
}

static bool open_all(Engine *e, GError **error)
{
    const LinkPortOptions port = {
        .fill = e->o.fill, .receive = on_receive, .dead = on_dead, .user = e};
    e->port = link_port_open(&port, error);
    if (e->port == NULL) {
        return false;
    }
    e->pool = pool_new(e->o.threads, e->o.cpus, e->o.cpus != NULL && !e->o.inline_run,
                       e->o.crowded ? 0 : SPIN_US);
    const StageOptions stage = {.spec = e->o.spec,
                                .plan = e->o.plan,
                                .replica = e->o.replica,
                                .stage = e->o.stage,
                                .rank = e->o.rank,
                                .shard = e->o.shard,
                                .pool = e->pool,
                                .kernels = e->o.kernels != NULL ? e->o.kernels
                                                                : kernels_get((KernelIsa)e->o.isa),
                                .progress = count_progress,
                                .progress_user = e};
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
    greeting_end(e, why);
    e->state = STATE_STOPPED;
    leader_free(e->leader, why);
    executor_free(e->executor);
    group_free(e->group);
    link_port_close(e->port);
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
    e->position = position_of(options->plan, options->replica, options->stage, options->rank);
    e->limits = limits_of(options->plan, options->spec);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        e->n_ranks += replica->stages[s].n_ranks;
    }
    e->steps_in_flight = flight_of(replica);
    e->step_deadline_us =
        MAX((int64_t)STEP_DEADLINE_US, (int64_t)(5e6 * options->predicted_step_s));
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

static void drop_commands(Engine *e)
{
    g_autoptr(GError) why =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_STALE, "the engine was stopped");
    Command *c;
    while ((c = pop_command(e)) != NULL) {
        if (c->kind == COMMAND_SUBMIT) {
            leader_request_fail(c->request, why);
        }
        command_free(c);
    }
}

void engine_free(Engine *e)
{
    if (e == NULL) {
        return;
    }
    atomic_store(&e->abort, true);
    if (e->thread != NULL) {
        Command *quit = g_new0(Command, 1);
        quit->kind = COMMAND_QUIT;
        push_command(e, quit);
        g_thread_join(e->thread);
    } else if (!e->closed) {
        close_all(e);
    }
    drop_commands(e);
    for (uint32_t r = 0; r < PLAN_RANKS_LIMIT; r++) {
        g_free(e->names[r]);
    }
    g_clear_pointer(&e->shared.address, g_bytes_unref);
    pthread_mutex_destroy(&e->shared.mutex);
    pthread_cond_destroy(&e->shared.opened);
    g_free(e);
}

/* ---- the outside ---- */

GBytes *engine_address(Engine *e)
{
    return g_bytes_ref(e->shared.address);
}

void engine_start(Engine *e, const uint8_t secret[32], const uint8_t own_boot_id[16], bool seal,
                  const EnginePeer *peers, uint32_t n_peers, Loop *loop,
                  void (*ready)(const GError *error, void *user), void *user)
{
    Greeting *g = g_new0(Greeting, 1);
    memcpy(g->secret, secret, sizeof g->secret);
    memcpy(g->boot_id, own_boot_id, sizeof g->boot_id);
    g->seal = seal;
    g->n_peers = n_peers;
    g->peers = g_memdup2(peers, sizeof *peers * n_peers);
    g->workers = g_new0(char *, n_peers);
    for (uint32_t i = 0; i < n_peers; i++) {
        g_bytes_ref(g->peers[i].address);
        g->workers[i] = g_strdup(peers[i].worker);
    }
    g->loop = loop;
    g->ready = ready;
    g->user = user;
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_START;
    c->greeting = g;
    push_command(e, c);
}

void engine_set_crowded(Engine *e)
{
    atomic_store(&e->crowded, true);
}

bool engine_step(Engine *e)
{
    bool did = false;
    turn(e, &did);
    return did;
}

uint64_t engine_submit(Engine *e, const EngineRequest *request, Loop *loop, EngineTokenFn fn,
                       void *user)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_SUBMIT;
    c->request_id = atomic_fetch_add(&e->next_request, 1) + 1;
    c->request = leader_request_new(c->request_id, request, loop, fn, user);
    const uint64_t id = c->request_id;
    atomic_store(&e->has_work, true); /* a stuck engine does not say so itself */
    push_command(e, c);
    return id;
}

void engine_cancel(Engine *e, uint64_t request_id)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_CANCEL;
    c->request_id = request_id;
    push_command(e, c);
}

void engine_abort(Engine *e, const GError *why)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_ABORT;
    c->error = g_error_copy(why);
    atomic_store(&e->abort, true);
    push_command(e, c);
}

void engine_status(Engine *e, EngineStatus *out)
{
    *out = (EngineStatus){
        .running = atomic_load(&e->running),
        .has_work = atomic_load(&e->has_work),
        .progress = atomic_load(&e->progress),
        .failed = atomic_load(&e->failed),
        .waiting = atomic_load(&e->waiting),
        .waits_stage = atomic_load(&e->waits_stage),
        .waits_rank = atomic_load(&e->waits_rank),
        .waits_since_us = atomic_load(&e->waits_since_us),
        .wait_expired = atomic_load(&e->wait_expired),
        .step_deadline_us = e->step_deadline_us,
        .leads = position_leads(&e->position),
    };
    engine_counters_read(&e->counters, out);
    pthread_mutex_lock(&e->shared.mutex);
    g_strlcpy(out->error, e->shared.error, sizeof out->error);
    g_strlcpy(out->waits_operation, e->shared.waits_operation, sizeof out->waits_operation);
    pthread_mutex_unlock(&e->shared.mutex);
}
