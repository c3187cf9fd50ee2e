/* Gradients of every training op: generic's backward against central differences of the forward
 * formula in float64 (FORMULAS 30), whose sum with random weights `dy` is the function that is
 * differentiated. Optimizers and sums against float64. */
#include "kernels/kernels.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { MOST = 4096 };

static const Kernels *k;
static Numbers numbers = {5};

typedef double (*Scalar)(const double *inputs, void *user);

/* got[i] is the derivative of f after inputs[i], relative to the largest of them. */
static void assert_gradient(Scalar f, void *user, const double *inputs, size_t n_inputs,
                            size_t first, size_t n, const float *got)
{
    double *x = malloc(n_inputs * sizeof *x), *want = malloc(n * sizeof *want), most = 0.0;
    memcpy(x, inputs, n_inputs * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        const double h = 1e-5;
        x[first + i] = inputs[first + i] + h;
        const double up = f(x, user);
        x[first + i] = inputs[first + i] - h;
        want[i] = (up - f(x, user)) / (2 * h);
        x[first + i] = inputs[first + i];
        most = fmax(most, fabs(want[i]));
    }
    for (size_t i = 0; i < n; i++) {
        if (!(fabs((double)got[i] - want[i]) <= 3e-6 * most)) {
            print_error("input %zu: %.9g, by differences %.9g (largest %g)\n", first + i,
                        (double)got[i], want[i], most);
            fail();
        }
    }
    free(x);
    free(want);
}

static void fill_both(float *f, double *d, size_t n, double low, double high)
{
    for (size_t i = 0; i < n; i++) {
        f[i] = (float)numbers_uniform(&numbers, low, high);
        d[i] = (double)f[i];
    }
}

/* ---- norms: inputs are x[rows][n], weight[n], bias[n] ---- */

enum { ROWS = 3, CHANNELS = 37 };

typedef struct NormCase {
    bool layer;
    float dy[ROWS * CHANNELS];
} NormCase;

static double norm_of(const double *in, void *user)
{
    const NormCase *c = user;
    const double *w = in + ROWS * CHANNELS, *b = w + CHANNELS;
    double sum = 0.0;
    for (int r = 0; r < ROWS; r++) {
        const double *x = in + r * CHANNELS;
        double mean = 0.0, square = 0.0;
        for (int i = 0; c->layer && i < CHANNELS; i++) {
            mean += x[i] / CHANNELS;
        }
        for (int i = 0; i < CHANNELS; i++) {
            square += (x[i] - mean) * (x[i] - mean) / CHANNELS;
        }
        for (int i = 0; i < CHANNELS; i++) {
            const double y = (x[i] - mean) / sqrt(square + 1e-5) * w[i] + (c->layer ? b[i] : 0.0);
            sum += y * (double)c->dy[r * CHANNELS + i];
        }
    }
    return sum;
}

static void check_norm(bool layer)
{
    enum { N = (ROWS + 2) * CHANNELS };
    float in[N], dx[ROWS * CHANNELS] = {0}, stats[2 * ROWS], dw[CHANNELS] = {0}, db[CHANNELS] = {0};
    double exact[N];
    NormCase c = {.layer = layer};
    fill_both(in, exact, N, -2.0, 3.0);
    numbers_fill(&numbers, c.dy, ROWS * CHANNELS, -1.0, 1.0);
    const float *w = in + ROWS * CHANNELS;
    for (int r = 0; r < ROWS; r++) {
        const int at = r * CHANNELS;
        (layer ? k->train.layer_norm_backward : k->train.rms_norm_backward)(
            in + at, w, c.dy + at, 1e-5f, CHANNELS, dx + at, stats + 2 * r);
    }
    k->train.norm_weight_backward(in, c.dy, CHANNELS, stats, ROWS, CHANNELS, dw, layer ? db : NULL);
    assert_gradient(norm_of, &c, exact, N, 0, ROWS * CHANNELS, dx);
    assert_gradient(norm_of, &c, exact, N, ROWS * CHANNELS, CHANNELS, dw);
    if (layer) {
        assert_gradient(norm_of, &c, exact, N, (ROWS + 1) * CHANNELS, CHANNELS, db);
        float out[CHANNELS], again[CHANNELS] = {0};
        double sum = 0.0;
        for (int r = 0; r < ROWS; r++) {
            k->train.layer_norm(in + r * CHANNELS, w, w + CHANNELS, 1e-5f, CHANNELS, out);
            for (int i = 0; i < CHANNELS; i++) {
                sum += (double)out[i] * (double)c.dy[r * CHANNELS + i];
            }
        }
        assert_true(fabs(sum - norm_of(exact, &c)) < 1e-5);
        k->train.sum_rows(c.dy, CHANNELS, ROWS, CHANNELS, again);
        assert_memory_equal(again, db, sizeof db);
    }
}

static void test_norms(void **state)
{
    check_norm(false);
    check_norm(true);
}

/* The gradient of x is added to what is there: the residual stream's. */
static void test_norm_gradient_is_added(void **state)
{
    float x[8], w[8], dy[8], dx[8] = {0}, added[8], stats[2];
    numbers_fill(&numbers, x, 8, -1.0, 1.0);
    numbers_fill(&numbers, w, 8, -1.0, 1.0);
    numbers_fill(&numbers, dy, 8, -1.0, 1.0);
    k->train.rms_norm_backward(x, w, dy, 1e-5f, 8, dx, stats);
    for (int i = 0; i < 8; i++) {
        added[i] = 100.0f;
    }
    k->train.rms_norm_backward(x, w, dy, 1e-5f, 8, added, stats);
    for (int i = 0; i < 8; i++) {
        assert_true(fabs((double)added[i] - 100.0 - (double)dx[i]) < 2e-5);
    }
}

/* ---- activations: inputs are x[n] or gate[n], up[n] ---- */

static double gelu_of(const double *x, void *user)
{
    const float *dy = user;
    double sum = 0.0;
    for (int i = 0; i < CHANNELS; i++) {
        const double u = 0.7978845608028654 * (x[i] + 0.044715 * x[i] * x[i] * x[i]);
        sum += 0.5 * x[i] * (1.0 + tanh(u)) * (double)dy[i];
    }
    return sum;
}

static double swiglu_of(const double *in, void *user)
{
    const float *dy = user;
    double sum = 0.0;
    for (int i = 0; i < CHANNELS; i++) {
        sum += in[i] / (1.0 + exp(-in[i])) * in[CHANNELS + i] * (double)dy[i];
    }
    return sum;
}

static void test_activations(void **state)
{
    float in[2 * CHANNELS], dy[CHANNELS], dx[CHANNELS], du[CHANNELS], out[CHANNELS];
    double exact[2 * CHANNELS], sum = 0.0;
    fill_both(in, exact, 2 * CHANNELS, -6.0, 6.0);
    numbers_fill(&numbers, dy, CHANNELS, -1.0, 1.0);
    k->train.gelu_backward(in, dy, CHANNELS, dx);
    assert_gradient(gelu_of, dy, exact, CHANNELS, 0, CHANNELS, dx);
    k->train.gelu(in, CHANNELS, out);
    for (int i = 0; i < CHANNELS; i++) {
        sum += (double)out[i] * (double)dy[i];
    }
    assert_true(fabs(sum - gelu_of(exact, dy)) < 1e-5);
    k->train.swiglu_backward(in, in + CHANNELS, dy, CHANNELS, dx, du);
    assert_gradient(swiglu_of, dy, exact, 2 * CHANNELS, 0, CHANNELS, dx);
    assert_gradient(swiglu_of, dy, exact, 2 * CHANNELS, CHANNELS, CHANNELS, du);
}

/* Far out the slopes are 0 or 1 (times the other factor), never NaN. */
static void test_activations_far_out(void **state)
{
    const float x[] = {-1e30f, -1000.0f, -90.0f, 90.0f, 1000.0f}, one[] = {1, 1, 1, 1, 1};
    float dx[5], du[5];
    k->train.gelu_backward(x + 1, one, 4, dx + 1);
    assert_true(fabs((double)dx[1]) < 1e-29 && fabs((double)dx[2]) < 1e-29 && dx[3] == 1.0f);
    k->train.swiglu_backward(x, one, one, 5, dx, du);
    assert_true(fabs((double)dx[0]) < 1e-6 && fabs((double)dx[1]) < 1e-30 && dx[3] == 1.0f &&
                dx[4] == 1.0f);
    assert_true(fabs((double)du[2]) < 1e-30 && du[4] == 1000.0f);
}

/* ---- RoPE: the gradient is the rotation with negated sines ---- */

typedef struct RopeCase {
    float c[8], s[8], dy[40];
    RopePairing pairing;
} RopeCase;

static double rope_of(const double *x, void *user)
{
    const RopeCase *r = user;
    double sum = 0.0;
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < 20; i++) {
            double y = x[h * 20 + i];
            if (i < 16) {
                const bool adjacent = r->pairing == ROPE_ADJACENT;
                const int pair = adjacent ? i / 2 : i % 8;
                const bool is_first = adjacent ? i % 2 == 0 : i < 8;
                const double other = x[h * 20 + (adjacent ? i ^ 1 : i ^ 8)];
                y = y * (double)r->c[pair] + (is_first ? -other : other) * (double)r->s[pair];
            }
            sum += y * (double)r->dy[h * 20 + i];
        }
    }
    return sum;
}

static void test_rope(void **state)
{
    for (int p = 0; p < 2; p++) {
        RopeCase r = {.pairing = p == 0 ? ROPE_ADJACENT : ROPE_HALVES};
        float x[40], dx[40], negated[8];
        double exact[40];
        fill_both(x, exact, 40, -1.0, 1.0);
        numbers_fill(&numbers, r.c, 8, -1.0, 1.0);
        numbers_fill(&numbers, r.s, 8, -1.0, 1.0);
        numbers_fill(&numbers, r.dy, 40, -1.0, 1.0);
        for (int i = 0; i < 8; i++) {
            negated[i] = -r.s[i];
        }
        memcpy(dx, r.dy, sizeof dx);
        k->rope_apply(dx, 2, 20, 16, r.pairing, r.c, negated);
        assert_gradient(rope_of, &r, exact, 40, 0, 40, dx);
    }
}

/* ---- attention: inputs are q[rows][heads * hd], k[rows][hd], v[rows][hd] ---- */

typedef struct AttentionCase {
    int rows, heads, hd;
    const float *dout;
} AttentionCase;

static double attention_of(const double *in, void *user)
{
    const AttentionCase *c = user;
    const int width = c->heads * c->hd;
    const double *q = in, *key = q + c->rows * width, *value = key + c->rows * c->hd;
    double sum = 0.0;
    for (int h = 0; h < c->heads; h++) {
        for (int i = 0; i < c->rows; i++) {
            double scores[64], total = 0.0;
            for (int j = 0; j <= i; j++) {
                double s = 0.0;
                for (int d = 0; d < c->hd; d++) {
                    s += q[i * width + h * c->hd + d] * key[j * c->hd + d];
                }
                scores[j] = exp(0.25 * s);
                total += scores[j];
            }
            for (int j = 0; j <= i; j++) {
                for (int d = 0; d < c->hd; d++) {
                    sum += scores[j] / total * value[j * c->hd + d] *
                           (double)c->dout[i * width + h * c->hd + d];
                }
            }
        }
    }
    return sum;
}

static void test_attention(void **state)
{
    static const int rows[] = {1, 5, 37};
    for (int n = 0; n < 3; n++) {
        for (int heads = 1; heads <= 3; heads++) {
            static float in[MOST], dout[MOST], dq[MOST], dk[MOST], dv[MOST];
            static double exact[MOST];
            AttentionCase c = {rows[n], heads, 12, dout};
            const int nq = c.rows * heads * c.hd, nk = c.rows * c.hd;
            TreeStep steps[3];
            tree_program((uint32_t)heads, 0, (uint32_t)heads, steps);
            fill_both(in, exact, (size_t)(nq + 2 * nk), -1.5, 1.5);
            numbers_fill(&numbers, dout, MOST, -1.0, 1.0);
            float *scratch = malloc(sizeof(float) * attention_backward_scratch_floats(
                                                        (uint32_t)c.rows, 12, (uint32_t)heads));
            const AttentionBackwardArgs args = {.q = in,
                                                .dout = dout,
                                                .k = in + nq,
                                                .v = in + nq + nk,
                                                .q_ld = (size_t)(heads * c.hd),
                                                .kv_ld = (size_t)c.hd,
                                                .dq = dq,
                                                .dk = dk,
                                                .dv = dv,
                                                .n_rows = (uint32_t)c.rows,
                                                .n_q = (uint32_t)heads,
                                                .head_size = 12,
                                                .steps = steps,
                                                .scale = 0.25f,
                                                .scratch = scratch};
            k->train.attention_backward(&args);
            const size_t all = (size_t)(nq + 2 * nk);
            if (c.rows > 1) { /* one key: the softmax is constant, the gradients are 0 */
                assert_gradient(attention_of, &c, exact, all, 0, (size_t)nq, dq);
                assert_gradient(attention_of, &c, exact, all, (size_t)nq, (size_t)nk, dk);
            } else {
                for (int i = 0; i < nk; i++) {
                    assert_true(fabs((double)dk[i]) < 1e-6);
                }
            }
            assert_gradient(attention_of, &c, exact, all, (size_t)(nq + nk), (size_t)nk, dv);
            free(scratch);
        }
    }
}

/* ---- cross-entropy over chunks ---- */

enum { VOCABULARY = 2100, TARGET = 1500 };

static double xent_of(const double *z, void *user)
{
    double sum = 0.0;
    for (int i = 0; i < VOCABULARY; i++) {
        sum += exp(z[i]);
    }
    return log(sum) - z[TARGET];
}

static void test_cross_entropy(void **state)
{
    static float z[VOCABULARY], dz[VOCABULARY];
    static double exact[VOCABULARY];
    float m[3], l[3];
    fill_both(z, exact, VOCABULARY, -5.0, 8.0);
    for (uint32_t c = 0; c < 3; c++) {
        const uint32_t n = c == 2 ? VOCABULARY - 2 * VOCAB_CHUNK : VOCAB_CHUNK;
        assert_true(k->chunk_stats(z + c * VOCAB_CHUNK, n, &m[c], &l[c]));
    }
    chunk_stats_merge(m, l, 3);
    const double loss = xent_of(exact, NULL);
    assert_true(fabs((double)xent_loss(m[0], l[0], z[TARGET]) - loss) < 1e-6 * loss);
    /* in two shards, the target in the second */
    k->train.xent_backward(z, VOCAB_CHUNK, m[0], l[0], XENT_NO_TARGET, 1.0f, dz);
    k->train.xent_backward(z + VOCAB_CHUNK, VOCABULARY - VOCAB_CHUNK, m[0], l[0],
                           TARGET - VOCAB_CHUNK, 1.0f, dz + VOCAB_CHUNK);
    assert_gradient(xent_of, NULL, exact, VOCABULARY, 1000, 600, dz + 1000);
    const float scaled = dz[7] * 0.125f; /* a power of two scales exactly */
    k->train.xent_backward(z, VOCAB_CHUNK, m[0], l[0], XENT_NO_TARGET, 0.125f, dz);
    assert_true(dz[7] == scaled);
}

/* ---- products against float64 ---- */

static void test_gemm(void **state)
{
    enum { M = 7, N = 11, K = 96 };
    float a[M * K], b[N * K], c[M * N], scratch[1];
    TreeStep steps[4];
    GemmSegment segments[4];
    numbers_fill(&numbers, a, M * K, -1.0, 1.0);
    numbers_fill(&numbers, b, N * K, -1.0, 1.0);
    gemm_whole_tree(4, steps);
    for (uint32_t u = 0; u < 4; u++) {
        segments[u] = (GemmSegment){.a = a + 24 * u,
                                    .a_row = K,
                                    .a_step = 1,
                                    .b = b + 24 * u,
                                    .b_step = 1,
                                    .b_column = K,
                                    .length = 24,
                                    .step = steps[u]};
    }
    const GemmArgs args = {
        .m = M, .n = N, .segments = segments, .n_segments = 4, .c = c, .ld = N, .scratch = scratch};
    k->train.gemm(&args);
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            double want = 0.0;
            for (int t = 0; t < K; t++) {
                want += (double)a[i * K + t] * (double)b[j * K + t];
            }
            assert_true(fabs((double)c[i * N + j] - want) < 1e-5);
        }
    }
}

/* The whole tree is tree_program()'s where that reaches. */
static void test_whole_tree(void **state)
{
    TreeStep steps[TREE_LEAVES_LIMIT], want[TREE_LEAVES_LIMIT];
    for (uint32_t n = 1; n <= TREE_LEAVES_LIMIT; n++) {
        tree_program(n, 0, n, want);
        gemm_whole_tree(n, steps);
        assert_memory_equal(steps, want, n * sizeof *steps);
    }
}

/* ---- optimizers against float64 ---- */

static void test_adamw(void **state)
{
    enum { N = 19, STEPS = 5 };
    float w[N], m[N] = {0}, v[N] = {0}, g[N];
    double wd[N], md[N] = {0}, vd[N] = {0};
    fill_both(w, wd, N, -1.0, 1.0);
    for (int t = 1; t <= STEPS; t++) {
        numbers_fill(&numbers, g, N, -0.1, 0.1);
        const double c1 = 1.0 - pow(0.9, t), c2 = 1.0 - pow(0.95, t);
        const AdamwScalars s = {.rate = 1e-2f,
                                .beta1 = 0.9f,
                                .rest1 = 0.1f,
                                .beta2 = 0.95f,
                                .rest2 = 0.05f,
                                .correct1 = (float)(1.0 / c1),
                                .correct2 = (float)(1.0 / c2),
                                .eps = 1e-8f,
                                .decay = 0.1f,
                                .clip = 0.5f};
        k->train.adamw(&s, N, g, m, v, w);
        for (int i = 0; i < N; i++) {
            const double h = (double)g[i] * 0.5;
            md[i] = 0.9 * md[i] + 0.1 * h;
            vd[i] = 0.95 * vd[i] + 0.05 * h * h;
            wd[i] -= 1e-2 * (md[i] / c1 / (sqrt(vd[i] / c2) + 1e-8) + 0.1 * wd[i]);
            assert_true(fabs((double)w[i] - wd[i]) < 1e-6);
        }
    }
}

/* FORMULAS 19. */
static void test_first_adamw_step_is_the_rate(void **state)
{
    float w[3] = {1.0f, 2.0f, 3.0f}, m[3] = {0}, v[3] = {0};
    const float g[3] = {1e-3f, -5.0f, 0.0f};
    const AdamwScalars s = {.rate = 0.125f,
                            .beta1 = 0.9f,
                            .rest1 = 0.1f,
                            .beta2 = 0.999f,
                            .rest2 = 0.001f,
                            .correct1 = 10.0f,
                            .correct2 = 1000.0f,
                            .eps = 1e-12f,
                            .clip = 1.0f};
    k->train.adamw(&s, 3, g, m, v, w);
    assert_true(fabs((double)w[0] - 0.875) < 1e-5 && fabs((double)w[1] - 2.125) < 1e-5 &&
                w[2] == 3.0f);
}

static void test_sgd(void **state)
{
    for (int nesterov = 0; nesterov < 2; nesterov++) {
        float w = 0.5f, b = 0.0f;
        double wd = 0.5, bd = 0.0;
        const SgdScalars s = {0.1f, 0.9f, 0.01f, 1.0f, nesterov != 0};
        for (int t = 0; t < 6; t++) {
            const float g = (float)numbers_uniform(&numbers, -1.0, 1.0);
            k->train.sgd(&s, 1, &g, &b, &w);
            const double h = (double)g + 0.01 * wd;
            bd = 0.9 * bd + h;
            wd -= 0.1 * (nesterov ? h + 0.9 * bd : bd);
            assert_true(fabs((double)w - wd) < 1e-6);
        }
    }
}

static void test_sums(void **state)
{
    float x[300], g[2] = {3.0f, -0.75f};
    double want = 0.0, total = 0.0;
    numbers_fill(&numbers, x, 300, -1.0, 1.0);
    for (int r = 0; r < 7; r++) {
        for (int c = 0; c < 29; c++) {
            want += (double)x[r * 40 + c] * (double)x[r * 40 + c];
        }
    }
    assert_true(fabs((double)k->train.sum_squares(x, 40, 7, 29) - want) < 1e-5 * want);
    for (int i = 0; i < 300; i++) {
        total += (double)x[i];
    }
    assert_true(fabs((double)node_sum(x, 300) - total) < 1e-4);
    const float three[] = {0x1p24f, 1.0f, 1.0f}; /* (a + b) + c rounds twice, a + (b + c) not */
    assert_true(node_sum(three, 3) == 0x1p24f);
    k->train.gradient_finish(g, 2, 0.25f, 3.0f);
    assert_true(g[0] == 0.25f && g[1] == -0.0625f);
}

int main(void)
{
    k = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norms),
        cmocka_unit_test(test_norm_gradient_is_added),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_activations_far_out),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_whole_tree),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_first_adamw_step_is_the_rate),
        cmocka_unit_test(test_sgd),
        cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
