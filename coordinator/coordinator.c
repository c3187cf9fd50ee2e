/* Start-up, in this order and no other:
 *
 *   read every table ──▶ cluster id, generation + 1, certificates durable
 *                    ──▶ listeners ──▶ STATE/endpoint ──▶ SERVING
 *
 * 1. Nothing is served before the new generation is durable: no two incarnations of a coordinator
 * speak with the same one.
 * 2. STATE/endpoint appears (by rename) only when both addresses in it are bound.
 * 3. Parts are freed in the reverse order of their making; servers first, so that no handler sees a
 * missing part; the store last. */
#include "coordinator/coordinator.h"

#include "coordinator/ca/state_files.h"
#include "coordinator/parts.h"
#include "coordinator/store/records.h"
#include "proto/base/error.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define HTTP_GRACE_MS 300
#define COORDINATOR_NAME "coordinator"
#define RENEW_LEAST_US (INT64_C(1) * 1000000)
#define RENEW_LOOK_US (INT64_C(24) * 3600 * 1000000)
#define RENEW_RETRY_US (INT64_C(3600) * 1000000)

struct Coordinator {
    Parts parts;
    char *listen, *join_listen, *health_listen, *advertise, *state_dir, *models_dir;
    char *http_listen, *http_certificate_pem, *http_key_pem;
    ApiLimits http_limits;
    GPtrArray *rows[STORE_TABLE_COUNT]; /* of StoreRow, until start is done */
    int next_table;
    char *key_pem, *chain_pem;
    int64_t renew_wall_us; /* the certificate, at two thirds of its life: the rest is for trying
                              again */
    LoopTimer *renew;      /* looks each day at least, while it serves */
    void (*started)(const GError *error, void *user);
    void *user;
};

Coordinator *coordinator_new(const CoordinatorOptions *options)
{
    Coordinator *c = g_new0(Coordinator, 1);
    c->listen = g_strdup(options->listen);
    c->join_listen = g_strdup(options->join_listen);
    c->health_listen = g_strdup(options->health_listen);
    c->advertise = g_strdup(options->advertise);
    c->state_dir = g_strdup(options->state_dir);
    c->models_dir = g_strdup(options->models_dir);
    c->http_listen = g_strdup(options->http_listen);
    c->http_certificate_pem = g_strdup(options->http_certificate_pem);
    c->http_key_pem = g_strdup(options->http_key_pem);
    c->http_limits = options->http_limits != NULL ? *options->http_limits : api_limits_default();
    g_queue_init(&c->parts.serving);
    c->parts.options = *options;
    c->parts.started_us = loop_now_us(options->loop);
    return c;
}

static void erase(char *text)
{
    if (text != NULL) {
        memset(text, 0, strlen(text));
        g_free(text);
    }
}

void coordinator_free(Coordinator *c)
{
    if (c == NULL) {
        return;
    }
    Parts *p = &c->parts;
    loop_timer_cancel(p->options.loop, c->renew);
    members_quiesce(p->members);
    http_admin_free(p);
    submissions_free(p->submissions);
    requests_free(p->requests);
    api_service_free(p->api, HTTP_GRACE_MS);
    api_keys_free(p->keys);
    if (p->control != NULL) {
        rpc_server_free(p->control, 100);
    }
    if (p->health != NULL) {
        rpc_server_free(p->health, 0);
    }
    join_gate_free(p->gate);
    token_book_free(p->tokens);
    jobs_free(p->jobs);
    members_free(p->members);
    work_pool_free(p->pool);
    models_free(p->models);
    authority_free(p->authority);
    store_free(p->options.store);
    for (int i = 0; i < STORE_TABLE_COUNT; i++) {
        g_clear_pointer(&c->rows[i], g_ptr_array_unref);
    }
    erase(c->key_pem);
    g_free(c->chain_pem);
    g_free(p->join_address);
    g_free(p->control_address);
    g_free(p->cluster);
    erase(c->http_key_pem);
    g_free(c->http_certificate_pem);
    g_free(c->http_listen);
    g_free(c->models_dir);
    g_free(c->state_dir);
    g_free(c->advertise);
    g_free(c->health_listen);
    g_free(c->join_listen);
    g_free(c->listen);
    g_free(c);
}

/* ---- addresses ---- */

static char *host_of(const char *address)
{
    const char *colon = strrchr(address, ':');
    return colon != NULL ? g_strndup(address, (gsize)(colon - address)) : g_strdup(address);
}

static bool is_wildcard(const char *host)
{
    return host[0] == '\0' || strcmp(host, "0.0.0.0") == 0 || strcmp(host, "[::]") == 0 ||
           strcmp(host, "::") == 0 || strcmp(host, "*") == 0;
}

/* This host's own addresses, loopback excluded; of char *. */
static GPtrArray *own_addresses(void)
{
    GPtrArray *list = g_ptr_array_new_with_free_func(g_free);
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) == 0) {
        for (struct ifaddrs *i = all; i != NULL; i = i->ifa_next) {
            char text[INET_ADDRSTRLEN];
            bool useful = i->ifa_addr != NULL && i->ifa_addr->sa_family == AF_INET &&
                          (i->ifa_flags & IFF_UP) != 0 && (i->ifa_flags & IFF_LOOPBACK) == 0;
            if (useful && inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, text,
                                    sizeof text) != NULL) {
                g_ptr_array_add(list, g_strdup(text));
            }
        }
        freeifaddrs(all);
    }
    return list;
}

/* The address by which others reach a listener that is bound to `bound`. */
static char *reachable(const Coordinator *c, const char *bound)
{
    g_autofree char *host = host_of(bound);
    const char *port = strrchr(bound, ':');
    if (c->advertise == NULL && !is_wildcard(host)) {
        return g_strdup(bound);
    }
    g_autoptr(GPtrArray) own = own_addresses();
    const char *name = c->advertise != NULL ? c->advertise
                       : own->len > 0       ? g_ptr_array_index(own, 0)
                                            : "127.0.0.1";
    return g_strconcat(name, port != NULL ? port : "", NULL);
}

/* Everything that somebody may call this host by, for the certificate. */
static GPtrArray *certificate_names(const Coordinator *c)
{
    GPtrArray *names = own_addresses();
    g_ptr_array_add(names, g_strdup("localhost"));
    g_ptr_array_add(names, g_strdup("127.0.0.1"));
    char host[256];
    if (gethostname(host, sizeof host) == 0) {
        host[sizeof host - 1] = '\0';
        g_ptr_array_add(names, g_strdup(host));
    }
    const char *given[] = {c->listen, c->join_listen, c->advertise};
    for (size_t i = 0; i < G_N_ELEMENTS(given); i++) {
        g_autofree char *name =
            given[i] != NULL ? (given[i] == c->advertise ? g_strdup(given[i]) : host_of(given[i]))
                             : NULL;
        if (name != NULL && !is_wildcard(name)) {
            g_ptr_array_add(names, g_steal_pointer(&name));
        }
    }
    return names;
}

/* ---- start ---- */

static void start_report(Coordinator *c, const GError *error)
{
    for (int i = 0; i < STORE_TABLE_COUNT; i++) {
        g_clear_pointer(&c->rows[i], g_ptr_array_unref);
    }
    c->started(error, c->user);
}

static GBytes *meta_row(const Coordinator *c, const char *key)
{
    const GPtrArray *rows = c->rows[STORE_META];
    for (guint i = 0; i < rows->len; i++) {
        StoreRow *row = g_ptr_array_index(rows, i);
        if (strcmp(row->key, key) == 0) {
            return row->value;
        }
    }
    return NULL;
}

static bool start_identity(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    GBytes *cluster = meta_row(c, "cluster");
    GBytes *generation = meta_row(c, "generation");
    if (cluster != NULL) {
        gsize size;
        const char *text = g_bytes_get_data(cluster, &size);
        p->cluster = g_strndup(text, size);
    } else {
        p->cluster = g_strdup_printf("%016" G_GINT64_MODIFIER "x", random_u64(p->options.random));
    }
    if (generation != NULL &&
        !counter_record_read("generation", generation, &p->generation, error)) {
        return false;
    }
    p->generation++;
    random_fill(p->options.random, p->generation_id, sizeof p->generation_id);
    return true;
}

/* fn over every row of a table; a row that cannot be read is said and left out when `tolerant`,
 * else the start fails. */
static bool restore_table(Coordinator *c, StoreTable table,
                          bool (*fn)(void *object, const StoreRow *row, GError **error),
                          void *object, bool tolerant, GError **error)
{
    for (guint i = 0; i < c->rows[table]->len; i++) {
        g_autoptr(GError) own = NULL;
        if (!fn(object, g_ptr_array_index(c->rows[table], i), &own)) {
            if (!tolerant) {
                g_propagate_error(error, g_steal_pointer(&own));
                return false;
            }
            log_warn(c->parts.options.log, "%s", own->message);
        }
    }
    return true;
}

static bool restore_certificate(void *object, const StoreRow *row, GError **error)
{
    return authority_restore(object, row, error);
}

static bool restore_token(void *object, const StoreRow *row, GError **error)
{
    return token_book_restore(object, row, error);
}

static bool restore_api_key(void *object, const StoreRow *row, GError **error)
{
    return api_keys_restore(object, row, error);
}

static bool restore_member(void *object, const StoreRow *row, GError **error)
{
    return members_restore(object, row, error);
}

static bool restore_job(void *object, const StoreRow *row, GError **error)
{
    return jobs_restore(object, row, error);
}

static bool restore_submission(void *object, const StoreRow *row, GError **error)
{
    return submissions_restore(object, row, error);
}

static bool restore_epoch(void *object, const StoreRow *row, GError **error)
{
    return jobs_restore_epoch(object, row, error);
}

static bool restore_manifest(void *object, const StoreRow *row, GError **error)
{
    models_restore(object, row);
    return true;
}

static void on_tokens_changed(void *user)
{
    Coordinator *c = user;
    if (c->parts.gate != NULL) {
        join_gate_update(c->parts.gate, c->parts.tokens);
    }
}

/* A certificate of our own. */
static bool issue_certificate(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    g_autoptr(GPtrArray) names = certificate_names(c);
    char *key = NULL, *chain = NULL;
    if (!authority_issue(p->authority, COORDINATOR_NAME, "coordinator",
                         (const char *const *)names->pdata, names->len, &key, &chain, error)) {
        return false;
    }
    erase(c->key_pem);
    g_free(c->chain_pem);
    c->key_pem = key;
    c->chain_pem = chain;
    int64_t now = loop_wall_us(p->options.loop);
    c->renew_wall_us = now + (authority_expiry(p->authority, COORDINATOR_NAME) - now) / 3 * 2;
    return c->state_dir == NULL ||
           (state_file_write(c->state_dir, "coordinator.crt", c->chain_pem, 0644, error) &&
            state_file_write(c->state_dir, "coordinator.key", c->key_pem, 0600, error));
}

static bool ensure_admin(Coordinator *c, GError **error)
{
    return c->state_dir == NULL || authority_ensure_admin(c->parts.authority, c->state_dir, error);
}

static bool start_authority(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    p->authority =
        authority_new(p->options.loop, p->options.store, c->state_dir, p->cluster, error);
    if (p->authority == NULL ||
        !restore_table(c, STORE_CERTIFICATES, restore_certificate, p->authority, false, error)) {
        return false;
    }
    p->tokens =
        token_book_new(p->options.loop, p->options.store, p->options.random, on_tokens_changed, c);
    if (!restore_table(c, STORE_TOKENS, restore_token, p->tokens, false, error)) {
        return false;
    }
    return issue_certificate(c, error) && ensure_admin(c, error);
}

static RpcCredentials own_credentials(const Coordinator *c)
{
    return (RpcCredentials){.ca_pem = authority_ca_pem(c->parts.authority),
                            .certificate_pem = c->chain_pem,
                            .key_pem = c->key_pem,
                            .require_client_certificate = true};
}

static void plan_renewal(Coordinator *c);

/* The listeners and the channels to workers take the new certificate; what is open stays. */
static bool renew_certificate(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    if (!issue_certificate(c, error)) {
        return false;
    }
    RpcCredentials own = own_credentials(c);
    if (!rpc_server_set_credentials(p->control, &own, error)) {
        return false;
    }
    join_gate_set_credentials(p->gate, &own);
    members_set_credentials(p->members, &own);
    log_info(p->options.log, "certificate renewed");
    return true;
}

static void renew_due(void *user)
{
    Coordinator *c = user;
    g_autoptr(GError) error = NULL;
    c->renew = NULL;
    bool due = loop_wall_us(c->parts.options.loop) >= c->renew_wall_us;
    if (!ensure_admin(c, &error) || (due && !renew_certificate(c, &error))) {
        log_error(c->parts.options.log, "certificate was not renewed: %s: tries again in an hour",
                  error->message);
        c->renew = loop_timer_start(c->parts.options.loop, RENEW_RETRY_US, renew_due, c);
        return;
    }
    plan_renewal(c);
}

static void plan_renewal(Coordinator *c)
{
    Loop *loop = c->parts.options.loop;
    int64_t left = c->renew_wall_us - loop_wall_us(loop);
    c->renew = loop_timer_start(loop, CLAMP(left, RENEW_LEAST_US, RENEW_LOOK_US), renew_due, c);
}

static const GPtrArray *revoked_serials(void *user)
{
    return authority_revoked(user);
}

static bool is_revoked(const char *serial, void *user)
{
    return authority_is_revoked(user, serial);
}

static bool start_members(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    MembersOptions options = {.loop = p->options.loop,
                              .transport = p->options.transport,
                              .store = p->options.store,
                              .log = p->options.log,
                              .credentials = own_credentials(c),
                              .cluster = p->cluster,
                              .generation = p->generation,
                              .revoked = revoked_serials,
                              .revoked_user = p->authority};
    memcpy(options.generation_id, p->generation_id, sizeof options.generation_id);
    p->members = members_new(&options);
    p->pool = work_pool_new(p->options.loop, p->options.threads);
    p->models = models_new(p->pool, p->options.store, c->models_dir);
    return restore_table(c, STORE_MEMBERS, restore_member, p->members, false, error) &&
           restore_table(c, STORE_MANIFESTS, restore_manifest, p->models, true, error);
}

static bool start_control(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    RpcServerOptions options = {.listen = c->listen,
                                .credentials = own_credentials(c),
                                .health = true,
                                .reflection = true,
                                .is_revoked = is_revoked,
                                .revoked_user = p->authority,
                                .log = p->options.log};
    p->control = rpc_server_new(p->options.transport, p->options.loop, &options, error);
    if (p->control == NULL) {
        return false;
    }
    p->control_address = reachable(c, rpc_server_address(p->control));
    return true;
}

/* What the parts share that work with members and models. */
#define SHARED_PARTS(p)                                                                            \
    .loop = (p)->options.loop, .log = (p)->options.log, .random = (p)->options.random,             \
    .pool = (p)->pool, .members = (p)->members, .models = (p)->models,                             \
    .generation = (p)->generation

/* The parts of the HTTP interface; its listener comes last, when there is something behind it. */
static void start_api(Coordinator *c)
{
    Parts *p = &c->parts;
    p->keys = api_keys_new(p->options.loop, p->options.store, p->options.random);
    ApiServiceOptions options = {SHARED_PARTS(p),
                                 .jobs = p->jobs,
                                 .requests = p->requests,
                                 .keys = p->keys,
                                 .limits = c->http_limits,
                                 .isolate_keys = p->options.http_isolate_keys,
                                 .certificate_pem = c->http_certificate_pem,
                                 .key_pem = c->http_key_pem,
                                 .lag_ms = p->options.lag_ms,
                                 .lag_user = p->options.lag_user};
    p->api = api_service_new(&options);
}

static bool start_jobs(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    if (p->options.seal_off) {
        log_warn(p->options.log, "payloads between workers are not sealed (--seal off): whoever "
                                 "reaches the data ports can read and forge activations");
    }
    JobsOptions options = {SHARED_PARTS(p),
                           .store = p->options.store,
                           .cluster = p->cluster,
                           .control_address = p->control_address,
                           .seal_off = p->options.seal_off,
                           .recovery_wait_us = p->options.recovery_wait_us};
    p->jobs = jobs_new(&options);
    RequestsOptions requests = {SHARED_PARTS(p), .jobs = p->jobs, .cluster = p->cluster};
    p->requests = requests_new(&requests);
    p->slices = (SlicesService){p->options.loop, p->pool, p->models};
    start_api(c);
    SubmissionsOptions submissions = {.loop = p->options.loop,
                                      .log = p->options.log,
                                      .store = p->options.store,
                                      .jobs = p->jobs,
                                      .api = p->api,
                                      .train = {.loop = p->options.loop,
                                                .log = p->options.log,
                                                .store = p->options.store,
                                                .random = p->options.random,
                                                .pool = p->pool,
                                                .members = p->members,
                                                .jobs = p->jobs,
                                                .cluster = p->cluster,
                                                .generation = p->generation,
                                                .seal_off = p->options.seal_off,
                                                .state_dir = c->state_dir}};
    p->submissions = submissions_new(&submissions);
    return restore_table(c, STORE_SUBMISSIONS, restore_submission, p->submissions, true, error) &&
           restore_table(c, STORE_API_KEYS, restore_api_key, p->keys, false, error) &&
           restore_table(c, STORE_JOBS, restore_job, p->jobs, true, error) &&
           restore_table(c, STORE_EPOCHS, restore_epoch, p->jobs, false, error);
}

static bool start_join(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    JoinGateOptions options = {.loop = p->options.loop,
                               .transport = p->options.transport,
                               .log = p->options.log,
                               .random = p->options.random,
                               .authority = p->authority,
                               .members = p->members,
                               .listen = c->join_listen,
                               .cluster = p->cluster,
                               .control_address = p->control_address,
                               .credentials = own_credentials(c)};
    p->gate = join_gate_new(&options, error);
    if (p->gate == NULL) {
        return false;
    }
    p->join_address = reachable(c, join_gate_address(p->gate));
    return true;
}

static bool start_health(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    if (c->health_listen == NULL) {
        return true;
    }
    RpcServerOptions options = {.listen = c->health_listen, .health = true, .log = p->options.log};
    p->health = rpc_server_new(p->options.transport, p->options.loop, &options, error);
    return p->health != NULL && rpc_server_start(p->health, error);
}

static bool start_http(Coordinator *c, GError **error)
{
    return c->http_listen == NULL ||
           api_service_listen(c->parts.api, c->http_listen, error) != NULL;
}

static void set_health(RpcServer *server)
{
    static const char *const services[] = {"", "weft.v1.Admin", "weft.v1.Cluster", "weft.v1.Serve"};
    for (size_t i = 0; server != NULL && i < G_N_ELEMENTS(services); i++) {
        rpc_server_set_health(server, services[i], true);
    }
}

/* NULL without --http. */
static const char *http_address(const Coordinator *c)
{
    const HttpServer *server =
        c->http_listen != NULL && c->parts.api != NULL ? api_service_listener(c->parts.api) : NULL;
    return server != NULL ? http_server_address(server) : NULL;
}

static bool write_endpoint(Coordinator *c, GError **error)
{
    if (c->state_dir == NULL) {
        return true;
    }
    Parts *p = &c->parts;
    g_autofree char *health = p->health != NULL
                                  ? g_strdup_printf("health %s\n", rpc_server_address(p->health))
                                  : g_strdup("");
    const char *address = http_address(c);
    g_autofree char *http = address != NULL ? g_strdup_printf("http %s\n", address) : g_strdup("");
    g_autofree char *text =
        g_strdup_printf("control %s\njoin %s\n%s%spid %ld\ncluster %s\n", p->control_address,
                        p->join_address, health, http, (long)getpid(), p->cluster);
    return state_file_write(c->state_dir, "endpoint", text, 0644, error);
}

static bool start_services(Coordinator *c, GError **error)
{
    Parts *p = &c->parts;
    cluster_service_add(p->control, p);
    admin_service_add(p->control, p);
    slices_service_add(p->control, &p->slices);
    requests_add(p->requests, p->control);
    if (!rpc_server_start(p->control, error)) {
        return false;
    }
    join_gate_update(p->gate, p->tokens);
    plan_renewal(c);
    set_health(p->control);
    set_health(p->health);
    if (!write_endpoint(c, error)) {
        return false;
    }
    submissions_start(p->submissions);
    return true;
}

static void start_on_durable(const GError *error, void *user)
{
    Coordinator *c = user;
    g_autoptr(GError) own = NULL;
    if (error == NULL && start_services(c, &own)) {
        log_info(c->parts.options.log,
                 "cluster %s generation %" G_GUINT64_FORMAT ": control at %s, join at %s",
                 c->parts.cluster, c->parts.generation, c->parts.control_address,
                 c->parts.join_address);
        start_report(c, NULL);
    } else {
        start_report(c, error != NULL ? error : own);
    }
}

static void start_with_rows(Coordinator *c)
{
    Parts *p = &c->parts;
    g_autoptr(GError) error = NULL;
    if (!start_identity(c, &error) || !start_authority(c, &error) || !start_members(c, &error) ||
        !start_control(c, &error) || !start_jobs(c, &error) || !start_join(c, &error) ||
        !start_health(c, &error) || !start_http(c, &error)) {
        start_report(c, error);
        return;
    }
    StoreChange changes[] = {
        {.table = STORE_META,
         .key = "cluster",
         .value = g_bytes_new(p->cluster, strlen(p->cluster))},
        {.table = STORE_META, .key = "generation", .value = counter_record_pack(p->generation)},
    };
    store_write(p->options.store, changes, G_N_ELEMENTS(changes), start_on_durable, c);
    for (size_t i = 0; i < G_N_ELEMENTS(changes); i++) {
        g_bytes_unref(changes[i].value);
    }
}

static void start_on_rows(const GPtrArray *rows, const GError *error, void *user)
{
    Coordinator *c = user;
    if (error != NULL) {
        start_report(c, error);
        return;
    }
    GPtrArray *copy = g_ptr_array_new_with_free_func((GDestroyNotify)store_row_free);
    for (guint i = 0; i < rows->len; i++) {
        const StoreRow *row = g_ptr_array_index(rows, i);
        StoreRow *own = g_new0(StoreRow, 1);
        own->key = g_strdup(row->key);
        own->value = g_bytes_ref(row->value);
        g_ptr_array_add(copy, own);
    }
    c->rows[c->next_table++] = copy;
    if (c->next_table < STORE_TABLE_COUNT) {
        store_read(c->parts.options.store, (StoreTable)c->next_table, start_on_rows, c);
    } else {
        start_with_rows(c);
    }
}

void coordinator_start(Coordinator *c, void (*started)(const GError *error, void *user), void *user)
{
    c->started = started;
    c->user = user;
    store_read(c->parts.options.store, STORE_META, start_on_rows, c);
}

const char *coordinator_control_address(const Coordinator *c)
{
    return c->parts.control_address;
}
