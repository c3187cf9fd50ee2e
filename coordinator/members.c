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
#include "coordinator/members_state.h"

#include "coordinator/message.h"
#include "coordinator/store/records.h"
#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <string.h>

#define NAME_LIMIT 48

/* ---- state ---- */

void member_settle(Member *m, bool was_attached)
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

void member_save(Member *m, StoreDone done, void *user)
{
    MemberRecord record = {.joined_us = m->joined_wall_us,
                           .draining = m->draining,
                           .revoked = m->revoked,
                           .attached = m->attached,
                           .reason = m->drain_reason};
    store_put(m->members->options.store, STORE_MEMBERS, m->name, member_record_pack(&record), done,
              user);
}

void member_drop_stream(Member *m)
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

void member_detach(Member *m, const char *reason)
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

void member_arm(Member *m, int64_t delay_us)
{
    Loop *loop = m->members->options.loop;
    loop_timer_cancel(loop, m->deadline);
    m->deadline_us = loop_now_us(loop) + delay_us;
    m->deadline = loop_timer_start(loop, delay_us, member_on_deadline, m);
}

/* The stream ended, by a reset or by the worker's half-close (a killed process gives either): it
 * has half a second to come back, but never longer than its heartbeat allows. */
void member_on_reset(void *user)
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
