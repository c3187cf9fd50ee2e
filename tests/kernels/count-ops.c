/* One call of each op of the AVX2 table, for test_budget.py, which runs this under callgrind and
 * compares the instruction counts with instruction-budget.txt. Counting starts with an op and ends
 * with it; the dump is named after it. */
#include "kernels/kernels.h"
#include "tests/kernels/matmul_case.h"

#include <stdio.h>
#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_START_INSTRUMENTATION
#define CALLGRIND_ZERO_STATS
#define CALLGRIND_DUMP_STATS_AT(name) (void)(name)
#define CALLGRIND_STOP_INSTRUMENTATION
#endif

#define COUNT(name, call)                                                                          \
    do {                                                                                           \
        CALLGRIND_START_INSTRUMENTATION;                                                           \
        CALLGRIND_ZERO_STATS;                                                                      \
        call;                                                                                      \
        CALLGRIND_DUMP_STATS_AT(name);                                                             \
        CALLGRIND_STOP_INSTRUMENTATION;                                                            \
    } while (0)

static float *floats(size_t n)
{
    uint64_t state = n;
    float *x = case_alloc(4 * n);
    for (size_t i = 0; i < n; i++) {
        x[i] = case_normal(&state);
    }
    return x;
}

static void count_matmul(const Kernels *k)
{
    static const uint32_t rows[] = {1, 8, 64};
    enum { N_IN = 512, N_OUT = 64 };
    for (size_t t = 0; t < G_N_ELEMENTS(host_types); t++) {
        for (size_t r = 0; r < G_N_ELEMENTS(rows); r++) {
            MatmulCase c;
            matmul_case_init(&c, host_types[t], rows[r], N_OUT, N_IN, VALUES_NORMAL, 1);
            const ActKind kind = act_kind_of(c.type);
            void *act = case_alloc(act_bytes(kind, c.rows, N_IN));
            float *out = case_alloc((size_t)4 * c.rows * N_OUT);
            const MatmulUnit whole = {N_IN, {0, 1}};
            const MatmulArgs args = {.w = &c.w,
                                     .act = act,
                                     .rows = c.rows,
                                     .units = &whole,
                                     .n_units = 1,
                                     .out = out,
                                     .ld = N_OUT,
                                     .panel1 = N_OUT / PANEL_ROWS};
            g_autofree char *name =
                g_strdup_printf("matmul %s %u rows", dtype_info(c.type)->name, rows[r]);
            k->act_quantise[kind](c.x, N_IN, c.rows, 0, c.rows, N_IN, act);
            COUNT(name, k->matmul[c.type](&args));
            free(out);
            free(act);
            matmul_case_free(&c);
        }
    }
}

static void count_quantise(const Kernels *k)
{
    static const char *const names[ACT_KIND_LIMIT] = {[ACT_BF16] = "quantise bf16",
                                                      [ACT_Q8_32] = "quantise q8_32",
                                                      [ACT_Q8_256] = "quantise q8_256"};
    enum { ROWS = 8, N = 1024 };
    float *x = floats(ROWS * N);
    for (int kind = 0; kind < ACT_KIND_LIMIT; kind++) {
        if (names[kind] != NULL) {
            void *act = case_alloc(act_bytes((ActKind)kind, ROWS, N));
            COUNT(names[kind], k->act_quantise[kind](x, N, ROWS, 0, ROWS, N, act));
            free(act);
        }
    }
    free(x);
}

static void count_small(const Kernels *k)
{
    enum { N = 2048, HEADS = 32, HEAD = 64 };
    float *x = floats(N), *y = floats(N), *out = case_alloc(4 * N), m, l;
    const GumbelKey key = {.seed = 7, .position = 3};
    COUNT("rms_norm 2048", k->rms_norm(x, y, 1e-5f, N, out));
    COUNT("swiglu 2048", k->swiglu(x, y, N, out));
    COUNT("add 2048", k->add(out, y, N));
    COUNT("rope 32 heads of 64", k->rope_apply(x, HEADS, HEAD, HEAD, ROPE_HALVES, y, y + HEAD / 2));
    COUNT("chunk_stats 1024", k->chunk_stats(y, 1024, &m, &l));
    COUNT("gumbel 1024", k->gumbel(&key, 0, 1024, out));
    free(x);
    free(y);
    free(out);
}

/* Four heads of 64 share a KV head with 1,024 keys: one row (decoding), 16 rows (a prompt). */
static void count_attention(const Kernels *k)
{
    static const char *const names[] = {[KV_F32] = "f32", [KV_F16] = "f16", [KV_BF16] = "bf16"};
    enum { HEADS = 4, HEAD = 64, KEYS = 1024, BLOCKS = KEYS / KV_BLOCK, LD = HEADS * HEAD };
    static const uint32_t rows[] = {1, 16};
    float *q = floats(16 * LD), *out = case_alloc(16 * LD * 4),
          *scratch = case_alloc(4 * attention_scratch_floats(HEADS, HEAD));
    for (int type = 0; type < 3; type++) {
        const size_t bytes = kv_block_bytes((KvType)type, HEAD);
        uint8_t *memory = case_alloc(2 * BLOCKS * bytes);
        const uint8_t *blocks[2 * BLOCKS];
        for (uint32_t b = 0; b < 2 * BLOCKS; b++) {
            blocks[b] = memory + b * bytes;
        }
        for (uint32_t p = 0; p < KEYS - 1; p++) {
            k->kv_write[type](q + p % 64, q + p % 32, HEAD, p % KV_BLOCK,
                              memory + p / KV_BLOCK * bytes,
                              memory + (BLOCKS + p / KV_BLOCK) * bytes);
        }
        g_autofree char *write = g_strdup_printf("kv_write %s", names[type]);
        COUNT(write,
              k->kv_write[type](q, q + HEAD, HEAD, KV_BLOCK - 1, memory + (BLOCKS - 1) * bytes,
                                memory + (2 * BLOCKS - 1) * bytes));
        for (size_t r = 0; r < G_N_ELEMENTS(rows); r++) {
            const AttentionArgs args = {.q = q,
                                        .q_ld = LD,
                                        .out = out,
                                        .out_ld = LD,
                                        .n_rows = rows[r],
                                        .first_position = KEYS - rows[r],
                                        .n_q = HEADS,
                                        .head_size = HEAD,
                                        .scale = 0.125f,
                                        .causal = true,
                                        .n_keys = KEYS,
                                        .k_blocks = blocks,
                                        .v_blocks = blocks + BLOCKS,
                                        .scratch = scratch};
            g_autofree char *name = g_strdup_printf("attention %s %u rows", names[type], rows[r]);
            COUNT(name, k->attention[type](&args));
        }
        free(memory);
    }
    free(q);
    free(out);
    free(scratch);
}

/* A product of training: 64 x 192, 256 steps; dw: of four leaves, by the columns of a. */
static void count_gemm(const char *name, GemmFn gemm, bool dw)
{
    enum { M = 64, N = 192, K = 256, LEAVES = 4 };
    float *a = floats(M * K), *b = floats(N * K), *c = case_alloc(4 * M * N),
          *scratch = case_alloc(4 * gemm_scratch_floats(LEAVES));
    const uint32_t n_segments = dw ? LEAVES : 1;
    GemmSegment segments[LEAVES];
    TreeStep steps[LEAVES];
    gemm_whole_tree(n_segments, steps);
    for (uint32_t s = 0; s < n_segments; s++) {
        const size_t t = s * (K / n_segments);
        segments[s] = (GemmSegment){.a = a + t * (dw ? M : 1),
                                    .a_row = dw ? 1 : K,
                                    .a_step = dw ? M : 1,
                                    .b = b + t * (dw ? N : 1),
                                    .b_step = dw ? N : 1,
                                    .b_column = dw ? 1 : K,
                                    .length = K / n_segments,
                                    .step = steps[s]};
    }
    const GemmArgs args = {.m = M,
                           .n = N,
                           .segments = segments,
                           .n_segments = n_segments,
                           .leaves = dw,
                           .c = c,
                           .ld = N,
                           .scratch = scratch};
    COUNT(name, gemm(&args));
    free(a);
    free(b);
    free(c);
    free(scratch);
}

static void count_training(const TrainKernels *k)
{
    enum { N = 3072 };
    float *x = floats(N), *g = floats(N), *m = floats(N), *v = floats(N), stats[2];
    const AdamwScalars adamw = {1e-3f, 0.9f, 0.1f, 0.95f, 0.05f, 3.0f, 7.0f, 1e-8f, 0.1f, 0.7f};
    count_gemm("gemm forward f32", k->gemm, false);
    count_gemm("gemm forward bf16", k->gemm_bf16, false);
    count_gemm("gemm forward f16", k->gemm_f16, false);
    count_gemm("gemm dw f32", k->gemm, true);
    count_gemm("gemm dw bf16", k->gemm_bf16, true);
    COUNT("gelu 3072", k->gelu(x, N, m));
    COUNT("gelu_backward 3072", k->gelu_backward(x, g, N, m));
    COUNT("layer_norm_backward 3072", k->layer_norm_backward(x, g, m, 1e-5f, N, v, stats));
    COUNT("xent_backward 3072", k->xent_backward(x, N, 4.0f, 9.0f, 7, 0.5f, m));
    COUNT("gradient_finish 3072", k->gradient_finish(g, N, 0.5f, 3.0f));
    COUNT("sum_squares 3072", stats[0] = k->sum_squares(g, N, 1, N));
    for (int i = 0; i < N; i++) {
        v[i] *= v[i];
    }
    COUNT("adamw 3072", k->adamw(&adamw, N, g, m, v, x));
    free(x);
    free(g);
    free(m);
    free(v);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--compiler") == 0) {
        printf("%s\n", __VERSION__);
        return 0;
    }
    if (kernels_best_isa() < ISA_AVX2) {
        fprintf(stderr, "this CPU lacks AVX2\n");
        return 77;
    }
    const Kernels *k = kernels_get(ISA_AVX2);
    count_matmul(k);
    count_quantise(k);
    count_small(k);
    count_attention(k);
    count_training(&k->train);
    return 0;
}
