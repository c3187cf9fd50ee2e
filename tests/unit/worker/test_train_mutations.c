/* The bits of training are pinned: weights_digest of the toys after two steps by `generic`
 * and by every variant (tests/golden/train/digests.txt; a change needs another numerics_version),
 * and each way of getting nearly the same numbers is caught by it. */
#include "tests/unit/worker/toy_training.h"

#include "kernels/ops/math.h"
#include "tests/kernels/avx512/variants.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { STEPS = 2 };

static const Kernels *generic;

/* Three leaves of two samples (gpt2), micro-batches of one: chains go on over micro-batches. */
static void digest_of(const Toy *toy, const Kernels *kernels, char hex[33])
{
    g_autoptr(ModelSpec) spec = toy_spec(toy);
    g_autoptr(TokenData) data = toy_data(toy);
    g_autoptr(GError) error = NULL;
    Pool *pool = pool_new(1, NULL, false, 0);
    TokenSamples samples = {.data = data, .seed = toy->order};
    const SampleSource source = token_samples_source(&samples);
    TrainRankOptions options = toy_options(toy, spec, &source);
    options.kernels = kernels;
    options.pool = pool;
    options.leaves = 3;
    TrainRank *rank = train_rank_new(&options, toy_weights(toy, spec), &error);
    for (int i = 0; i < STEPS; i++) {
        TrainStep out;
        assert_true(train_rank_step(rank, &out, &error));
    }
    Hash128 digest;
    assert_true(train_rank_digest(rank, &digest, &error));
    hash128_hex(&digest, hex);
    train_rank_free(rank);
    pool_free(pool);
}

static char *golden(const char *name)
{
    g_autofree char *text = NULL, *start = g_strdup_printf("%s ", name);
    assert_true(g_file_get_contents(GOLDEN_DIR "/digests.txt", &text, NULL, NULL));
    const char *line = strstr(text, start);
    assert_non_null(line);
    return g_strndup(line + strlen(start), 32);
}

static void test_golden_digests(void **state)
{
    const struct {
        const char *name;
        const Toy *toy;
    } rows[] = {{"gpt2", &toy_gpt2}, {"llama", &toy_llama}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autofree char *want = golden(rows[i].name);
        char hex[33];
        digest_of(rows[i].toy, generic, hex);
        assert_string_equal(hex, want);
        for (const Variant *v = variants; v->name != NULL; v++) {
            if (variant_for_engines(v) && !v->dots) { /* its products are of f32 */
                Kernels table;
                variant_table(v, &table);
                digest_of(rows[i].toy, &table, hex);
                assert_string_equal(hex, want);
            }
        }
    }
}

static void assert_caught(const Kernels *mutant)
{
    g_autofree char *want = golden("gpt2");
    char hex[33];
    digest_of(&toy_gpt2, mutant, hex);
    assert_string_not_equal(hex, want);
}

/* ---- products ---- */

/* One unit: from the last k to the first. */
static void gemm_reversed(const GemmArgs *args)
{
    const GemmSegment *g = args->segments;
    if (args->n_segments != 1) {
        generic->train.gemm(args);
        return;
    }
    for (uint32_t i = 0; i < args->m; i++) {
        for (uint32_t j = 0; j < args->n; j++) {
            float *c = args->c + i * args->ld + j, acc = args->accumulate ? *c : 0.0f;
            for (uint32_t t = g->length; t-- > 0;) {
                acc = fmaf(g->a[i * g->a_row + t * g->a_step],
                           g->b[t * g->b_step + j * g->b_column], acc);
            }
            *c = acc;
        }
    }
}

/* Units one after another instead of node(). */
static void gemm_other_tree(const GemmArgs *args)
{
    GemmSegment segments[64];
    GemmArgs changed = *args;
    assert_true(args->n_segments <= 64);
    bool first = true;
    for (uint32_t s = 0; s < args->n_segments; s++) {
        segments[s] = args->segments[s];
        if (!segments[s].continues) {
            segments[s].step = (TreeStep){first ? 0 : 1, s + 1 == args->n_segments};
            first = false;
        }
    }
    changed.segments = segments;
    generic->train.gemm(&changed);
}

/* A micro-batch's gradients by themselves, then added: not one chain. */
static void gemm_added(const GemmArgs *args)
{
    if (!args->accumulate) {
        generic->train.gemm(args);
        return;
    }
    GemmArgs alone = *args;
    g_autofree float *c = g_new(float, (size_t)args->m * args->n);
    alone.accumulate = false;
    alone.c = c;
    alone.ld = args->n;
    generic->train.gemm(&alone);
    for (uint32_t i = 0; i < args->m; i++) {
        generic->add(args->c + i * args->ld, c + (size_t)i * args->n, args->n);
    }
}

static void test_reversed_k(void **state)
{
    Kernels mutant = *generic;
    mutant.train.gemm = gemm_reversed;
    assert_caught(&mutant);
}

static void test_other_tree_of_units(void **state)
{
    Kernels mutant = *generic;
    mutant.train.gemm = gemm_other_tree;
    assert_caught(&mutant);
}

static void test_chain_broken_at_micro_batches(void **state)
{
    Kernels mutant = *generic;
    mutant.train.gemm = gemm_added;
    assert_caught(&mutant);
}

/* ---- across elements, and element by element ---- */

static void layer_norm_in_eight(const float *x, const float *weight, const float *bias, float eps,
                                uint32_t n, float *out)
{
    float sums[32] = {0}, squares[32] = {0};
    for (uint32_t i = 0; i < n; i++) {
        sums[i % 8] += x[i];
    }
    const float mean = lanes_fold(sums) / (float)n;
    for (uint32_t i = 0; i < n; i++) {
        squares[i % 8] = fmaf(x[i] - mean, x[i] - mean, squares[i % 8]);
    }
    const float scale = 1.0f / sqrtf(lanes_fold(squares) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = fmaf((x[i] - mean) * scale, weight[i], bias[i]);
    }
}

static void xent_of_libm(const float *z, uint32_t n, float m, float l, uint32_t target,
                         float factor, float *dz)
{
    for (uint32_t i = 0; i < n; i++) {
        const float p = expf(z[i] - m) / l;
        dz[i] = (i == target ? p - 1.0f : p) * factor;
    }
}

static void adamw_unfused(const AdamwScalars *s, size_t n, const float *g, float *m, float *v,
                          float *w)
{
    for (size_t i = 0; i < n; i++) {
        const float h = g[i] * s->clip;
        m[i] = s->beta1 * m[i] + s->rest1 * h;
        v[i] = s->beta2 * v[i] + (s->rest2 * h) * h;
        const float u = (m[i] * s->correct1) / (sqrtf(v[i] * s->correct2) + s->eps);
        w[i] = w[i] - s->rate * (u + s->decay * w[i]);
    }
}

static void test_eight_lanes(void **state)
{
    Kernels mutant = *generic;
    mutant.train.layer_norm = layer_norm_in_eight;
    assert_caught(&mutant);
}

static void test_libm_exp(void **state)
{
    Kernels mutant = *generic;
    mutant.train.xent_backward = xent_of_libm;
    assert_caught(&mutant);
}

static void test_unfused_optimizer(void **state)
{
    Kernels mutant = *generic;
    mutant.train.adamw = adamw_unfused;
    assert_caught(&mutant);
}

int main(void)
{
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_digests),
        cmocka_unit_test(test_reversed_k),
        cmocka_unit_test(test_other_tree_of_units),
        cmocka_unit_test(test_chain_broken_at_micro_batches),
        cmocka_unit_test(test_eight_lanes),
        cmocka_unit_test(test_libm_exp),
        cmocka_unit_test(test_unfused_optimizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
