#include "tests/unit/worker/agent_env.h"

#include "proto/base/error.h"
#include "proto/plan/plan_message.h"

#include "grpc/health.pb-c.h"
#include "tests/unit/remove_tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <string.h>

const TinyShape env_shape = {2,          256,        6,          3,    64,    640,  1100,
                             DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};

static void on_refused(const GError *error, void *user)
{
    Env *env = user;
    g_assert_null(env->refused);
    env->refused = g_error_copy(error);
}

void env_stopped(void *user)
{
    ((Env *)user)->stopped = true;
}

void env_start_agent(Env *env, const Identity *identity, uint64_t memory)
{
    static const Measure of_device = {
        .read_bytes_per_s = 6, .int8_ops_per_s = 7, .f32_ops_per_s = 8, .since_s = 9};
    AgentOptions options = {.loop = env->loop,
                            .transport = env->transport,
                            .random = sim_world_random(env->world),
                            .fill = env->fill,
                            .identity = identity,
                            .cache_dir = env->cache,
                            .listen = "w0-listen",
                            .health_listen = "w0-health",
                            .host = "host",
                            .memory_bytes = memory,
                            .threads = 1,
                            .isa = ISA_GENERIC,
                            .numerics_classes = 1,
                            .measure = {1, 2, 3, {[DTYPE_Q8_0] = 6}, 4, 5},
                            .leave_ms = env->leave_ms,
                            .device = env->device,
                            .devices = &env->device,
                            .n_devices = env->device != NULL,
                            .device_measures = env->device != NULL ? &of_device : NULL,
                            .refused = on_refused,
                            .user = env};
    GError *error = NULL;
    env->agent = agent_new(&options, &error);
    g_assert_no_error(error);
}

static Env *open_env(const TinyShape *of, char *cache, unsigned leave_ms, const Device *device)
{
    Env *env = g_new0(Env, 1);
    env->leave_ms = leave_ms;
    env->device = device;
    env->cache = cache;
    env->world = sim_world_new(sim_seed(1));
    env->transport = rpc_transport_inproc_new();
    env->fill = link_fill_inproc_new();
    env->model = tiny_model_new(of, 11);
    env->c = fake_coordinator_new(env->world, env->transport, "coordinator", "ca");
    env->c->model = env->model;
    env->loop = sim_world_loop(env->world);
    Identity identity = fake_identity(env->c, "w0");
    env_start_agent(env, &identity, 1u << 30);
    identity_clear(&identity);
    return env;
}

Env *env_new(void)
{
    return open_env(&env_shape, NULL, 0, NULL);
}

Env *env_new_with(const TinyShape *of, char *cache)
{
    return open_env(of, cache, 0, NULL);
}

Env *env_new_on(const Device *device)
{
    return open_env(&env_shape, NULL, 0, device);
}

Env *env_new_leaving(unsigned leave_ms)
{
    return open_env(&env_shape, NULL, leave_ms, NULL);
}

void env_free(Env *env)
{
    if (env->agent) {
        agent_stop(env->agent, env_stopped, env);
        sim_world_run_until(env->world, &env->stopped, 60 * SECOND);
        assert_true(env->stopped);
        agent_free(env->agent);
    }
    fake_coordinator_free(env->c);
    sim_world_run_for(env->world, SECOND);
    rpc_transport_inproc_free(env->transport);
    sim_world_free(env->world);
    link_fill_free(env->fill);
    tiny_model_free(env->model);
    g_clear_error(&env->refused);
    if (env->cache) {
        remove_tree(env->cache);
        g_free(env->cache);
    }
    g_free(env);
}

void env_run(Env *env, int64_t duration_us)
{
    for (int64_t at = 0; at < duration_us; at += 1000) {
        sim_world_run_for(env->world, 1000);
        while (agent_step(env->agent)) {
        }
    }
}

void env_wait_for(Env *env, const bool *done)
{
    for (int i = 0; i < 60000 && !*done; i++) {
        env_run(env, 1000);
    }
    assert_true(*done);
}

void env_wait_attached(Env *env, unsigned n)
{
    for (int i = 0; i < 60000 && (env->c->n_attached < n || !agent_is_attached(env->agent)); i++) {
        env_run(env, 1000);
    }
    assert_true(agent_is_attached(env->agent));
}

/* ---- calls ---- */

FakeReply *env_load_from(Env *env, uint64_t epoch, const Plan *plan, uint32_t rank,
                         const char *const *sources, size_t n_sources)
{
    Weft__V1__Stamp stamp = fake_stamp(env->c, epoch);
    Weft__V1__LoadRequest request = WEFT__V1__LOAD_REQUEST__INIT;
    request.stamp = &stamp;
    request.plan = plan_to_message(plan);
    request.model = tiny_model_message(env->model, "tiny.gguf");
    request.rank = rank;
    request.sources = (char **)sources;
    request.n_sources = n_sources;
    request.seal = true;
    FakeReply *reply = fake_call(env->c, agent_address(env->agent), "coordinator",
                                 &weft__v1__worker__descriptor, "Load", &request.base);
    weft__v1__plan__free_unpacked(request.plan, NULL);
    weft__v1__model__free_unpacked(request.model, NULL);
    return reply;
}

FakeReply *env_load(Env *env, uint64_t epoch)
{
    g_autoptr(Plan) plan = tiny_plan(env->model->spec, 1, (uint32_t[]){1}, (double[]){1});
    const char *source = "coordinator";
    return env_load_from(env, epoch, plan, 0, &source, 1);
}

const Weft__V1__LoadProgress *env_loaded(Env *env, FakeReply *reply)
{
    env_wait_for(env, &reply->done);
    g_assert_no_error(reply->error);
    const Weft__V1__LoadProgress *last = (const Weft__V1__LoadProgress *)fake_reply_last(reply);
    assert_true(last->loaded);
    assert_true(last->data_address.len > 0);
    assert_memory_equal(last->boot_id.data, env->c->hello->boot_id.data, 16);
    return last;
}

FakeReply *env_start(Env *env, uint64_t epoch, const Weft__V1__LoadProgress *of)
{
    Weft__V1__Stamp stamp = fake_stamp(env->c, epoch);
    Weft__V1__StartRequest request = WEFT__V1__START_REQUEST__INIT;
    Weft__V1__RankAddress rank = WEFT__V1__RANK_ADDRESS__INIT, *ranks = &rank;
    uint8_t secret[32] = {7};
    rank.worker = "w0";
    rank.data_address = of->data_address;
    rank.boot_id = of->boot_id;
    request.stamp = &stamp;
    request.secret = (ProtobufCBinaryData){sizeof secret, secret};
    request.n_ranks = 1;
    request.ranks = &ranks;
    return fake_call(env->c, agent_address(env->agent), "coordinator",
                     &weft__v1__worker__descriptor, "Start", &request.base);
}

void env_make_ready(Env *env, uint64_t epoch)
{
    FakeReply *l = env_load(env, epoch);
    FakeReply *s = env_start(env, epoch, env_loaded(env, l));
    env_wait_for(env, &s->done);
    g_assert_no_error(s->error);
    fake_reply_free(s);
    fake_reply_free(l);
}

FakeReply *env_drop(Env *env, uint64_t epoch, bool keep)
{
    Weft__V1__Stamp stamp = fake_stamp(env->c, epoch);
    Weft__V1__DropRequest request = WEFT__V1__DROP_REQUEST__INIT;
    request.stamp = &stamp;
    request.keep_weights = keep;
    return fake_call(env->c, agent_address(env->agent), "coordinator",
                     &weft__v1__worker__descriptor, "Drop", &request.base);
}

FakeReply *env_generate_biased(Env *env, Weft__V1__Sampler *sampler)
{
    uint32_t prompt[] = {5, 77};
    Weft__V1__Stamp stamp = fake_stamp(env->c, 1);
    Weft__V1__GenerateRequest request = WEFT__V1__GENERATE_REQUEST__INIT;
    request.stamp = &stamp;
    request.request = "r2";
    request.n_prompt = G_N_ELEMENTS(prompt);
    request.prompt = prompt;
    request.max_tokens = 3;
    request.sampler = sampler;
    return fake_call(env->c, agent_address(env->agent), "coordinator",
                     &weft__v1__leader__descriptor, "Generate", &request.base);
}

FakeReply *env_generate_with(Env *env, uint64_t epoch, uint32_t n_tokens, uint32_t first_id,
                             bool logits, const char *role)
{
    static uint32_t prompt[] = {0, 5, 77, 1000};
    prompt[0] = first_id;
    Weft__V1__Stamp stamp = fake_stamp(env->c, epoch);
    Weft__V1__GenerateRequest request = WEFT__V1__GENERATE_REQUEST__INIT;
    request.stamp = &stamp;
    request.request = "r1";
    request.n_prompt = G_N_ELEMENTS(prompt);
    request.prompt = prompt;
    request.max_tokens = n_tokens;
    request.top_logprobs = 2;
    request.want_logits = logits;
    return fake_call(env->c, agent_address(env->agent), role, &weft__v1__leader__descriptor,
                     "Generate", &request.base);
}

FakeReply *env_generate(Env *env, uint64_t epoch, uint32_t n_tokens, uint32_t first_id,
                        const char *role)
{
    return env_generate_with(env, epoch, n_tokens, first_id, false, role);
}

void env_assert_fails(Env *env, FakeReply *reply, int code, const char *a, const char *b)
{
    env_wait_for(env, &reply->done);
    assert_non_null(reply->error);
    if (reply->error->code != code || !strstr(reply->error->message, a) ||
        !strstr(reply->error->message, b)) {
        fail_msg("error %d: %s", reply->error->code, reply->error->message);
    }
    fake_reply_free(reply);
}

int env_health(Env *env, const char *service)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)service;
    FakeReply *reply = fake_call(env->c, agent_address(env->agent), "probe",
                                 &grpc__health__v1__health__descriptor, "Check", &request.base);
    env_wait_for(env, &reply->done);
    g_assert_no_error(reply->error);
    int status = ((const Grpc__Health__V1__HealthCheckResponse *)fake_reply_last(reply))->status;
    fake_reply_free(reply);
    return status;
}
