/* The agent against a coordinator that lies, dies and freezes, under simulated time. */
#include "proto/base/error.h"
#include "proto/plan/logits_limits.h"
#include "proto/plan/plan_message.h"
#include "tests/unit/worker/agent_env.h"
#include "transport/crypto/x509.h"
#include "worker/agent/attach.h"
#include "worker/shard/fetch.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib/gstdio.h>
#include <math.h>
#include <string.h>

/* Rows of logits of 80 kB: what a slow reader leaves waiting grows fast. */
static const TinyShape wide_shape = {1,          256,        6,          3,    64,    640,  20000,
                                     DTYPE_Q8_0, DTYPE_Q8_0, DTYPE_Q8_0, true, false, false};

/* ---- attach ---- */

static void test_hello_and_heartbeats(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    const Weft__V1__Hello *hello = env->c->hello;
    assert_int_equal(hello->protocol_version, 1);
    assert_int_equal(hello->boot_id.len, 16);
    assert_string_equal(hello->control_address, "w0-listen");
    assert_string_equal(hello->isa, "generic");
    assert_true(hello->memory_bytes == 1u << 30);
    assert_true(hello->measured->int8_ops_per_s == 2);
    bool q8 = false;
    for (size_t i = 0; i < hello->n_packed; i++) {
        q8 = q8 || (hello->packed[i]->type == DTYPE_Q8_0 &&
                    hello->packed[i]->block_bytes == packed_block_bytes(DTYPE_Q8_0) &&
                    hello->packed[i]->ops_per_s == 6);
    }
    assert_true(q8);
    unsigned before = env->c->n_heartbeats;
    env_run(env, 5 * SECOND);
    assert_in_range(env->c->n_heartbeats - before, 9, 11);
    assert_int_equal(env->c->n_attached, 1);
    assert_int_equal(env_health(env, "weft.v1.Worker"), SERVING);
    assert_int_equal(env_health(env, ""), NOT_SERVING); /* nothing is loaded: not earned */
    env_free(env);
}

static void test_refused_for_good(void **state)
{
    (void)state;
    const int codes[] = {WEFT_ERROR_DENIED, WEFT_ERROR_VERSION};
    for (size_t i = 0; i < G_N_ELEMENTS(codes); i++) {
        Env *env = env_new();
        env->c->refuse = g_error_new(WEFT_ERROR, codes[i], "protocol 2 here, 1 there");
        env_run(env, 30 * SECOND);
        assert_non_null(env->refused);
        assert_int_equal(env->refused->code, codes[i]);
        assert_non_null(strstr(env->refused->message, "protocol 2 here, 1 there"));
        env_free(env);
    }
}

static void test_comes_back_after_a_restart(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    fake_coordinator_down(env->c);
    env_run(env, 2 * SECOND); /* shorter than the lease: nothing is lost */
    fake_coordinator_up(env->c);
    env_wait_attached(env, 2);
    assert_int_equal(env->c->hello->n_held, 1);
    assert_string_equal(env->c->hello->held[0]->state, "ready");
    assert_int_equal(env->c->hello->held[0]->epoch, 1);
    env_run(env, SECOND);
    assert_int_equal(env_health(env, ""), SERVING);
    FakeReply *g = env_generate(env, 1, 3, 1, "coordinator"); /* under the new generation */
    env_wait_for(env, &g->done);
    g_assert_no_error(g->error);
    fake_reply_free(g);
    fake_coordinator_down(env->c);
    env_run(env, 100 * SECOND);
    fake_coordinator_up(env->c);
    env_wait_attached(env, 3);
    assert_int_equal(env->c->hello->n_held, 0);
    env_free(env);
}

/* ---- fencing ---- */

static void test_fences_itself_and_keeps_weights(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    FakeReply *g = env_generate(env, 1, 100, 1, "coordinator");
    unsigned fetched = env->c->n_slices_asked;
    sim_world_run_for(env->world,
                      SECOND / 2); /* the engine is not stepped: the request stays open */
    int64_t since = sim_world_now_us(env->world);
    rpc_inproc_set_fault(env->transport, NULL, NULL, RPC_INPROC_FROZEN);
    while (agent_is_attached(env->agent)) {
        sim_world_run_for(env->world, 1000);
        assert_true(sim_world_now_us(env->world) - since < 4 * SECOND);
    }
    int64_t fenced_after = sim_world_now_us(env->world) - since;
    assert_in_range(fenced_after, 3 * SECOND - 20000,
                    3 * SECOND + 510000); /* 3.5 s after a send time that is at most 0.5 s old */
    rpc_inproc_set_fault(env->transport, NULL, NULL, RPC_INPROC_UP);
    env_assert_fails(env, g, WEFT_ERROR_WORKER_LOST, "fenced", "w0");
    env_wait_attached(env, 2);
    assert_int_equal(env->c->hello->n_held, 0);
    env_run(env, SECOND);
    assert_int_equal(env_health(env, ""), NOT_SERVING);
    FakeReply *again = env_load(env, 2);
    env_loaded(env, again);
    fake_reply_free(again);
    assert_int_equal(env->c->n_slices_asked, fetched); /* the weights were still there */
    env_free(env);
}

/* A process that was stopped for 10 s must not serve one call of the old epoch when it goes on,
 * whatever lies in its queues. */
static void test_stopped_process_is_fenced_first(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    env_run(env, SECOND);
    sim_loop_freeze(env->loop, true);
    FakeReply *g = env_generate(env, 1, 3, 1, "coordinator");
    sim_world_run_for(env->world, 10 * SECOND);
    sim_loop_freeze(env->loop, false);
    env_wait_for(env, &g->done);
    assert_non_null(g->error);
    assert_int_equal(g->messages->len, 0);
    fake_reply_free(g);
    env_wait_attached(env, 2);
    env_free(env);
}

/* ---- load, start, drop ---- */

static void test_load_is_idempotent_and_epochs_only_rise(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    FakeReply *first = env_load(env, 5), *joined = env_load(env, 5);
    env_loaded(env, first);
    env_loaded(env, joined);
    assert_int_equal(((const Weft__V1__LoadProgress *)fake_reply_last(first))->bytes_from_network,
                     ((const Weft__V1__LoadProgress *)fake_reply_last(first))->bytes_total);
    unsigned fetched = env->c->n_slices_asked;
    FakeReply *again = env_load(env, 5);
    env_loaded(env, again);
    assert_int_equal(env->c->n_slices_asked, fetched);
    env_assert_fails(env, env_load(env, 4), WEFT_ERROR_STALE, "epoch 4", "epoch 5");
    env->c->generation = 9;
    env_assert_fails(env, env_load(env, 6), WEFT_ERROR_STALE, "generation 9", "generation 1");
    env->c->generation = 1;
    FakeReply *s = env_start(env, 5, (const Weft__V1__LoadProgress *)fake_reply_last(again));
    env_wait_for(env, &s->done);
    g_assert_no_error(s->error);
    FakeReply *twice = env_start(env, 5, (const Weft__V1__LoadProgress *)fake_reply_last(again));
    env_wait_for(env, &twice->done);
    g_assert_no_error(twice->error);
    FakeReply *newer = env_load(env, 6);
    env_loaded(env, newer);
    assert_int_equal(env->c->n_slices_asked, fetched); /* the part is the same: from memory */
    env_assert_fails(env, env_start(env, 5, (const Weft__V1__LoadProgress *)fake_reply_last(again)),
                     WEFT_ERROR_STALE, "epoch 5", "epoch 6");
    env_run(env, SECOND);
    assert_int_equal(env->c->heartbeat->n_held, 1);
    assert_int_equal(env->c->heartbeat->held[0]->epoch, 6);
    FakeReply *all[] = {first, joined, again, s, twice, newer};
    for (size_t i = 0; i < G_N_ELEMENTS(all); i++) {
        fake_reply_free(all[i]);
    }
    env_free(env);
}

static void test_drop_and_keep(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    unsigned fetched = env->c->n_slices_asked;
    FakeReply *d = env_drop(env, 1, false);
    env_wait_for(env, &d->done);
    g_assert_no_error(d->error);
    fake_reply_free(d);
    env_run(env, SECOND);
    assert_int_equal(env->c->heartbeat->n_held, 0);
    env_make_ready(env, 2);
    assert_int_equal(env->c->n_slices_asked, 2 * fetched); /* dropped with its weights */
    FakeReply *k = env_drop(env, 2, true);
    env_wait_for(env, &k->done);
    fake_reply_free(k);
    env_make_ready(env, 3);
    assert_int_equal(env->c->n_slices_asked, 2 * fetched);
    /* The coordinator that does not know epoch 3 gets it dropped; the one that knows it, not. */
    FakeKeep known = {"job", 0, 3};
    env->c->keep = g_array_new(FALSE, FALSE, sizeof(FakeKeep));
    g_array_append_val(env->c->keep, known);
    env_run(env, 2 * SECOND);
    assert_int_equal(env->c->heartbeat->n_held, 1);
    g_array_set_size(env->c->keep, 0);
    env_run(env, 2 * SECOND);
    assert_int_equal(env->c->heartbeat->n_held, 0);
    env_free(env);
}

static void test_load_refuses_what_is_not_ours(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    const char *source = "coordinator";
    g_autoptr(Plan) two = tiny_plan(env->model->spec, 1, (uint32_t[]){2}, (double[]){1, 1});
    env_assert_fails(env, env_load_from(env, 1, two, 1, &source, 1), WEFT_ERROR_PROTOCOL,
                     "belongs to w1", "w0");
    two->replicas[0].stages[0].ranks[0].ffn_count--; /* a unit that nobody owns */
    env_assert_fails(env, env_load_from(env, 2, two, 0, &source, 1), WEFT_ERROR_INVALID,
                     "plan is refused", "unit");
    g_autoptr(Plan) large = tiny_plan(env->model->spec, 1, (uint32_t[]){1}, (double[]){1});
    large->kv_pages = 1u << 24;
    env_assert_fails(env, env_load_from(env, 3, large, 0, &source, 1), WEFT_ERROR_IMPOSSIBLE,
                     "needs", "1.0 GiB");
    env_free(env);
}

/* ---- slices ---- */

static void test_slices_come_from_whoever_has_them(void **state)
{
    (void)state;
    Env *env = env_new();
    FakeCoordinator *peer = fake_coordinator_new(env->world, env->transport, "peer", "ca");
    peer->model = env->model;
    env_wait_attached(env, 1);
    g_autoptr(Plan) plan = tiny_plan(env->model->spec, 1, (uint32_t[]){1}, (double[]){1});
    const char *sources[] = {"nobody", "peer", "coordinator"};
    for (int spoilt = 0; spoilt < 5; spoilt++) {
        peer->corrupt_slices = spoilt == 1 ? 3 : 0;
        peer->missing = spoilt == 2;
        peer->die_after_chunks = spoilt == 3 ? 500 : -1;
        peer->silent = spoilt == 4;
        unsigned before = env->c->n_slices_asked, of_peer = peer->n_slices_asked;
        FakeReply *l = env_load_from(env, 10 + (uint64_t)spoilt, plan, 0, sources, 3);
        env_loaded(env, l);
        fake_reply_free(l);
        assert_true(peer->n_slices_asked > of_peer);
        unsigned asked = env->c->n_slices_asked - before;
        if (spoilt == 0) {
            assert_int_equal(asked, 0);
        } else if (spoilt == 1) {
            assert_int_equal(asked, 3);
        } else {
            assert_true(asked > 0);
        }
        FakeReply *d = env_drop(env, 10 + (uint64_t)spoilt, false);
        env_wait_for(env, &d->done);
        fake_reply_free(d);
    }
    peer->missing = env->c->missing = true;
    peer->silent = false;
    env_assert_fails(env, env_load_from(env, 20, plan, 0, sources, 3), WEFT_ERROR_PEER_UNREACHABLE,
                     "could not be had", "tensor");
    /* Nothing but wrong bytes is no model either. */
    env->c->missing = peer->missing = false;
    env->c->corrupt_slices = peer->corrupt_slices = -1;
    env_assert_fails(env, env_load_from(env, 21, plan, 0, sources, 3), WEFT_ERROR_PEER_UNREACHABLE,
                     "wrong hash", "tensor");
    env->c->corrupt_slices = 0;
    peer->corrupt_slices = 0;
    env_make_ready(env, 22);
    fake_coordinator_free(peer);
    env_free(env);
}

/* A source that comes to have its slices later is waited for, however many flights fail meanwhile:
 * between two rounds there is a pause. */
static void test_waits_for_a_source_that_begins(void **state)
{
    (void)state;
    Env *env = env_new_with(&wide_shape, NULL);
    env_wait_attached(env, 1);
    env->c->missing = true;
    FakeReply *l = env_load(env, 1);
    env_run(env, SECOND);
    assert_false(l->done);
    assert_true(env->c->n_fetches > FETCH_FLIGHTS);
    env->c->missing = false;
    env_loaded(env, l);
    fake_reply_free(l);
    env_free(env);
}

/* The peer stands still for a second after it has asked; one that is freed meanwhile ended so. */
static FakeReply *ask_and_stand_still(Env *env, const Weft__V1__FetchRequest *request)
{
    FakeReply *reply = fake_call(env->c, agent_address(env->agent), "worker",
                                 &weft__v1__slices__descriptor, "Fetch", &request->base);
    sim_loop_freeze(env->c->loop, true);
    env_run(env, SECOND);
    assert_false(reply->done);
    return reply;
}

/* What this worker has cached it gives to its peers, byte for byte, and says what it lacks; also
 * when it is more than may wait for a peer. */
static void serves_its_cache(const TinyShape *of)
{
    Env *env = env_new_with(of, g_dir_make_tmp("weft-cache-XXXXXX", NULL));
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    const ModelSpec *spec = env->model->spec;
    GPtrArray *refs = g_ptr_array_new_with_free_func(g_free);
    for (uint32_t t = 0; t <= spec->n_tensors; t++) { /* one tensor too many */
        for (uint32_t s = 0; s < (t < spec->n_tensors ? spec->tensors[t].n_slices : 1); s++) {
            Weft__V1__SliceRef *ref = g_new(Weft__V1__SliceRef, 1);
            weft__v1__slice_ref__init(ref);
            ref->tensor = t;
            ref->slice = s;
            g_ptr_array_add(refs, ref);
        }
    }
    Weft__V1__FetchRequest request = WEFT__V1__FETCH_REQUEST__INIT;
    request.file_hash = (ProtobufCBinaryData){16, (uint8_t *)spec->file_hash.bytes};
    request.n_slices = refs->len;
    request.slices = (Weft__V1__SliceRef **)refs->pdata;
    fake_reply_free(ask_and_stand_still(env, &request));
    sim_loop_freeze(env->c->loop, false);
    FakeReply *reply = ask_and_stand_still(env, &request);
    sim_loop_freeze(env->c->loop, false);
    env_wait_for(env, &reply->done);
    g_assert_no_error(reply->error);
    guint at = 0;
    for (guint i = 0; i < refs->len; i++) {
        const Weft__V1__SliceRef *ref = refs->pdata[i];
        g_autoptr(GByteArray) got = g_byte_array_new();
        const Weft__V1__FetchChunk *chunk;
        do {
            assert_true(at < reply->messages->len);
            chunk = reply->messages->pdata[at++];
            assert_int_equal(chunk->index, i);
            g_byte_array_append(got, chunk->data.data, (guint)chunk->data.len);
        } while (!chunk->last);
        if (ref->tensor == spec->n_tensors) {
            assert_true(chunk->missing);
            continue;
        }
        size_t size;
        g_autofree void *expected = tiny_model_slice(env->model, ref->tensor, ref->slice, &size);
        assert_int_equal(got->len, size);
        assert_memory_equal(got->data, expected, size);
    }
    assert_int_equal(at, reply->messages->len);
    fake_reply_free(reply);
    g_ptr_array_unref(refs);
    /* After a drop and all memory of it, a load needs no network. */
    unsigned asked = env->c->n_slices_asked;
    FakeReply *d = env_drop(env, 1, false);
    env_wait_for(env, &d->done);
    fake_reply_free(d);
    FakeReply *again = env_load(env, 2);
    const Weft__V1__LoadProgress *last = env_loaded(env, again);
    assert_int_equal(last->bytes_from_cache, last->bytes_total);
    assert_int_equal(env->c->n_slices_asked, asked);
    fake_reply_free(again);
    env_free(env);
}

static void test_serves_its_cache_to_peers(void **state)
{
    (void)state;
    serves_its_cache(&env_shape);
    serves_its_cache(&wide_shape);
}

/* ---- generate ---- */

/* An exact plan of hosts is refused by a worker whose device has bits of its own, whoever made it.
 */
static void test_another_kind_is_refused(void **state)
{
    g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
    (void)state;
    g_strlcpy(device->info.exact_kind, "NVIDIA H200, sm_90", sizeof device->info.exact_kind);
    Env *env = env_new_on(device);
    env_wait_attached(env, 1);
    assert_string_equal(env->c->hello->devices[0]->exact_kind, "NVIDIA H200, sm_90");
    FakeReply *reply = env_load(env, 1);
    env_assert_fails(env, reply, WEFT_ERROR_INVALID, "computes on NVIDIA H200, sm_90",
                     "exact bits are those of hosts' cores");
    env_free(env);
}

/* Slices go from the network into device memory; the report says where it computes; the tokens are
 * the host's. */
static void test_generate_on_a_device(void **state)
{
    g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
    Env *envs[2] = {env_new(), env_new_on(device)};
    FakeReply *g[2];
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        env_wait_attached(envs[i], 1);
        env_make_ready(envs[i], 1);
        g[i] = env_generate(envs[i], 1, 5, 1, "coordinator");
        env_wait_for(envs[i], &g[i]->done);
        g_assert_no_error(g[i]->error);
        assert_int_equal(g[i]->messages->len, 6);
    }
    assert_int_equal(envs[0]->c->hello->n_devices, 0);
    assert_int_equal(envs[1]->c->hello->n_devices, 1);
    assert_string_equal(envs[1]->c->hello->devices[0]->kind, "cpu");
    assert_string_equal(envs[1]->c->hello->devices[0]->name, "host");
    assert_int_equal(envs[1]->c->hello->devices[0]->memory_bytes, device->info.memory_bytes);
    assert_string_equal(envs[1]->c->hello->devices[0]->exact_kind, "");      /* every host's */
    const Weft__V1__Measured *own = envs[1]->c->hello->devices[0]->measured; /* each has its own */
    assert_true(own->read_bytes_per_s == 6 && own->int8_ops_per_s == 7 && own->since == 9);
    assert_true(envs[1]->c->hello->measured->read_bytes_per_s == 1);
    for (unsigned t = 0; t < 5; t++) {
        const Weft__V1__TokenEvent *a = g[0]->messages->pdata[t], *b = g[1]->messages->pdata[t];
        assert_int_equal(a->id, b->id);
    }
    for (unsigned i = 0; i < 2; i++) {
        fake_reply_free(g[i]);
        env_free(envs[i]);
    }
}

static void test_generate(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    env_run(env, SECOND);
    assert_int_equal(env_health(env, ""), SERVING);
    assert_true(env->c->heartbeat->serving);
    FakeReply *g[2] = {env_generate(env, 1, 5, 1, "coordinator"),
                       env_generate(env, 1, 5, 1, "coordinator")};
    for (unsigned i = 0; i < 2; i++) {
        env_wait_for(env, &g[i]->done);
        g_assert_no_error(g[i]->error);
        assert_int_equal(g[i]->messages->len, 6);
        const Weft__V1__TokenEvent *last = (const Weft__V1__TokenEvent *)fake_reply_last(g[i]);
        assert_true(last->done);
        assert_string_equal(last->finish_reason, "length");
        for (unsigned t = 0; t < 5; t++) {
            const Weft__V1__TokenEvent *a = g[0]->messages->pdata[t], *b = g[i]->messages->pdata[t];
            assert_int_equal(a->position, 4 + t);
            assert_string_equal(b->request, "r1");
            assert_int_equal(a->id, b->id);
            assert_int_equal(b->row_hash.len, 16);
            assert_memory_equal(a->row_hash.data, b->row_hash.data, 16);
            assert_int_equal(b->n_top, 2);
            assert_int_equal(b->top[0]->id, b->id);
        }
    }
    fake_reply_free(g[0]);
    fake_reply_free(g[1]);
    env_run(env, SECOND);
    assert_int_equal(env->c->heartbeat->n_loads, 1);
    const Weft__V1__ReplicaLoad *load = env->c->heartbeat->loads[0];
    assert_int_equal(load->running + load->waiting, 0);
    assert_int_equal(load->prompt_tokens, 2 * 4);
    assert_int_equal(load->generation_tokens, 2 * 5);
    assert_true(load->slots > 0 && load->kv_pages_total > 0 && load->epoch == 1);
    env_assert_fails(env, env_generate(env, 1, 5, 1, "worker"), WEFT_ERROR_DENIED, "role worker",
                     "coordinator");
    env_assert_fails(env, env_generate(env, 1, 5, 1100, "coordinator"), WEFT_ERROR_INVALID,
                     "id 1100", "has 1100");
    env_assert_fails(env, env_generate(env, 2, 5, 1, "coordinator"), WEFT_ERROR_NOT_FOUND,
                     "epoch 2", "epoch 1");
    /* A client that goes away frees its place. */
    FakeReply *gone = env_generate(env, 1, 100, 1, "coordinator");
    sim_world_run_for(env->world, 10000);
    rpc_client_cancel(gone->call);
    env_wait_for(env, &gone->done);
    fake_reply_free(gone);
    env_run(env, SECOND);
    FakeReply *d = env_drop(env, 1, false);
    env_wait_for(env, &d->done);
    fake_reply_free(d);
    env_free(env);
}

static void test_samplers_are_checked(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    Weft__V1__LogitBias bias[2] = {WEFT__V1__LOGIT_BIAS__INIT, WEFT__V1__LOGIT_BIAS__INIT};
    Weft__V1__LogitBias *pointers[2] = {&bias[0], &bias[1]};
    Weft__V1__Sampler sampler = WEFT__V1__SAMPLER__INIT;
    sampler.n_logit_bias = 2;
    sampler.logit_bias = pointers;
    bias[0].id = 1000;
    bias[0].bias = 500; /* always this one */
    bias[1].id = 3;
    FakeReply *g = env_generate_biased(env, &sampler);
    env_wait_for(env, &g->done);
    g_assert_no_error(g->error);
    assert_int_equal(((const Weft__V1__TokenEvent *)g->messages->pdata[0])->id, 1000);
    fake_reply_free(g);
    bias[1].id = 1000;
    env_assert_fails(env, env_generate_biased(env, &sampler), WEFT_ERROR_INVALID,
                     "two logit biases", "1000");
    bias[1].id = 1100;
    env_assert_fails(env, env_generate_biased(env, &sampler), WEFT_ERROR_INVALID,
                     "logit bias of token", "1100");
    bias[1].id = 3;
    bias[1].bias = -1001;
    env_assert_fails(env, env_generate_biased(env, &sampler), WEFT_ERROR_INVALID,
                     "logit bias is -1001", "1000");
    sampler.n_logit_bias = 0;
    sampler.presence_penalty = NAN;
    env_assert_fails(env, env_generate_biased(env, &sampler), WEFT_ERROR_INVALID,
                     "presence penalty", "-100 to 100");
    env_free(env);
}

static void test_slow_reader_loses_its_stream(void **state)
{
    (void)state;
    Env *env = env_new_with(&wide_shape, NULL);
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    FakeReply *reads = env_generate_with(env, 1, 40, 1, true, "coordinator");
    env_wait_for(env, &reads->done); /* 3.2 MB may wait */
    g_assert_no_error(reads->error);
    assert_int_equal(reads->messages->len, 41);
    fake_reply_free(reads);
    FakeReply *slow = env_generate_with(env, 1, 100, 1, true, "coordinator");
    sim_world_run_for(env->world, 1000); /* the request is there */
    rpc_inproc_set_fault(env->transport, "caller", NULL, RPC_INPROC_FROZEN);
    env_run(env, SECOND);
    rpc_inproc_set_fault(env->transport, "caller", NULL, RPC_INPROC_UP);
    env_assert_fails(env, slow, WEFT_ERROR_FULL, "reader is too slow", "r1");
    FakeReply *next = env_generate(env, 1, 3, 1, "coordinator");
    env_wait_for(env, &next->done);
    g_assert_no_error(next->error);
    fake_reply_free(next);
    env_free(env);
}

static FakeReply *score_logits(Env *env, uint32_t n_scored)
{
    uint32_t prompt[64];
    for (uint32_t i = 0; i < G_N_ELEMENTS(prompt); i++) {
        prompt[i] = i * 311 % 20000;
    }
    Weft__V1__Stamp stamp = fake_stamp(env->c, 1);
    Weft__V1__GenerateRequest request = WEFT__V1__GENERATE_REQUEST__INIT;
    request.stamp = &stamp;
    request.request = "r1";
    request.kind = WEFT__V1__REQUEST_KIND__SCORE;
    request.prompt = prompt;
    request.n_prompt = 10 + n_scored;
    request.score_from = 10;
    request.want_logits = true;
    return fake_call(env->c, agent_address(env->agent), "coordinator",
                     &weft__v1__leader__descriptor, "Generate", &request.base);
}

/* As many rows as may wait for a reader, and not one more. */
static void test_scored_logits_are_bounded(void **state)
{
    (void)state;
    const uint32_t most = logits_rows(LOGITS_SEQUENCE_BYTES, 20000);
    Env *env = env_new_with(&wide_shape, NULL);
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    FakeReply *fits = score_logits(env, most);
    env_wait_for(env, &fits->done);
    g_assert_no_error(fits->error);
    assert_int_equal(fits->messages->len, most + 1);
    for (uint32_t i = 0; i < most; i++) {
        const Weft__V1__TokenEvent *e = g_ptr_array_index(fits->messages, i);
        assert_int_equal(e->position, 10 + i);
        assert_int_equal(e->logits.len, 4 * 20000);
    }
    fake_reply_free(fits);
    env_assert_fails(env, score_logits(env, most + 1), WEFT_ERROR_INVALID,
                     "at most 13 rows at once", "14 scored tokens");
    env_free(env);
}

static void test_drop_ends_open_requests(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env_make_ready(env, 1);
    FakeReply *g = env_generate(env, 1, 100, 1, "coordinator");
    sim_world_run_for(env->world, 10000);
    FakeReply *d = env_drop(env, 1, false);
    env_wait_for(env, &d->done);
    fake_reply_free(d);
    env_wait_for(env, &g->done);
    assert_non_null(g->error);
    fake_reply_free(g);
    env_free(env);
}

static void test_revoked_peers_are_not_served(void **state)
{
    (void)state;
    Env *env = env_new();
    env_wait_attached(env, 1);
    env->c->revoked = "99"; /* the serial that fake_call() shows */
    env_run(env, SECOND);
    env_assert_fails(env, env_drop(env, 1, false), WEFT_ERROR_DENIED, "revoked", "99");
    env_free(env);
}

/* ---- the certificate ---- */

/* Notes with what certificate slices are asked for; answers nothing itself. */
static bool note_serial(RpcCall *call, void *user)
{
    char **serial = user;
    g_free(*serial);
    *serial = g_strdup(rpc_call_peer(call)->serial);
    return false;
}

static void load_and_drop(Env *env, uint64_t epoch)
{
    FakeReply *l = env_load(env, epoch);
    env_loaded(env, l);
    fake_reply_free(l);
    FakeReply *d = env_drop(env, epoch, false);
    env_wait_for(env, &d->done);
    fake_reply_free(d);
}

static void test_renews_at_two_thirds(void **state)
{
    (void)state;
    Env *env = env_new();
    agent_stop(env->agent, env_stopped, env);
    sim_world_run_until(env->world, &env->stopped, SECOND);
    agent_free(env->agent);
    env->stopped = false;
    fake_coordinator_free(env->c);
    GError *error = NULL;
    char *ca_key = x509_new_key(&error);
    int64_t now = loop_wall_us(env->loop);
    g_autofree char *ca = x509_new_ca(ca_key, "test", now, &error);
    g_assert_no_error(error);
    env->c = fake_coordinator_new(env->world, env->transport, "coordinator", ca);
    env->c->ca_key_pem = ca_key;
    env->c->model = env->model;
    env->c->certificate_life_us = 3000 * SECOND;
    Identity identity = fake_identity(env->c, "w0");
    g_free(identity.key_pem);
    g_free(identity.certificate_pem);
    identity.key_pem = x509_new_key(&error);
    g_autofree char *csr = x509_new_request(identity.key_pem, "w0", &error);
    X509Grant grant = {
        .name = "w0", .role = "worker", .not_before_us = now, .not_after_us = now + 3000 * SECOND};
    identity.certificate_pem = x509_sign(ca, ca_key, csr, &grant, NULL, &error);
    g_assert_no_error(error);
    env_start_agent(env, &identity, 1u << 30);
    identity_clear(&identity);
    env_wait_attached(env, 1);
    g_autofree char *first = NULL, *second = NULL;
    env->c->answer_fetch = note_serial;
    env->c->answer_user = &first;
    load_and_drop(env, 1);
    sim_world_run_for(env->world, 1990 * SECOND);
    assert_int_equal(env->c->n_renewed, 0);
    sim_world_run_for(env->world, 20 * SECOND);
    assert_int_equal(env->c->n_renewed, 1);
    assert_int_equal(env->c->n_attached, 2); /* with the new certificate */
    env_run(env, 5 * SECOND);
    assert_true(agent_is_attached(env->agent));
    assert_int_equal(env_health(env, "weft.v1.Worker"), SERVING);
    env->c->answer_user = &second;
    load_and_drop(env, 2); /* what asks for slices has the new certificate, too */
    assert_true(first != NULL && second != NULL && *first != '\0');
    assert_string_not_equal(first, second);
    sim_world_run_for(env->world, 4000 * SECOND);
    assert_in_range(env->c->n_renewed, 2, 4);
    env_free(env);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hello_and_heartbeats),
        cmocka_unit_test(test_refused_for_good),
        cmocka_unit_test(test_comes_back_after_a_restart),
        cmocka_unit_test(test_fences_itself_and_keeps_weights),
        cmocka_unit_test(test_stopped_process_is_fenced_first),
        cmocka_unit_test(test_load_is_idempotent_and_epochs_only_rise),
        cmocka_unit_test(test_drop_and_keep),
        cmocka_unit_test(test_load_refuses_what_is_not_ours),
        cmocka_unit_test(test_slices_come_from_whoever_has_them),
        cmocka_unit_test(test_waits_for_a_source_that_begins),
        cmocka_unit_test(test_serves_its_cache_to_peers),
        cmocka_unit_test(test_generate),
        cmocka_unit_test(test_another_kind_is_refused),
        cmocka_unit_test(test_generate_on_a_device),
        cmocka_unit_test(test_samplers_are_checked),
        cmocka_unit_test(test_slow_reader_loses_its_stream),
        cmocka_unit_test(test_scored_logits_are_bounded),
        cmocka_unit_test(test_drop_ends_open_requests),
        cmocka_unit_test(test_revoked_peers_are_not_served),
        cmocka_unit_test(test_renews_at_two_thirds),
    };
    return cmocka_run_group_tests_name("agent", tests, NULL, NULL);
}
