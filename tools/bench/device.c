/* bench-device: the ops of a device, one by one, with what they reach: products of a square matrix
 * by weight type, rows and class; attention of a prompt in both classes and of decoding rows; a
 * token's draw. For tools/gpu-check's report.
 *
 *   bench-device [--device cpu|cuda[:N]] [--side N] [--keys N] [--vocabulary N] [--repeats N]
 *
 * Markdown on standard output. Memory holds zeros: times do not depend on values. Exit code 1: the
 * device failed, 2: wrong arguments. */
#include "kernels/device/ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADS = 32, KV_HEADS = 8, HEAD_SIZE = 128, ROWS_MOST = 2048 };

typedef struct Bench {
    Device *device;
    DeviceStream *stream;
    uint32_t side, keys, vocabulary, repeats;
    uint8_t *weights, *x, *out, *pages, *workspace, *small;
    size_t workspace_bytes;
    DeviceStatus status;
} Bench;

typedef DeviceStatus (*OpFn)(Bench *b, const void *args);

/* Seconds of one run, over `repeats` of them behind one that does not count; NAN: unsupported. */
static double timed(Bench *b, OpFn op, const void *args)
{
    int64_t start = 0;
    for (uint32_t i = 0; i <= b->repeats && b->status == DEVICE_OK; i++) {
        b->status = op(b, args);
        if (i == 0 && b->status == DEVICE_OK) {
            b->status = b->device->api->stream_wait(b->stream);
            start = g_get_monotonic_time();
        }
    }
    if (b->status == DEVICE_UNSUPPORTED) {
        b->status = DEVICE_OK;
        return NAN;
    }
    if (b->status == DEVICE_OK) {
        b->status = b->device->api->stream_wait(b->stream);
    }
    return 1e-6 * (double)MAX(g_get_monotonic_time() - start, 1) / b->repeats;
}

/* ---- products ---- */

typedef struct Product {
    Dtype type;
    uint32_t rows;
    bool fast;
} Product;

static DeviceStatus run_product(Bench *b, const void *args)
{
    const Product *p = args;
    const PackedMatrix w = {.type = p->type,
                            .n_out = b->side,
                            .n_in = b->side,
                            .panel_bytes = packed_panel_bytes(p->type, b->side),
                            .data = b->weights};
    const DeviceMatmul m = {.w = &w,
                            .x = (const float *)(const void *)b->x,
                            .x_ld = b->side,
                            .rows = p->rows,
                            .out = (float *)(void *)b->out,
                            .out_ld = b->side,
                            .fast = p->fast,
                            .workspace = b->workspace,
                            .workspace_bytes = b->workspace_bytes};
    return b->device->ops->matmul(b->stream, &m);
}

static void products(Bench *b, uint32_t rows_most)
{
    static const Dtype types[] = {DTYPE_BF16, DTYPE_F16,  DTYPE_F8_E4M3, DTYPE_Q8_0,
                                  DTYPE_Q4_0, DTYPE_Q4_K, DTYPE_Q6_K};
    static const uint32_t rows[] = {1, 8, 32, 128, 512, 2048};
    printf("## Products, %u x %u: us, GB/s of weights, Tflop/s\n\n| type | rows | exact | fast |\n"
           "|---|---|---|---|\n",
           b->side, b->side);
    for (unsigned t = 0; t < G_N_ELEMENTS(types) && b->status == DEVICE_OK; t++) {
        const double bytes =
            (double)packed_panel_bytes(types[t], b->side) * ((b->side + 15) / PANEL_ROWS);
        for (unsigned r = 0; r < G_N_ELEMENTS(rows) && rows[r] <= rows_most; r++) {
            printf("| %s | %u |", dtype_info(types[t])->name, rows[r]);
            for (int fast = 0; fast < 2; fast++) {
                const Product p = {types[t], rows[r], fast != 0};
                const double s = timed(b, run_product, &p);
                printf(" %.1f, %.0f, %.1f |", 1e6 * s, 1e-9 * bytes / s,
                       2e-12 * b->side * b->side * rows[r] / s);
            }
            printf("\n");
        }
    }
}

/* ---- attention ---- */

typedef struct Attention {
    uint32_t rows, segments;
    bool fast;
} Attention;

/* Every page is page 0: the traffic is that of other pages, but for the last cache. */
static DeviceStatus run_attention(Bench *b, const void *args)
{
    const Attention *a = args;
    const size_t block = kv_block_bytes(KV_F16, HEAD_SIZE);
    const DeviceRows rows = {.n_rows = a->rows,
                             .n_segments = a->segments,
                             .longest_segment = a->rows / a->segments,
                             .max_keys = b->keys,
                             .segments = (const DeviceSegment *)(const void *)b->small,
                             .pages = (const uint32_t *)(const void *)(b->small + 65536),
                             .pages_ld = 0};
    const DeviceAttention attention = {
        .q = (const float *)(const void *)b->x,
        .out = (float *)(void *)b->out,
        .n_heads = HEADS,
        .head_size = HEAD_SIZE,
        .heads_per_kv = HEADS / KV_HEADS,
        .scale = 0.1f,
        .fast = a->fast,
        .kv = {b->pages, KV_HEADS * 2 * block, block, KV_HEADS, KV_F16},
        .workspace = b->workspace,
        .workspace_bytes = b->workspace_bytes};
    return b->device->ops->attention(b->stream, &rows, &attention);
}

static void put_segments(Bench *b, uint8_t *pinned, uint32_t segments, uint32_t length)
{
    DeviceSegment *s = (DeviceSegment *)(void *)pinned;
    for (uint32_t i = 0; i < segments; i++) {
        s[i] = (DeviceSegment){i * length, length, b->keys - length, 0};
    }
    b->status =
        b->device->api->copy(b->stream, b->small, pinned, sizeof *s * segments, DEVICE_COPY_UP);
    if (b->status == DEVICE_OK) {
        b->status = b->device->api->stream_wait(b->stream);
    }
}

static void attentions(Bench *b, uint8_t *pinned)
{
    const uint32_t shapes[][2] = {{1, b->keys}, {1, 1}, {32, 1}}; /* segments, rows of each */
    printf("\n## Attention, %d heads of %d, %d KV heads (f16), %u keys: us, Tflop/s, GB/s of keys "
           "and values\n\n| segments | rows of each | exact | fast |\n|---|---|---|---|\n",
           HEADS, HEAD_SIZE, KV_HEADS, b->keys);
    for (unsigned i = 0; i < G_N_ELEMENTS(shapes) && b->status == DEVICE_OK; i++) {
        const uint32_t segments = shapes[i][0], length = shapes[i][1];
        const double pairs = segments * ((double)length * (b->keys - length) +
                                         0.5 * (double)length * ((double)length + 1));
        put_segments(b, pinned, segments, length);
        printf("| %u | %u |", segments, length);
        for (int fast = 0; fast < 2; fast++) {
            const Attention a = {segments * length, segments, fast != 0};
            const double s = timed(b, run_attention, &a);
            printf(" %.1f, %.2f, %.0f |", 1e6 * s, 4e-12 * pairs * HEADS * HEAD_SIZE / s,
                   1e-9 * segments * (double)b->keys * KV_HEADS * HEAD_SIZE * 4 / s);
        }
        printf("\n");
    }
}

/* ---- draws ---- */

static DeviceStatus run_sample(Bench *b, const void *args)
{
    const uint32_t *shape = args; /* rows, keep */
    const uint32_t n_chunks = (b->vocabulary + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
    const DeviceSample s = {
        .logits = (const float *)(const void *)b->weights,
        .n_rows = shape[0],
        .n = b->vocabulary,
        .draws = (const DeviceDraw *)(const void *)b->small,
        .keep = shape[1],
        .chunks = (DeviceChunk *)(void *)b->out,
        .best = (DeviceCandidate *)(void *)(b->out + sizeof(DeviceChunk) * n_chunks * shape[0]),
        .workspace = b->workspace,
        .workspace_bytes = b->workspace_bytes};
    return b->device->ops->sample(b->stream, &s);
}

static void draws(Bench *b)
{
    static const uint32_t shapes[][2] = {{1, 1}, {1, 64}, {32, 1}, {32, 64}};
    printf("\n## Draws of %u ids: us\n\n| rows | candidates | |\n|---|---|---|\n", b->vocabulary);
    for (unsigned i = 0; i < G_N_ELEMENTS(shapes) && b->status == DEVICE_OK; i++) {
        printf("| %u | %u | %.1f |\n", shapes[i][0], shapes[i][1],
               1e6 * timed(b, run_sample, shapes[i]));
    }
}

/* ---- memory ---- */

static void *take(Bench *b, size_t bytes)
{
    void *memory = NULL;
    if (b->status == DEVICE_OK) {
        b->status = b->device->api->alloc(b->device->handle, bytes, &memory);
    }
    if (b->status == DEVICE_OK) {
        b->status = b->device->api->fill(b->stream, memory, 0, bytes);
    }
    return memory;
}

static void allocate(Bench *b, uint32_t rows)
{
    const size_t panels = (b->side + 15) / PANEL_ROWS,
                 floats = sizeof(float) * MAX((size_t)rows * MAX(b->side, HEADS * HEAD_SIZE),
                                              (size_t)b->keys * HEADS * HEAD_SIZE);
    const DeviceLimits limits = {.max_rows = MAX(rows, b->keys),
                                 .max_keys = b->keys,
                                 .max_segments = 32,
                                 .n_heads = HEADS,
                                 .n_kv_heads = KV_HEADS,
                                 .head_size = HEAD_SIZE,
                                 .widest_in = b->side,
                                 .widest_out = b->side,
                                 .sampled_rows = 32,
                                 .vocabulary = b->vocabulary,
                                 .fast = true};
    b->workspace_bytes = device_workspace_bytes(&limits);
    b->weights = take(b, MAX(panels * packed_panel_bytes(DTYPE_BF16, b->side),
                             sizeof(float) * 32 * (size_t)b->vocabulary));
    b->x = take(b, floats);
    b->out = take(b, MAX(floats, (size_t)32 * (b->vocabulary / 16 + 4096)));
    b->pages = take(b, KV_HEADS * 2 * kv_block_bytes(KV_F16, HEAD_SIZE));
    b->small = take(b, 131072);
    b->workspace = take(b, b->workspace_bytes);
}

static int wrong(const char *what)
{
    fprintf(stderr, "bench-device: %s: see the head of tools/bench/device.c\n", what);
    return 2;
}

int main(int argc, char **argv)
{
    Bench b = {.side = 4096, .keys = 2048, .vocabulary = 128256, .repeats = 20};
    DeviceChoice choice = {.kind = DEVICE_KIND_AUTO};
    g_autoptr(GError) error = NULL;
    uint32_t *const numbers[] = {&b.side, &b.keys, &b.vocabulary, &b.repeats};
    static const char *const names[] = {"--side", "--keys", "--vocabulary", "--repeats"};
    for (int i = 1; i < argc; i += 2) {
        unsigned k = 0;
        while (k < G_N_ELEMENTS(names) && strcmp(argv[i], names[k]) != 0) {
            k++;
        }
        if (i + 1 == argc || (k == G_N_ELEMENTS(names) && strcmp(argv[i], "--device") != 0)) {
            return wrong(argv[i]);
        }
        if (k == G_N_ELEMENTS(names)) {
            if (!device_choice_parse(argv[i + 1], &choice, &error)) {
                return wrong(error->message);
            }
        } else if ((*numbers[k] = (uint32_t)strtoul(argv[i + 1], NULL, 10)) == 0) {
            return wrong(argv[i]);
        }
    }
    const uint32_t rows = MIN(ROWS_MOST, b.side);
    uint8_t *pinned = NULL;
    b.device = device_open(&choice, &error);
    if (b.device == NULL) {
        fprintf(stderr, "bench-device: %s\n", error->message);
        return 1;
    }
    b.status = b.device->api->stream_new(b.device->handle, &b.stream);
    if (b.status == DEVICE_OK) {
        b.status = b.device->api->alloc_pinned(b.device->handle, 65536, (void **)&pinned);
    }
    allocate(&b, rows);
    products(&b, rows);
    if (b.status == DEVICE_OK) {
        attentions(&b, pinned);
    }
    if (b.status == DEVICE_OK) { /* what lies in `small` now is no draw */
        b.status = b.device->api->fill(b.stream, b.small, 0, 131072);
        draws(&b);
    }
    if (!device_check(b.device, b.status, "a benchmark", &error)) {
        fprintf(stderr, "bench-device: %s\n", error->message);
        return 1;
    }
    return 0;
}
