/* Training in class exact on a device, over the emulation of tests/kernels/cuda_emulation: each op
 * of kernels/cuda/train_ops.c gives the bits of the host's (kernels/device/cpu_train_ops.c), and so
 * do whole runs, on devices alone, beside hosts, and resumed on the other. No product goes to the
 * library. What this does not prove is the hardware. */
#include "kernels/cuda/dense.h"
#include "kernels/cuda/module.h"
#include "kernels/device/cpu.h"
#include "kernels/device/train_ops.h"
#include "tests/unit/kernels/numbers.h"
#include "tests/unit/worker/train_runs.h"

#include <math.h>
#include <stdatomic.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* ---- what module.h asks of kernels/cuda/device.c ---- */

/* Kernels run at once here: all that was enqueued before comes first. */
struct CUstream_st *cuda_stream(DeviceStream *stream)
{
    g_assert(device_cpu_api.stream_wait(stream) == DEVICE_OK);
    return NULL;
}

DeviceStatus cuda_result(DeviceStream *stream, int error)
{
    (void)stream;
    return error == 0 ? DEVICE_OK : DEVICE_FAILED;
}

struct CudaDense *cuda_dense(DeviceStream *stream)
{
    (void)stream;
    g_error("class exact asks for the library");
}

int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *a, WeftCudaStream stream)
{
    (void)dense, (void)a, (void)stream;
    g_error("class exact asks the library for a product");
}

enum { DEVICES = 4, STEPS = 2 };
static Device *devices[DEVICES];
static DeviceStream *stream;

static int open_devices(void **state)
{
    for (uint32_t i = 0; i < DEVICES; i++) {
        devices[i] = device_open_module(device_module_cpu(), i, NULL);
        devices[i]->train_ops = &cuda_train_ops;
    }
    return device_cpu_api.stream_new(devices[0]->handle, &stream) != DEVICE_OK;
}

static int close_devices(void **state)
{
    device_cpu_api.stream_free(stream);
    for (uint32_t i = 0; i < DEVICES; i++) {
        device_free(devices[i]);
    }
    return 0;
}

/* ---- ops: the same call of both tables, on copies of the same arrays ---- */

enum { ARRAYS = 12 };

typedef struct Op {
    float *arrays[2][ARRAYS]; /* of the host's ops, of the device's */
    size_t sizes[ARRAYS];
    uint32_t n;
    Numbers numbers;
} Op;

/* One array more, of numbers in [low, high), or of NaN. Its place. */
static uint32_t array(Op *op, size_t n, double low, double high)
{
    const uint32_t i = op->n++;
    g_assert(i < ARRAYS);
    op->sizes[i] = n * sizeof(float);
    op->arrays[0][i] = g_malloc(MAX(n, 1) * sizeof(float));
    if (low < high) {
        numbers_fill(&op->numbers, op->arrays[0][i], n, low, high);
    } else {
        memset(op->arrays[0][i], 0xff, op->sizes[i]);
    }
    op->arrays[1][i] = g_memdup2(op->arrays[0][i], MAX(n, 1) * sizeof(float));
    return i;
}
static uint32_t nothing(Op *op, size_t n)
{
    return array(op, n, 0, 0);
}

static void done(DeviceStatus status)
{
    assert_int_equal(status, DEVICE_OK);
    assert_int_equal(device_cpu_api.stream_wait(stream), DEVICE_OK);
}

/* All arrays are the same now. */
static void op_end(Op *op, const char *what)
{
    for (uint32_t i = 0; i < op->n; i++) {
        for (size_t k = 0; k < op->sizes[i] / sizeof(float); k++) {
            const float want = op->arrays[0][i][k], got = op->arrays[1][i][k];
            if (memcmp(&want, &got, sizeof want) != 0 && !(isnan(want) && isnan(got))) {
                fail_msg("%s, array %u, element %zu: %a, the host's is %a", what, i, k, (double)got,
                         (double)want);
            }
        }
        g_free(op->arrays[0][i]);
        g_free(op->arrays[1][i]);
    }
    *op = (Op){.numbers = op->numbers};
}

/* Body with `ops` and `a` (its arrays) of each side. */
#define FOR_BOTH(op)                                                                               \
    for (int side = 0; side < 2; side++)                                                           \
        for (const DeviceTrainOps *ops = side ? &cuda_train_ops : device_module_cpu()->train_ops,  \
                                  *once = ops;                                                     \
             once != NULL; once = NULL)                                                            \
            for (float **a = (op)->arrays[side]; a != NULL; a = NULL)

static void test_flat_ops(void **state)
{
    enum { N = 70001 };
    const AdamwScalars adam = {1e-3f, 0.9f, 0.1f, 0.95f, 0.05f, 1.5f, 1.2f, 1e-8f, 0.1f, 0.7f};
    const SgdScalars sgd = {1e-2f, 0.9f, 0.01f, 0.8f, true};
    Op op = {.numbers = {1}};
    for (uint32_t i = 0; i < 6; i++) {
        array(&op, N, -30, 30);
    }
    for (int side = 0; side < 2; side++) { /* what an exponential or a sum of subnormals meets */
        const float odd[] = {0.0f, -0.0f, 1e30f, -1e30f, 1e-40f, -1e-40f, INFINITY, 88.5f, -87.4f};
        memcpy(op.arrays[side][0], odd, sizeof odd);
        memcpy(op.arrays[side][1] + 3, odd, sizeof odd);
    }
    FOR_BOTH(&op)
    {
        done(ops->gelu(stream, a[0], N, a[2]));
        done(ops->gelu_backward(stream, a[0], a[1], N, a[3]));
        done(ops->swiglu(stream, a[0], a[1], N, a[4]));
        done(ops->swiglu_backward(stream, a[0], a[1], a[5], N, a[0], a[1]));
        done(ops->add(stream, a[5], a[3], N));
    }
    op_end(&op, "activations");
    for (uint32_t i = 0; i < 6; i++) {
        array(&op, N, 0, 3);
    }
    FOR_BOTH(&op)
    {
        done(ops->finish(stream, a[0], N, 0x1p-7f, 37.0f));
        done(ops->adamw(stream, &adam, N, a[0], a[1], a[2], a[3]));
        done(ops->sgd(stream, &sgd, N, a[0], a[4], a[5]));
    }
    op_end(&op, "optimizers");
}

static void test_rows_by_number(void **state)
{
    enum { ROWS = 9, WIDTH = 37, N = 20 };
    const uint32_t index[ROWS] = {5, 24, 4, 5, 25, 100, 6, 5, 23}, ids[] = {3, 0, 7},
                   starts[] = {0, 4, 5, 9}, order[] = {0, 3, 7, 8, 1, 2, 4, 5, 6};
    Op op = {.numbers = {2}};
    array(&op, N * WIDTH, -2, 2);
    array(&op, ROWS * WIDTH, -2, 2);
    nothing(&op, ROWS * WIDTH);
    FOR_BOTH(&op)
    {
        DeviceGather gather = {.table = a[0],
                               .index = index,
                               .first = 5,
                               .n = N,
                               .rows = ROWS,
                               .width = WIDTH,
                               .out = a[2]};
        const DeviceScatter scatter = {.dy = a[1],
                                       .ids = ids,
                                       .starts = starts,
                                       .order = order,
                                       .n_ids = 3,
                                       .width = WIDTH,
                                       .out = a[0]};
        done(ops->gather(stream, &gather));
        gather.accumulate = true;
        gather.out = a[1];
        done(ops->gather(stream, &gather));
        done(ops->scatter(stream, &scatter));
    }
    op_end(&op, "rows by number");
}

static void test_norms(void **state)
{
    enum { ROWS = 7 };
    static const uint32_t widths[] = {1, 31, 33, 70, 577};
    Op op = {.numbers = {3}};
    for (uint32_t i = 0; i < 2 * G_N_ELEMENTS(widths); i++) {
        const uint32_t n = widths[i / 2];
        const bool layer = i % 2 != 0;
        for (uint32_t k = 0; k < 4; k++) {
            array(&op, ROWS * n, -2, 3);
        }
        for (uint32_t k = 0; k < 4; k++) {
            array(&op, n, -2, 3);
        }
        nothing(&op, ROWS * 2);
        FOR_BOTH(&op)
        {
            const DeviceTrainNorm norm = {a[0], a[4], layer ? a[5] : NULL, 1e-5f, ROWS, n, a[1]};
            const DeviceNormBackward back = {.x = a[0],
                                             .weight = a[4],
                                             .dy = a[2],
                                             .eps = 1e-5f,
                                             .rows = ROWS,
                                             .n = n,
                                             .dx = a[3],
                                             .dweight = a[6],
                                             .dbias = layer ? a[7] : NULL,
                                             .stats = a[8]};
            done(ops->norm(stream, &norm));
            done(ops->norm_backward(stream, &back));
            done(ops->bias(stream, a[2], a[5], ROWS, n));
            done(ops->sum_rows(stream, a[2], ROWS, n, a[4]));
        }
        op_end(&op, layer ? "layer norm" : "RMS norm");
    }
}

static void test_turns(void **state)
{
    enum { ROWS = 5, HEADS = 3, SIZE = 20, DIMS = 12, CONTEXT = 9 };
    const uint32_t positions[ROWS] = {0, 8, 3, 3, 1};
    Op op = {.numbers = {4}};
    for (uint32_t i = 0; i < 4; i++) {
        array(&op, ROWS * HEADS * SIZE, -2, 2);
        array(&op, CONTEXT * DIMS / 2, -1, 1);
        array(&op, CONTEXT * DIMS / 2, -1, 1);
        FOR_BOTH(&op)
        {
            const DeviceTurn turn = {.x = a[0],
                                     .positions = positions,
                                     .rows = ROWS,
                                     .n_heads = HEADS,
                                     .head_size = SIZE,
                                     .dims = DIMS,
                                     .pairing = i % 2 ? ROPE_HALVES : ROPE_ADJACENT,
                                     .cos = a[1],
                                     .sin = a[2],
                                     .inverse = i / 2 != 0};
            done(ops->turn(stream, &turn));
        }
        op_end(&op, "rotary positions");
    }
}

static void test_dropout(void **state)
{
    enum { SAMPLES = 3, LENGTH = 5, WIDTH = 41, ROWS = SAMPLES * LENGTH };
    Op op = {.numbers = {5}};
    for (uint32_t i = 0; i < 8; i++) {
        array(&op, ROWS * WIDTH, -2, 2);
        array(&op, WIDTH, -2, 2);
        array(&op, ROWS * WIDTH, -2, 2);
        nothing(&op, ROWS * WIDTH);
        FOR_BOTH(&op)
        {
            const DeviceDropout dropout = {.dropout = {(i & 1) != 0 ? 0.3f : 0.0f, 77},
                                           .site = 9,
                                           .first_sample = ((uint64_t)1 << 32) - 1,
                                           .length = LENGTH,
                                           .rows = ROWS,
                                           .width = WIDTH,
                                           .x = a[0],
                                           .bias = (i & 2) != 0 ? a[1] : NULL,
                                           .residual = (i & 4) != 0 ? a[2] : NULL,
                                           .out = a[3]};
            done(ops->dropout(stream, &dropout));
        }
        op_end(&op, "dropout");
    }
}

/* Two chunks of the own of four that there are; targets here, elsewhere and none; a row that is not
 * finite. */
static void loss_case(Op *op, float smoothing)
{
    enum { ROWS = 6, N = 1024 + 77, LD = N + 3, CHUNKS = 4, FIRST = 1, VOCABULARY = 3 * 1024 + 77 };
    const uint32_t targets[ROWS] = {0, N - 1, XENT_NO_TARGET, 1024, 5, XENT_NO_TARGET},
                   learnt[ROWS] = {1, 1, 1, 1, 1, 0};
    array(op, ROWS * LD, -20, 20);
    for (uint32_t k = 0; k < 3; k++) {
        array(op, ROWS * CHUNKS, 1, 20); /* what the other ranks found */
    }
    array(op, ROWS, -20, 20);
    for (uint32_t k = 0; k < 3; k++) {
        nothing(op, ROWS);
    }
    op->arrays[0][0][4 * LD + 9] = op->arrays[1][0][4 * LD + 9] = INFINITY;
    FOR_BOTH(op)
    {
        const DeviceRowStats stats = {.logits = a[0],
                                      .ld = LD,
                                      .rows = ROWS,
                                      .n = N,
                                      .targets = targets,
                                      .first_chunk = FIRST,
                                      .n_chunks = CHUNKS,
                                      .max = a[1],
                                      .sum = a[2],
                                      .total = smoothing > 0.0f ? a[3] : NULL,
                                      .target = a[4]};
        const DeviceRowLosses losses = {.max = a[1],
                                        .sum = a[2],
                                        .total = a[3],
                                        .target = a[4],
                                        .row_max = a[5],
                                        .row_sum = a[6],
                                        .rows = ROWS,
                                        .n_chunks = CHUNKS,
                                        .smoothing = smoothing,
                                        .vocabulary = VOCABULARY,
                                        .learnt = learnt,
                                        .losses = a[7]};
        const DeviceLossGradient gradient = {.logits = a[0],
                                             .ld = LD,
                                             .rows = ROWS - 2, /* finite ones */
                                             .n = N,
                                             .targets = targets,
                                             .learnt = learnt,
                                             .row_max = a[5],
                                             .row_sum = a[6],
                                             .factor = 0.25f,
                                             .smoothing = smoothing,
                                             .vocabulary = VOCABULARY};
        done(ops->row_stats(stream, &stats));
        done(ops->row_losses(stream, &losses));
        done(ops->loss_gradient(stream, &gradient));
        a[5][4] = a[6][4] = 0.0f;      /* of the row that is not finite: nobody reads them */
        memset(a[1], 0, op->sizes[1]); /* used up */
        memset(a[2], 0, op->sizes[2]);
        memset(a[3], 0, op->sizes[3]);
    }
    op_end(op, "the loss");
}

static void test_losses(void **state)
{
    Op op = {.numbers = {6}};
    loss_case(&op, 0.0f);
    loss_case(&op, 0.1f);
}

static void test_squares(void **state)
{
    enum { TILES = 3 };
    static const uint32_t shapes[TILES][3] = {{32, 33, 40}, {1, 1024, 1024}, {7, 3, 5}};
    Op op = {.numbers = {7}};
    for (uint32_t i = 0; i < TILES; i++) {
        array(&op, (size_t)shapes[i][0] * shapes[i][2], -2, 2);
    }
    nothing(&op, TILES);
    FOR_BOTH(&op)
    {
        DeviceTile tiles[TILES];
        for (uint32_t i = 0; i < TILES; i++) {
            tiles[i] = (DeviceTile){a[i], shapes[i][2], shapes[i][0], shapes[i][1]};
        }
        done(ops->squares(stream, tiles, TILES, a[TILES]));
    }
    op_end(&op, "squares of tiles");
}

/* ---- attention: documents behind each other, and what a rank's limits say of the workspace ----
 */

typedef struct Heads {
    uint32_t n_kv, n_q, size, lengths[3];
} Heads;

static void attention_case(Op *op, const Heads *h)
{
    enum { DOCUMENTS = 3 };
    uint32_t positions[512], tables[512], pages[DOCUMENTS * 8], n_pages = 0, rows = 0, longest = 0;
    DeviceSegment segments[DOCUMENTS];
    TreeStep steps[64];
    for (uint32_t d = 0; d < DOCUMENTS; d++) {
        segments[d] = (DeviceSegment){rows, h->lengths[d], 0, d};
        longest = MAX(longest, h->lengths[d]);
        for (uint32_t i = 0; i < h->lengths[d]; i++, rows++) {
            positions[rows] = i;
            tables[rows] = d;
        }
        for (uint32_t b = 0; b < (h->lengths[d] + KV_BLOCK - 1) / KV_BLOCK; b++) {
            pages[d * 8 + b] = n_pages++;
        }
    }
    g_assert(rows <= 512);
    assert_int_equal(tree_program(h->n_q, 0, h->n_q, steps), 1);
    const uint32_t q_ld = h->n_kv * h->n_q * h->size, kv_ld = h->n_kv * h->size;
    const DeviceRows all = {.n_rows = rows,
                            .n_segments = DOCUMENTS,
                            .longest_segment = longest,
                            .max_keys = longest,
                            .positions = positions,
                            .tables = tables,
                            .segments = segments,
                            .pages = pages,
                            .pages_ld = 8};
    const DeviceTrainLimits limits = {.operands = DTYPE_BF16,
                                      .exact = true,
                                      .operand_elements = rows * q_ld,
                                      .longest_side = MAX(rows, q_ld),
                                      .max_segments = 64,
                                      .max_rows = rows,
                                      .max_documents = DOCUMENTS,
                                      .longest_document = longest,
                                      .n_heads = h->n_kv * h->n_q,
                                      .n_kv_heads = h->n_kv,
                                      .head_size = h->size};
    array(op, rows * q_ld, -2, 2);  /* q */
    array(op, rows * kv_ld, -2, 2); /* k, v */
    array(op, rows * kv_ld, -2, 2);
    nothing(op, rows * q_ld);      /* out */
    array(op, rows * q_ld, -2, 2); /* dout, dq */
    nothing(op, rows * kv_ld);     /* dk, dv */
    nothing(op, rows * kv_ld);
    FOR_BOTH(op)
    {
        const size_t bytes = ops->workspace_bytes(&limits);
        g_autofree void *workspace = g_malloc(bytes + 256);
        const DeviceTrainAttention args = {
            .operands = DTYPE_F32,
            .q = a[0],
            .k = a[1],
            .v = a[2],
            .q_ld = q_ld,
            .kv_ld = kv_ld,
            .n_kv_heads = h->n_kv,
            .n_q = h->n_q,
            .head_size = h->size,
            .scale = 0.3f,
            .rows = &all,
            .n_pages = device_train_pages(rows, longest),
            .out = a[3],
            .dout = a[4],
            .dq = a[4],
            .dk = a[5],
            .dv = a[6],
            .steps = steps,
            .workspace = (void *)(((uintptr_t)workspace + 255) & ~(uintptr_t)255),
            .workspace_bytes = bytes};
        done(ops->attention(stream, &args));
        done(ops->attention_backward(stream, &args));
    }
    op_end(op, "attention");
}

static void test_attention(void **state)
{
    static const Heads heads[] = {{2, 1, 16, {1, 33, 20}},
                                  {1, 3, 8, {70, 2, 31}},
                                  {2, 2, 20, {5, 64, 33}},
                                  {1, 1, 64, {200, 9, 1}}};
    Op op = {.numbers = {8}};
    for (size_t i = 0; i < G_N_ELEMENTS(heads); i++) {
        attention_case(&op, &heads[i]);
    }
}

/* ---- whole runs ---- */

static uint32_t global_of(const TrainRankOptions *o)
{
    const TrainPosition p = train_position(o->plan, o->replica, o->stage, o->rank);
    return train_global(&p, o->replica, o->stage, o->rank);
}

static void on_devices(TrainRankOptions *o)
{
    o->devices = true;
    o->device = devices[global_of(o)];
}

/* Hosts and devices in every group. */
static void on_some(TrainRankOptions *o)
{
    on_devices(o);
    o->device = global_of(o) % 2 == 0 ? o->device : NULL;
}

static void full(TrainRankOptions *o)
{
    on_devices(o);
    o->recompute = RECOMPUTE_FULL;
}

static void zero_bubble(TrainRankOptions *o)
{
    on_devices(o);
    o->schedule = PIPELINE_ZERO_BUBBLE;
}

static RunResult run_on(const Toy *toy, RunSpread spread, uint32_t steps,
                        void (*define)(TrainRankOptions *))
{
    spread.isa = kernels_best_isa();
    return run_toy(toy, &spread, steps, define);
}

/* A host alone, then the layouts. */
static void check_runs(const Toy *toy, const RunSpread *spreads, size_t n,
                       void (*define)(TrainRankOptions *))
{
    const RunResult want = run_on(toy, (RunSpread){.micro = 1}, STEPS, define);
    for (size_t i = 0; i < n; i++) {
        const RunResult got = run_on(toy, spreads[i], STEPS, define);
        assert_same_run(&got, &want);
    }
}
#define CHECK_RUNS(toy, spreads, define) check_runs(toy, spreads, G_N_ELEMENTS(spreads), define)

static void test_runs(void **state)
{
    static const RunSpread gpt2[] = {{.micro = 2, .change = on_devices},
                                     {.dp = 2, .pp = 2, .micro = 2, .change = on_some},
                                     {.pp = 2, .tp = 2, .micro = 3, .change = zero_bubble}},
                           llama[] = {{.dp = 2, .tp = 2, .micro = 2, .change = on_some},
                                      {.dp = 3, .micro = 2, .change = full}};
    CHECK_RUNS(&toy_gpt2, gpt2, NULL);
    CHECK_RUNS(&toy_llama, llama, NULL);
}

/* Units, chunks and shared KV heads that cuts go through. */
static void test_uneven(void **state)
{
    static const RunSpread gpt2[] =
        {{.tp = 2, .micro = 2, .edit = plan_uneven, .change = on_devices}},
                           llama[] = {{.tp = 3, .micro = 2, .change = on_devices}};
    CHECK_RUNS(&toy_wide_gpt2, gpt2, NULL);
    CHECK_RUNS(&toy_wide_llama, llama, NULL);
}

static void with_options(TrainRankOptions *o)
{
    o->dropout = (Dropout){0.1f, 77};
    o->smoothing = 0.1f;
}

static void with_sgd(TrainRankOptions *o)
{
    o->optimizer.kind = OPTIMIZER_SGD;
}

static void with_bf16(TrainRankOptions *o)
{
    o->precision = PRECISION_BF16;
}

static void with_f16(TrainRankOptions *o)
{
    o->precision = PRECISION_F16;
    o->scaling.dynamic = true;
}

static void test_options(void **state)
{
    static const RunSpread alone[] = {{.micro = 2, .change = on_devices}},
                           both[] = {{.tp = 2, .micro = 2, .change = on_some}};
    Toy gpt2 = toy_gpt2, llama = toy_llama;
    CHECK_RUNS(&gpt2, both, with_options);
    CHECK_RUNS(&llama, alone, with_sgd);
    gpt2.bounds = BOUNDS_POSITIONS;
    llama.bounds = BOUNDS_ATTENTION;
    CHECK_RUNS(&gpt2, alone, NULL);
    CHECK_RUNS(&llama, alone, NULL);
}

/* Samples of an odd length, too: pairs of bf16dot do not span them. */
static void test_narrow_operands(void **state)
{
    static const RunSpread alone[] = {{.micro = 2, .change = on_devices}},
                           ranks[] = {{.tp = 2, .micro = 2, .change = on_devices}},
                           both[] = {{.dp = 2, .pp = 2, .micro = 2, .change = on_some}};
    Toy odd = toy_llama;
    odd.length--;
    CHECK_RUNS(&toy_gpt2, ranks, with_bf16);
    CHECK_RUNS(&odd, both, with_bf16);
    CHECK_RUNS(&toy_llama, alone, with_f16);
}

/* A host's checkpoint goes on on devices, theirs on a host. */
static void test_resumed(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_gpt2);
    RunState *of_host = run_state_new(spec), *of_devices = run_state_new(spec);
    const RunResult want = run_on(&toy_gpt2, (RunSpread){.micro = 1}, 3, NULL);
    run_on(&toy_gpt2, (RunSpread){.micro = 2, .save = of_host}, 1, NULL);
    run_on(&toy_gpt2,
           (RunSpread){.dp = 2, .change = on_devices, .load = of_host, .save = of_devices}, 1,
           NULL);
    const RunResult got =
        run_on(&toy_gpt2, (RunSpread){.pp = 2, .micro = 2, .load = of_devices}, 1, NULL);
    assert_memory_equal(got.losses, want.losses + 2, sizeof *want.losses);
    assert_true(hash128_equal(&got.digest, &want.digest));
    run_state_free(of_host);
    run_state_free(of_devices);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_flat_ops), cmocka_unit_test(test_rows_by_number),
        cmocka_unit_test(test_norms),    cmocka_unit_test(test_turns),
        cmocka_unit_test(test_dropout),  cmocka_unit_test(test_losses),
        cmocka_unit_test(test_squares),  cmocka_unit_test(test_attention),
        cmocka_unit_test(test_runs),     cmocka_unit_test(test_uneven),
        cmocka_unit_test(test_options),  cmocka_unit_test(test_narrow_operands),
        cmocka_unit_test(test_resumed),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
