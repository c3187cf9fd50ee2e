/* The worker's side of liveness.
 *
 *            .--------------------- backoff over -----------------------.
 *            v                                                          |
 *   OPENING (hello sent) --welcome--> ATTACHED --stream ended--> WAITING (0, 0.1, 0.2 ... 1 s)
 *        |                               |  ^                           ^
 *        |--5 s, stream ended------------|--|---------------------------'
 *        |                               |--'  heartbeat / ack
 *        '--DENIED, VERSION--> REFUSED <-'
 *
 *   beside it: FENCED, entered by check_fence() from any state, left by welcome().
 *
 * Invariants
 *   1. At most one stream: a new one is opened only after on_done of the last.
 *   2. `acked_sent_us` is the send time (CLOCK_BOOTTIME) of the newest report that the coordinator
 * acknowledged; it only rises. The time of the acknowledgement's arrival counts for nothing: an old
 * one must not prolong a lease.
 *   3. When now >= acked_sent_us + ATTACH_FENCE_US the worker is fenced, before anything else is
 * done with a message or a call. The coordinator declares death 4.5 s after the last report it
 * received, so whatever it does to the epoch then happens after we stopped.
 *   4. The fence timer is armed whenever `fenced` is false and something was ever acknowledged. */
#include "worker/agent/attach.h"

#include "proto/base/error.h"

#include <string.h>

#define OPENING_US 5000000
#define BACKOFF_LEAST_US 100000
#define BACKOFF_MOST_US 1000000
#define RENEW_DEADLINE_MS 10000
#define SENT_RING 32u /* reports on their way: 16 s of them */

typedef enum AttachState {
    ATTACH_WAITING,
    ATTACH_OPENING,
    ATTACH_ATTACHED,
    ATTACH_REFUSED
} AttachState;

struct Attach {
    Loop *loop;
    RpcTransport *transport;
    Log *log;
    AttachHooks hooks;
    Identity identity;
    RpcChannel *channel;
    AttachState state;
    RpcClientCall *call;        /* the stream, or NULL */
    uint64_t sequence;          /* of the last heartbeat sent */
    int64_t sent_us[SENT_RING]; /* by sequence */
    int64_t hello_sent_us, acked_sent_us, backoff_us;
    bool was_acked, fenced, told_lost, renew_channel;
    bool leaving, said_goodbye;
    uint64_t goodbye; /* sequence of the first heartbeat that said so; 0 = none yet */
    LoopTimer *heartbeat, *fence, *retry, *opening;
};

static void open_stream(Attach *a);
static void fence_due(void *user);

/* ---- fencing ---- */

static bool check_fence(Attach *a)
{
    int64_t silent_us = loop_now_us(a->loop) - a->acked_sent_us;
    if (!a->was_acked || a->fenced || silent_us < ATTACH_FENCE_US) {
        return a->fenced;
    }
    a->fenced = true;
    loop_timer_cancel(a->loop, g_steal_pointer(&a->fence));
    log_warn(a->log,
             "fenced: no acknowledgement of %s for %d ms: work of the epoch is dropped, weights "
             "are kept",
             a->identity.control_address, (int)(silent_us / 1000));
    a->hooks.fenced(silent_us, a->hooks.user);
    if (a->call) {
        rpc_client_cancel(a->call); /* a live coordinator would have answered: begin again */
    }
    return true;
}

static void arm_fence(Attach *a)
{
    loop_timer_cancel(a->loop, a->fence);
    int64_t left = a->acked_sent_us + ATTACH_FENCE_US - loop_now_us(a->loop);
    a->fence = loop_timer_start(a->loop, MAX(left, 0), fence_due, a);
}

static void fence_due(void *user)
{
    Attach *a = user;
    a->fence = NULL;
    if (!check_fence(a)) {
        arm_fence(a); /* acknowledged since */
    }
}

static void acknowledged(Attach *a, int64_t sent_us)
{
    if (!a->was_acked || sent_us > a->acked_sent_us) {
        a->acked_sent_us = sent_us;
    }
    a->was_acked = true;
    if (!a->fence && !a->fenced) {
        arm_fence(a);
    }
}

/* ---- sending ---- */

static void heartbeat_due(void *user)
{
    Attach *a = user;
    a->heartbeat = NULL;
    if (check_fence(a) || a->state != ATTACH_ATTACHED || !a->call) {
        return;
    }
    a->sequence++;
    Weft__V1__Heartbeat *heartbeat = a->hooks.heartbeat(a->sequence, a->hooks.user);
    heartbeat->sequence = a->sequence;
    heartbeat->leaving = a->leaving;
    a->goodbye = a->leaving && a->goodbye == 0 ? a->sequence : a->goodbye;
    Weft__V1__WorkerReport report = WEFT__V1__WORKER_REPORT__INIT;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HEARTBEAT;
    report.heartbeat = heartbeat;
    a->sent_us[a->sequence % SENT_RING] = loop_now_us(a->loop);
    rpc_client_send(a->call, &report.base);
    weft__v1__heartbeat__free_unpacked(heartbeat, NULL);
    a->heartbeat = loop_timer_start(a->loop, ATTACH_HEARTBEAT_US, heartbeat_due, a);
}

static void send_hello(Attach *a)
{
    Weft__V1__Hello *hello = a->hooks.hello(a->hooks.user);
    Weft__V1__WorkerReport report = WEFT__V1__WORKER_REPORT__INIT;
    report.report_case = WEFT__V1__WORKER_REPORT__REPORT_HELLO;
    report.hello = hello;
    a->hello_sent_us = loop_now_us(a->loop);
    rpc_client_send(a->call, &report.base);
    weft__v1__hello__free_unpacked(hello, NULL);
}

/* ---- receiving ---- */

static void welcome(Attach *a, const Weft__V1__Welcome *message)
{
    if (a->state != ATTACH_OPENING) {
        return;
    }
    a->state = ATTACH_ATTACHED;
    a->backoff_us = 0;
    loop_timer_cancel(a->loop, g_steal_pointer(&a->opening));
    a->fenced = false;
    loop_timer_cancel(a->loop, g_steal_pointer(&a->fence));
    acknowledged(a, a->hello_sent_us);
    a->told_lost = false;
    log_info(a->log, "attached to %s, cluster %s, generation %" G_GUINT64_FORMAT,
             a->identity.control_address, message->cluster, message->generation);
    a->hooks.welcome(message, a->hooks.user);
    a->heartbeat = loop_timer_start(a->loop, 0, heartbeat_due, a);
}

static void ack(Attach *a, const Weft__V1__Ack *message)
{
    bool ours = message->sequence > 0 && message->sequence <= a->sequence &&
                a->sequence - message->sequence < SENT_RING;
    if (a->state != ATTACH_ATTACHED || !ours) {
        return;
    }
    acknowledged(a, a->sent_us[message->sequence % SENT_RING]);
    a->said_goodbye = a->said_goodbye || (a->goodbye != 0 && message->sequence >= a->goodbye);
    a->hooks.ack(message, a->hooks.user);
}

static void on_message(const ProtobufCMessage *message, void *user)
{
    Attach *a = user;
    const Weft__V1__CoordinatorNotice *notice = (const Weft__V1__CoordinatorNotice *)message;
    /* Invariant 3: an acknowledgement that waited in a buffer while this process was stopped comes
     * too late. */
    bool fenced_before = a->fenced;
    if (check_fence(a) && !fenced_before) {
        return;
    }
    if (notice->notice_case == WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME) {
        if (loop_now_us(a->loop) - a->hello_sent_us >= ATTACH_FENCE_US) {
            rpc_client_cancel(a->call); /* its lease is over already */
        } else {
            welcome(a, notice->welcome);
        }
    } else if (notice->notice_case == WEFT__V1__COORDINATOR_NOTICE__NOTICE_ACK && !a->fenced) {
        ack(a, notice->ack);
    }
}

static void retry_due(void *user)
{
    Attach *a = user;
    a->retry = NULL;
    open_stream(a);
}

static void stop_stream_timers(Attach *a)
{
    loop_timer_cancel(a->loop, g_steal_pointer(&a->heartbeat));
    loop_timer_cancel(a->loop, g_steal_pointer(&a->opening));
}

static void on_done(const GError *error, void *user)
{
    Attach *a = user;
    a->call = NULL;
    stop_stream_timers(a);
    if (g_error_matches(error, WEFT_ERROR, WEFT_ERROR_DENIED) ||
        g_error_matches(error, WEFT_ERROR, WEFT_ERROR_VERSION)) {
        a->state = ATTACH_REFUSED;
        a->hooks.refused(error, a->hooks.user);
        return;
    }
    if (!a->told_lost && !a->renew_channel) {
        a->told_lost = true;
        log_warn(a->log, "coordinator %s: %s: tries again until it answers",
                 a->identity.control_address, error ? error->message : "the stream was ended");
    }
    a->state = ATTACH_WAITING;
    a->retry = loop_timer_start(a->loop, a->backoff_us, retry_due, a);
    a->backoff_us = a->backoff_us == 0 ? BACKOFF_LEAST_US : MIN(2 * a->backoff_us, BACKOFF_MOST_US);
}

static void opening_due(void *user)
{
    Attach *a = user;
    a->opening = NULL;
    if (a->call) {
        rpc_client_cancel(a->call);
    }
}

/* ---- the stream ---- */

static bool open_channel(Attach *a, GError **error)
{
    RpcChannelOptions to = {
        .target = a->identity.control_address,
        .credentials = {a->identity.ca_pem, a->identity.certificate_pem, a->identity.key_pem,
                        false},
        .server_name = "weft-coordinator",
    };
    a->channel = rpc_channel_new(a->transport, a->loop, &to, error);
    return a->channel != NULL;
}

static void open_stream(Attach *a)
{
    if (a->renew_channel) {
        a->renew_channel = false;
        RpcChannel *old = a->channel;
        g_autoptr(GError) error = NULL;
        if (open_channel(a, &error)) {
            rpc_channel_free(old);
        } else {
            log_warn(a->log, "channel with the new certificate: %s: goes on with the old one",
                     error->message);
            a->channel = old;
        }
    }
    a->state = ATTACH_OPENING;
    a->call = rpc_call_start(a->channel, &weft__v1__cluster__descriptor, "Attach", NULL, 0, false,
                             (RpcCallbacks){on_message, on_done}, a);
    a->opening = loop_timer_start(a->loop, OPENING_US, opening_due, a);
    send_hello(a);
}

Attach *attach_new(const AttachOptions *options, GError **error)
{
    Attach *a = g_new0(Attach, 1);
    a->loop = options->loop;
    a->transport = options->transport;
    a->log = options->log;
    a->hooks = options->hooks;
    identity_copy(options->identity, &a->identity);
    if (!open_channel(a, error)) {
        attach_free(a);
        return NULL;
    }
    a->state = ATTACH_WAITING;
    a->retry = loop_timer_start(a->loop, 0, retry_due, a);
    return a;
}

void attach_free(Attach *a)
{
    if (!a) {
        return;
    }
    stop_stream_timers(a);
    /* The stream's on_done runs inside channel_free() at the latest and may start a retry: stop
     * that after it. */
    rpc_channel_free(a->channel);
    stop_stream_timers(a);
    loop_timer_cancel(a->loop, a->retry);
    loop_timer_cancel(a->loop, a->fence);
    identity_clear(&a->identity);
    g_free(a);
}

bool attach_is_attached(const Attach *a)
{
    return a->state == ATTACH_ATTACHED && !a->fenced;
}

void attach_leave(Attach *a)
{
    a->leaving = true;
    if (a->state == ATTACH_ATTACHED && a->call) {
        loop_timer_cancel(a->loop, g_steal_pointer(&a->heartbeat));
        heartbeat_due(a);
    }
}

bool attach_has_said_goodbye(const Attach *a)
{
    return a->said_goodbye;
}

bool attach_is_fenced(Attach *a)
{
    return check_fence(a);
}

bool attach_renew(Attach *a, const char *request_pem, RpcCallbacks callbacks, void *user)
{
    if (!attach_is_attached(a)) {
        return false;
    }
    Weft__V1__RenewRequest request = WEFT__V1__RENEW_REQUEST__INIT;
    request.csr_pem = (ProtobufCBinaryData){strlen(request_pem), (uint8_t *)request_pem};
    rpc_call_start(a->channel, &weft__v1__cluster__descriptor, "Renew", &request.base,
                   RENEW_DEADLINE_MS, false, callbacks, user);
    return true;
}

void attach_set_identity(Attach *a, const Identity *identity)
{
    identity_clear(&a->identity);
    identity_copy(identity, &a->identity);
    a->renew_channel = true;
    a->backoff_us = 0;
    if (a->call) {
        rpc_client_cancel(a->call);
    }
}
