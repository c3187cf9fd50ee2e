/* The device's way through the engine, on the trivial device (kernels/device/cpu.c), whose streams
 * run nothing before it is waited for, or on a GPU (WEFT_TEST_DEVICE): weights by pinned buffers,
 * KV pages and layers on the device, decode steps as graphs, ranks of hosts and devices in one
 * replica. On the trivial device the bits are the host's; on another the text is, and logits are
 * close. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/device/cpu.h"
#include "kernels/kernels.h"
#include "proto/base/failpoint.h"
#include "proto/plan/device_memory.h"
#include "tests/unit/worker/chosen_device.h"
#include "tests/unit/worker/engine_runs.h"
#include "worker/model/device_stage.h"
#include "worker/serve/engine_state.h"

#include <glib/gstdio.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

static const uint32_t PROMPT[] = {1,  17,  5,   99, 23,  4,  250, 31, 77, 8,  140, 63, 2,  201,
                                  19, 55,  180, 9,  12,  33, 47,  81, 3,  66, 111, 90, 14, 28,
                                  7,  222, 35,  51, 160, 44, 13,  70, 6,  39, 25,  101};
enum { N_PROMPT = G_N_ELEMENTS(PROMPT), N_TOKENS = 14, VOCAB = 2500 };

static LocalReplica *replica(const Gguf *g, LocalLayout layout)
{
    g_autoptr(GError) error = NULL;
    layout.isa = kernels_best_isa();
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    return r;
}

static const DeviceStage *device_of(LocalReplica *r, uint32_t rank)
{
    return local_replica_engine(r, rank)->stage->device;
}

static EngineRequest request_of(uint32_t n_prompt)
{
    return (EngineRequest){
        .prompt = PROMPT, .n_prompt = n_prompt, .max_tokens = N_TOKENS, .want_logits = true};
}

static void run_request(LocalReplica *r, const EngineRequest *request, LocalResult *result)
{
    local_replica_run(r, request, 1, result);
    if (result->error != NULL) {
        fail_msg("%s", result->error);
    }
}

static void run(LocalReplica *r, LocalResult *result)
{
    const EngineRequest request = request_of(N_PROMPT);
    run_request(r, &request, result);
}

/* The same tokens; logits within `most` of their largest magnitude. */
static void assert_close(const LocalResult *a, const LocalResult *b, double most)
{
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, sizeof(uint32_t) * a->n);
    double largest = 0, apart = 0;
    for (size_t i = 0; i < (size_t)a->n * VOCAB; i++) {
        largest = fmax(largest, fabs((double)a->logits[i]));
        apart = fmax(apart, fabs((double)a->logits[i] - (double)b->logits[i]));
    }
    assert_true(largest > 0);
    if (!(apart <= most * largest)) {
        fail_msg("logits differ by %g of %g", apart, largest);
    }
}

typedef struct Mix {
    LocalLayout layout;
    unsigned devices; /* bit i: global rank i is on a device */
} Mix;

static const double UNEVEN[] = {1.0, 2.6, 0.7, 1.3};

static const Mix MIXES[] = {
    {{.pp = 1, .tp = {1}}, 1},
    {{.pp = 1, .tp = {1}, .max_rows = 7}, 1},
    {{.pp = 1, .tp = {1}, .max_rows = 1}, 1},
    {{.pp = 2, .tp = {1, 1}}, 3},
    {{.pp = 2, .tp = {1, 1}}, 1}, /* device, then host */
    {{.pp = 2, .tp = {1, 1}}, 2}, /* host, then device */
    {{.pp = 3, .tp = {1, 1, 1}, .max_rows = 7}, 2},
    {{.pp = 1, .tp = {2}}, 3},
    {{.pp = 1, .tp = {2}}, 2}, /* one sum of both */
    {{.pp = 1, .tp = {4}, .weight = UNEVEN}, 5},
    {{.pp = 2, .tp = {3, 2}, .weight = UNEVEN}, 21},
};

static void check_mixes(const Gguf *g, double most, const Mix *mixes, unsigned n_mixes)
{
    LocalResult host, other;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}});
    run(r, &host);
    local_replica_free(r);
    for (unsigned i = 0; i < n_mixes; i++) {
        g_autoptr(Device) device = chosen_device();
        const Device *devices[8] = {NULL};
        LocalLayout layout = mixes[i].layout;
        for (unsigned k = 0; k < 8; k++) {
            devices[k] = mixes[i].devices >> k & 1 ? device : NULL;
        }
        layout.devices = devices;
        r = replica(g, layout);
        for (unsigned again = 0; again < 2; again++) { /* then with pages reused and copied */
            run(r, &other);
            assert_close(&host, &other, most);
            local_result_clear(&other);
        }
        local_replica_free(r);
    }
    local_result_clear(&host);
}

static void check_type(Dtype type, double most, unsigned n_mixes)
{
    g_autoptr(Gguf) g = runs_awkward_model(type);
    check_mixes(g, most, MIXES, n_mixes);
}

static void test_f32(void **state)
{
    (void)state;
    check_type(DTYPE_F32, 1e-3, G_N_ELEMENTS(MIXES));
}

static void test_q8_0(void **state)
{
    (void)state;
    check_type(DTYPE_Q8_0, 0.05, 2);
}

static void test_bf16(void **state)
{
    (void)state;
    check_type(DTYPE_BF16, 0.05, 2);
}

/* ---- GPT-2: layer norms, learnt positions, GELU, biases ---- */

static Gguf *gpt2_model(Dtype type)
{
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type);
    config.family = FAMILY_GPT2;
    config.n_layers = 3;
    config.width = 192;
    config.n_heads = config.n_kv_heads = 6;
    config.head_size = 32;
    config.ffn_width = 768;
    config.vocab_size = VOCAB;
    config.context = 512;
    config.seed = 5;
    return runs_model(&config);
}

static void test_gpt2(void **state)
{
    static const Mix mixes[] = {
        {{.pp = 1, .tp = {1}}, 1},
        {{.pp = 1, .tp = {1}, .max_rows = 7}, 1},
        {{.pp = 3, .tp = {1, 1, 1}}, 5},
        {{.pp = 1, .tp = {2}}, 3},
        {{.pp = 2, .tp = {3, 2}, .weight = UNEVEN}, 21},
    };
    g_autoptr(Gguf) g = gpt2_model(DTYPE_F32);
    (void)state;
    check_mixes(g, 1e-3, mixes, G_N_ELEMENTS(mixes));
}

/* ---- graphs ---- */

/* A decode step's graph is made once for each shape and launched for each step after. */
static void test_decode_steps_are_graphs(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    LocalResult result;
    (void)state;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    run(r, &result);
    const DeviceStage *d = device_of(r, 0);
    /* The prompt's last row gives the first token; each other is a step of one row, the first of
     * them op by op. */
    assert_int_equal(d->n_captures, 1);
    assert_int_equal(d->n_launches, N_TOKENS - 2);
    local_result_clear(&result);
    local_replica_free(r);
}

enum { STREAMS = 4 };

/* Neighbours of several lengths, so that shapes come and go, among them more keys than a first
 * graph's bound; page tables of other sequences. */
static void test_streams_together(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    EngineRequest requests[STREAMS];
    LocalResult host[STREAMS], other[STREAMS];
    uint32_t prompt[300];
    (void)state;
    for (uint32_t i = 0; i < G_N_ELEMENTS(prompt); i++) {
        prompt[i] = (i * 37 + 11) % VOCAB;
    }
    for (uint32_t i = 0; i < STREAMS; i++) {
        requests[i] = request_of(N_PROMPT - 3 * i);
        requests[i].max_tokens = N_TOKENS - 3 * i;
    }
    requests[1].prompt = prompt;
    requests[1].n_prompt = 245; /* crosses 256 keys */
    requests[2].prompt = prompt + 7;
    requests[2].n_prompt = 64; /* whole pages */
    LocalLayout layout = {.pp = 1, .tp = {1}, .context = 512};
    LocalReplica *r = replica(g, layout);
    local_replica_run(r, requests, STREAMS, host);
    local_replica_free(r);
    layout.devices = devices;
    r = replica(g, layout);
    local_replica_run(r, requests, STREAMS, other);
    assert_true(device_of(r, 0)->n_captures >= 1); /* how many, the turns of the threads decide */
    local_replica_free(r);
    for (unsigned i = 0; i < STREAMS; i++) {
        assert_null(other[i].error);
        assert_close(&host[i], &other[i], 1e-3);
        local_result_clear(&host[i]);
        local_result_clear(&other[i]);
    }
}

/* More shapes than there are places: graphs are made again, the text stays. */
static void test_the_oldest_graph_goes(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    (void)state;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    DeviceStage *d = local_replica_engine(r, 0)->stage->device;
    DevicePass pass = {.longest_segment = 1, .max_keys = 256};
    for (uint32_t i = 1; i <= DEVICE_GRAPHS; i++) {
        pass.n_rows = i;
        assert_int_equal(device_stage_graph(d, &pass)->pass.n_rows, i);
    }
    pass.n_rows = 1;
    device_stage_graph(d, &pass)->ran = true; /* is there, and now the youngest */
    pass.n_rows = DEVICE_GRAPHS + 1;
    assert_false(device_stage_graph(d, &pass)->ran);
    pass.n_rows = 1;
    assert_true(device_stage_graph(d, &pass)->ran);
    pass.n_rows = 2;
    assert_false(device_stage_graph(d, &pass)->ran); /* went */
    local_replica_free(r);
}

/* ---- more rows with logits than fit at once; sampling ---- */

static void test_scored_prompts(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    LocalResult host, other;
    EngineRequest request = {.kind = 1, .prompt = PROMPT, .n_prompt = N_PROMPT, .score_from = 1};
    (void)state;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}});
    local_replica_run(r, &request, 1, &host);
    local_replica_free(r);
    r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    local_replica_run(r, &request, 1, &other);
    local_replica_free(r);
    assert_true(host.n > STAGE_LOGITS_ROWS);
    assert_int_equal(host.n, other.n);
    for (uint32_t i = 0; i < host.n; i++) {
        assert_true(fabsf(host.logprobs[i] - other.logprobs[i]) < 1e-3f);
    }
    local_result_clear(&host);
    local_result_clear(&other);
}

static void test_drawn_tokens(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[2] = {device, device};
    LocalResult host, other;
    EngineRequest request = request_of(N_PROMPT);
    (void)state;
    request.temperature = 0.8f;
    request.top_p = 0.9f; /* may ask for a second round */
    request.seed = 5;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}});
    local_replica_run(r, &request, 1, &host);
    local_replica_free(r);
    r = replica(g, (LocalLayout){.pp = 1, .tp = {2}, .devices = devices});
    local_replica_run(r, &request, 1, &other);
    local_replica_free(r);
    assert_close(&host, &other, 1e-3);
    local_result_clear(&host);
    local_result_clear(&other);
}

/* ---- tokens drawn on the device, and class exact ---- */

/* The trivial device has the host's bits: ids, logprobs, digests. Another one has its ids. */
static void assert_same(const Device *device, const LocalResult *a, const LocalResult *b)
{
    assert_null(b->error);
    if (strcmp(device->info.kind, "cpu") == 0) {
        assert_true(runs_equal(a, b));
    }
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, sizeof(uint32_t) * a->n);
}

/* Every way to draw: those that a device does by itself, and those that need the logits here. */
enum { WAYS = 10 };
static void fill_ways(EngineRequest ways[WAYS])
{
    static const SampleBias bias[] = {{7, -2.0f}, {900, 3.5f}};
    for (unsigned i = 0; i < WAYS; i++) {
        ways[i] = request_of(N_PROMPT - i);
        ways[i].want_logits = false;
        ways[i].seed = 100 + i;
        ways[i].temperature = i > 0 ? 0.9f : 0.0f;
    }
    ways[1].top_logprobs = 5; /* no filter: noise for all */
    ways[2].top_k = 40;
    ways[3].top_p = 0.8f; /* may ask for a second round */
    ways[4].min_p = 0.05f;
    ways[5].top_k = 700; /* more than a device keeps */
    ways[6].repeat_penalty = 1.3f;
    ways[6].penalty_window = 16;
    ways[7].presence_penalty = 0.5f;
    ways[8].bias = bias;
    ways[8].n_bias = G_N_ELEMENTS(bias);
    ways[9].want_logits = true;
}

static void run_ways(const Gguf *g, const Device *const *devices, LocalLayout layout,
                     const EngineRequest *ways, unsigned n, LocalResult *results)
{
    layout.devices = devices;
    LocalReplica *r = replica(g, layout);
    local_replica_run(r, ways, n, results);
    local_replica_free(r);
}

static void test_ways_to_draw(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[2] = {device, device};
    EngineRequest ways[WAYS];
    LocalResult host[WAYS], other[WAYS];
    (void)state;
    fill_ways(ways);
    for (unsigned i = 0; i < WAYS; i++) { /* each alone */
        run_ways(g, NULL, (LocalLayout){.pp = 1, .tp = {1}}, &ways[i], 1, &host[i]);
        run_ways(g, devices, (LocalLayout){.pp = 1, .tp = {1 + i % 2}}, &ways[i], 1, &other[i]);
        assert_same(device, &host[i], &other[i]);
        local_result_clear(&other[i]);
    }
    const LocalLayout wide = {.pp = 1, .tp = {1}, .streams = WAYS};
    run_ways(g, devices, wide, ways, WAYS, other); /* together: of both kinds in a step */
    for (unsigned i = 0; i < WAYS; i++) {
        assert_same(device, &host[i], &other[i]);
        local_result_clear(&other[i]);
        local_result_clear(&host[i]);
    }
}

/* A plain row's step ends with its draw: no logits come down. */
static void test_no_logits_come_down(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    EngineRequest request = request_of(N_PROMPT);
    LocalResult result;
    (void)state;
    request.want_logits = false;
    request.temperature = 1.0f;
    request.seed = 3;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    run_request(r, &request, &result);
    assert_int_equal(device_of(r, 0)->last.n_draws, 1);
    assert_int_equal(device_of(r, 0)->last.keep, 1);
    assert_int_equal(device_of(r, 0)->last.n_outputs, 0);
    assert_int_equal(device_of(r, 0)->n_captures, 1);
    local_result_clear(&result);
    local_replica_free(r);
}

/* A vocabulary whose last chunk no device hashes is sampled here. */
static void test_a_short_last_chunk(void **state)
{
    GgufBuilderConfig config;
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    EngineRequest request = request_of(9);
    LocalResult host, other;
    (void)state;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, DTYPE_F32);
    config.vocab_size = 1024 + 60;
    g_autoptr(Gguf) g = runs_model(&config);
    request.want_logits = false;
    run_ways(g, NULL, (LocalLayout){.pp = 1, .tp = {1}}, &request, 1, &host);
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    run_request(r, &request, &other);
    assert_int_equal(device_of(r, 0)->last.n_draws, 0);
    assert_same(device, &host, &other);
    local_replica_free(r);
    local_result_clear(&host);
    local_result_clear(&other);
}

/* Class exact: bits do not depend on layout, chunks or neighbours; those of a GPU are its own. */
static void test_exact_layouts(void **state)
{
    static const LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}},    {.pp = 1, .tp = {1}, .max_rows = 7},
        {.pp = 1, .tp = {2}},    {.pp = 1, .tp = {3}, .weight = UNEVEN, .max_rows = 5},
        {.pp = 2, .tp = {1, 2}},
    };
    static const Dtype types[] = {DTYPE_F32, DTYPE_Q8_0, DTYPE_BF16};
    g_autoptr(Device) device = chosen_device();
    const Device *devices[4] = {device, device, device, device};
    EngineRequest requests[2] = {request_of(N_PROMPT), request_of(23)};
    (void)state;
    requests[0].want_logits = requests[1].want_logits = false;
    requests[0].temperature = 0.7f;
    for (unsigned t = 0; t <= G_N_ELEMENTS(types); t++) {
        g_autoptr(Gguf) g =
            t < G_N_ELEMENTS(types) ? runs_awkward_model(types[t]) : gpt2_model(DTYPE_Q8_0);
        LocalResult first, other[2];
        run_ways(g, devices, layouts[0], requests, 1, &first);
        assert_null(first.error);
        for (unsigned i = 1; i < G_N_ELEMENTS(layouts); i++) {
            run_ways(g, devices, layouts[i], requests, 2, other);
            if (other[0].error != NULL) {
                fail_msg("%s", other[0].error);
            }
            assert_true(runs_equal(&first, &other[0]));
            local_result_clear(&other[0]);
            local_result_clear(&other[1]);
        }
        local_result_clear(&first);
    }
}

/* Class fast: a prompt so long that a device's kernels for many rows do it; the first logits are
 * close, and the text goes on. */
static void test_fast_prompt(void **state)
{
    static const Dtype types[] = {DTYPE_Q4_0, DTYPE_BF16};
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    uint32_t prompt[400];
    LocalLayout layout = {.pp = 1, .tp = {1}, .context = 512, .max_rows = 384};
    EngineRequest request = request_of(N_PROMPT);
    (void)state;
    for (uint32_t i = 0; i < G_N_ELEMENTS(prompt); i++) {
        prompt[i] = (i * 37 + 11) % VOCAB;
    }
    request.prompt = prompt;
    request.n_prompt = G_N_ELEMENTS(prompt);
    for (unsigned t = 0; t < G_N_ELEMENTS(types); t++) {
        g_autoptr(Gguf) g = t == 0 ? runs_awkward_model(types[t]) : gpt2_model(types[t]);
        LocalResult host, other;
        double largest = 0, apart = 0;
        layout.numerics = NUMERICS_EXACT;
        run_ways(g, NULL, layout, &request, 1, &host);
        assert_null(host.error);
        layout.numerics = NUMERICS_FAST;
        run_ways(g, devices, layout, &request, 1, &other);
        assert_null(other.error);
        assert_int_equal(other.n, host.n);
        for (size_t i = 0; i < VOCAB; i++) {
            largest = fmax(largest, fabs((double)host.logits[i]));
            apart = fmax(apart, fabs((double)host.logits[i] - (double)other.logits[i]));
        }
        assert_true(apart <= 0.05 * largest);
        local_result_clear(&host);
        local_result_clear(&other);
    }
}

/* Traced rows have the sites of a host's, embedding included, whose bits are the same. */
static void test_traced_rows(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    g_autoptr(Device) device = chosen_device();
    const Device *devices[1] = {device};
    LocalResult host, other;
    EngineRequest request = request_of(8);
    (void)state;
    request.trace = true;
    LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}});
    local_replica_run(r, &request, 1, &host);
    local_replica_free(r);
    r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
    local_replica_run(r, &request, 1, &other);
    assert_int_equal(device_of(r, 0)->n_launches, 0);
    local_replica_free(r);
    assert_true(host.trace_bytes > 0);
    assert_int_equal(host.trace_bytes, other.trace_bytes);
    assert_memory_equal(host.trace, other.trace, 4 + 16); /* position, site 0 */
    local_result_clear(&host);
    local_result_clear(&other);
}

/* ---- memory ---- */

/* What a plan counts for a rank on a device, the estimates aside. */
static uint64_t planned_bytes(const Plan *plan, const ModelSpec *spec, uint32_t n_ranks,
                              uint32_t stage, uint32_t rank)
{
    PlanMember members[8];
    g_autoptr(Plan) measured = plan_copy(plan);
    uint32_t n = 0;
    memset(members, 0, sizeof members);
    for (uint32_t s = 0; s < plan->replicas[0].n_stages; s++) {
        for (uint32_t k = 0; k < plan->replicas[0].stages[s].n_ranks; k++, n++) {
            members[n].worker = plan->replicas[0].stages[s].ranks[k].worker;
            members[n].device = "cpu:0 (host)";
            for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
                members[n].packed_block_bytes[type] = packed_block_bytes((Dtype)type);
            }
        }
    }
    assert_int_equal(n, n_ranks);
    plan_measure(measured, spec, members, n);
    const PlanStage *of = &measured->replicas[0].stages[stage];
    return of->ranks[rank].peak_bytes - DEVICE_RANK_BYTES -
           (of->n_ranks > 1 ? DEVICE_GROUP_BYTES : 0);
}

static void check_allocated(const Gguf *g, LocalLayout layout)
{
    enum { RANKS = 8 };
    const Device *devices[RANKS] = {NULL};
    for (unsigned i = 0; i < RANKS; i++) {
        devices[i] = device_open_module(device_module_cpu(), i, NULL);
    }
    layout.devices = devices;
    LocalReplica *r = replica(g, layout);
    uint32_t n_ranks = 0, at = 0;
    for (uint32_t s = 0; s < layout.pp; s++) {
        n_ranks += layout.tp[s];
    }
    for (uint32_t s = 0; s < layout.pp; s++) {
        for (uint32_t k = 0; k < layout.tp[s]; k++, at++) {
            const Engine *e = local_replica_engine(r, at);
            const uint64_t planned = planned_bytes(e->o.plan, e->o.spec, n_ranks, s, k);
            const size_t taken = device_cpu_bytes(devices[at]->handle);
            if (taken != planned) {
                fail_msg("pp %u stage %u rank %u: %zu bytes taken, %" G_GUINT64_FORMAT " planned",
                         layout.pp, s, k, taken, planned);
            }
        }
    }
    local_replica_free(r);
    for (unsigned i = 0; i < RANKS; i++) {
        assert_int_equal(device_cpu_bytes(devices[i]->handle), 0);
        device_free((Device *)devices[i]);
    }
}

/* To the byte: nothing on a device is found out by failing. */
static void test_what_is_planned_is_taken(void **state)
{
    static const Dtype types[] = {DTYPE_F32, DTYPE_Q8_0, DTYPE_BF16};
    (void)state;
    for (unsigned t = 0; t <= G_N_ELEMENTS(types); t++) {
        g_autoptr(Gguf) g =
            t < G_N_ELEMENTS(types) ? runs_awkward_model(types[t]) : gpt2_model(DTYPE_Q8_0);
        for (unsigned i = 0; i < G_N_ELEMENTS(MIXES); i++) {
            LocalLayout layout = MIXES[i].layout;
            layout.numerics = i % 2 == 0 ? NUMERICS_EXACT : NUMERICS_FAST;
            check_allocated(g, layout);
            layout.numerics = i % 2 == 0 ? NUMERICS_FAST : NUMERICS_EXACT;
            layout.context = 512;
            layout.max_rows = 300;
            check_allocated(g, layout);
        }
    }
}

/* ---- failure ---- */

static void test_failures_end_the_epoch_by_name(void **state)
{
    static const DeviceStatus statuses[] = {DEVICE_ILLEGAL_ADDRESS, DEVICE_ECC, DEVICE_LOST,
                                            DEVICE_STUCK};
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_F32);
    (void)state;
    for (unsigned i = 0; i < G_N_ELEMENTS(statuses); i++) {
        g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
        const Device *devices[1] = {device};
        LocalResult result;
        EngineStatus status;
        LocalReplica *r = replica(g, (LocalLayout){.pp = 1, .tp = {1}, .devices = devices});
        failpoint_set("device-fail", true, -(int64_t)statuses[i]);
        local_replica_greedy(r, PROMPT, N_PROMPT, N_TOKENS, &result);
        failpoint_set("device-fail", false, 0);
        assert_string_equal(result.finish_reason, "error");
        assert_non_null(strstr(result.error, "cpu:0 (host)"));
        assert_non_null(strstr(result.error, device_status_name(statuses[i])));
        engine_status(local_replica_engine(r, 0), &status);
        assert_true(status.failed);
        local_result_clear(&result);
        local_replica_free(r);
    }
}

/* A weight type that the device has no kernel for is told before anything is loaded. */
static bool no_weight(Dtype type)
{
    (void)type;
    return false;
}

static void test_types_are_checked(void **state)
{
    g_autoptr(Gguf) g = runs_awkward_model(DTYPE_Q8_0);
    g_autoptr(Device) device = chosen_device();
    g_autoptr(GError) error = NULL;
    DeviceOps poor = *device->ops;
    const Device *devices[1] = {device};
    (void)state;
    poor.has_weight = no_weight;
    device->ops = &poor;
    const LocalLayout layout = {.pp = 1, .tp = {1}, .devices = devices};
    assert_null(local_replica_new(g, &layout, NULL, &error));
    assert_non_null(strstr(error->message, "no kernels for weights of type"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_q8_0),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_decode_steps_are_graphs),
        cmocka_unit_test(test_streams_together),
        cmocka_unit_test(test_the_oldest_graph_goes),
        cmocka_unit_test(test_scored_prompts),
        cmocka_unit_test(test_drawn_tokens),
        cmocka_unit_test(test_ways_to_draw),
        cmocka_unit_test(test_no_logits_come_down),
        cmocka_unit_test(test_a_short_last_chunk),
        cmocka_unit_test(test_exact_layouts),
        cmocka_unit_test(test_fast_prompt),
        cmocka_unit_test(test_traced_rows),
        cmocka_unit_test(test_what_is_planned_is_taken),
        cmocka_unit_test(test_failures_end_the_epoch_by_name),
        cmocka_unit_test(test_types_are_checked),
    };
    return cmocka_run_group_tests_name("engine_device", tests, NULL, NULL);
}
