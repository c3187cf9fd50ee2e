/* Links of a training engine: made and greeted once per epoch; then messages go to the groups, and
 * a peer's death or word that it failed ends the epoch here too. */
#include "proto/base/error.h"
#include "worker/peer_link.h"
#include "worker/train/train_engine_state.h"

#include <string.h>

enum {
    HELLO_DEADLINE_US = 10000000,
    /* flags of a hello: */
    HELLO_BUILT = 1, /* the sender has its state, too */
    HELLO_SAVES = 2, /* it begins its next checkpoint */
};

void train_greeting_free(TrainGreeting *g)
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

static const char *worker_of(const TrainEngine *e, uint32_t global)
{
    const TrainPosition *p = &e->position;
    const PlanReplica *replica = &e->o.plan->replicas[global / (p->pp * p->tp)];
    return replica->stages[global / p->tp % p->pp].ranks[global % p->tp].worker;
}

static bool connect_peers(TrainEngine *e, const TrainGreeting *g, GError **error)
{
    const KeyScope scope = {
        .generation = e->o.generation, .epoch = e->o.epoch, .job = e->o.plan->job, .replica = 0};
    for (uint32_t r = 0; r < g->n_peers; r++) {
        const PeerLink link = {.secret = g->secret,
                               .scope = scope,
                               .own_boot = g->boot_id,
                               .peer_boot = g->peers[r].boot_id,
                               .own = e->own,
                               .peer = r,
                               .address = g->peers[r].address,
                               .seal = g->seal};
        if (r == e->own) {
            continue;
        }
        e->peers[r] = peer_link_connect(e->port, &link, error);
        if (e->peers[r] == NULL) {
            return false;
        }
    }
    return true;
}

static void open_links(TrainEngine *e)
{
    const TrainLinksOptions options = {
        .port = e->port,
        .links = e->peers,
        .position = e->position,
        .plan = e->o.plan,
        .abort = &e->abort,
        .deadline_us = e->wait_us,
        .spin_us = TRAIN_SPIN_US,
        .yield = atomic_load(&e->crowded),
    };
    e->links = train_links_new(&options);
}

static bool say_hello(TrainEngine *e, uint16_t flags, GError **error)
{
    for (uint32_t r = 0; r < train_world(&e->position); r++) {
        if (e->peers[r] != NULL &&
            link_send(e->peers[r], LINK_OP_HELLO, flags, 0, NULL, 0) != LINK_OK) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                        "worker %s cannot be reached for a hello", worker_of(e, r));
            return false;
        }
    }
    return true;
}

static bool has_greeted(const TrainEngine *e, uint32_t r)
{
    return e->greeted[r];
}

static bool has_built(const TrainEngine *e, uint32_t r)
{
    return e->built[r];
}

static bool has_saved(const TrainEngine *e, uint32_t r)
{
    return e->saves[r] >= e->saves[e->own];
}

/* Until `said` of all others; deadline_us: since a rank's last hello, 0: none, but an abort or a
 * dead link. */
static bool hear_all(TrainEngine *e, bool (*said)(const TrainEngine *e, uint32_t r),
                     const char *during, int64_t deadline_us, GError **error)
{
    const int64_t since = g_get_monotonic_time();
    for (uint32_t r = 0; r < train_world(&e->position);) {
        if (e->peers[r] == NULL || said(e, r)) {
            r++;
            continue;
        }
        if (atomic_load(&e->abort)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED,
                        "the wait for worker %s was aborted", worker_of(e, r));
            return false;
        }
        if (deadline_us > 0 && g_get_monotonic_time() - MAX(since, e->heard_us[r]) > deadline_us) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                        "worker %s did not answer during %s (%" G_GINT64_FORMAT " ms)",
                        worker_of(e, r), during, deadline_us / 1000);
            return false;
        }
        train_engine_rest(e);
    }
    return true;
}

bool train_greeting_run(TrainEngine *e, const TrainGreeting *g, GError **error)
{
    if (g->n_peers != train_world(&e->position)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "%u addresses for a layout of %u ranks",
                    g->n_peers, train_world(&e->position));
        return false;
    }
    link_port_set_crowded(e->port, atomic_load(&e->crowded));
    if (!connect_peers(e, g, error)) {
        return false;
    }
    open_links(e);
    return say_hello(e, 0, error) && hear_all(e, has_greeted, "hello", HELLO_DEADLINE_US, error);
}

bool train_greeting_built(TrainEngine *e, GError **error)
{
    return say_hello(e, HELLO_BUILT, error) && hear_all(e, has_built, "hello", 0, error);
}

bool train_greeting_saves(TrainEngine *e, GError **error)
{
    e->saves[e->own]++;
    return say_hello(e, HELLO_SAVES, error) &&
           hear_all(e, has_saved, "a checkpoint's begin", e->wait_us, error);
}

bool train_greeting_holds(TrainEngine *e, GError **error)
{
    return say_hello(e, 0, error);
}

void train_greeting_tell(TrainEngine *e, const GError *why)
{
    const LinkPart part = {why->message, strlen(why->message)};
    const uint16_t code = why->domain == WEFT_ERROR ? (uint16_t)why->code : 0;
    for (uint32_t r = 0; r < train_world(&e->position); r++) {
        if (e->peers[r] != NULL && !link_is_dead(e->peers[r])) {
            link_send_try(e->peers[r], LINK_OP_ABORT, code, 0, &part, 1);
        }
    }
}

/* ---- what arrives ---- */

/* What would end the job at any other rank, too, is the same error here; of all else, and of a
 * release that tells no code, the sender is lost. */
static WeftErrorCode code_here(uint16_t told)
{
    switch (told) {
    case WEFT_ERROR_INVALID:
    case WEFT_ERROR_IMPOSSIBLE:
    case WEFT_ERROR_MEMORY:
    case WEFT_ERROR_IO:
    case WEFT_ERROR_NUMERICS:
        return (WeftErrorCode)told;
    default:
        return WEFT_ERROR_WORKER_LOST;
    }
}

void train_links_on_message(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    TrainEngine *e = user;
    const uint32_t from = link_peer(link);
    if (header->op == LINK_OP_HELLO) {
        e->greeted[from] = true;
        e->heard_us[from] = g_get_monotonic_time();
        e->built[from] = e->built[from] || (header->flags & HELLO_BUILT) != 0;
        e->saves[from] += (header->flags & HELLO_SAVES) != 0;
    } else if (header->op == LINK_OP_ABORT) {
        g_autofree char *why = g_strndup(payload, MIN(header->length, 300u));
        train_engine_stop_with(e, g_error_new_literal(WEFT_ERROR, code_here(header->flags), why));
    } else if (e->links != NULL) {
        train_links_receive(e->links, link, header, payload);
    }
}

void train_links_on_dead(Link *link, const char *why, void *user)
{
    TrainEngine *e = user;
    if (!e->ended) {
        train_engine_stop_with(e, g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                                              "worker %s lost its connection (%s)",
                                              worker_of(e, link_peer(link)), why));
    }
}
