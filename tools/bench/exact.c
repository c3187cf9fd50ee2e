/* bench-exact [--isa avx2|avx512]: what the bit contract costs. Each op as the workers run it, of
 * the best instruction set that the CPU has or the one named, beside the fastest variant without
 * the contract that we found (loose.h, or the op itself without units), interleaved on one pinned
 * thread: medians, and what the best runs of both say; then a token and a prompt of the 1.2 B shape
 * as sums of those ops. Ratios of a pair measured in turn stand also where the machine is busy, but
 * a neighbour on the same core changes them. */
#include "tools/bench/loose.h"
#include "tools/bench/peaks.h"

#include "kernels/ops/packed.h"
#include "tests/kernels/matmul_case.h"

#include <stdio.h>

enum { RUNS = 31, WIDTH = 2048, FFN = 5632, HEAD = 64, GROUP_HEADS = 8, LAYERS = 22 };

/* What is measured: set once, by main(). */
static KernelIsa bench_isa;
static const LooseOps *loose;

typedef struct Cost {
    double exact_s, cost; /* seconds, and exact / loose - 1 */
} Cost;

typedef struct Op {
    Cost median, best; /* cost of the medians: the median of pairs */
} Op;

typedef void (*WorkFn)(void *user);

static double seconds(WorkFn fn, void *user, unsigned times)
{
    const double start = peaks_now_s();
    for (unsigned i = 0; i < times; i++) {
        fn(user);
    }
    return (peaks_now_s() - start) / times;
}

static Op measure(const char *name, const char *variant, WorkFn exact, WorkFn without, void *user)
{
    double a[RUNS], b[RUNS], ratio[RUNS];
    const double once = seconds(exact, user, 1);
    const unsigned times = once > 2e-3 ? 1 : (unsigned)(2e-3 / once) + 1;
    for (int i = 0; i < RUNS; i++) {
        a[i] = seconds(exact, user, times);
        b[i] = seconds(without, user, times);
        ratio[i] = a[i] / b[i];
    }
    double best_a = a[0], best_b = b[0];
    for (int i = 1; i < RUNS; i++) {
        best_a = MIN(best_a, a[i]);
        best_b = MIN(best_b, b[i]);
    }
    const Op op = {{peaks_median(a, RUNS), peaks_median(ratio, RUNS) - 1},
                   {best_a, best_a / best_b - 1}};
    printf("%-34s %-28s %10.1f %10.1f %+7.1f %% %+7.1f %%\n", name, variant,
           1e6 * op.median.exact_s, 1e6 * peaks_median(b, RUNS), 100 * op.median.cost,
           100 * op.best.cost);
    fflush(stdout);
    return op;
}

/* ---- products ---- */

typedef struct Products {
    const Kernels *k;
    MatmulCase c;
    MatmulArgs args;
    MatmulUnit whole, units[32];
    uint32_t n_units;
    LooseBlock *blocks;
    void *act;
    float *out;
} Products;

static void products_init(Products *p, Dtype type, uint32_t rows, uint32_t n_out, uint32_t n_units)
{
    TreeStep steps[32];
    p->k = kernels_get(bench_isa);
    matmul_case_init(&p->c, type, rows, n_out, WIDTH, VALUES_NORMAL, 1);
    const ActKind kind = act_kind_of(type);
    p->act = case_alloc(act_bytes(kind, rows, WIDTH));
    p->k->act_quantise[kind](p->c.x, WIDTH, rows, 0, rows, WIDTH, p->act);
    p->out = case_alloc((size_t)4 * rows * n_out);
    p->blocks = case_alloc(sizeof(LooseBlock) * WIDTH / 32);
    tree_program(n_units, 0, n_units, steps);
    for (uint32_t u = 0; u < n_units; u++) {
        p->units[u] = (MatmulUnit){WIDTH / n_units, steps[u]};
    }
    p->n_units = n_units;
    p->whole = (MatmulUnit){WIDTH, {0, 1}};
    p->args = (MatmulArgs){.w = &p->c.w,
                           .act = p->act,
                           .rows = rows,
                           .units = &p->whole,
                           .n_units = 1,
                           .out = p->out,
                           .ld = n_out,
                           .panel1 = n_out / PANEL_ROWS};
}

static void products_clear(Products *p)
{
    matmul_case_free(&p->c);
    free(p->act);
    free(p->out);
    free(p->blocks);
}

static void product_whole(void *user)
{
    const Products *p = user;
    p->k->matmul[p->c.type](&p->args);
}

static void product_units(void *user)
{
    const Products *p = user;
    MatmulArgs args = p->args;
    args.units = p->units;
    args.n_units = p->n_units;
    p->k->matmul[p->c.type](&args);
}

static void product_coarse(void *user)
{
    loose->coarse_q4_0(&((const Products *)user)->args);
}

static void product_horizontal(void *user)
{
    const Products *p = user;
    loose->horizontal_q4_0(p->c.file, p->c.row_bytes, p->c.n_out, WIDTH, p->blocks, p->out);
}

/* ---- attention: 8 heads of 64 share a KV head ---- */

typedef struct Attention {
    const Kernels *k;
    AttentionArgs args;
    float *q, *out, *scratch;
    uint8_t *memory;
    const uint8_t **blocks;
} Attention;

static void attention_init(Attention *a, uint32_t rows, uint32_t keys)
{
    const uint32_t n_blocks = (keys + KV_BLOCK - 1) / KV_BLOCK, ld = GROUP_HEADS * HEAD;
    const size_t bytes = kv_block_bytes(KV_F16, HEAD);
    uint64_t state = 3;
    a->k = kernels_get(bench_isa);
    a->q = case_alloc((size_t)4 * rows * ld);
    a->out = case_alloc((size_t)4 * rows * ld);
    a->scratch = case_alloc(4 * attention_scratch_floats(GROUP_HEADS, HEAD));
    a->memory = case_alloc(2 * n_blocks * bytes);
    a->blocks = case_alloc(2 * n_blocks * sizeof *a->blocks);
    for (uint32_t i = 0; i < rows * ld; i++) {
        a->q[i] = case_normal(&state);
    }
    for (uint32_t b = 0; b < 2 * n_blocks; b++) {
        a->blocks[b] = a->memory + b * bytes;
    }
    for (uint32_t p = 0; p < keys; p++) {
        float kv[2 * HEAD];
        for (int i = 0; i < 2 * HEAD; i++) {
            kv[i] = case_normal(&state);
        }
        a->k->kv_write[KV_F16](kv, kv + HEAD, HEAD, p % KV_BLOCK, a->memory + p / KV_BLOCK * bytes,
                               a->memory + (n_blocks + p / KV_BLOCK) * bytes);
    }
    a->args = (AttentionArgs){.q = a->q,
                              .q_ld = ld,
                              .out = a->out,
                              .out_ld = ld,
                              .n_rows = rows,
                              .first_position = keys - rows,
                              .n_q = GROUP_HEADS,
                              .head_size = HEAD,
                              .scale = 0.125f,
                              .causal = true,
                              .n_keys = keys,
                              .k_blocks = a->blocks,
                              .v_blocks = a->blocks + n_blocks,
                              .scratch = a->scratch};
}

static void attention_clear(Attention *a)
{
    free(a->q);
    free(a->out);
    free(a->scratch);
    free(a->memory);
    free(a->blocks);
}

static void attention_exact(void *user)
{
    const Attention *a = user;
    a->k->attention[KV_F16](&a->args);
}

static void attention_loose(void *user)
{
    loose->attention_f16(&((const Attention *)user)->args);
}

/* The variant computes the same thing, but for rounding. */
static bool attention_agrees(Attention *a)
{
    const size_t n = (size_t)a->args.n_rows * GROUP_HEADS * HEAD;
    float *exact = case_alloc(4 * n);
    attention_exact(a);
    memcpy(exact, a->out, 4 * n);
    attention_loose(a);
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        worst = MAX(worst, ABS((double)exact[i] - (double)a->out[i]));
    }
    free(exact);
    return worst < 1e-4;
}

static Op attention_op(const char *name, uint32_t rows, uint32_t keys)
{
    Attention a;
    attention_init(&a, rows, keys);
    if (!attention_agrees(&a)) {
        fprintf(stderr, "%s: the variant's result is another one\n", name);
        exit(1);
    }
    const Op op = measure(name, "running maximum", attention_exact, attention_loose, &a);
    attention_clear(&a);
    return op;
}

/* ---- the table ---- */

static Op better(Op a, Op b)
{
    return a.median.cost > b.median.cost ? a : b;
}

/* A layer's ops for a step: products, all of which are `whole` per weight, a third of the weights
 * (attention output, down projection) cut into units; attention so often. */
typedef struct Step {
    const char *name;
    double rows, product_weights, attention_calls;
    Op whole, units, attention;
} Step;

/* Seconds, with and without contract. */
static Cost step_cost(const Step *step, Cost whole, Cost units, Cost attention)
{
    const double all = (double)WIDTH * (2 * WIDTH + 2 * 256 + 3 * FFN),
                 cut = (double)WIDTH * (WIDTH + FFN), plain = all - cut;
    const double weight_s = whole.exact_s / step->product_weights,
                 attention_s = step->attention_calls * attention.exact_s;
    const double exact =
        LAYERS * (weight_s * (plain + cut * (1 + MAX(units.cost, 0))) + attention_s);
    const double without = LAYERS * (weight_s / (1 + MAX(whole.cost, 0)) * all +
                                     attention_s / (1 + MAX(attention.cost, 0)));
    return (Cost){exact, exact / without - 1};
}

static void end_to_end(const Step *step)
{
    const Cost median =
                   step_cost(step, step->whole.median, step->units.median, step->attention.median),
               best = step_cost(step, step->whole.best, step->units.best, step->attention.best);
    printf("%-34s %-28s %10.0f %10.0f %+7.1f %% %+7.1f %%\n", step->name, "all of the above",
           1e6 * median.exact_s / step->rows, 1e6 * median.exact_s / (1 + median.cost) / step->rows,
           100 * median.cost, 100 * best.cost);
}

static void bench(void *user, unsigned thread, unsigned n_threads)
{
    enum { ROWS = 128, OUT = 256, OUT_1 = 8192 };
    Products p;
    (void)user;
    printf("%-34s %-28s %10s %10s %9s %9s\n", "op (one thread, us)", "without the contract",
           "exact", "without", "cost", "of best");
    products_init(&p, DTYPE_Q4_0, ROWS, OUT, 8);
    const Op gemm =
        measure("Q4_0 product, 128 rows", "one scale per 256", product_whole, product_coarse, &p);
    const Op gemm_units =
        measure("Q4_0 product, 128 rows, 8 units", "no units", product_units, product_whole, &p);
    products_clear(&p);
    products_init(&p, DTYPE_Q4_1, ROWS, OUT, 32); /* as in the 135 M model */
    measure("Q4_1 product, 128 rows, 32 units", "no units", product_units, product_whole, &p);
    products_clear(&p);
    products_init(&p, DTYPE_Q4_K, ROWS, OUT, 8);
    measure("Q4_K product, 128 rows, 8 units", "no units", product_units, product_whole, &p);
    products_clear(&p);
    products_init(&p, DTYPE_Q4_0, 1, OUT_1, 8);
    const Op gemv_coarse =
        measure("Q4_0 product, 1 row", "one scale per 256", product_whole, product_coarse, &p);
    const Op gemv_dots =
        measure("Q4_0 product, 1 row", "horizontal dots", product_whole, product_horizontal, &p);
    const Op gemv_units =
        measure("Q4_0 product, 1 row, 8 units", "no units", product_units, product_whole, &p);
    products_clear(&p);
    const Op prompt = attention_op("attention, 16 rows, 512 keys", 16, 512);
    const Op token = attention_op("attention, 1 row, 512 keys", 1, 512);
    attention_op("attention, 1 row, 16384 keys", 1, 16384);
    end_to_end(&(Step){"a prompt token, 1.2 B Q4_0", ROWS, (double)OUT * WIDTH, 4.0 * ROWS / 16,
                       gemm, gemm_units, prompt});
    end_to_end(&(Step){"a decoded token, 1.2 B Q4_0", 1, (double)OUT_1 * WIDTH, 4,
                       better(gemv_coarse, gemv_dots), gemv_units, token});
}

int main(int argc, char **argv)
{
    const int cpu = 0;
    const char *name = "auto";
    if (argc == 3 && strcmp(argv[1], "--isa") == 0) {
        name = argv[2];
    } else if (argc != 1) {
        fprintf(stderr, "usage: bench-exact [--isa avx2|avx512]\n");
        return 2;
    }
    if (!kernels_parse_isa(name, &bench_isa) || bench_isa < ISA_AVX2) {
        fprintf(stderr, "--isa %s: this CPU lacks it, or no variants are written in it\n", name);
        return 77;
    }
    loose = bench_isa == ISA_AVX512 ? &loose_avx512 : &loose_avx2;
    printf("%s\n", kernels_isa_name(bench_isa));
    Pool *pool = pool_new(1, &cpu, true, 0);
    if (pool == NULL) {
        fprintf(stderr, "no memory\n");
        return 1;
    }
    pool_run(pool, bench, NULL);
    pool_free(pool);
    return 0;
}
