#include "tests/sim/whole.h"

#include "kernels/kernels.h"
#include "weft/v1/admin.pb-c.h"

#include <stdio.h>
#include <string.h>

#define JOIN "coordinator:2"

/* ---- log ------------------------------------------------------------------------------------- */

static void log_write(Log *self, LogLevel level, const char *line)
{
    Whole *w = (Whole *)((char *)self - offsetof(Whole, log));
    fprintf(stderr, "%9.4f %s\n", (double)sim_world_now_us(w->world) / 1e6, line);
}

/* ---- the coordinator ------------------------------------------------------------------------- */

static void on_started(const GError *error, void *user)
{
    Whole *w = user;
    g_assert_no_error(error);
    w->coordinator_started = true;
}

/* Each fault holds until a later one about the same pair: the narrow ones are said again after a
 * wide one. */
static void say_control(Whole *w, unsigned i)
{
    WholeWorker *worker = &w->workers[i];
    const bool gone = worker->dying || !worker->agent;
    const RpcInprocFault fault = gone || !w->coordinator ? RPC_INPROC_CUT : worker->link;
    rpc_inproc_set_fault(w->transport, worker->name, WHOLE_CONTROL, fault);
    rpc_inproc_set_fault(w->transport, "coordinator", worker->address, fault);
}

static void say_all(Whole *w)
{
    const RpcInprocFault fault = w->coordinator ? RPC_INPROC_UP : RPC_INPROC_CUT;
    rpc_inproc_set_fault(w->transport, NULL, WHOLE_CONTROL, fault);
    rpc_inproc_set_fault(w->transport, "coordinator", NULL, fault);
    for (unsigned i = 0; i < w->n_workers; i++) {
        say_control(w, i);
    }
}

void whole_start_coordinator(Whole *w)
{
    if (w->coordinator) {
        return;
    }
    w->coordinator_loop = sim_world_loop(w->world);
    const CoordinatorOptions options = {.loop = w->coordinator_loop,
                                        .transport = w->transport,
                                        .log = &w->log,
                                        .random = sim_world_random(w->world),
                                        .store = store_memory_new(w->disk, w->coordinator_loop),
                                        .listen = WHOLE_CONTROL,
                                        .join_listen = JOIN,
                                        .models_dir = w->foundation->dir,
                                        .recovery_wait_us = (int64_t)w->recovery_wait_ms * 1000};
    w->n_incarnations++;
    w->coordinator_started = false;
    store_disk_fail_after(w->disk, -1);
    w->coordinator_up_us = sim_world_now_us(w->world);
    w->coordinator_frozen = false;
    w->coordinator = coordinator_new(&options);
    coordinator_start(w->coordinator, on_started, w);
    say_all(w);
}

void whole_kill_coordinator(Whole *w)
{
    if (!w->coordinator) {
        return;
    }
    sim_loop_freeze(w->coordinator_loop, false);
    Coordinator *dead = g_steal_pointer(&w->coordinator);
    w->coordinator_died_us = sim_world_now_us(w->world);
    say_all(w); /* from here on nobody hears it */
    coordinator_free(dead);
}

void whole_fail_disk(Whole *w, bool fails)
{
    if (!fails || (w->coordinator && w->coordinator_started)) {
        store_disk_fail_after(w->disk, fails ? 0 : -1);
    }
}

void whole_freeze_coordinator(Whole *w, bool frozen)
{
    if (w->coordinator) {
        w->coordinator_frozen = frozen;
        w->coordinator_frozen_us = sim_world_now_us(w->world);
        sim_loop_freeze(w->coordinator_loop, frozen);
    }
}

/* ---- workers --------------------------------------------------------------------------------- */

static void worker_turn(void *user)
{
    WholeWorker *worker = user;
    while (agent_step(worker->agent)) {
    }
}

static void on_refused(const GError *error, void *user)
{
    g_error("a worker was refused: %s", error->message);
}

static void say_worker(Whole *w, unsigned i)
{
    WholeWorker *worker = &w->workers[i];
    const bool gone = worker->dying || !worker->agent;
    rpc_inproc_set_fault(w->transport, worker->name, NULL, gone ? RPC_INPROC_CUT : RPC_INPROC_UP);
    rpc_inproc_set_fault(w->transport, NULL, worker->address,
                         gone ? RPC_INPROC_CUT : RPC_INPROC_UP);
    say_control(w, i);
    for (unsigned j = 0; j < w->n_workers; j++) {
        if (j != i && sim_net_is_cut(w->net, i, j)) {
            rpc_inproc_set_fault(w->transport, worker->name, w->workers[j].address,
                                 RPC_INPROC_FROZEN);
            rpc_inproc_set_fault(w->transport, w->workers[j].name, worker->address,
                                 RPC_INPROC_FROZEN);
        }
    }
}

void whole_start_worker(Whole *w, unsigned i)
{
    WholeWorker *worker = &w->workers[i];
    if (worker->agent) {
        worker->wanted = worker->dying || worker->leaving;
        return;
    }
    g_autofree char *certificate = rpc_inproc_certificate(worker->name, "worker", "01");
    g_autofree char *host = g_strdup_printf("host%u", i);
    worker->loop = sim_world_loop(w->world);
    worker->node = sim_net_node(w->net, i, worker->loop);
    worker->frozen = false;
    worker->thawed_us = sim_world_now_us(w->world);
    const Identity identity = {.cluster = (char *)"history",
                               .name = worker->name,
                               .control_address = (char *)WHOLE_CONTROL,
                               .ca_pem = (char *)WHOLE_CA,
                               .certificate_pem = certificate,
                               .key_pem = (char *)"key"};
    const AgentOptions options = {.loop = worker->loop,
                                  .transport = w->transport,
                                  .random = sim_world_random(w->world),
                                  .log = &w->log,
                                  .fill = sim_node_fill(worker->node),
                                  .identity = &identity,
                                  .listen = worker->address,
                                  .host = host,
                                  .memory_bytes = w->memory_bytes,
                                  .threads = 1,
                                  .isa = kernels_best_isa(),
                                  .numerics_classes = 1,
                                  .measure = {1e10, 1e11, 5e10, {0}, 1e-5, 1e9},
                                  .leave_ms = 5000,
                                  .refused = on_refused,
                                  .user = worker};
    g_autoptr(GError) error = NULL;
    worker->agent = agent_new(&options, &error);
    g_assert_no_error(error);
    sim_loop_set_after(worker->loop, worker_turn, worker);
    say_worker(w, i);
}

static void worker_reap(void *user)
{
    WholeWorker *worker = user;
    sim_loop_set_after(worker->loop, NULL, NULL);
    agent_free(g_steal_pointer(&worker->agent));
    worker->loop = NULL;
    worker->dying = worker->leaving = false;
    say_worker(worker->whole, worker->index);
    if (worker->wanted) {
        worker->wanted = false;
        whole_start_worker(worker->whole, worker->index);
    }
}

static void worker_stopped(void *user)
{
    WholeWorker *worker = user;
    loop_post(worker->whole->director, worker_reap, worker);
}

void whole_kill_worker(Whole *w, unsigned i)
{
    WholeWorker *worker = &w->workers[i];
    if (!worker->agent || worker->dying) {
        return;
    }
    worker->dying = true;
    worker->frozen = false;
    say_worker(w, i);
    sim_node_kill(worker->node);
    sim_loop_freeze(worker->loop, false); /* what is left of it is swept up unseen */
    agent_stop(worker->agent, worker_stopped, worker);
    agent_stop(worker->agent, worker_stopped, worker); /* no time to say anything */
}

void whole_stop_worker(Whole *w, unsigned i)
{
    WholeWorker *worker = &w->workers[i];
    if (worker->agent && !worker->dying && !worker->leaving && !worker->frozen) {
        worker->leaving = true;
        agent_stop(worker->agent, worker_stopped, worker);
    }
}

void whole_freeze_worker(Whole *w, unsigned i, bool frozen)
{
    WholeWorker *worker = &w->workers[i];
    if (worker->agent && !worker->dying && worker->frozen != frozen) {
        worker->frozen = frozen;
        worker->thawed_us = sim_world_now_us(w->world);
        sim_loop_freeze(worker->loop, frozen);
    }
}

/* ---- the network ----------------------------------------------------------------------------- */

void whole_set_control(Whole *w, unsigned i, RpcInprocFault fault)
{
    w->workers[i].link = fault;
    say_control(w, i);
}

void whole_cut(Whole *w, unsigned a, unsigned b)
{
    sim_net_cut(w->net, a, b);
    say_worker(w, a);
}

void whole_heal(Whole *w, unsigned a, unsigned b, bool reset)
{
    if (!sim_net_is_cut(w->net, a, b)) {
        return;
    }
    sim_net_heal(w->net, a, b, reset);
    const RpcInprocFault found = reset ? RPC_INPROC_CUT : RPC_INPROC_UP;
    for (int up = 0; up < 2; up++) {
        const RpcInprocFault fault = up ? RPC_INPROC_UP : found;
        rpc_inproc_set_fault(w->transport, w->workers[a].name, w->workers[b].address, fault);
        rpc_inproc_set_fault(w->transport, w->workers[b].name, w->workers[a].address, fault);
    }
    say_worker(w, a);
    say_worker(w, b);
}

typedef struct Drain {
    WholeWorker *worker;
    bool drain;
    unsigned number;
} Drain;

static void on_drained(const GError *error, void *user)
{
    Drain *drain = user;
    if (!error && drain->number == drain->worker->n_drains) { /* nothing else was said since */
        drain->worker->draining = drain->drain;
        drain->worker->drained_us = sim_world_now_us(drain->worker->whole->world);
    }
    g_free(drain);
}

void whole_drain(Whole *w, unsigned i, bool drain)
{
    Weft__V1__DrainRequest request = WEFT__V1__DRAIN_REQUEST__INIT;
    request.node = w->workers[i].name;
    request.undrain = !drain;
    Drain *d = g_new(Drain, 1);
    *d = (Drain){&w->workers[i], drain, ++w->workers[i].n_drains};
    w->workers[i].draining = false; /* until it is acknowledged either is right */
    rpc_call_start(w->client, &weft__v1__admin__descriptor, "Drain", &request.base, 20000, true,
                   (RpcCallbacks){.on_done = on_drained}, d);
}

void whole_repair(Whole *w)
{
    sim_net_set_trouble(w->net, (SimTrouble){0});
    for (unsigned i = 0; i < w->n_workers; i++) {
        w->workers[i].link = RPC_INPROC_UP;
        whole_freeze_worker(w, i, false);
        for (unsigned j = 0; j < i; j++) {
            whole_heal(w, i, j, true);
        }
    }
    whole_freeze_coordinator(w, false);
    whole_start_coordinator(w);
    whole_fail_disk(w, false);
    for (unsigned i = 0; i < w->n_workers; i++) {
        whole_start_worker(w, i);
        say_control(w, i);
        whole_drain(w, i, false);
    }
}

/* ---- life ------------------------------------------------------------------------------------ */

static void open_client(Whole *w)
{
    g_autofree char *certificate = rpc_inproc_certificate("tester", "admin", NULL);
    const RpcChannelOptions options = {
        .target = WHOLE_CONTROL,
        .credentials = {.ca_pem = WHOLE_CA, .certificate_pem = certificate, .key_pem = "key"},
        .server_name = "weft-coordinator"};
    w->client = rpc_channel_new(w->transport, w->director, &options, NULL);
}

Whole *whole_new(const Foundation *foundation, uint64_t seed, unsigned n_workers,
                 uint64_t memory_bytes, uint32_t recovery_wait_ms, const SimEngineHooks *hooks,
                 bool chatty)
{
    g_assert(n_workers <= WHOLE_WORKERS);
    Whole *w = g_new0(Whole, 1);
    w->foundation = foundation;
    w->world = sim_world_new(seed);
    sim_engines_enter(w->world, hooks);
    w->transport = rpc_transport_inproc_new();
    rpc_inproc_set_delay(w->transport, 200);
    w->net = sim_net_new(w->world, seed);
    w->disk = store_disk_new();
    w->director = sim_world_loop(w->world);
    w->n_workers = n_workers;
    w->chatty = chatty;
    w->memory_bytes = memory_bytes;
    w->recovery_wait_ms = recovery_wait_ms;
    w->log = (Log){.min_level = chatty ? LOG_LEVEL_DEBUG : LOG_LEVEL_ERROR, .write = log_write};
    for (unsigned i = 0; i < n_workers; i++) {
        WholeWorker *worker = &w->workers[i];
        worker->whole = w;
        worker->index = i;
        g_snprintf(worker->name, sizeof worker->name, "w%u", i);
        g_snprintf(worker->address, sizeof worker->address, "w%u:1", i);
    }
    whole_start_coordinator(w);
    open_client(w);
    return w;
}

static bool any_worker(const Whole *w)
{
    for (unsigned i = 0; i < w->n_workers; i++) {
        if (w->workers[i].agent) {
            return true;
        }
    }
    return false;
}

void whole_free(Whole *w)
{
    w->over = true;
    whole_kill_coordinator(w);
    for (unsigned i = 0; i < w->n_workers; i++) {
        w->workers[i].wanted = false;
        whole_kill_worker(w, i);
    }
    for (int n = 0; any_worker(w); n++) {
        g_assert(n < 100);
        sim_world_run_for(w->world, WHOLE_SECOND / 10);
    }
    rpc_channel_free(w->client);
    sim_world_run_for(w->world, WHOLE_SECOND);
    sim_engines_leave();
    sim_world_free(w->world);
    sim_net_free(w->net);
    rpc_transport_inproc_free(w->transport);
    store_disk_free(w->disk);
    g_free(w);
}
