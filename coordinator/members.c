/* Problem: to say of every worker, within a bounded time and never contradicting oneself, whether
 * it is there.
 *
 *           hello + heartbeat        a rank of a ready deployment
 *   JOINED ───────────────────▶ READY ◀─────────────────────────▶ SERVING
 *                               ▲ │ ▲  drain, undrain                │
 *             hello + heartbeat │ │ └──────────────▶ DRAINING ◀──────┘
 *                               │ ▼                     │
 *                              LOST ◀───────────────────┘ (and from SERVING)
 *   any ── revoke ──▶ REVOKED (final)
 *
 *   Lost: no heartbeat for 4.5 s, unless more than half are silent; or the stream ended, by
 *   whomever, and is not back in 0.5 s; or another process of the same name said hello. A restarted
 *   coordinator begins at JOINED.
 *
 * 1. attached (from hello on) <=> channel and deadline timer exist; confirmed (from the first
 * heartbeat on) <=> state is READY, SERVING or DRAINING. The worker sends heartbeats after the
 * welcome only, so whoever is confirmed takes calls stamped with this generation. The stream may be
 * missing for 0.5 s (reset).
 * 2. Each attachment ends with exactly one lost() call, before another attached() call for that
 * member.
 * 3. The deadline is armed at hello and at each heartbeat; only its expiry, a reset's, a new
 * process or a revocation ends an attachment.
 * 4. A hello of another protocol or numerics version never attaches; the refusal names both
 * versions.
 * 5. State is a function of (attached, draining or leaving, serving, revoked): member_settle() is
 * the only place that sets it. Draining is an administrator's word and durable; leaving is the
 * process's own and ends with its attachment, at once when its stream does.
 * 6. One process at a time is a member: a hello with another boot id ends the attachment of the old
 * process first. A hello with the same boot id takes the stream over: the worker itself is the
 * witness that the old one is dead.
 * 7. Once quiet, no attachment ends: a coordinator that stops must leave its rows as they are, or
 * its successor could adopt nothing.
 * 8. Silence of the majority convicts nobody (members_cut_off); neither does silence while this
 * process was itself stopped. The deadline is then looked at again every second. */
#include "coordinator/members.h"

#include "coordinator/message.h"
#include "coordinator/store/records.h"
#include "proto/base/error.h"
#include "proto/base/version.h"
#include "proto/plan/plan.h"
#include "transport/crypto/x509.h"

#include <string.h>

#define NAME_LIMIT 48

struct Member {
    Members *members;
    char *name;
    MemberState state;
    bool attached, draining, revoked, serving;
    bool leaving;   /* its process said that it was asked to stop */
    bool confirmed; /* a heartbeat came after its hello: it has read the welcome, and with it this
                       generation */
    bool accused;   /* since its last heartbeat */
    bool was_attached;  /* when the last coordinator died */
    char *reason;       /* why it was lost, NULL */
    char *drain_reason; /* why it drains, NULL */
    int64_t joined_wall_us;
    int64_t heard_us; /* loop time of the last message */
    RpcCall *stream;  /* referenced; NULL after a reset */
    LoopTimer *deadline;
    int64_t deadline_us; /* when it is due */
    bool silent_reset;   /* its stream broke after it was silent for long */
    RpcChannel *channel;
    RpcChannel *old_channel; /* from before the last renewal, for what was open on it; NULL */
    Weft__V1__Hello *hello;
    Weft__V1__Heartbeat *heartbeat;
};

struct Members {
    MembersOptions options;
    char *cluster, *ca_pem, *certificate_pem, *key_pem;
    MembersListener listener;
    GTree *by_name; /* name -> Member, owned */
    bool quiet;     /* stopping: invariant 7 */
    bool told_cut_off;
};

/* ---- state ---- */

const char *member_state_text(MemberState state)
{
    static const char *const texts[] = {"joined",   "ready", "serving",
                                        "draining", "lost",  "revoked"};
    return texts[state];
}

static bool member_drains(const Member *m)
{
    return m->draining || m->leaving;
}

static const char *member_reason(const Member *m)
{
    return m->state != MEMBER_DRAINING ? m->reason
           : m->leaving                ? "it is being stopped"
                                       : m->drain_reason;
}

static void member_settle(Member *m, bool was_attached)
{
    MemberState state = m->state;
    if (m->revoked) {
        state = MEMBER_REVOKED;
    } else if (m->attached && m->confirmed) {
        state = member_drains(m) ? MEMBER_DRAINING : m->serving ? MEMBER_SERVING : MEMBER_READY;
    } else if (was_attached) {
        state = MEMBER_LOST;
    }
    if (state != m->state) {
        const MemberState before = m->state;
        m->state = state;
        const char *reason = member_reason(m);
        log_info(m->members->options.log, "worker %s %s (was %s)%s%s", m->name,
                 member_state_text(state), member_state_text(before), reason != NULL ? ": " : "",
                 reason != NULL ? reason : "");
    }
}

static void member_save(Member *m, StoreDone done, void *user)
{
    MemberRecord record = {.joined_us = m->joined_wall_us,
                           .draining = m->draining,
                           .revoked = m->revoked,
                           .attached = m->attached,
                           .reason = m->drain_reason};
    store_put(m->members->options.store, STORE_MEMBERS, m->name, member_record_pack(&record), done,
              user);
}

static void member_drop_stream(Member *m)
{
    if (m->stream != NULL) {
        rpc_call_set_data(m->stream, NULL, NULL);
        rpc_call_unref(m->stream);
        m->stream = NULL;
    }
}

GError *member_lost_error(const Member *m, const char *what)
{
    return g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST, "worker %s lost%s%s: %s", m->name,
                       what != NULL ? " during " : "", what != NULL ? what : "",
                       m->reason != NULL ? m->reason : "its connection broke");
}

/* The one way out of an attachment (invariant 2). */
static void member_detach(Member *m, const char *reason)
{
    if (!m->attached || m->members->quiet) {
        return;
    }
    Members *members = m->members;
    g_free(m->reason);
    m->reason = g_strdup(reason);
    m->attached = false;
    m->confirmed = false;
    m->serving = m->leaving = false;
    m->accused = false;
    loop_timer_cancel(members->options.loop, m->deadline);
    m->deadline = NULL;
    member_settle(m, true);
    g_autoptr(GError) why = member_lost_error(m, NULL);
    if (members->listener.lost != NULL) {
        members->listener.lost(m, why, members->listener.user);
    }
    if (m->stream != NULL) {
        RpcCall *stream = rpc_call_ref(m->stream);
        member_drop_stream(m);
        g_autoptr(GError) denied =
            m->revoked ? g_error_new(WEFT_ERROR, WEFT_ERROR_DENIED,
                                     "worker %s was revoked: join again with a new token", m->name)
                       : NULL;
        rpc_call_finish(stream, denied != NULL ? denied : why);
        rpc_call_unref(stream);
    }
    rpc_channel_free(g_steal_pointer(&m->old_channel));
    RpcChannel *channel = g_steal_pointer(&m->channel);
    rpc_channel_free(channel); /* runs the on_done of what was open on it */
    member_save(m, NULL, NULL);
}

static void member_arm(Member *m, int64_t delay_us);

/* Heard of too long ago; a stream that broke meanwhile (keepalive, after long silence) makes it no
 * less silent. */
static bool is_silent(const Member *m)
{
    int64_t silent_us = loop_now_us(m->members->options.loop) - m->heard_us;
    return silent_us >= MEMBER_SUSPECT_US && (m->stream != NULL || m->silent_reset);
}

typedef struct Silence {
    unsigned n, n_silent;
} Silence;

static void count_silent(Member *m, void *user)
{
    Silence *silence = user;
    if (m->attached && m->confirmed) {
        silence->n++;
        silence->n_silent += is_silent(m);
    }
}

char *members_cut_off(const Members *members)
{
    Silence s = {0};
    members_each(members, count_silent, &s);
    if (s.n < MEMBERS_QUORUM || s.n_silent * 2 <= s.n) {
        return NULL;
    }
    return g_strdup_printf("%u of %u workers fell silent together: is the coordinator cut off from "
                           "them? nothing is placed anew before they are back",
                           s.n_silent, s.n);
}

/* Invariant 8. */
static bool member_spared(Member *m)
{
    Members *members = m->members;
    int64_t late_us = loop_now_us(members->options.loop) - m->deadline_us;
    if (late_us >= MEMBER_AGAIN_US) {
        log_warn(members->options.log,
                 "this coordinator was stopped for %" G_GINT64_FORMAT
                 " ms: worker %s gets time to be heard",
                 late_us / 1000, m->name);
        return true;
    }
    if (!is_silent(m)) {
        return false;
    }
    g_autofree char *cut_off = members_cut_off(members);
    if (cut_off != NULL && !members->told_cut_off) {
        log_warn(members->options.log, "%s", cut_off);
    }
    members->told_cut_off = cut_off != NULL;
    return cut_off != NULL;
}

static void member_on_deadline(void *user)
{
    Member *m = user;
    Members *members = m->members;
    m->deadline = NULL;
    if (member_spared(m)) {
        member_arm(m, MEMBER_AGAIN_US);
        return;
    }
    int64_t silent_ms = (loop_now_us(members->options.loop) - m->heard_us) / 1000;
    g_autofree char *reason =
        m->leaving && m->stream == NULL ? g_strdup("it was stopped")
        : m->stream == NULL && !m->silent_reset
            ? g_strdup_printf("its connection ended and did not come back within %d ms",
                              (int)(MEMBER_RESET_US / 1000))
            : g_strdup_printf("no heartbeat for %" G_GINT64_FORMAT " ms", silent_ms);
    member_detach(m, reason);
}

static void member_arm(Member *m, int64_t delay_us)
{
    Loop *loop = m->members->options.loop;
    loop_timer_cancel(loop, m->deadline);
    m->deadline_us = loop_now_us(loop) + delay_us;
    m->deadline = loop_timer_start(loop, delay_us, member_on_deadline, m);
}

/* The stream ended, by a reset or by the worker's half-close (a killed process gives either): it
 * has half a second to come back, but never longer than its heartbeat allows. */
static void member_on_reset(void *user)
{
    Member *m = user;
    member_drop_stream(m);
    if (m->attached && !m->members->quiet) {
        m->silent_reset = loop_now_us(m->members->options.loop) - m->heard_us >= MEMBER_LOST_US;
        int64_t left = m->heard_us + MEMBER_LOST_US - loop_now_us(m->members->options.loop);
        member_arm(m, m->leaving ? 0 : CLAMP(left, 0, MEMBER_RESET_US));
    }
}

/* ---- registry ---- */

static void member_free(void *data)
{
    Member *m = data;
    loop_timer_cancel(m->members->options.loop, m->deadline);
    if (m->stream != NULL) {
        rpc_call_on_cancel(m->stream, NULL, NULL);
        member_drop_stream(m);
    }
    rpc_channel_free(m->old_channel);
    rpc_channel_free(m->channel);
    message_free(m->hello);
    message_free(m->heartbeat);
    g_free(m->name);
    g_free(m->reason);
    g_free(m->drain_reason);
    g_free(m);
}

static int compare_names(const void *a, const void *b, void *user)
{
    return strcmp(a, b);
}

Members *members_new(const MembersOptions *options)
{
    Members *members = g_new0(Members, 1);
    members->options = *options;
    members->cluster = g_strdup(options->cluster);
    members->ca_pem = g_strdup(options->credentials.ca_pem);
    members->certificate_pem = g_strdup(options->credentials.certificate_pem);
    members->key_pem = g_strdup(options->credentials.key_pem);
    members->options.credentials.ca_pem = members->ca_pem;
    members->options.credentials.certificate_pem = members->certificate_pem;
    members->options.credentials.key_pem = members->key_pem;
    members->by_name = g_tree_new_full(compare_names, NULL, NULL, member_free);
    return members;
}

void members_free(Members *members)
{
    if (members == NULL) {
        return;
    }
    memset(&members->listener, 0, sizeof members->listener);
    g_tree_unref(members->by_name);
    x509_free_key(members->key_pem);
    g_free(members->certificate_pem);
    g_free(members->ca_pem);
    g_free(members->cluster);
    g_free(members);
}

void members_quiesce(Members *members)
{
    if (members != NULL) {
        members->quiet = true;
    }
}

void members_listen(Members *members, const MembersListener *listener)
{
    members->listener = *listener;
}

static Member *members_insert(Members *members, const char *name)
{
    Member *m = g_new0(Member, 1);
    m->members = members;
    m->name = g_strdup(name);
    m->state = MEMBER_JOINED;
    m->joined_wall_us = loop_wall_us(members->options.loop);
    g_tree_insert(members->by_name, m->name, m);
    return m;
}

bool members_restore(Members *members, const StoreRow *row, GError **error)
{
    MemberRecord record = {0};
    if (!member_record_read(row->key, row->value, &record, error)) {
        return false;
    }
    Member *m = members_insert(members, row->key);
    m->joined_wall_us = record.joined_us;
    m->draining = record.draining;
    m->revoked = record.revoked;
    m->was_attached = record.attached;
    if (record.reason[0] != '\0') {
        m->drain_reason = g_steal_pointer(&record.reason);
    }
    member_settle(m, false);
    member_record_clear(&record);
    return true;
}

char *members_free_name(const Members *members, const char *wish)
{
    g_autoptr(GString) base = g_string_new(NULL);
    for (const char *c = wish; *c != '\0' && base->len < NAME_LIMIT; c++) {
        char lower = g_ascii_tolower(*c);
        if (g_ascii_isalnum(lower) || (lower == '-' && base->len > 0)) {
            g_string_append_c(base, lower);
        }
    }
    while (base->len > 0 && base->str[base->len - 1] == '-') {
        g_string_truncate(base, base->len - 1);
    }
    bool own = base->len > 0 && !g_str_has_prefix(base->str, "weft") &&
               strcmp(base->str, "coordinator") != 0 && strcmp(base->str, "local-admin") != 0;
    if (own && members_find(members, base->str) == NULL) {
        return g_strdup(base->str);
    }
    for (unsigned i = own ? 2 : 1;; i++) {
        g_autofree char *name = g_strdup_printf("%s-%u", own ? base->str : "worker", i);
        if (members_find(members, name) == NULL) {
            return g_steal_pointer(&name);
        }
    }
}

void members_add(Members *members, const char *name)
{
    if (members_find(members, name) == NULL) {
        member_save(members_insert(members, name), NULL, NULL);
    }
}

Member *members_find(const Members *members, const char *name)
{
    return g_tree_lookup(members->by_name, name);
}

typedef struct EachMember {
    void (*fn)(Member *member, void *user);
    void *user;
} EachMember;

static gboolean each_member(void *key, void *value, void *user)
{
    EachMember *each = user;
    each->fn(value, each->user);
    return FALSE;
}

void members_each(const Members *members, void (*fn)(Member *member, void *user), void *user)
{
    EachMember each = {fn, user};
    g_tree_foreach(members->by_name, each_member, &each);
}

static void count_missing(Member *m, void *user)
{
    *(unsigned *)user += m->was_attached && !m->confirmed && !m->revoked;
}

unsigned members_n_missing(const Members *members)
{
    unsigned n = 0;
    members_each(members, count_missing, &n);
    return n;
}

/* ---- Attach ---- */

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

static void member_renew_channel(Member *m, void *user)
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

void members_set_credentials(Members *members, const RpcCredentials *credentials)
{
    x509_free_key(members->key_pem);
    g_free(members->certificate_pem);
    members->certificate_pem = g_strdup(credentials->certificate_pem);
    members->key_pem = g_strdup(credentials->key_pem);
    members->options.credentials.certificate_pem = members->certificate_pem;
    members->options.credentials.key_pem = members->key_pem;
    members_each(members, member_renew_channel, NULL);
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

/* ---- the administrator's side ---- */

bool members_drain(Members *members, const char *name, const char *reason, bool undrain,
                   StoreDone done, void *user, GError **error)
{
    Member *m = members_find(members, name);
    if (m == NULL || m->revoked) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND,
                    "worker %s is %s: weft status lists the members", name,
                    m == NULL ? "not a member" : "revoked");
        return false;
    }
    m->draining = !undrain;
    g_free(m->drain_reason);
    m->drain_reason =
        undrain
            ? NULL
            : g_strdup(reason != NULL && reason[0] != '\0' ? reason : "asked by an administrator");
    member_settle(m, false);
    member_save(m, done, user);
    if (members->listener.drained != NULL) {
        members->listener.drained(m, members->listener.user);
    }
    return true;
}

bool members_revoke(Members *members, const char *name)
{
    Member *m = members_find(members, name);
    if (m == NULL) {
        return false;
    }
    m->revoked = true;
    member_detach(m, "it was revoked by an administrator");
    member_settle(m, false);
    member_save(m, NULL, NULL);
    return true;
}

void members_set_serving(Member *m, bool serving)
{
    m->serving = serving && m->confirmed;
    member_settle(m, false);
}

void members_accuse(Members *members, const char *name)
{
    Member *m = members_find(members, name);
    if (m != NULL && m->attached) {
        m->accused = true;
    }
}

/* ---- looking at one ---- */

const char *member_name(const Member *m)
{
    return m->name;
}

MemberState member_state(const Member *m)
{
    return m->state;
}

bool member_attached(const Member *m)
{
    return m->attached && m->confirmed;
}

bool member_usable(const Member *m)
{
    int64_t silent_us = loop_now_us(m->members->options.loop) - m->heard_us;
    return member_attached(m) && !member_drains(m) && !m->accused && m->stream != NULL &&
           silent_us < MEMBER_SUSPECT_US;
}

uint64_t member_silent_ms(const Member *m)
{
    return m->hello != NULL
               ? (uint64_t)MAX(loop_now_us(m->members->options.loop) - m->heard_us, 0) / 1000
               : 0;
}

const Weft__V1__Hello *member_hello(const Member *m)
{
    return m->hello;
}

const Weft__V1__Heartbeat *member_heartbeat(const Member *m)
{
    return m->heartbeat;
}

RpcChannel *member_channel(const Member *m)
{
    return m->channel;
}

const Weft__V1__Held *member_held(const Member *m, const char *job, uint32_t replica,
                                  uint32_t stage, uint32_t rank)
{
    Weft__V1__Held **held = m->heartbeat != NULL ? m->heartbeat->held
                            : m->hello != NULL   ? m->hello->held
                                                 : NULL;
    size_t n = m->heartbeat != NULL ? m->heartbeat->n_held
               : m->hello != NULL   ? m->hello->n_held
                                    : 0;
    for (size_t i = 0; m->attached && i < n; i++) {
        if (strcmp(held[i]->job, job) == 0 && held[i]->replica == replica &&
            held[i]->stage == stage && held[i]->rank == rank) {
            return held[i];
        }
    }
    return NULL;
}

const char *member_problem(const Member *m)
{
    return m->heartbeat != NULL && m->heartbeat->problem[0] != '\0' ? m->heartbeat->problem : NULL;
}

void member_describe(const Member *m, Weft__V1__Member *out)
{
    Loop *loop = m->members->options.loop;
    out->name = m->name;
    out->state = (char *)member_state_text(m->state);
    const char *reason = member_reason(m) != NULL ? member_reason(m) : member_problem(m);
    out->reason = reason != NULL ? (char *)reason : (char *)"";
    out->age_ms = (uint64_t)MAX(loop_wall_us(loop) - m->joined_wall_us, 0) / 1000;
    if (m->hello != NULL) {
        out->last_heartbeat_ms = member_silent_ms(m);
        out->address = m->hello->control_address;
        out->isa = m->hello->isa;
        out->threads = m->hello->threads;
        out->memory_bytes = m->hello->memory_bytes;
        out->measured = m->hello->measured;
        out->release = m->hello->release;
        out->cpu = m->hello->cpu;
        out->devices = m->hello->devices;
        out->n_devices = m->hello->n_devices;
    }
    if (m->heartbeat != NULL) {
        out->counters = m->heartbeat->counters;
        out->loop_lag_ms = m->heartbeat->loop_lag_ms;
        out->loads = m->heartbeat->loads;
        out->n_loads = m->attached ? m->heartbeat->n_loads : 0;
        out->waiting = m->heartbeat->waiting;
        out->n_waiting = m->attached ? m->heartbeat->n_waiting : 0;
    }
}
