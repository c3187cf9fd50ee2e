/* The hellos of an engine's links: STATE_GREETING of the diagram in engine.c. */
#include "worker/serve/engine_state.h"

#include "proto/base/error.h"
#include "proto/plan/rank_span.h"
#include "transport/group/group.h"
#include "worker/peer_link.h"

#include <string.h>

enum {
    HELLO_DEADLINE_US = 10000000,
};

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

void engine_greeting_free(Greeting *g)
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

void engine_greeting_end(Engine *e, const GError *error)
{
    Greeting *g = e->greeting;
    if (g == NULL) {
        return;
    }
    ReadyPost *p = g_new0(ReadyPost, 1);
    *p = (ReadyPost){g->ready, g->user, error != NULL ? g_error_copy(error) : NULL};
    loop_post(g->loop, ready_deliver, p);
    e->greeting = NULL;
    engine_greeting_free(g);
}

static bool connect_peer(Engine *e, const Greeting *g, const EnginePeer *peer, GError **error)
{
    const uint32_t mine = position_global(engine_replica(e), e->position.stage, e->position.rank);
    const uint32_t other = position_global(engine_replica(e), peer->stage, peer->rank);
    const KeyScope scope = {.generation = e->o.generation,
                            .epoch = e->o.epoch,
                            .job = e->o.plan->job,
                            .replica = e->o.replica};
    const PeerLink link = {.secret = g->secret,
                           .scope = scope,
                           .own_boot = g->boot_id,
                           .peer_boot = peer->boot_id,
                           .own = mine,
                           .peer = other,
                           .address = peer->address,
                           .seal = g->seal};
    e->links[other] = peer_link_connect(e->port, &link, error);
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
        .spin_us = ENGINE_SPIN_US,
        .yield = e->crowded,
        .two_shot_bytes = PLAN_TWO_SHOT_BYTES,
    };
    e->group = group_new(&options);
    stage_set_group(e->stage, e->group);
}

static void open_direct(Engine *e)
{
    const DirectOptions options = {.port = e->port,
                                   .stage = e->stage,
                                   .position = e->position,
                                   .links = e->links,
                                   .n_due = engine_limits_inbox(engine_replica(e)),
                                   .sealed = e->greeting->seal,
                                   .trivial_bytes = e->o.direct_trivial};
    e->direct = direct_new(&options);
}

static void send_hellos(Engine *e)
{
    GError *error = NULL;
    g_autoptr(GByteArray) hello = NULL;
    if (!engine_group_hello(e, &hello, &error)) {
        engine_fail(e, error, true);
        return;
    }
    const LinkPart part = {hello->data, hello->len};
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL && link_send(e->links[r], LINK_OP_HELLO, direct_hello(e->direct), 0,
                                             &part, hello->len > 0) != LINK_OK) {
            engine_fail_waiting(e, r, "hello", e->greeting_since_us, "cannot be reached");
            return;
        }
    }
}

void engine_greeting_begin(Engine *e, Greeting *g)
{
    GError *error = NULL;
    e->greeting = g;
    e->greeting_since_us = g_get_monotonic_time();
    link_port_set_crowded(e->port, e->crowded);
    if (e->leader != NULL) {
        leader_set_stages_at_once(e->leader, atomic_load(&e->stages_at_once));
    }
    e->state = STATE_GREETING;
    for (uint32_t i = 0; i < g->n_peers; i++) {
        const EnginePeer *peer = &g->peers[i];
        const uint32_t global = position_global(engine_replica(e), peer->stage, peer->rank);
        g_free(e->names[global]);
        e->names[global] = g_strdup(g->workers[i]);
        if (position_talks_to(&e->position, peer->stage, peer->rank) &&
            !connect_peer(e, g, peer, &error)) {
            engine_fail(e, error, false);
            return;
        }
    }
    open_group(e);
    open_direct(e);
    const ExecutorOptions options = {.stage = e->stage,
                                     .limits = e->limits,
                                     .position = e->position,
                                     .links = e->links,
                                     .direct = e->direct,
                                     .wait = engine_steps_wait,
                                     .wait_for_room = engine_steps_wait_for_room,
                                     .user = e,
                                     .deadline_us = e->step_deadline_us,
                                     .flight_deadline_us = engine_flight_deadline_us(e)};
    e->executor = executor_new(&options);
    send_hellos(e);
}

void engine_greeting_check(Engine *e)
{
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL && !e->greeted[r]) {
            if (g_get_monotonic_time() - e->greeting_since_us > HELLO_DEADLINE_US) {
                engine_fail_waiting(e, r, "hello", e->greeting_since_us, "did not answer");
            }
            return;
        }
    }
    if (!engine_group_open(e)) {
        return;
    }
    atomic_store(&e->activations, direct_describe(e->direct));
    e->state = STATE_RUNNING;
    e->idle_since_us = g_get_monotonic_time();
    atomic_store(&e->running, true);
    engine_greeting_end(e, NULL);
}
