/* The engine over the device kernels, run by the emulation of tests/kernels/cuda_emulation: weights
 * through pinned buffers, every op of kernels/cuda/ops.c, decode steps as graphs. The streams are
 * those of the trivial device, so a kernel runs when its stream comes to it. The text is the
 * host's and logits are close. What this does not prove is the hardware. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/cuda/dense.h"
#include "kernels/cuda/module.h"
#include "kernels/device/cpu.h"
#include "kernels/device/ops.h"
#include "kernels/kernels.h"
#include "tests/golden/gguf_builder.h"
#include "tests/sim/local_replica.h"
#include "worker/model/device_stage.h"
#include "worker/serve/engine_state.h"

#include <glib/gstdio.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

/* ---- what module.h asks of kernels/cuda/device.c ---- */

static int first_error;

struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    (void)stream;
    return NULL;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    (void)stream;
    first_error = first_error != 0 ? first_error : error;
    return error == 0 ? DEVICE_OK : DEVICE_FAILED;
}

/* No library: a kernel of ours does what it would (test-cuda-dense.c has the other way). */
struct CudaDense *cuda_dense(DeviceStream *stream)
{
    (void)stream;
    return NULL;
}

CudaDenseF8 *cuda_dense_f8(CudaDense *dense)
{
    static CudaDenseF8 never;
    (void)dense;
    return &never;
}

int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *args, WeftCudaStream stream)
{
    (void)dense, (void)args, (void)stream;
    return 1;
}

/* ---- cuda_ops on the trivial device's streams: each op waits in the queue with its arguments ----
 */

typedef struct Call {
    enum { EMBED, NORM, MATMUL, ROPE, ATTENTION, SWIGLU, ADD, ADD_BIAS, SAMPLE } op;
    PackedMatrix w;
    MatmulUnit units[TREE_LEAVES_LIMIT];
    union {
        DeviceMatmul matmul;
        DeviceNorm norm;
        DeviceRope rope;
        DeviceAttention attention;
        DeviceSample sample;
    } of;
    DeviceRows rows;
    const uint32_t *ids;
    const float *a, *b;
    float *out;
    uint32_t n, n_rows;
    bool accumulate;
} Call;

static void run_now(Call *c)
{
    switch (c->op) {
    case EMBED:
        cuda_ops.embed(NULL, &c->w, c->ids, c->n, c->n_rows, c->accumulate, c->out);
        break;
    case NORM:
        cuda_ops.norm(NULL, &c->of.norm);
        break;
    case MATMUL:
        c->of.matmul.w = &c->w;
        c->of.matmul.units = c->units;
        cuda_ops.matmul(NULL, &c->of.matmul);
        break;
    case ROPE:
        cuda_ops.rope_store(NULL, &c->rows, &c->of.rope);
        break;
    case ATTENTION:
        cuda_ops.attention(NULL, &c->rows, &c->of.attention);
        break;
    case SWIGLU:
        cuda_ops.swiglu(NULL, c->a, c->b, c->n_rows, c->n, c->out);
        break;
    case ADD:
        cuda_ops.add(NULL, c->out, c->b, c->n_rows, c->n);
        break;
    case ADD_BIAS:
        cuda_ops.add_bias(NULL, c->out, c->b, c->n_rows, c->n);
        break;
    case SAMPLE:
        cuda_ops.sample(NULL, &c->of.sample);
        break;
    }
}

/* There is one emulation, and an engine's thread for each rank. */
static void run_call(void *args)
{
    static GMutex emulation;
    g_mutex_lock(&emulation);
    run_now(args);
    g_mutex_unlock(&emulation);
}

static DeviceStatus later(DeviceStream *stream, const Call *call)
{
    return device_cpu_enqueue(stream, run_call, call, sizeof *call);
}

static DeviceStatus embed(DeviceStream *stream, const PackedMatrix *w, const uint32_t *ids,
                          uint32_t first_id, uint32_t n_rows, bool accumulate, float *x)
{
    return later(stream, &(const Call){.op = EMBED,
                                       .w = *w,
                                       .ids = ids,
                                       .n = first_id,
                                       .n_rows = n_rows,
                                       .accumulate = accumulate,
                                       .out = x});
}

static DeviceStatus norm(DeviceStream *stream, const DeviceNorm *args)
{
    return later(stream, &(const Call){.op = NORM, .of.norm = *args});
}

static DeviceStatus matmul(DeviceStream *stream, const DeviceMatmul *m)
{
    Call call = {.op = MATMUL, .w = *m->w, .of.matmul = *m};
    if (m->n_units > 0) {
        memcpy(call.units, m->units, sizeof call.units[0] * m->n_units);
    }
    return later(stream, &call);
}

static DeviceStatus rope_store(DeviceStream *stream, const DeviceRows *rows, const DeviceRope *args)
{
    return later(stream, &(const Call){.op = ROPE, .rows = *rows, .of.rope = *args});
}

static DeviceStatus attention(DeviceStream *stream, const DeviceRows *rows,
                              const DeviceAttention *args)
{
    return later(stream, &(const Call){.op = ATTENTION, .rows = *rows, .of.attention = *args});
}

static DeviceStatus swiglu(DeviceStream *stream, const float *gate, const float *up, uint32_t rows,
                           uint32_t n, float *out)
{
    return later(stream, &(const Call){
                             .op = SWIGLU, .a = gate, .b = up, .n_rows = rows, .n = n, .out = out});
}

static DeviceStatus add(DeviceStream *stream, float *x, const float *y, uint32_t rows, uint32_t n)
{
    return later(stream, &(const Call){.op = ADD, .out = x, .b = y, .n_rows = rows, .n = n});
}

static DeviceStatus add_bias(DeviceStream *stream, float *x, const float *bias, uint32_t rows,
                             uint32_t n)
{
    return later(stream,
                 &(const Call){.op = ADD_BIAS, .out = x, .b = bias, .n_rows = rows, .n = n});
}

static DeviceStatus sample(DeviceStream *stream, const DeviceSample *args)
{
    return later(stream, &(const Call){.op = SAMPLE, .of.sample = *args});
}

/* The trivial device with these ops. Returned. */
static Device *emulated_device(DeviceOps *ops)
{
    Device *device = device_open_module(device_module_cpu(), 0, NULL);
    *ops = cuda_ops;
    ops->embed = embed;
    ops->norm = norm;
    ops->matmul = matmul;
    ops->rope_store = rope_store;
    ops->attention = attention;
    ops->swiglu = swiglu;
    ops->add = add;
    ops->add_bias = add_bias;
    ops->sample = sample;
    device->ops = ops;
    return device;
}

/* ---- the cases ---- */

static const uint32_t PROMPT[] = {1,   17,  5,  99, 23,  4,   250, 31, 77,  8,  140, 63,
                                  2,   201, 19, 55, 180, 9,   12,  33, 47,  81, 3,   66,
                                  111, 90,  14, 28, 7,   222, 35,  51, 160, 44, 13};
enum { N_PROMPT = G_N_ELEMENTS(PROMPT), N_TOKENS = 4, VOCAB = 320 };

/* The layout on the device, on the device and a host, or on hosts. */
static void run_layout(const Gguf *g, const Device *first, const Device *second, LocalLayout layout,
                       const EngineRequest *request, LocalResult *result)
{
    g_autoptr(GError) error = NULL;
    const Device *devices[2] = {first, second};
    layout.isa = kernels_best_isa();
    layout.predicted_step_s = 20; /* the emulation is slow */
    layout.devices = first != NULL ? devices : NULL;
    LocalReplica *r = local_replica_new(g, &layout, NULL, &error);
    if (r == NULL) {
        fail_msg("%s", error->message);
    }
    local_replica_run(r, request, 1, result);
    if (result->error != NULL) {
        fail_msg("%s", result->error);
    }
    assert_int_equal(first_error, 0);
    if (first != NULL && layout.tp[0] == 1 && request->max_tokens == N_TOKENS) {
        assert_int_equal(local_replica_engine(r, 0)->stage->device->n_captures, 1);
    }
    local_replica_free(r);
}

static void run(const Gguf *g, const Device *device, uint32_t tp, uint32_t kv_type, Dtype matrices,
                LocalResult *result)
{
    const EngineRequest request = {
        .prompt = PROMPT, .n_prompt = N_PROMPT, .max_tokens = N_TOKENS, .want_logits = true};
    run_layout(g, device, NULL,
               (LocalLayout){.pp = 1,
                             .tp = {tp},
                             .context = 128,
                             .streams = 1,
                             .kv_type = kv_type,
                             .matrices = matrices},
               &request, result);
}

static void assert_close(const LocalResult *a, const LocalResult *b, double most)
{
    double largest = 0, apart = 0;
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->ids, b->ids, sizeof(uint32_t) * a->n);
    for (size_t i = 0; i < (size_t)a->n * VOCAB; i++) {
        largest = fmax(largest, fabs((double)a->logits[i]));
        apart = fmax(apart, fabs((double)a->logits[i] - (double)b->logits[i]));
    }
    if (!(apart <= most * largest)) {
        fail_msg("logits differ by %g of %g", apart, largest);
    }
}

/* No GGUF file has 8-bit floats: the layout rounds one of F32. */
static Dtype rounded_to(Dtype type)
{
    return type == DTYPE_F8_E4M3 ? type : DTYPE_F32;
}

static Gguf *model(Dtype type, ModelFamily family)
{
    g_autoptr(GError) error = NULL;
    GgufBuilderConfig config;
    gguf_builder_defaults(&config);
    gguf_builder_set_type(&config, type == DTYPE_F8_E4M3 ? DTYPE_F32 : type);
    config.family = family;
    config.n_layers = 2;
    config.width = 256;
    config.n_heads = 4;
    config.n_kv_heads = family == FAMILY_GPT2 ? 4 : 2;
    config.head_size = 64;
    config.ffn_width = 512;
    config.vocab_size = VOCAB;
    config.context = 512;
    config.seed = 11;
    g_autofree char *path =
        g_strdup_printf("%s/weft-cuda-engine-%d.gguf", g_get_tmp_dir(), (int)getpid());
    if (!gguf_builder_write(&config, path, &error)) {
        fail_msg("%s", error->message);
    }
    Gguf *g = gguf_open(path, &error);
    g_unlink(path);
    assert_non_null(g);
    return g;
}

static void check(Dtype type, ModelFamily family, uint32_t tp, KvType kv_type, double most)
{
    DeviceOps ops;
    g_autoptr(Device) device = emulated_device(&ops);
    g_autoptr(Gguf) g = model(type, family);
    LocalResult host, emulated;
    run(g, NULL, 1, kv_type, rounded_to(type), &host);
    run(g, device, tp, kv_type, rounded_to(type), &emulated);
    assert_close(&host, &emulated, most);
    local_result_clear(&host);
    local_result_clear(&emulated);
}

static void test_f32(void **state)
{
    (void)state;
    check(DTYPE_F32, FAMILY_LLAMA, 1, KV_F16, 1e-3);
}

static void test_bf16(void **state)
{
    (void)state;
    check(DTYPE_BF16, FAMILY_LLAMA, 1, KV_F16, 0.03);
}

static void test_q8_0_beside_a_host(void **state)
{
    (void)state;
    check(DTYPE_Q8_0, FAMILY_LLAMA, 2, KV_F32, 0.03);
}

static void test_q4_k(void **state)
{
    (void)state;
    check(DTYPE_Q4_K, FAMILY_LLAMA, 1, KV_Q8, 0.03);
}

static void test_f8(void **state)
{
    (void)state;
    check(DTYPE_F8_E4M3, FAMILY_LLAMA, 2, KV_F16, 1e-3);
}

static void test_gpt2(void **state)
{
    (void)state;
    check(DTYPE_F32, FAMILY_GPT2, 1, KV_F16, 1e-3);
    check(DTYPE_Q8_0, FAMILY_GPT2, 2, KV_F16, 0.03);
}

/* Class exact among devices of one kind: ids, logprobs and digests of tokens drawn on the device do
 * not depend on tensor ranks or chunks. */
static void test_exact(void **state)
{
    LocalLayout layouts[] = {
        {.pp = 1, .tp = {1}, .context = 128, .streams = 1},
        {.pp = 1, .tp = {1}, .context = 128, .streams = 1, .max_rows = 9},
        {.pp = 1, .tp = {2}, .context = 128, .streams = 1, .max_rows = 34},
    };
    static const Dtype types[] = {DTYPE_Q8_0, DTYPE_BF16, DTYPE_F8_E4M3};
    DeviceOps ops;
    g_autoptr(Device) device = emulated_device(&ops);
    const EngineRequest request = {.prompt = PROMPT,
                                   .n_prompt = N_PROMPT,
                                   .max_tokens = N_TOKENS,
                                   .temperature = 0.8f,
                                   .seed = 7};
    (void)state;
    for (unsigned t = 0; t < G_N_ELEMENTS(types); t++) {
        g_autoptr(Gguf) g = model(types[t], t == 0 ? FAMILY_GPT2 : FAMILY_LLAMA);
        LocalResult first, other;
        for (unsigned i = 0; i < G_N_ELEMENTS(layouts); i++) {
            layouts[i].matrices = rounded_to(types[t]);
        }
        run_layout(g, device, device, layouts[0], &request, &first);
        for (unsigned i = 1; i < G_N_ELEMENTS(layouts); i++) {
            run_layout(g, device, device, layouts[i], &request, &other);
            assert_int_equal(first.n, other.n);
            assert_memory_equal(first.ids, other.ids, sizeof(uint32_t) * first.n);
            assert_memory_equal(first.logprobs, other.logprobs, sizeof(float) * first.n);
            assert_memory_equal(first.hashes, other.hashes, 16 * first.n);
            local_result_clear(&other);
        }
        local_result_clear(&first);
    }
}

/* Class fast: attention by matrix instructions, and 35 rows are enough for 16-bit products of
 * bf16 and of 8-bit floats. */
static void test_fast(void **state)
{
    static const Dtype types[] = {DTYPE_Q4_0, DTYPE_BF16, DTYPE_F8_E4M3};
    DeviceOps ops;
    g_autoptr(Device) device = emulated_device(&ops);
    LocalLayout layout = {.pp = 1, .tp = {1}, .context = 128, .streams = 1};
    const EngineRequest request = {
        .prompt = PROMPT, .n_prompt = N_PROMPT, .max_tokens = 1, .want_logits = true};
    (void)state;
    for (unsigned t = 0; t < G_N_ELEMENTS(types); t++) {
        g_autoptr(Gguf) g = model(types[t], FAMILY_LLAMA);
        LocalResult host, emulated;
        layout.matrices = rounded_to(types[t]);
        layout.numerics = NUMERICS_EXACT;
        run_layout(g, NULL, NULL, layout, &request, &host);
        layout.numerics = NUMERICS_FAST;
        run_layout(g, device, NULL, layout, &request, &emulated);
        assert_close(&host, &emulated, 0.03);
        local_result_clear(&host);
        local_result_clear(&emulated);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_f32),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_q8_0_beside_a_host),
        cmocka_unit_test(test_q4_k),
        cmocka_unit_test(test_f8),
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_fast),
    };
    return cmocka_run_group_tests_name("cuda-engine", tests, NULL, NULL);
}
