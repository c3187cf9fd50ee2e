/* weft token, revoke, status, drain, undrain: the operator's view of the members. */
#include "tools/weft/request.h"
#include "tools/weft/training_shown.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <stdio.h>
#include <string.h>

#define ADMIN (&weft__v1__admin__descriptor)
enum { DEADLINE_MS = 10000 };

/* ---- token ---- */

typedef struct TokenOptions {
    CommonOptions common;
    char *role;
    int64_t ttl_us;
    uint64_t uses;
} TokenOptions;

static const Option TOKEN_OPTIONS[] = {
    {"role", 0, OPTION_STRING, offsetof(TokenOptions, role), "ROLE", "what its bearer becomes",
     NULL, 0, 0, "worker|admin|submit|probe", false},
    {"ttl", 0, OPTION_DURATION, offsetof(TokenOptions, ttl_us), "TIME", "how long it is valid",
     NULL, 0, 0, NULL, false},
    {"uses", 0, OPTION_COUNT, offsetof(TokenOptions, uses), "N", "how often it may be used", NULL,
     1, 10000, NULL, false},
    COMMON_OPTIONS(TokenOptions),
    {0},
};

static void token_defaults(void *values)
{
    TokenOptions *o = values;
    o->ttl_us = (int64_t)3600 * G_USEC_PER_SEC;
    o->uses = 1;
}

static char *hash_text(const ProtobufCBinaryData *hash)
{
    GString *text = g_string_new("sha256:");
    for (size_t i = 0; i < hash->len; i++) {
        g_string_append_printf(text, "%02x", hash->data[i]);
    }
    return g_string_free(text, FALSE);
}

static int token_run(const Verb *verb, void *values, GPtrArray *rest)
{
    TokenOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1 || strcmp(rest->pdata[0], "create") != 0) {
        return cli_usage(verb, "`create` is what a token can be asked for");
    }
    const char *role = o->role != NULL ? o->role : "worker";
    Weft__V1__CreateTokenRequest request = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    Weft__V1__CreateTokenResponse *response;
    request.role = (char *)role;
    request.ttl_ms = (uint64_t)(o->ttl_us / 1000);
    request.uses = (uint32_t)o->uses;
    if (o->common.dry_run) {
        printf("would create a token for role %s, %" G_GUINT64_FORMAT " uses\n", role, o->uses);
        return 0;
    }
    if (!admin_call(&o->common, "CreateToken", &request.base, (ProtobufCMessage **)&response,
                    &error)) {
        return cli_fail(error);
    }
    g_autofree char *hash = hash_text(&response->ca_hash);
    if (o->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object,
                               json_pack("{s:s,s:s,s:s,s:s,s:I}", "token", response->token,
                                         "ca_hash", hash, "join_address", response->join_address,
                                         "role", role, "expires", (json_int_t)response->expires));
        cli_print_json(object);
    } else if (strcmp(role, "worker") == 0) {
        printf("weft-worker --join %s --token %s --ca-hash %s\n", response->join_address,
               response->token, hash);
    } else {
        printf("weft login %s --token %s --ca-hash %s\n", response->join_address, response->token,
               hash);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

const Verb VERB_TOKEN = {"token",       "create [--role ROLE]", "let a worker or a person join",
                         TOKEN_OPTIONS, sizeof(TokenOptions),   token_defaults,
                         token_run};

/* ---- verbs with a node ---- */

typedef struct NodeOptions {
    CommonOptions common;
    char *reason;
} NodeOptions;

static const Option NODE_OPTIONS[] = {
    {"reason", 0, OPTION_STRING, offsetof(NodeOptions, reason), "TEXT", "shown in status", NULL, 0,
     0, NULL, false},
    COMMON_OPTIONS(NodeOptions),
    {0},
};
static const Option PLAIN_NODE_OPTIONS[] = {COMMON_OPTIONS(NodeOptions), {0}};

static int revoke_run(const Verb *verb, void *values, GPtrArray *rest)
{
    NodeOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one node is expected");
    }
    Weft__V1__RevokeRequest request = WEFT__V1__REVOKE_REQUEST__INIT;
    Weft__V1__RevokeResponse *response;
    request.node = rest->pdata[0];
    if (o->common.dry_run) {
        printf("would revoke all certificates of %s\n", request.node);
        return 0;
    }
    if (!admin_call(&o->common, "Revoke", &request.base, (ProtobufCMessage **)&response, &error)) {
        return cli_fail(error);
    }
    if (!o->common.quiet) {
        fprintf(stderr, "%u certificates of %s revoked\n", response->certificates, request.node);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return 0;
}

static int drain_node(const Verb *verb, NodeOptions *o, GPtrArray *rest, bool undrain)
{
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one node is expected");
    }
    Weft__V1__DrainRequest request = WEFT__V1__DRAIN_REQUEST__INIT;
    ProtobufCMessage *response;
    request.node = rest->pdata[0];
    request.reason = o->reason != NULL ? o->reason : "";
    request.undrain = undrain;
    if (o->common.dry_run) {
        printf("would %s %s\n", verb->name, request.node);
        return 0;
    }
    if (!admin_call(&o->common, "Drain", &request.base, &response, &error)) {
        return cli_fail(error);
    }
    protobuf_c_message_free_unpacked(response, NULL);
    if (!o->common.quiet) {
        fprintf(stderr, undrain ? "%s takes work again\n" : "%s takes no new work\n", request.node);
    }
    return 0;
}

static int drain_run(const Verb *verb, void *values, GPtrArray *rest)
{
    return drain_node(verb, values, rest, false);
}

static int undrain_run(const Verb *verb, void *values, GPtrArray *rest)
{
    return drain_node(verb, values, rest, true);
}

const Verb VERB_REVOKE = {"revoke",
                          "NODE",
                          "refuse a node's certificates from now on",
                          PLAIN_NODE_OPTIONS,
                          sizeof(NodeOptions),
                          NULL,
                          revoke_run};
const Verb VERB_DRAIN = {"drain",      "NODE [--reason R]", "no new work for a node",
                         NODE_OPTIONS, sizeof(NodeOptions), NULL,
                         drain_run};
const Verb VERB_UNDRAIN = {
    "undrain", "NODE",     "work for a node again", PLAIN_NODE_OPTIONS, sizeof(NodeOptions),
    NULL,      undrain_run};

/* ---- status ---- */

typedef struct StatusOptions {
    CommonOptions common;
    bool watch;
} StatusOptions;

static const Option STATUS_OPTIONS[] = {
    {"watch", 'w', OPTION_FLAG, offsetof(StatusOptions, watch), "", "again every second", NULL, 0,
     0, NULL, false},
    COMMON_OPTIONS(StatusOptions),
    {0},
};

static json_t *counters_json(const Weft__V1__Counters *c)
{
    return json_pack(
        "{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "steps", (json_int_t)c->steps, "rows",
        (json_int_t)c->rows, "wire_bytes_sent", (json_int_t)c->wire_bytes_sent,
        "wire_bytes_received", (json_int_t)c->wire_bytes_received, "wire_messages_sent",
        (json_int_t)c->wire_messages_sent, "dropped_stale", (json_int_t)c->dropped_stale,
        "dropped_replayed", (json_int_t)c->dropped_replayed, "dropped_corrupt",
        (json_int_t)c->dropped_corrupt, "compute_us", (json_int_t)c->compute_us, "wait_us",
        (json_int_t)c->wait_us, "wire_us", (json_int_t)c->wire_us, "seal_us",
        (json_int_t)c->seal_us);
}

static json_t *devices_json(const Weft__V1__Member *m)
{
    json_t *devices = json_array();
    for (size_t i = 0; i < m->n_devices; i++) {
        const Weft__V1__Device *d = m->devices[i];
        json_array_append_new(
            devices, json_pack("{s:s,s:I,s:s,s:s,s:I,s:s}", "kind", d->kind, "index",
                               (json_int_t)d->index, "name", d->name, "bus", d->bus, "memory_bytes",
                               (json_int_t)d->memory_bytes, "exact_kind", d->exact_kind));
    }
    return devices;
}

static json_t *member_json(const Weft__V1__Member *m)
{
    json_t *shards = json_array();
    for (size_t i = 0; i < m->n_shards; i++) {
        json_array_append_new(shards, json_string(m->shards[i]));
    }
    json_t *object =
        json_pack("{s:s,s:s,s:s,s:I,s:s,s:I,s:I,s:o,s:s,s:I,s:I,s:s,s:s,s:f}", "name", m->name,
                  "state", m->state, "address", m->address, "epoch", (json_int_t)m->epoch, "isa",
                  m->isa, "threads", (json_int_t)m->threads, "memory_bytes",
                  (json_int_t)m->memory_bytes, "shards", shards, "reason", m->reason, "age_ms",
                  (json_int_t)m->age_ms, "last_heartbeat_ms", (json_int_t)m->last_heartbeat_ms,
                  "release", m->release, "cpu", m->cpu, "loop_lag_ms", m->loop_lag_ms);
    json_object_set_new(object, "devices", devices_json(m));
    if (m->counters != NULL) {
        json_object_set_new(object, "counters", counters_json(m->counters));
    }
    if (m->measured != NULL) {
        json_object_set_new(
            object, "measured",
            json_pack("{s:f,s:f,s:f,s:f,s:f,s:I}", "read_bytes_per_s",
                      m->measured->read_bytes_per_s, "int8_ops_per_s", m->measured->int8_ops_per_s,
                      "f32_ops_per_s", m->measured->f32_ops_per_s, "link_latency_s",
                      m->measured->link_latency_s, "link_bytes_per_s",
                      m->measured->link_bytes_per_s, "since", (json_int_t)m->measured->since));
    }
    return object;
}

static void print_status_json(const Weft__V1__StatusResponse *s)
{
    json_t *object = cli_json_new(), *members = json_array(), *jobs = json_array();
    for (size_t i = 0; i < s->n_members; i++) {
        json_array_append_new(members, member_json(s->members[i]));
    }
    for (size_t i = 0; i < s->n_jobs; i++) {
        const Weft__V1__Job *j = s->jobs[i];
        json_array_append_new(jobs, json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:I,s:s,s:I}", "id", j->id,
                                              "kind", j->kind, "model", j->model, "state", j->state,
                                              "layout", j->layout, "numerics", j->numerics, "epoch",
                                              (json_int_t)j->epoch, "error", j->error,
                                              "active_requests", (json_int_t)j->active_requests));
    }
    g_autofree char *hash = hash_text(&s->ca_hash);
    json_object_update_new(object,
                           json_pack("{s:s,s:I,s:s,s:s,s:s,s:s,s:s,s:o,s:o}", "cluster", s->cluster,
                                     "generation", (json_int_t)s->generation, "release", s->release,
                                     "seal", s->seal_off ? "off" : "on", "control_address",
                                     s->control_address, "join_address", s->join_address, "ca_hash",
                                     hash, "members", members, "jobs", jobs));
    json_object_set_new(object, "training", training_json(s));
    cli_print_json(object);
}

static uint64_t dropped(const Weft__V1__Member *m)
{
    return m->counters != NULL ? m->counters->dropped_stale + m->counters->dropped_replayed +
                                     m->counters->dropped_corrupt
                               : 0;
}

static bool any_dropped(const Weft__V1__StatusResponse *s)
{
    for (size_t i = 0; i < s->n_members; i++) {
        if (dropped(s->members[i]) > 0) {
            return true;
        }
    }
    return false;
}

/* What a member holds: of its latest job without the job's name, and how many more; with details
 * everything. Returned. */
static char *shards_text(const Weft__V1__Member *m, bool details)
{
    if (m->n_shards == 0) {
        return g_strdup(m->reason[0] != '\0' ? m->reason : "-");
    }
    g_autoptr(GString) text = g_string_new(m->reason);
    for (size_t k = 0; details && k < m->n_shards; k++) {
        g_string_append_printf(text, "%s%s", text->len > 0 ? "; " : "", m->shards[k]);
    }
    if (!details) {
        const char *latest = m->shards[m->n_shards - 1], *after_job = strchr(latest, ' ');
        g_string_append_printf(text, "%s%s", text->len > 0 ? "; " : "",
                               after_job != NULL ? after_job + 1 : latest);
        if (m->n_shards > 1) {
            g_string_append_printf(text, " +%zu", m->n_shards - 1);
        }
    }
    return g_string_free(g_steal_pointer(&text), FALSE);
}

/* DROPPED: messages of an old epoch, replayed, or whose seal or checksum is wrong; only where there
 * are any. */
static void print_members(const Weft__V1__StatusResponse *s, bool details)
{
    const bool drops = any_dropped(s);
    TextTable *t =
        text_table_new(drops ? (const char *const[]){"NAME", "STATE", "ISA", "THREADS", "MEMORY",
                                                     "SHARDS", "DROPPED", "AGE", NULL}
                             : (const char *const[]){"NAME", "STATE", "ISA", "THREADS", "MEMORY",
                                                     "SHARDS", "AGE", NULL});
    for (size_t i = 0; i < s->n_members; i++) {
        const Weft__V1__Member *m = s->members[i];
        g_autofree char *threads = g_strdup_printf("%u", m->threads);
        g_autofree char *memory = units_format_size(m->memory_bytes);
        g_autofree char *age = units_format_duration((int64_t)m->age_ms / 1000 * 1000000);
        g_autofree char *shards = shards_text(m, details);
        g_autofree char *lost = g_strdup_printf("%" G_GUINT64_FORMAT, dropped(m));
        g_autofree char *device =
            m->n_devices > 0 ? g_strdup_printf("%s:%u", m->devices[0]->kind, m->devices[0]->index)
                             : g_strdup(m->isa);
        text_table_row(t, m->name, m->state, device, threads, memory, shards, drops ? lost : age,
                       drops ? age : NULL, NULL);
    }
    if (!details) {
        text_table_fit(t, 5);
    }
    text_table_print(t);
}

static void print_jobs(const Weft__V1__StatusResponse *s, bool details)
{
    if (s->n_jobs == 0) {
        return;
    }
    printf("\n");
    TextTable *t = text_table_new(
        (const char *const[]){"JOB", "KIND", "STATE", "LAYOUT", "EPOCH", "MODEL", "AGE", NULL});
    for (size_t i = 0; i < s->n_jobs; i++) {
        const Weft__V1__Job *j = s->jobs[i];
        g_autofree char *epoch = g_strdup_printf("%" G_GUINT64_FORMAT, j->epoch);
        g_autofree char *age = units_format_duration((int64_t)j->age_ms / 1000 * 1000000);
        g_autofree char *model = g_path_get_basename(j->model);
        g_autofree char *layout = job_layout_text(j);
        text_table_row(t, j->id, j->kind, j->state, layout, epoch, model, age, NULL);
    }
    if (!details) {
        text_table_fit(t, 5);
    }
    text_table_print(t);
}

static bool show_status(Client *client, const StatusOptions *o, GError **error)
{
    Weft__V1__StatusRequest request = WEFT__V1__STATUS_REQUEST__INIT;
    Weft__V1__StatusResponse *status;
    request.details = true;
    if (!client_call(client, ADMIN, "Status", &request.base, DEADLINE_MS,
                     (ProtobufCMessage **)&status, error)) {
        return false;
    }
    if (o->common.json) {
        print_status_json(status);
    } else {
        print_members(status, o->common.verbose);
        print_jobs(status, o->common.verbose);
        training_print(status, o->common.verbose);
        printf("\npayloads between workers: %s\n",
               status->seal_off ? "NOT sealed, CRC32C only (--seal off)" : "sealed, AES-256-GCM");
    }
    protobuf_c_message_free_unpacked(&status->base, NULL);
    return true;
}

static bool watch_status(Client *client, const StatusOptions *o, GError **error)
{
    const bool never = false;
    while (!client->interrupted) {
        if (!o->common.json) {
            printf("\033[H\033[2J");
        }
        if (!show_status(client, o, error)) {
            return false;
        }
        fflush(stdout);
        main_loop_run_until(client->loop, client->interrupted ? &client->interrupted : &never,
                            G_USEC_PER_SEC);
    }
    return true;
}

static int status_run(const Verb *verb, void *values, GPtrArray *rest)
{
    StatusOptions *o = values;
    GError *error = NULL;
    if (rest->len > 0) {
        return cli_usage(verb, "'%s' is not expected", (char *)rest->pdata[0]);
    }
    Client *client = client_new(&o->common, &error);
    const bool ok = client != NULL &&
                    (o->watch ? watch_status(client, o, &error) : show_status(client, o, &error));
    client_free(client);
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_STATUS = {"status",
                          "[-w]",
                          "members, their states and shards, jobs",
                          STATUS_OPTIONS,
                          sizeof(StatusOptions),
                          NULL,
                          status_run};
