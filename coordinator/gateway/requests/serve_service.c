/* service Serve: a gRPC call as the sink of a run.
 *
 * The call is referenced from its handler until the run's finish() or the client's cancel,
 * whichever comes: the other cannot follow. */
#include "coordinator/gateway/requests/requests.h"

#include "proto/plan/logits_limits.h"
#include "weft/v1/serve.pb-c.h"

#define PENDING_LIMIT ((size_t)32 << 20)
#define ROOM_BYTES ((size_t)8 << 20)
/* What is begun while there is room is all that may be added to what waits. */
G_STATIC_ASSERT(ROOM_BYTES + LOGITS_STEP_BYTES + LOGITS_SEQUENCE_BYTES < PENDING_LIMIT);

static bool call_send(void *user, const Weft__V1__RunEvent *event)
{
    return rpc_call_send(user, &event->base) <= PENDING_LIMIT;
}

static bool call_has_room(void *user, LoopFn fn, void *fn_user)
{
    return rpc_call_has_room(user, ROOM_BYTES, fn, fn_user);
}

static void call_finish(void *user, const GError *error)
{
    RpcCall *call = user;
    rpc_call_on_cancel(call, NULL, NULL);
    rpc_call_finish(call, error);
    rpc_call_unref(call);
}

static void on_cancel(void *user)
{
    RpcCall *call = user;
    run_cancel(rpc_call_data(call), NULL);
    rpc_call_unref(call);
}

static void send_opening(RpcCall *call)
{
    Weft__V1__RunProgress progress = WEFT__V1__RUN_PROGRESS__INIT;
    progress.text = (char *)"opening the model";
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_PROGRESS;
    event.progress = &progress;
    rpc_call_send(call, &event.base);
}

static void on_run(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    static const RunSink sink = {call_send, call_finish, call_has_room};
    Requests *requests = user;
    g_autoptr(GError) error = NULL;
    const RunSetting setting = {.share_key = rpc_call_peer(call)->name};
    Run *run = requests_start(requests, (const Weft__V1__RunRequest *)message, &setting, &sink,
                              call, &error);
    if (run == NULL) {
        rpc_call_finish(call, error);
        return;
    }
    rpc_call_ref(call);
    rpc_call_set_data(call, run, NULL);
    rpc_call_on_cancel(call, on_cancel, call);
    send_opening(call);
}

void requests_add(Requests *requests, RpcServer *server)
{
    static const RpcMethod methods[] = {{"Run", on_run, RPC_ROLE_SUBMIT | RPC_ROLE_ADMIN}, {NULL}};
    rpc_server_add(server, &weft__v1__serve__descriptor, methods, requests);
}
