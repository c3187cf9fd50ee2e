#include "worker/serve/engine_state.h"

#include "proto/base/error.h"
#include "transport/group/group.h"

#include <string.h>

/* A peer without room for it takes nothing, and finds out by its own deadline. */
void engine_links_tell(Engine *e, const char *why)
{
    const LinkPart part = {why, strlen(why)};
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL && !link_is_dead(e->links[r])) {
            link_send_try(e->links[r], LINK_OP_ABORT, 0, 0, &part, 1);
        }
    }
}

static void on_step_message(Engine *e, const LinkHeader *header, const void *payload)
{
    GError *error = NULL;
    if (!inbox_push(&e->inbox, header->step, payload, header->length, &error)) {
        engine_fail(e, error, true);
    } else if ((header->flags & DIRECT_STEP_APART) != 0 && !direct_due(e->direct, header->step)) {
        engine_fail(e,
                    g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                "the activations of step %u come apart, which was not agreed",
                                header->step),
                    true);
    }
}

static void on_tokens(Engine *e, const LinkHeader *header, const void *payload)
{
    const RowResult *results;
    uint32_t n;
    if (e->leader == NULL ||
        !executor_decode_results(e->executor, payload, header->length, &results, &n)) {
        engine_fail(e,
                    g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                "malformed token message of %u bytes", header->length),
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
        engine_fail(e,
                    g_error_new(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                "malformed trace message of %u bytes", header->length),
                    true);
    }
}

void engine_links_receive(Link *link, const LinkHeader *header, const void *payload, void *user)
{
    Engine *e = user;
    const uint32_t from = link_peer(link);
    if (e->executor == NULL && header->op != LINK_OP_HELLO && header->op != LINK_OP_ABORT) {
        return; /* the greeting failed: nothing is run any more */
    }
    switch (header->op) {
    case LINK_OP_HELLO:
        e->greeted[from] = true;
        engine_group_heard(e, from, payload, header->length);
        if (e->direct != NULL) {
            direct_heard(e->direct, from, header->flags);
        }
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
        engine_fail(e, g_error_new_literal(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, why), false);
        atomic_store(&e->abort, true); /* a collective that is waiting gives up */
        break;
    }
    default:
        break; /* newer op of the same protocol version: not for this rank */
    }
}

void engine_links_dead(Link *link, const char *why, void *user)
{
    Engine *e = user;
    const char *operation = "waiting";
    int64_t since = g_get_monotonic_time();
    if (e->group != NULL && group_waits_for(e->group, &operation, &since) < 0) {
        operation = e->state == STATE_GREETING ? "hello" : "a step";
    }
    engine_report_wait(e, (int)link_peer(link), operation, since);
    atomic_store(&e->wait_expired, true);
    engine_fail(e,
                g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                            "worker %s lost its connection during %s (%s)",
                            engine_worker_name(e, link_peer(link)), operation, why),
                true);
    atomic_store(&e->abort, true);
}

void engine_links_count(Engine *e)
{
    engine_counters_link(&e->counters, link_port_counters(e->port));
    for (uint32_t r = 0; r < e->n_ranks; r++) {
        if (e->links[r] != NULL) {
            engine_counters_peer(&e->counters, r, link_traffic(e->links[r]));
        }
    }
}
