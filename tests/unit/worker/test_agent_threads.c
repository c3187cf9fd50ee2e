/* The agent as a daemon has it: real loop, loading threads, engines with threads of their own. Two
 * workers in one process answer over two layouts with the same rows, again and again, while
 * deployments come and go. */
#include "proto/base/error.h"
#include "proto/plan/plan_message.h"
#include "tests/unit/worker/fake_coordinator.h"
#include "transport/daemon/daemon.h"
#include "worker/agent/agent.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <string.h>

#define SECOND 1000000ll

static const TinyShape shape = {2,          256,        6,          3,    64,    640,  1100,
                                DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};

typedef struct Env {
    MainLoop *main;
    Loop *loop;
    RpcTransport *transport;
    LinkFill *fill;
    TinyModel *model;
    FakeCoordinator *c[2]; /* one for each worker: the fake one follows a single stream */
    Agent *agents[2];
    bool done;
} Env;

static void on_refused(const GError *error, void *user)
{
    (void)user;
    fail_msg("refused: %s", error->message);
}

static void on_done(void *user)
{
    *(bool *)user = true;
}

static void wait_done(Env *env, const bool *done)
{
    assert_true(main_loop_run_until(env->main, done, 30 * SECOND));
}

static void check_attached(void *user)
{
    Env *env = user;
    env->done = agent_is_attached(env->agents[0]) && agent_is_attached(env->agents[1]);
    if (!env->done) {
        loop_timer_start(env->loop, 1000, check_attached, env);
    }
}

static Env *env_new(void)
{
    Env *env = g_new0(Env, 1);
    env->main = main_loop_new();
    env->loop = main_loop_loop(env->main);
    env->transport = rpc_transport_inproc_new();
    env->fill = link_fill_inproc_new();
    env->model = tiny_model_new(&shape, 11);
    for (unsigned i = 0; i < 2; i++) {
        g_autofree char *address = g_strdup_printf("coordinator%u", i),
                        *name = g_strdup_printf("w%u", i), *listen = g_strdup_printf("listen%u", i);
        env->c[i] = fake_coordinator_new_on(env->loop, env->transport, address, "ca");
        env->c[i]->model = env->model;
        Identity identity = fake_identity(env->c[i], name);
        AgentOptions options = {.loop = env->loop,
                                .transport = env->transport,
                                .random = random_system(),
                                .fill = env->fill,
                                .identity = &identity,
                                .listen = listen,
                                .memory_bytes = 1u << 30,
                                .threads = 2,
                                .isa = kernels_best_isa(),
                                .numerics_classes = 1,
                                .measure = {1, 2, 3, {0}, 4, 5},
                                .crowded = true,
                                .io_threads = 2,
                                .refused = on_refused,
                                .user = env};
        GError *error = NULL;
        env->agents[i] = agent_new(&options, &error);
        g_assert_no_error(error);
        identity_clear(&identity);
    }
    check_attached(env);
    wait_done(env, &env->done);
    return env;
}

static void env_free(Env *env)
{
    for (unsigned i = 0; i < 2; i++) {
        bool stopped = false;
        agent_stop(env->agents[i], on_done, &stopped);
        wait_done(env, &stopped);
        agent_free(env->agents[i]);
    }
    fake_coordinator_free(env->c[0]);
    fake_coordinator_free(env->c[1]);
    rpc_transport_inproc_free(env->transport);
    main_loop_free(env->main);
    link_fill_free(env->fill);
    tiny_model_free(env->model);
    g_free(env);
}

static FakeReply *load_on(FakeCoordinator *c, const Agent *agent, const Plan *plan, uint64_t epoch,
                          uint32_t stage, uint32_t rank)
{
    Weft__V1__Stamp stamp = fake_stamp(c, epoch);
    Weft__V1__LoadRequest request = WEFT__V1__LOAD_REQUEST__INIT;
    request.stamp = &stamp;
    request.plan = plan_to_message(plan);
    request.model = tiny_model_message(c->model, "tiny.gguf");
    request.stage = stage;
    request.rank = rank;
    request.sources = &c->address;
    request.n_sources = 1;
    request.seal = true;
    FakeReply *reply = fake_call(c, agent_address(agent), "coordinator",
                                 &weft__v1__worker__descriptor, "Load", &request.base);
    weft__v1__plan__free_unpacked(request.plan, NULL);
    weft__v1__model__free_unpacked(request.model, NULL);
    return reply;
}

static FakeReply *load(Env *env, const Plan *plan, uint64_t epoch, uint32_t stage, uint32_t rank,
                       unsigned worker)
{
    return load_on(env->c[worker], env->agents[worker], plan, epoch, stage, rank);
}

static FakeReply *start(Env *env, uint64_t epoch, Weft__V1__RankAddress **ranks, size_t n,
                        unsigned worker)
{
    Weft__V1__Stamp stamp = fake_stamp(env->c[worker], epoch);
    Weft__V1__StartRequest request = WEFT__V1__START_REQUEST__INIT;
    uint8_t secret[32] = {(uint8_t)epoch, 1};
    request.stamp = &stamp;
    request.secret = (ProtobufCBinaryData){sizeof secret, secret};
    request.n_ranks = n;
    request.ranks = ranks;
    return fake_call(env->c[worker], agent_address(env->agents[worker]), "coordinator",
                     &weft__v1__worker__descriptor, "Start", &request.base);
}

/* Loads and starts two ranks: two stages, or one stage of two ranks. */
static void deploy(Env *env, const Plan *plan, uint64_t epoch)
{
    bool pipeline = plan->replicas[0].n_stages == 2;
    FakeReply *loads[2], *starts[2];
    Weft__V1__RankAddress addresses[2], *pointers[2];
    for (unsigned i = 0; i < 2; i++) {
        loads[i] = load(env, plan, epoch, pipeline ? i : 0, pipeline ? 0 : i, i);
    }
    for (unsigned i = 0; i < 2; i++) {
        wait_done(env, &loads[i]->done);
        g_assert_no_error(loads[i]->error);
        const Weft__V1__LoadProgress *last =
            (const Weft__V1__LoadProgress *)fake_reply_last(loads[i]);
        assert_true(last->loaded);
        weft__v1__rank_address__init(&addresses[i]);
        addresses[i].stage = pipeline ? i : 0;
        addresses[i].rank = pipeline ? 0 : i;
        addresses[i].worker = i == 0 ? "w0" : "w1";
        addresses[i].data_address = last->data_address;
        addresses[i].boot_id = last->boot_id;
        pointers[i] = &addresses[i];
    }
    for (unsigned i = 0; i < 2; i++) {
        starts[i] = start(env, epoch, pointers, 2, i);
    }
    for (unsigned i = 0; i < 2; i++) {
        wait_done(env, &starts[i]->done);
        g_assert_no_error(starts[i]->error);
        fake_reply_free(starts[i]);
        fake_reply_free(loads[i]);
    }
}

static FakeReply *generate(Env *env, uint64_t epoch, uint32_t n_tokens)
{
    uint32_t prompt[] = {1, 5, 77, 1000};
    Weft__V1__Stamp stamp = fake_stamp(env->c[0], epoch);
    Weft__V1__GenerateRequest request = WEFT__V1__GENERATE_REQUEST__INIT;
    request.stamp = &stamp;
    request.request = "r1";
    request.n_prompt = G_N_ELEMENTS(prompt);
    request.prompt = prompt;
    request.max_tokens = n_tokens;
    return fake_call(env->c[0], agent_address(env->agents[0]), "coordinator",
                     &weft__v1__leader__descriptor, "Generate", &request.base);
}

static void test_layouts_come_and_go(void **state)
{
    (void)state;
    Env *env = env_new();
    g_autoptr(Plan) tensor = tiny_plan(env->model->spec, 1, (uint32_t[]){2}, (double[]){2, 1});
    g_autoptr(Plan) pipeline = tiny_plan(env->model->spec, 2, (uint32_t[]){1, 1}, (double[]){1});
    g_autoptr(GByteArray) first = NULL;
    for (uint64_t epoch = 1; epoch <= 6; epoch++) {
        deploy(env, epoch % 2 ? tensor : pipeline, epoch);
        FakeReply *g = generate(env, epoch, 8);
        wait_done(env, &g->done);
        g_assert_no_error(g->error);
        assert_int_equal(g->messages->len, 9);
        g_autoptr(GByteArray) rows = g_byte_array_new();
        for (unsigned t = 0; t < 8; t++) {
            const Weft__V1__TokenEvent *event = g->messages->pdata[t];
            g_byte_array_append(rows, event->row_hash.data, (guint)event->row_hash.len);
        }
        fake_reply_free(g);
        if (!first) {
            first = g_steal_pointer(&rows);
        } else {
            assert_int_equal(rows->len, first->len);
            assert_memory_equal(rows->data, first->data, first->len);
        }
        /* One more that the next epoch takes the engine from. */
        FakeReply *open = generate(env, epoch, 100);
        if (epoch < 6) {
            deploy(env, epoch % 2 ? pipeline : tensor, epoch + 1);
            wait_done(env, &open->done);
            deploy(env, epoch % 2 ? pipeline : tensor,
                   epoch + 1); /* idempotent: loaded and started already */
        }
        fake_reply_free(open);
    }
    env_free(env);
}

/* ---- over gRPC ---- */

typedef struct Watch {
    Loop *loop;
    FakeCoordinator *c;
    Agent *agent;
    int64_t old_end_us;
    const Plan *plan;
    FakeReply *load, *reply;
    bool done;
} Watch;

/* Until a new connection succeeds after the first certificate's end: then the listener shows the
 * renewed one. It does so while a load is open. */
static void look_at_listener(void *user)
{
    Watch *w = user;
    if (w->reply && w->reply->done) {
        w->done = !w->reply->error && loop_wall_us(w->loop) > w->old_end_us + SECOND &&
                  agent_is_attached(w->agent);
        fake_reply_free(g_steal_pointer(&w->reply));
    }
    if (!w->done && !w->reply && agent_is_attached(w->agent)) {
        Weft__V1__Stamp stamp = fake_stamp(w->c, 1);
        Weft__V1__DropRequest request = WEFT__V1__DROP_REQUEST__INIT;
        if (!w->load) {
            w->load = load_on(w->c, w->agent, w->plan, 1, 0, 0);
        }
        stamp.job = "another";
        request.stamp = &stamp;
        w->reply = fake_call(w->c, agent_address(w->agent), "coordinator",
                             &weft__v1__worker__descriptor, "Drop", &request.base);
    }
    if (!w->done) {
        loop_timer_start(w->loop, 50000, look_at_listener, w);
    }
}

/* A certificate at two thirds of its life, with 2 s to go: renewed at once, kept on disk, and both
 * directions go on past its end. */
static void test_renewed_certificate_is_used_by_both_sides(void **state)
{
    (void)state;
    MainLoop *main_loop = main_loop_new();
    Loop *loop = main_loop_loop(main_loop);
    FakeCoordinator *c = fake_coordinator_new_grpc(loop);
    LinkFill *fill = link_fill_inproc_new();
    g_autofree char *dir = g_dir_make_tmp("weft-state-XXXXXX", NULL);
    int64_t now = loop_wall_us(loop);
    Identity identity = {g_strdup("test"),    g_strdup("w0"), g_strdup(c->address),
                         g_strdup(c->ca_pem), NULL,           NULL};
    identity.certificate_pem =
        fake_certificate(c, "w0", "worker", now - 4 * SECOND, now + 2 * SECOND, &identity.key_pem);
    AgentOptions options = {.loop = loop,
                            .transport = rpc_transport_grpc(),
                            .random = random_system(),
                            .fill = fill,
                            .identity = &identity,
                            .state_dir = dir,
                            .listen = "127.0.0.1:0",
                            .memory_bytes = 1u << 30,
                            .threads = 1,
                            .isa = ISA_GENERIC,
                            .numerics_classes = 1,
                            .measure = {1, 2, 3, {0}, 4, 5},
                            .io_threads = 1,
                            .refused = on_refused};
    GError *error = NULL;
    Agent *agent = agent_new(&options, &error);
    g_assert_no_error(error);
    TinyModel *model = tiny_model_new(&shape, 11);
    g_autoptr(Plan) plan = tiny_plan(model->spec, 1, (uint32_t[]){1}, (double[]){1});
    Watch watch = {loop, c, agent, now + 2 * SECOND, plan, NULL, NULL, false};
    c->model = model;
    c->silent = true;
    look_at_listener(&watch);
    assert_true(main_loop_run_until(main_loop, &watch.done, 30 * SECOND));
    assert_non_null(watch.load);
    assert_false(watch.load->done);
    assert_int_equal(c->n_renewed, 1);
    assert_true(c->n_attached >= 2);
    Identity kept;
    assert_true(identity_load(dir, &kept, &error));
    assert_string_not_equal(kept.certificate_pem, identity.certificate_pem);
    assert_string_not_equal(kept.key_pem, identity.key_pem);
    identity_clear(&kept);
    identity_clear(&identity);
    bool stopped = false;
    agent_stop(agent, on_done, &stopped);
    assert_true(main_loop_run_until(main_loop, &stopped, 10 * SECOND));
    fake_reply_free(watch.load);
    agent_free(agent);
    fake_coordinator_free(c);
    main_loop_free(main_loop);
    link_fill_free(fill);
    tiny_model_free(model);
    const char *names[] = {"node.pem", "node.conf", "ca.pem"};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *path = g_build_filename(dir, names[i], NULL);
        g_unlink(path);
    }
    g_rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts_come_and_go),
        cmocka_unit_test(test_renewed_certificate_is_used_by_both_sides)};
    return cmocka_run_group_tests_name("agent threads", tests, NULL, NULL);
}
