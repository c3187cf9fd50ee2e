/* Attach: a worker's stream. Its hello and each of its heartbeats are taken here, with what is
 * answered; what they make of the member is members.c's. */
#include "coordinator/members_state.h"

#include "coordinator/message.h"
#include "proto/base/error.h"
#include "proto/base/version.h"
#include "proto/plan/plan.h"

#include <string.h>

/* ---- hello ---- */

/* A device other than the trivial one has bits of its own, and class exact must name them. */
static bool devices_check(const Member *m, const Weft__V1__Hello *hello, GError **error)
{
    const bool exact = (hello->numerics_classes >> NUMERICS_EXACT & 1u) != 0;
    for (size_t i = 0; i < hello->n_devices; i++) {
        const Weft__V1__Device *d = hello->devices[i];
        const size_t length = strlen(d->exact_kind);
        if (length >= EXACT_KIND_BYTES || (exact && length == 0 && strcmp(d->kind, "cpu") != 0)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                        "worker %s offers numerics exact on %.16s:%u, and %s: install the same "
                        "release",
                        m->name, d->kind, d->index,
                        length == 0 ? "does not say of which kind of device its bits are"
                                    : "the kind of device that it names is too long");
            return false;
        }
    }
    return true;
}

static bool hello_check(const Member *m, const Weft__V1__Hello *hello, GError **error)
{
    if (hello->protocol_version != WEFT_PROTOCOL_VERSION) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                    "worker %s (release %s) speaks protocol %u, this coordinator (release %s) "
                    "protocol %u: install the same release",
                    m->name, hello->release, hello->protocol_version, WEFT_VERSION,
                    WEFT_PROTOCOL_VERSION);
        return false;
    }
    if (hello->numerics_version != WEFT_NUMERICS_VERSION) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_VERSION,
                    "worker %s (release %s) computes numerics %u, this coordinator (release %s) "
                    "numerics %u: install the same release",
                    m->name, hello->release, hello->numerics_version, WEFT_VERSION,
                    WEFT_NUMERICS_VERSION);
        return false;
    }
    if (hello->boot_id.len != 16 || hello->control_address[0] == '\0') {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "hello of worker %s with a boot id of %zu bytes and address '%s' is malformed",
                    m->name, hello->boot_id.len, hello->control_address);
        return false;
    }
    return devices_check(m, hello, error);
}

static bool same_process(const Member *m, const Weft__V1__Hello *hello)
{
    return m->hello != NULL && m->hello->boot_id.len == hello->boot_id.len &&
           memcmp(m->hello->boot_id.data, hello->boot_id.data, hello->boot_id.len) == 0;
}

static void member_welcome(Member *m)
{
    Weft__V1__Welcome welcome = WEFT__V1__WELCOME__INIT;
    welcome.cluster = m->members->cluster;
    welcome.generation = m->members->options.generation;
    welcome.generation_id.data = m->members->options.generation_id;
    welcome.generation_id.len = sizeof m->members->options.generation_id;
    Weft__V1__CoordinatorNotice notice = WEFT__V1__COORDINATOR_NOTICE__INIT;
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_WELCOME;
    notice.welcome = &welcome;
    rpc_call_send(m->stream, &notice.base);
}

static bool member_open_channel(Member *m, const Weft__V1__Hello *hello, GError **error)
{
    RpcChannelOptions options = {.target = hello->control_address,
                                 .credentials = m->members->options.credentials,
                                 .server_name = m->name};
    m->channel =
        rpc_channel_new(m->members->options.transport, m->members->options.loop, &options, error);
    return m->channel != NULL;
}

void member_renew_channel(Member *m, void *user)
{
    if (!m->attached) {
        return;
    }
    RpcChannel *before = g_steal_pointer(&m->channel);
    g_autoptr(GError) error = NULL;
    if (!member_open_channel(m, m->hello, &error)) {
        m->channel = before;
        log_warn(m->members->options.log, "worker %s is called with the old certificate: %s",
                 m->name, error->message);
        return;
    }
    rpc_channel_free(g_steal_pointer(&m->old_channel));
    m->old_channel = before;
}

static void member_take_stream(Member *m, RpcCall *call)
{
    if (m->stream != NULL) {
        RpcCall *old = rpc_call_ref(m->stream);
        member_drop_stream(m);
        rpc_call_on_cancel(old, NULL, NULL);
        g_autoptr(GError) why =
            g_error_new(WEFT_ERROR, WEFT_ERROR_STALE, "worker %s opened a newer stream", m->name);
        rpc_call_finish(old, why);
        rpc_call_unref(old);
    }
    m->stream = rpc_call_ref(call);
    m->silent_reset = false;
    rpc_call_set_data(call, m, NULL);
    rpc_call_on_cancel(call, member_on_reset, m);
}

static bool member_attach(Member *m, RpcCall *call, const Weft__V1__Hello *hello, GError **error)
{
    Members *members = m->members;
    bool restarted = !same_process(m, hello);
    if (m->attached && restarted) {
        member_detach(m, "its process was started again");
    }
    bool fresh = !m->attached;
    if (fresh && !member_open_channel(m, hello, error)) {
        return false;
    }
    message_replace(&m->hello, hello);
    message_free(m->heartbeat);
    m->heartbeat = NULL;
    member_take_stream(m, call);
    m->heard_us = loop_now_us(members->options.loop);
    member_arm(m, MEMBER_LOST_US);
    member_welcome(m);
    m->attached = true;
    if (m->confirmed && members->listener.attached != NULL) {
        members->listener.attached(m, false, members->listener.user);
    }
    return true;
}

static void member_confirm(Member *m)
{
    Members *members = m->members;
    m->confirmed = true;
    m->was_attached = false;
    g_clear_pointer(&m->reason, g_free);
    member_settle(m, false);
    member_save(m, NULL, NULL);
    if (members->listener.attached != NULL) {
        members->listener.attached(m, true, members->listener.user);
    }
}

static void keep_free(void *keep)
{
    message_free(keep);
}

static void member_acknowledge(Member *m, uint64_t sequence)
{
    Members *members = m->members;
    g_autoptr(GPtrArray) keep = g_ptr_array_new_with_free_func(keep_free);
    if (members->listener.keep != NULL) {
        members->listener.keep(m, keep, members->listener.user);
    }
    const GPtrArray *revoked = members->options.revoked != NULL
                                   ? members->options.revoked(members->options.revoked_user)
                                   : NULL;
    Weft__V1__Ack ack = WEFT__V1__ACK__INIT;
    ack.sequence = sequence;
    ack.draining = member_drains(m);
    ack.keep = (Weft__V1__Keep **)keep->pdata;
    ack.n_keep = keep->len;
    if (revoked != NULL) {
        ack.revoked = (char **)revoked->pdata;
        ack.n_revoked = revoked->len;
    }
    Weft__V1__CoordinatorNotice notice = WEFT__V1__COORDINATOR_NOTICE__INIT;
    notice.notice_case = WEFT__V1__COORDINATOR_NOTICE__NOTICE_ACK;
    notice.ack = &ack;
    rpc_call_send(m->stream, &notice.base);
}

/* As if it drained, but for this process only, so not on disk: what runs there moves at once. */
static void member_leave(Member *m)
{
    m->leaving = true;
    member_settle(m, false);
    if (m->members->listener.drained != NULL) {
        m->members->listener.drained(m, m->members->listener.user);
    }
}

static void member_on_heartbeat(Member *m, const Weft__V1__Heartbeat *heartbeat)
{
    Members *members = m->members;
    m->heard_us = loop_now_us(members->options.loop);
    m->accused = false;
    member_arm(m, MEMBER_LOST_US);
    message_replace(&m->heartbeat, heartbeat);
    if (!m->confirmed) {
        member_confirm(m);
    }
    if (heartbeat->leaving && !m->leaving) {
        member_leave(m);
    }
    if (members->listener.reported != NULL) {
        members->listener.reported(m, members->listener.user);
    }
    if (m->stream != NULL) {
        member_acknowledge(m, heartbeat->sequence);
    }
}

static bool members_on_hello(Members *members, RpcCall *call, const Weft__V1__Hello *hello,
                             GError **error)
{
    const char *name = rpc_call_peer(call)->name;
    Member *m = members_find(members, name);
    if (m == NULL) {
        /* A certificate of this CA without a row: the state directory was restored from an older
         * copy. The certificate is the proof. */
        members_add(members, name);
        m = members_find(members, name);
    }
    if (m->revoked) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                    "worker %s was revoked: join again with a new token", name);
        return false;
    }
    if (!hello_check(m, hello, error)) {
        log_warn(members->options.log, "worker %s refused: %s", name, (*error)->message);
        return false;
    }
    return member_attach(m, call, hello, error);
}

static void stream_refuse(RpcCall *call, const GError *error)
{
    rpc_call_finish(call, error);
}

void members_on_report(Members *members, RpcCall *call, const Weft__V1__WorkerReport *report)
{
    Member *m = rpc_call_data(call);
    g_autoptr(GError) error = NULL;
    if (report == NULL) {
        if (m != NULL) {
            rpc_call_on_cancel(call, NULL, NULL);
            member_on_reset(m);
        }
        rpc_call_finish(call, NULL);
        return;
    }
    if (report->report_case == WEFT__V1__WORKER_REPORT__REPORT_HELLO && m == NULL) {
        if (!members_on_hello(members, call, report->hello, &error)) {
            stream_refuse(call, error);
        }
    } else if (report->report_case == WEFT__V1__WORKER_REPORT__REPORT_HEARTBEAT && m != NULL) {
        member_on_heartbeat(m, report->heartbeat);
    } else {
        g_set_error(&error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "report %d of worker %s is out of order: one hello first, then heartbeats",
                    (int)report->report_case, rpc_call_peer(call)->name);
        stream_refuse(call, error);
    }
}
