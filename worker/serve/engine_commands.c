/* What engine.h offers to other threads, as commands that the engine's thread takes in order. */
#include "worker/serve/engine_state.h"

#include "proto/base/error.h"

#include <string.h>

static void command_free(Command *c)
{
    engine_greeting_free(c->greeting);
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
bool engine_commands_run(Engine *e)
{
    Command *c;
    while ((c = pop_command(e)) != NULL) {
        switch (c->kind) {
        case COMMAND_START:
            engine_greeting_begin(e, g_steal_pointer(&c->greeting));
            break;
        case COMMAND_SUBMIT:
            do_submit(e, c->request);
            break;
        case COMMAND_CANCEL:
            if (e->leader != NULL) {
                leader_cancel(e->leader, c->request_id);
            }
            break;
        case COMMAND_CANARY:
            if (e->leader != NULL) {
                leader_canary(e->leader);
            }
            break;
        case COMMAND_ABORT:
            engine_fail(e, g_steal_pointer(&c->error), true);
            break;
        case COMMAND_QUIT:
            command_free(c);
            return false;
        }
        command_free(c);
    }
    return true;
}

void engine_commands_quit(Engine *e)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_QUIT;
    push_command(e, c);
}

void engine_commands_drop(Engine *e)
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

uint64_t engine_submit(Engine *e, const EngineRequest *request, Loop *loop, EngineTokenFn fn,
                       void *user)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_SUBMIT;
    c->request_id = atomic_fetch_add(&e->next_request, 1) + 1;
    c->request = leader_request_new(c->request_id, request, loop, fn, user);
    const uint64_t id = c->request_id;
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

void engine_canary(Engine *e)
{
    Command *c = g_new0(Command, 1);
    c->kind = COMMAND_CANARY;
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
