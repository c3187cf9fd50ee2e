/* clang-format off */
/* Wiring: who hears what from whom. The state machines are elsewhere (attach.c, deployment.h,
 * leader_service.c); here is only
 *
 *   coordinator --Worker, Leader--> listener --> deployments, leader service (refused while fenced)
 *   attach --welcome, ack, fenced--> deployments;  deployments --held, waiting, counters--> attach
 *   certificate at 2/3 of its life --Renew--> identity on disk --> attach, channels, listener
 *
 * Invariants
 *   1. While fenced no call of the coordinator is served: its epoch may be over.
 *   2. The boot id is drawn once per agent: it names this process to peers' keys and to the
 * coordinator. */
/* clang-format on */
#include "worker/agent/agent.h"

#include "kernels/device/ops.h"
#include "kernels/device/train_ops.h"
#include "kernels/device/use.h"

#include "proto/base/error.h"
#include "proto/base/version.h"
#include "transport/crypto/keys.h"
#include "transport/crypto/x509.h"
#include "weft/v1/serve.pb-c.h"
#include "worker/agent/attach.h"
#include "worker/agent/health.h"
#include "worker/agent/join.h"
#include "worker/agent/leader_service.h"
#include "worker/agent/train_estimate.h"
#include "worker/agent/trainings.h"
#include "worker/model/training_precision.h"
#include "worker/shard/slice_server.h"

#include <string.h>

#define RENEW_RETRY_US 60000000
#define ATTACHED_LOOK_US 1000000
#define STOP_LOOK_US 10000
#define SERVER_GRACE_MS 200

struct Agent {
    AgentOptions o;
    Identity identity;
    char *state_dir, *models_dir, *listen, *advertise, *health_listen, *host, *cpu;
    int *cpus;
    Measure *measures; /* of each device, or NULL */
    uint8_t boot_id[BOOT_ID_BYTES];
    char *address; /* what peers use */
    TaskPool *pool;
    SliceStore *store;
    PackedImages *images; /* or NULL */
    SliceServer *slices;
    Deployments *deployments;
    Trainings *trainings;
    LeaderService *leader;
    Health *health;
    Attach *attach;
    RpcServer *server, *health_server;
    GHashTable *channels;        /* source address -> RpcChannel * */
    GHashTable *channels_before; /* the last renewal, for what goes on over them; or NULL */
    GHashTable *revoked;         /* certificate serials */
    LoopTimer *renew, *leaving, *stopping;
    int64_t leave_until_us;
    char *renewed_key; /* of the request on its way */
    LoopFn stopped;
    void *stopped_user;
};

/* ---- the coordinator's calls ---- */

/* True: not fenced. Else the call was refused. */
static bool admit(Agent *a, RpcCall *call)
{
    if (!a->attach || attach_is_fenced(a->attach)) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, WEFT_ERROR_NOT_READY,
                                              "worker %s is %s: try again when it is attached",
                                              a->identity.name, a->attach ? "fenced" : "stopping");
        rpc_call_finish(call, error);
        return false;
    }
    return true;
}

static void on_load(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    Agent *a = user;
    if (admit(a, call)) {
        deployments_load(a->deployments, call, (const Weft__V1__LoadRequest *)request);
    }
}

static void on_start(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    Agent *a = user;
    if (admit(a, call)) {
        deployments_start(a->deployments, call, (const Weft__V1__StartRequest *)request);
    }
}

static void on_drop(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    Agent *a = user;
    if (admit(a, call)) {
        deployments_drop(a->deployments, call, (const Weft__V1__DropRequest *)request);
    }
}

static void on_generate(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    Agent *a = user;
    if (admit(a, call)) {
        leader_service_generate(a->leader, call, (const Weft__V1__GenerateRequest *)request);
    }
}

/* What an admitted call goes on with needs no new admission: fencing ends it. */
static void on_train(RpcCall *call, const ProtobufCMessage *command, void *user)
{
    Agent *a = user;
    if (rpc_call_data(call) != NULL || admit(a, call)) {
        trainings_on_command(a->trainings, call, (const Weft__V1__TrainCommand *)command);
    }
}

static void on_estimate(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    Agent *a = user;
    if (admit(a, call)) {
        train_estimate_answer(a->pool, a->o.device, trainings_process_bytes(a->trainings), call,
                              (const Weft__V1__TrainEstimateRequest *)request);
    }
}

static bool is_revoked(const char *serial, void *user)
{
    Agent *a = user;
    return g_hash_table_contains(a->revoked, serial);
}

/* ---- listeners ---- */

static RpcCredentials own_credentials(const Agent *a)
{
    return (RpcCredentials){a->identity.ca_pem, a->identity.certificate_pem, a->identity.key_pem,
                            true};
}

static RpcServer *open_server(Agent *a, const char *listen, GError **error)
{
    static const RpcMethod worker[] = {{"Load", on_load, RPC_ROLE_COORDINATOR},
                                       {"Start", on_start, RPC_ROLE_COORDINATOR},
                                       {"Drop", on_drop, RPC_ROLE_COORDINATOR},
                                       {NULL}};
    static const RpcMethod leader[] = {{"Generate", on_generate, RPC_ROLE_COORDINATOR}, {NULL}};
    static const RpcMethod trainer[] = {{"Train", on_train, RPC_ROLE_COORDINATOR},
                                        {"Estimate", on_estimate, RPC_ROLE_COORDINATOR},
                                        {NULL}};
    RpcServerOptions options = {
        .listen = listen,
        .credentials = own_credentials(a),
        .health = true,
        .reflection = true,
        .is_revoked = is_revoked,
        .revoked_user = a,
        .log = a->o.log,
    };
    RpcServer *server = rpc_server_new(a->o.transport, a->o.loop, &options, error);
    if (!server) {
        return NULL;
    }
    rpc_server_add(server, &weft__v1__worker__descriptor, worker, a);
    rpc_server_add(server, &weft__v1__leader__descriptor, leader, a);
    rpc_server_add(server, &weft__v1__trainer__descriptor, trainer, a);
    slice_server_add_to(a->slices, server);
    if (!rpc_server_start(server, error)) {
        rpc_server_free(server, 0);
        return NULL;
    }
    health_listen(a->health, server);
    return server;
}

static bool open_health_server(Agent *a, GError **error)
{
    RpcServerOptions options = {.listen = a->health_listen, .health = true, .log = a->o.log};
    a->health_server = rpc_server_new(a->o.transport, a->o.loop, &options, error);
    if (!a->health_server || !rpc_server_start(a->health_server, error)) {
        return false;
    }
    health_listen(a->health, a->health_server);
    return true;
}

static void close_server(Agent *a, RpcServer *server, int grace_ms)
{
    if (server) {
        health_unlisten(a->health, server);
        rpc_server_free(server, grace_ms);
    }
}

/* host:port for peers: the advertised host with the port that was bound. */
static char *peer_address(const Agent *a)
{
    const char *bound = rpc_server_address(a->server), *port = strrchr(bound, ':');
    return a->advertise && port ? g_strconcat(a->advertise, port, NULL) : g_strdup(bound);
}

/* ---- channels to sources of slices ---- */

static GHashTable *channels_new(void)
{
    return g_hash_table_new_full(g_str_hash, g_str_equal, g_free, (GDestroyNotify)rpc_channel_free);
}

static RpcChannel *channel_to(const char *source, bool is_last, void *user)
{
    Agent *a = user;
    const char *target = is_last ? a->identity.control_address
                                 : source; /* the coordinator, as this host reaches it */
    RpcChannel *channel = g_hash_table_lookup(a->channels, target);
    if (channel || (!is_last && strcmp(source, a->address) == 0)) {
        return channel; /* no use asking oneself */
    }
    RpcChannelOptions options = {
        .target = target,
        .credentials = {a->identity.ca_pem, a->identity.certificate_pem, a->identity.key_pem,
                        false},
        .server_name = is_last ? "weft-coordinator" : "weft-worker",
    };
    g_autoptr(GError) error = NULL;
    channel = rpc_channel_new(a->o.transport, a->o.loop, &options, &error);
    if (!channel) {
        log_warn(a->o.log, "source %s: %s", target, error->message);
        return NULL;
    }
    g_hash_table_insert(a->channels, g_strdup(target), channel);
    return channel;
}

/* ---- the certificate ---- */

static void renew_due(void *user);

static void plan_renewal(Agent *a)
{
    X509Info info;
    if (!x509_parse(a->identity.certificate_pem, &info, NULL)) {
        return; /* a stand-in of a simulated cluster */
    }
    int64_t due = info.not_before_us + (info.not_after_us - info.not_before_us) / 3 * 2;
    x509_info_clear(&info);
    a->renew = loop_timer_start(a->o.loop, MAX(0, due - loop_wall_us(a->o.loop)), renew_due, a);
}

/* What is open stays, also a fetch, until the next renewal. */
static void use_new_certificate(Agent *a)
{
    const RpcCredentials own = own_credentials(a);
    g_autoptr(GError) error = NULL;
    attach_set_identity(a->attach, &a->identity);
    g_clear_pointer(&a->channels_before, g_hash_table_unref);
    a->channels_before = a->channels;
    a->channels = channels_new();
    if (!rpc_server_set_credentials(a->server, &own, &error)) {
        log_error(a->o.log, "listener %s goes on with the old certificate: %s",
                  rpc_server_address(a->server), error->message);
    }
}

static void on_renewed(const ProtobufCMessage *message, void *user)
{
    Agent *a = user;
    const Weft__V1__RenewResponse *r = (const Weft__V1__RenewResponse *)message;
    g_autofree char *certificate =
        g_strndup((const char *)r->certificate_pem.data, r->certificate_pem.len);
    X509Info info = {0};
    g_autoptr(GError) error = NULL;
    if (!x509_parse(certificate, &info, &error)) {
        log_warn(a->o.log, "renewal: %s", error->message);
        return;
    }
    x509_info_clear(&info);
    x509_free_key(a->identity.key_pem);
    a->identity.key_pem = g_steal_pointer(&a->renewed_key);
    g_free(a->identity.certificate_pem);
    a->identity.certificate_pem = g_steal_pointer(&certificate);
    if (a->state_dir && !identity_save(a->state_dir, &a->identity, &error)) {
        log_warn(a->o.log, "the renewed certificate is not kept: %s", error->message);
    }
    log_info(a->o.log, "certificate renewed");
}

static void on_renew_done(const GError *error, void *user)
{
    Agent *a = user;
    bool taken = !error && !a->renewed_key;
    x509_free_key(g_steal_pointer(&a->renewed_key));
    if (!taken) {
        log_warn(a->o.log, "certificate was not renewed: %s: tries again in a minute",
                 error ? error->message : "no certificate came");
        a->renew = loop_timer_start(a->o.loop, RENEW_RETRY_US, renew_due, a);
        return;
    }
    use_new_certificate(a);
    plan_renewal(a);
}

static void renew_due(void *user)
{
    Agent *a = user;
    g_autoptr(GError) error = NULL;
    a->renew = NULL;
    char *key = x509_new_key(&error);
    g_autofree char *request = key ? x509_new_request(key, a->identity.name, &error) : NULL;
    a->renewed_key = key;
    if (!request ||
        !attach_renew(a->attach, request, (RpcCallbacks){on_renewed, on_renew_done}, a)) {
        x509_free_key(g_steal_pointer(&a->renewed_key));
        a->renew =
            loop_timer_start(a->o.loop, ATTACHED_LOOK_US, renew_due, a); /* not attached now */
    }
}

/* ---- the stream to the coordinator ---- */

static ProtobufCBinaryData copied(const void *data, size_t size)
{
    return (ProtobufCBinaryData){size, g_memdup2(data, size)};
}

static void fill_packed_sizes(const Agent *a, Weft__V1__Hello *hello)
{
    const Kernels *kernels = kernels_get(a->o.isa);
    hello->packed = g_new0(Weft__V1__PackedSize *, DTYPE_LIMIT);
    for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
        uint32_t bytes = packed_block_bytes((Dtype)type);
        if (bytes == 0 || !(a->o.device ? a->o.device->ops->has_weight((Dtype)type)
                                        : kernels->matmul[type] != NULL)) {
            continue;
        }
        Weft__V1__PackedSize *size = hello->packed[hello->n_packed++] =
            g_new(Weft__V1__PackedSize, 1);
        weft__v1__packed_size__init(size);
        size->type = type;
        size->block_bytes = bytes;
        size->ops_per_s = a->o.measure.matmul_ops_per_s[type];
    }
}

static void fill_cpus(const Agent *a, Weft__V1__Hello *hello)
{
    hello->n_cpus = a->o.n_cpu_set;
    hello->cpus = g_memdup2(a->o.cpu_set, a->o.n_cpu_set * sizeof *hello->cpus);
}

static Weft__V1__Measured *measured(const Measure *measure)
{
    Weft__V1__Measured *m = g_new(Weft__V1__Measured, 1);
    weft__v1__measured__init(m);
    m->read_bytes_per_s = measure->read_bytes_per_s;
    m->int8_ops_per_s = measure->int8_ops_per_s;
    m->f32_ops_per_s = measure->f32_ops_per_s;
    m->link_latency_s = measure->link_latency_s;
    m->link_bytes_per_s = measure->link_bytes_per_s;
    m->since = (uint64_t)measure->since_s;
    return m;
}

/* A bit for each precision with which a device trains exactly. */
static uint32_t exact_training(const Device *device)
{
    uint32_t bits = 0;
    for (uint32_t p = 0; device->train_ops != NULL && p < PRECISION_LIMIT; p++) {
        bits |= (uint32_t)device->train_ops->gives_exact(precision_dtype((Precision)p)) << p;
    }
    return bits;
}

static void fill_devices(const Agent *a, Weft__V1__Hello *hello)
{
    const unsigned n = a->o.device ? MAX(a->o.n_devices, 1u) : 0;
    hello->devices = g_new(Weft__V1__Device *, n);
    for (unsigned i = 0; i < n; i++) {
        const Device *own = i == 0 ? a->o.device : a->o.devices[i];
        const DeviceInfo *info = &own->info;
        Weft__V1__Device *device = g_new(Weft__V1__Device, 1);
        weft__v1__device__init(device);
        device->kind = g_strdup(info->kind);
        device->index = info->index;
        device->name = g_strdup(info->name);
        device->bus = g_strdup(info->bus);
        device->memory_bytes = info->memory_bytes;
        device->budget_bytes = a->o.device_bytes;
        device->exact_kind = g_strdup(info->exact_kind);
        device->exact_training = exact_training(own);
        device->measured = a->measures ? measured(&a->measures[i]) : NULL;
        hello->devices[hello->n_devices++] = device;
    }
}

static void fill_device_use(const Agent *a, Weft__V1__Heartbeat *heartbeat)
{
    const unsigned n = a->o.device ? MAX(a->o.n_devices, 1u) : 0;
    heartbeat->device_use = g_new(Weft__V1__DeviceUse *, n);
    for (unsigned i = 0; i < n; i++) {
        const DeviceUse *use = (i == 0 ? a->o.device : a->o.devices[i])->use;
        Weft__V1__DeviceUse *m = g_new(Weft__V1__DeviceUse, 1);
        weft__v1__device_use__init(m);
        m->rank_bytes = use ? atomic_load(&use->rank) : 0;
        m->group_bytes = use ? atomic_load(&use->group) : 0;
        heartbeat->device_use[heartbeat->n_device_use++] = m;
    }
}

static Weft__V1__Hello *make_hello(void *user)
{
    Agent *a = user;
    Weft__V1__Hello *hello = g_new(Weft__V1__Hello, 1);
    weft__v1__hello__init(hello);
    hello->protocol_version = WEFT_PROTOCOL_VERSION;
    hello->release = g_strdup(WEFT_VERSION);
    hello->numerics_version = WEFT_NUMERICS_VERSION;
    hello->numerics_classes = a->o.numerics_classes;
    hello->boot_id = copied(a->boot_id, sizeof a->boot_id);
    hello->control_address = g_strdup(a->address);
    hello->host = g_strdup(a->host ? a->host : "");
    hello->isa = g_strdup(kernels_isa_name(a->o.isa));
    hello->threads = a->o.threads;
    hello->memory_bytes = a->o.memory_bytes;
    hello->cpu = g_strdup(a->cpu);
    fill_cpus(a, hello);
    fill_packed_sizes(a, hello);
    fill_devices(a, hello);
    hello->measured = measured(&a->o.measure);
    hello->held = deployments_held(a->deployments, 0, &hello->n_held);
    return hello;
}

static Weft__V1__Heartbeat *make_heartbeat(uint64_t sequence, void *user)
{
    Agent *a = user;
    Weft__V1__Heartbeat *heartbeat = g_new(Weft__V1__Heartbeat, 1);
    weft__v1__heartbeat__init(heartbeat);
    heartbeat->serving = health_is_serving(a->health);
    heartbeat->held = deployments_held(a->deployments, sequence, &heartbeat->n_held);
    heartbeat->waiting = deployments_waiting(a->deployments, &heartbeat->n_waiting);
    heartbeat->loads = deployments_loads(a->deployments, &heartbeat->n_loads);
    heartbeat->counters = deployments_counters(a->deployments);
    heartbeat->links = deployments_links(a->deployments, &heartbeat->n_links);
    heartbeat->problem = deployments_problem(a->deployments);
    fill_device_use(a, heartbeat);
    heartbeat->loop_lag_ms = a->o.lag_ms != NULL ? a->o.lag_ms(a->o.lag_user) : 0;
    return heartbeat;
}

static void on_welcome(const Weft__V1__Welcome *welcome, void *user)
{
    Agent *a = user;
    deployments_set_generation(a->deployments, welcome->cluster, welcome->generation);
}

static void on_ack(const Weft__V1__Ack *ack, void *user)
{
    Agent *a = user;
    for (size_t i = 0; i < ack->n_revoked; i++) {
        if (g_hash_table_add(a->revoked, g_strdup(ack->revoked[i])) && a->server) {
            log_info(a->o.log, "certificate %s is revoked", ack->revoked[i]);
            rpc_server_kick(a->server, ack->revoked[i]);
        }
    }
    deployments_keep(a->deployments, ack->keep, ack->n_keep, ack->sequence);
}

static void on_fenced(int64_t silent_us, void *user)
{
    Agent *a = user;
    deployments_fence(a->deployments, silent_us);
    trainings_fence(a->trainings, silent_us);
}

static void on_refused(const GError *error, void *user)
{
    Agent *a = user;
    a->o.refused(error, a->o.user);
}

/* ---- life ---- */

static void open_objects(Agent *a)
{
    const AgentOptions *o = &a->o;
    a->pool = task_pool_new(o->loop, o->io_threads);
    a->store = slice_store_new(o->cache_dir, o->log);
    if (o->packed_images) {
        a->images = packed_images_new(slice_store_dir(a->store), 0, o->packed_after_us, o->log);
    }
    a->slices = slice_server_new(o->loop, a->pool, a->store);
    DeploymentsOptions options = {
        .loop = o->loop,
        .pool = a->pool,
        .store = a->store,
        .images = a->images,
        .log = o->log,
        .fill = o->fill,
        .name = a->identity.name,
        .boot_id = a->boot_id,
        .models_dir = a->models_dir,
        .memory_bytes = o->memory_bytes,
        .threads = o->threads,
        .io_threads = o->io_threads,
        .cpus = a->cpus,
        .isa = o->isa,
        .device = o->device,
        .devices = o->devices,
        .n_devices = o->n_devices,
        .device_bytes = o->device_bytes,
        .numerics_classes = o->numerics_classes,
        .crowded = o->crowded,
        .inline_engine = o->io_threads == 0,
        .channel = channel_to,
        .channel_user = a,
    };
    a->deployments = deployments_new(&options);
    a->trainings = trainings_new(&options, a->deployments);
    a->leader = leader_service_new(o->loop, o->log, a->deployments);
    a->health = health_new(o->loop, a->deployments);
    a->channels = channels_new();
    a->revoked = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
}

static bool open_attach(Agent *a, GError **error)
{
    AttachOptions options = {
        .loop = a->o.loop,
        .transport = a->o.transport,
        .log = a->o.log,
        .identity = &a->identity,
        .hooks = {make_hello, make_heartbeat, on_welcome, on_ack, on_fenced, on_refused, a},
    };
    a->attach = attach_new(&options, error);
    health_follow(a->health, a->attach);
    return a->attach != NULL;
}

Agent *agent_new(const AgentOptions *options, GError **error)
{
    Agent *a = g_new0(Agent, 1);
    a->o = *options;
    identity_copy(options->identity, &a->identity);
    a->state_dir = g_strdup(options->state_dir);
    a->models_dir = g_strdup(options->models_dir);
    a->listen = g_strdup(options->listen);
    a->advertise = g_strdup(options->advertise);
    a->health_listen = g_strdup(options->health_listen);
    a->host = g_strdup(options->host);
    a->cpu = measure_cpu_name();
    a->cpus = options->cpus ? g_memdup2(options->cpus, options->threads * sizeof(int)) : NULL;
    a->measures = g_memdup2(options->device_measures,
                            options->device_measures ? options->n_devices * sizeof(Measure) : 0);
    random_fill(options->random, a->boot_id, sizeof a->boot_id);
    open_objects(a);
    a->server = open_server(a, a->listen, error);
    if (a->server) {
        a->address = peer_address(a);
    }
    if (!a->server || (a->health_listen && !open_health_server(a, error)) ||
        !open_attach(a, error)) {
        agent_free(a);
        return NULL;
    }
    plan_renewal(a);
    return a;
}

const char *agent_address(const Agent *a)
{
    return a->address;
}
bool agent_is_attached(const Agent *a)
{
    return a->attach && attach_is_attached(a->attach);
}
Deployments *agent_deployments(Agent *a)
{
    return a->deployments;
}
bool agent_step(Agent *a)
{
    return deployments_step(a->deployments);
}

static void stopping_due(void *user)
{
    Agent *a = user;
    a->stopping = NULL;
    if (deployments_is_empty(a->deployments) && trainings_is_empty(a->trainings)) {
        a->stopped(a->stopped_user);
    } else {
        a->stopping = loop_timer_start(a->o.loop, STOP_LOOK_US, stopping_due, a);
    }
}

static void end_now(Agent *a)
{
    loop_timer_cancel(a->o.loop, g_steal_pointer(&a->leaving));
    health_follow(a->health, NULL);
    attach_free(g_steal_pointer(&a->attach));
    loop_timer_cancel(a->o.loop, g_steal_pointer(&a->renew));
    deployments_shut_down(a->deployments);
    trainings_shut_down(a->trainings);
    stopping_due(a);
}

static void leaving_due(void *user)
{
    Agent *a = user;
    a->leaving = NULL;
    const bool moved = attach_has_said_goodbye(a->attach) && deployments_is_empty(a->deployments);
    if (moved || !attach_is_attached(a->attach) || loop_now_us(a->o.loop) >= a->leave_until_us) {
        end_now(a);
    } else {
        a->leaving = loop_timer_start(a->o.loop, STOP_LOOK_US, leaving_due, a);
    }
}

void agent_stop(Agent *a, LoopFn stopped, void *user)
{
    if (a->stopped) {
        if (a->leaving) {
            end_now(a);
        }
        return;
    }
    a->stopped = stopped;
    a->stopped_user = user;
    if (a->o.leave_ms == 0 || !attach_is_attached(a->attach)) {
        end_now(a);
        return;
    }
    a->leave_until_us = loop_now_us(a->o.loop) + (int64_t)a->o.leave_ms * 1000;
    attach_leave(a->attach);
    leaving_due(a);
}

void agent_free(Agent *a)
{
    if (!a) {
        return;
    }
    if (a->attach) {
        health_follow(a->health, NULL);
        attach_free(a->attach);
    }
    loop_timer_cancel(a->o.loop, a->renew);
    loop_timer_cancel(a->o.loop, a->stopping);
    loop_timer_cancel(a->o.loop, a->leaving);
    close_server(a, a->server, SERVER_GRACE_MS);
    close_server(a, a->health_server, 0);
    g_hash_table_unref(a->channels);
    g_clear_pointer(&a->channels_before, g_hash_table_unref);
    leader_service_free(a->leader);
    trainings_free(a->trainings);
    deployments_free(a->deployments);
    health_free(a->health);
    task_pool_free(a->pool);
    slice_server_free(a->slices);
    packed_images_free(a->images);
    slice_store_free(a->store);
    g_hash_table_unref(a->revoked);
    identity_clear(&a->identity);
    x509_free_key(a->renewed_key);
    g_free(a->cpus);
    g_free(a->measures);
    g_free(a->cpu);
    g_free(a->address);
    g_free(a->state_dir);
    g_free(a->models_dir);
    g_free(a->listen);
    g_free(a->advertise);
    g_free(a->health_listen);
    g_free(a->host);
    g_free(a);
}
