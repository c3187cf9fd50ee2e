/* Device kernels of training and of logits against generic, by bits. */
#include "tests/kernels/cuda_case.h"
#include "proto/base/hash.h"
#include "kernels/ops/xent.h"

static const Kernels *generic;

static void assert_device(const char *what, const float *device, const float *want, size_t n)
{
    float *got = malloc(n * sizeof *got);
    device_read(got, device, n * sizeof *got);
    assert_bits(what, got, want, n);
    free(got);
}

static void test_activation_gradients(void **state)
{
    enum { N = 777 };
    Numbers numbers = {1};
    float x[N], up[N], dy[N], want[N], want_up[N];
    numbers_fill(&numbers, x, N, -40, 40);
    numbers_fill(&numbers, up, N, -3, 3);
    numbers_fill(&numbers, dy, N, -3, 3);
    x[0] = 1e30f;
    x[1] = -200;
    FOR_EACH_ORDER
    {
        float *dx = device_floats(x, N), *du = device_floats(up, N), *dd = device_floats(dy, N);
        float *out = device_floats(NULL, N);
        generic->train.gelu_backward(x, dy, N, want);
        run(weft_cuda_gelu_backward(dx, dd, N, out, NULL));
        assert_device("gelu_backward", out, want, N);
        generic->train.swiglu_backward(x, up, dy, N, want, want_up);
        run(weft_cuda_swiglu_backward(dx, du, dd, N, dx, du, NULL)); /* in place */
        assert_device("swiglu_backward: gate", dx, want, N);
        assert_device("swiglu_backward: up", du, want_up, N);
        device_free_all();
    }
}

static void test_optimizers(void **state)
{
    enum { N = 1001 };
    Numbers numbers = {2};
    const AdamwScalars adam = {1e-3f, 0.9f, 0.1f, 0.95f, 0.05f, 1.5f, 1.2f, 1e-8f, 0.1f, 0.7f};
    float g[N], m[N], v[N], w[N];
    for (unsigned nesterov = 0; nesterov < 2; nesterov++) {
        const SgdScalars sgd = {1e-2f, 0.9f, 0.01f, 0.8f, nesterov != 0};
        numbers_fill(&numbers, g, N, -3, 3);
        numbers_fill(&numbers, m, N, -3, 3);
        numbers_fill(&numbers, v, N, 0, 3);
        numbers_fill(&numbers, w, N, -3, 3);
        float *dg = device_floats(g, N), *dm = device_floats(m, N), *dv = device_floats(v, N);
        float *dw = device_floats(w, N);
        run(weft_cuda_gradient_finish(dg, N, 0.25f, 3.0f, NULL));
        run(weft_cuda_adamw(&adam, N, dg, dm, dv, dw, NULL));
        run(weft_cuda_sgd(&sgd, N, dg, dm, dw, NULL));
        generic->train.gradient_finish(g, N, 0.25f, 3.0f);
        generic->train.adamw(&adam, N, g, m, v, w);
        generic->train.sgd(&sgd, N, g, m, w);
        assert_device("gradient", dg, g, N);
        assert_device("first moment", dm, m, N);
        assert_device("second moment", dv, v, N);
        assert_device("weights", dw, w, N);
        device_free_all();
    }
}

static void test_sum_squares(void **state)
{
    static const uint32_t shapes[][3] = {{1, 1, 1},    {32, 7, 9},      {3, 100, 128},
                                         {32, 31, 31}, {1, 1024, 1024}, {5, 33, 40}};
    enum { TILES = sizeof shapes / sizeof shapes[0] };
    Numbers numbers = {3};
    FOR_EACH_ORDER
    {
        CudaTile tiles[TILES];
        float want[TILES];
        for (unsigned i = 0; i < TILES; i++) {
            const uint32_t rows = shapes[i][0], columns = shapes[i][1], ld = shapes[i][2];
            float *x = padded_rows(&numbers, rows, columns, ld, -2, 2);
            want[i] = generic->train.sum_squares(x, ld, rows, columns);
            tiles[i] = (CudaTile){device_floats(x, rows * ld), ld, rows, columns};
            free(x);
        }
        float *out = device_floats(NULL, TILES);
        run(weft_cuda_sum_squares(device_of(tiles, sizeof tiles), TILES, out, NULL));
        assert_device("sum_squares", out, want, TILES);
        device_free_all();
    }
}

static void norm_case(Numbers *numbers, uint32_t n, bool layer, bool with_bias)
{
    enum { ROWS = 5 };
    const size_t ld = n + 3, total = ROWS * ld;
    float *x = padded_rows(numbers, ROWS, n, ld, -2, 3),
          *dy = padded_rows(numbers, ROWS, n, ld, -2, 2);
    float *dx = padded_rows(numbers, ROWS, n, ld, -2, 2),
          *weight = padded_rows(numbers, 1, n, n, -2, 2);
    float *dw = padded_rows(numbers, 1, n, n, -1, 1), *db = padded_rows(numbers, 1, n, n, -1, 1);
    float *want = malloc(total * sizeof *want), *want_dw = malloc(n * sizeof *want);
    float *want_db = malloc(n * sizeof *want), stats[2 * ROWS];
    FOR_EACH_ORDER
    {
        float *d_x = device_floats(x, total), *d_dy = device_floats(dy, total);
        float *d_dx = device_floats(dx, total), *d_w = device_floats(weight, n);
        float *d_dw = device_floats(dw, n), *d_db = device_floats(db, n);
        float *d_stats = device_floats(NULL, 2 * ROWS);
        memcpy(want, dx, total * sizeof *want);
        memcpy(want_dw, dw, n * sizeof *want);
        memcpy(want_db, db, n * sizeof *want);
        for (unsigned r = 0; r < ROWS; r++) {
            (layer ? generic->train.layer_norm_backward : generic->train.rms_norm_backward)(
                x + r * ld, weight, dy + r * ld, 1e-5f, n, want + r * ld, stats + 2 * r);
        }
        generic->train.norm_weight_backward(x, dy, ld, stats, ROWS, n, want_dw,
                                            with_bias ? want_db : NULL);
        run((layer ? weft_cuda_layer_norm_backward : weft_cuda_rms_norm_backward)(
            d_x, d_w, d_dy, ld, 1e-5f, ROWS, n, d_dx, d_stats, NULL));
        assert_device("norm backward", d_dx, want, total);
        assert_device("stats", d_stats, stats, 2 * ROWS);
        run(weft_cuda_norm_weight_backward(d_x, d_dy, ld, d_stats, ROWS, n, d_dw,
                                           with_bias ? d_db : NULL, NULL));
        assert_device("dweight", d_dw, want_dw, n);
        assert_device("dbias", d_db, want_db, n);
        run(weft_cuda_sum_rows(d_dy, ld, ROWS, n, d_db, NULL));
        generic->train.sum_rows(dy, ld, ROWS, n, want_db);
        assert_device("sum_rows", d_db, want_db, n);
        device_free_all();
    }
    free(x), free(dy), free(dx), free(weight), free(dw), free(db);
    free(want), free(want_dw), free(want_db);
}

static void test_norm_gradients(void **state)
{
    static const uint32_t sizes[] = {1, 31, 33, 256, 577};
    Numbers numbers = {4};
    for (unsigned s = 0; s < 5; s++) {
        norm_case(&numbers, sizes[s], false, false);
        norm_case(&numbers, sizes[s], true, true);
    }
}

/* ---- logits ---- */

static void test_stats_and_loss(void **state)
{
    static const uint32_t sizes[] = {1, 1000, 1024, 3 * 1024 + 5, 9 * 1024, 37 * 1024 + 1};
    enum { ROWS = 2 };
    Numbers numbers = {5};
    for (unsigned s = 0; s < 6; s++) {
        const uint32_t n = sizes[s], n_chunks = (n + 1023) / 1024;
        const size_t ld = n + 1;
        float *z = padded_rows(&numbers, ROWS, n, ld, -30, 30), divisors[ROWS] = {0.7f, 1.3f};
        float *m = malloc(ROWS * n_chunks * sizeof *m), *l = malloc(ROWS * n_chunks * sizeof *l);
        float *tempered = malloc(n * sizeof *tempered), *dz = malloc(ROWS * ld * sizeof *dz);
        float *whole_m = malloc(n_chunks * sizeof *m), *whole_l = malloc(n_chunks * sizeof *l);
        FOR_EACH_ORDER
        {
            if (order_ > 0 && s == 5) {
                break;
            }
            float *d_z = device_floats(z, ROWS * ld), *d_m = device_floats(NULL, ROWS * n_chunks);
            float *d_l = device_floats(NULL, ROWS * n_chunks);
            float *row_m = device_floats(NULL, ROWS), *row_l = device_floats(NULL, ROWS);
            float row_stats[2][ROWS], logit[ROWS], loss[ROWS];
            uint32_t targets[ROWS] = {n / 2, XENT_NO_TARGET};
            for (unsigned with = 0; with < 2; with++) {
                for (unsigned r = 0; r < ROWS; r++) {
                    for (uint32_t i = 0; i < n; i++) {
                        tempered[i] = with ? z[r * ld + i] / divisors[r] : z[r * ld + i];
                    }
                    for (uint32_t c = 0; c < n_chunks; c++) {
                        const uint32_t rest = n - c * 1024;
                        assert_true(
                            generic->chunk_stats(tempered + c * 1024, rest < 1024 ? rest : 1024,
                                                 &m[r * n_chunks + c], &l[r * n_chunks + c]));
                    }
                    memcpy(whole_m, m + r * n_chunks, n_chunks * sizeof *m);
                    memcpy(whole_l, l + r * n_chunks, n_chunks * sizeof *l);
                    chunk_stats_merge(whole_m, whole_l, n_chunks);
                    row_stats[0][r] = whole_m[0];
                    row_stats[1][r] = whole_l[0];
                    logit[r] = z[r * ld + n / 2];
                    loss[r] = xent_loss(whole_m[0], whole_l[0], logit[r]);
                }
                run(weft_cuda_chunk_stats(d_z, ld, with ? device_floats(divisors, ROWS) : NULL,
                                          ROWS, n, d_m, d_l, NULL));
                assert_device("m", d_m, m, ROWS * n_chunks);
                assert_device("l", d_l, l, ROWS * n_chunks);
                run(weft_cuda_merge_stats(d_m, d_l, ROWS, n_chunks, row_m, row_l, NULL));
                assert_device("row m", row_m, row_stats[0], ROWS);
                assert_device("row l", row_l, row_stats[1], ROWS);
            }
            float *d_loss = device_floats(NULL, ROWS);
            run(weft_cuda_xent_loss(row_m, row_l, device_floats(logit, ROWS), ROWS, d_loss, NULL));
            assert_device("loss", d_loss, loss, ROWS);
            memcpy(dz, z, ROWS * ld * sizeof *dz);
            for (unsigned r = 0; r < ROWS; r++) {
                generic->train.xent_backward(z + r * ld, n, row_stats[0][r], row_stats[1][r],
                                             targets[r], 0.125f, dz + r * ld);
            }
            run(weft_cuda_xent_backward(d_z, ld, ROWS, n, row_m, row_l,
                                        device_of(targets, sizeof targets), 0.125f, d_z, NULL));
            assert_device("dz", d_z, dz, ROWS * ld);
            device_free_all();
        }
        free(z), free(m), free(l), free(tempered), free(dz), free(whole_m), free(whole_l);
    }
}

static void test_logit_that_is_not_finite(void **state)
{
    float z[2048] = {0}, m[2], l[2];
    z[1500] = -INFINITY;
    float *d_m = device_floats(NULL, 2), *d_l = device_floats(NULL, 2);
    run(weft_cuda_chunk_stats(device_floats(z, 2048), 2048, NULL, 1, 2048, d_m, d_l, NULL));
    device_read(m, d_m, sizeof m);
    device_read(l, d_l, sizeof l);
    assert_true(m[0] == 0.0f && l[0] == 1024.0f && isnan(m[1]) && isnan(l[1]));
    device_free_all();
}

typedef struct Ranked {
    float value;
    uint32_t id;
} Ranked;

static int by_rank(const void *a, const void *b)
{
    const Ranked *x = a, *y = b;
    return x->value > y->value ? -1 : x->value < y->value ? 1 : x->id < y->id ? -1 : 1;
}

static void candidates_case(Numbers *numbers, uint32_t n, uint32_t keep)
{
    enum { ROWS = 3, FIRST = 2048 };
    const size_t ld = n + 2;
    const DeviceDraw draws[ROWS] = {{.seed = 5, .temperature = 0.0f, .noise = 1},
                                    {.seed = 0x123456789abcdefu,
                                     .choice = 2,
                                     .position = 77,
                                     .purpose = 1,
                                     .temperature = 0.8f,
                                     .noise = 1},
                                    {.temperature = 1.5f}};
    float *z = padded_rows(numbers, ROWS, n, ld, -8, 8);
    for (uint32_t i = 0; i < n; i++) { /* ties, and both zeros */
        z[i] = i % 7 == 3 ? -0.0f : floorf(z[i]) + 0.0f;
    }
    Ranked *ranked = malloc(n * sizeof *ranked);
    float *noise = malloc(n * sizeof *noise);
    DeviceCandidate *got = malloc(ROWS * keep * sizeof *got);
    FOR_EACH_ORDER
    {
        DeviceCandidate *out = device_of(NULL, ROWS * keep * sizeof *out);
        run(weft_cuda_candidates(device_floats(z, ROWS * ld), ld, device_of(draws, sizeof draws),
                                 FIRST, ROWS, n, keep, out,
                                 device_of(NULL, weft_cuda_candidates_bytes(ROWS, n, keep)), NULL));
        device_read(got, out, ROWS * keep * sizeof *got);
        for (unsigned r = 0; r < ROWS; r++) {
            const GumbelKey key = {draws[r].seed, draws[r].choice, draws[r].position,
                                   draws[r].purpose};
            generic->gumbel(&key, FIRST, n, noise);
            for (uint32_t i = 0; i < n; i++) {
                float v = z[r * ld + i];
                if (draws[r].temperature != 0) {
                    v = v / draws[r].temperature;
                    v = draws[r].noise ? v + noise[i] : v;
                }
                ranked[i] = (Ranked){v, FIRST + i};
            }
            qsort(ranked, n, sizeof *ranked, by_rank);
            for (uint32_t i = 0; i < keep; i++) {
                const DeviceCandidate *c = &got[r * keep + i];
                if (i >= n) {
                    assert_true(c->value == -INFINITY);
                    continue;
                }
                if (c->id != ranked[i].id || c->value != ranked[i].value ||
                    c->logit != z[r * ld + c->id - FIRST]) {
                    fail_msg("row %u, rank %u of %u: id %u value %a, expected %u %a", r, i, n,
                             c->id, (double)c->value, ranked[i].id, (double)ranked[i].value);
                }
            }
        }
        device_free_all();
    }
    free(z), free(ranked), free(noise), free(got);
}

/* Digests and statistics of chunks, tempered and raw; the last chunk short. */
static void chunk_parts_case(Numbers *numbers, uint32_t n)
{
    enum { ROWS = 3 };
    const size_t ld = n + 1;
    const uint32_t n_chunks = (n + 1023) / 1024;
    const DeviceDraw draws[ROWS] = {
        {.temperature = 0.7f}, {.temperature = 0.0f}, {.seed = 3, .temperature = 2.0f}};
    float *z = padded_rows(numbers, ROWS, n, ld, -20, 20);
    z[ld + 3] = -0.0f;
    z[2 * ld + n - 1] = INFINITY;
    DeviceChunk *got = malloc(ROWS * n_chunks * sizeof *got);
    float tempered[1024];
    FOR_EACH_ORDER
    {
        DeviceChunk *out = device_of(NULL, ROWS * n_chunks * sizeof *out);
        run(weft_cuda_chunk_parts(device_floats(z, ROWS * ld), ld, device_of(draws, sizeof draws),
                                  ROWS, n, out, NULL));
        device_read(got, out, ROWS * n_chunks * sizeof *got);
        for (unsigned i = 0; i < ROWS * n_chunks; i++) {
            const unsigned r = i / n_chunks, first = i % n_chunks * 1024;
            const uint32_t count = n - first < 1024 ? n - first : 1024;
            const float *logits = z + r * ld + first;
            float want[4] = {0};
            const Hash128 hash = hash128(logits, count * sizeof *logits);
            assert_memory_equal(got[i].hash, hash.bytes, 16);
            if (!generic->chunk_stats(logits, count, &want[0], &want[1])) {
                want[0] = want[1] = NAN;
            }
            if (draws[r].temperature != 0) {
                for (unsigned k = 0; k < count; k++) {
                    tempered[k] = logits[k] / draws[r].temperature;
                }
                if (!generic->chunk_stats(tempered, count, &want[2], &want[3])) {
                    want[2] = want[3] = NAN;
                }
            }
            assert_bits("chunk", &got[i].m, want, 4);
        }
        device_free_all();
    }
    free(z), free(got);
}

static void test_chunk_parts(void **state)
{
    static const uint32_t sizes[] = {61, 64, 65, 80, 256, 257, 1023, 1024, 1024 + 61, 2500};
    Numbers numbers = {61};
    for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        chunk_parts_case(&numbers, sizes[i]);
    }
    assert_int_not_equal(weft_cuda_chunk_parts(NULL, 0, NULL, 1, 1024 + 60, NULL, NULL), 0);
}

static void test_candidates(void **state)
{
    Numbers numbers = {6};
    candidates_case(&numbers, 5, 8);
    candidates_case(&numbers, 1024, 1);
    candidates_case(&numbers, 2500, 40);
    candidates_case(&numbers, 5 * 1024 + 3, 300); /* three rounds */
    assert_int_not_equal(weft_cuda_candidates(NULL, 0, NULL, 0, 1, 10, 513, NULL, NULL, NULL), 0);
}

/* ---- attention ---- */

/* n floats of q and dout and n_kv of k and v on the device, and n_out for each of dk and dv. dq
 * goes over dout, which is then used up. */
static CudaAttentionBackward on_device(const float *q, const float *dout, size_t n, size_t q_ld,
                                       const float *k, const float *v, size_t n_kv, size_t kv_ld,
                                       size_t n_out)
{
    CudaAttentionBackward a = {.q = device_floats(q, n),
                               .dout = device_floats(dout, n),
                               .k = device_floats(k, n_kv),
                               .v = device_floats(v, n_kv),
                               .q_ld = q_ld,
                               .kv_ld = kv_ld,
                               .dk = device_floats(NULL, n_out),
                               .dv = device_floats(NULL, n_out)};
    a.dq = (float *)a.dout;
    return a;
}

static void attention_case(Numbers *numbers, uint32_t rows, uint32_t head_size, uint32_t n_heads,
                           uint32_t first, uint32_t last)
{
    const uint32_t n_q = last - first;
    const size_t q_ld = n_q * head_size + 3, kv_ld = head_size + 2;
    TreeStep steps[64];
    const uint32_t n_subtrees = tree_program(n_heads, first, last, steps);
    const size_t n = rows * q_ld, n_kv = rows * kv_ld, n_out = n_subtrees * n_kv;
    float *q = padded_rows(numbers, rows, n_q * head_size, q_ld, -2, 2);
    float *dout = padded_rows(numbers, rows, n_q * head_size, q_ld, -2, 2);
    float *k = padded_rows(numbers, rows, head_size, kv_ld, -2, 2);
    float *v = padded_rows(numbers, rows, head_size, kv_ld, -2, 2);
    float *dq = malloc(n * sizeof *dq), *dk = malloc(n_out * sizeof *dk);
    float *dv = malloc(n_out * sizeof *dv);
    memset(dk, 0xff, n_out * sizeof *dk);
    memset(dv, 0xff, n_out * sizeof *dv);
    memcpy(dq, dout, n * sizeof *dq);
    const size_t scratch = attention_backward_scratch_floats(rows, head_size, n_q);
    AttentionBackwardArgs want = {.q = q,
                                  .dout = dout,
                                  .k = k,
                                  .v = v,
                                  .q_ld = q_ld,
                                  .kv_ld = kv_ld,
                                  .dq = dq,
                                  .dk = dk,
                                  .dv = dv,
                                  .subtree_stride = n_kv,
                                  .n_rows = rows,
                                  .n_q = n_q,
                                  .head_size = head_size,
                                  .steps = steps,
                                  .scale = 0.2f,
                                  .scratch = malloc(scratch * sizeof(float))};
    generic->train.attention_backward(&want);
    FOR_EACH_ORDER
    {
        CudaAttentionBackward a = on_device(q, dout, n, q_ld, k, v, n_kv, kv_ld, n_out);
        a.subtree_stride = n_kv;
        a.n_rows = rows;
        a.n_q = n_q;
        a.head_size = head_size;
        a.steps = steps;
        a.scale = 0.2f;
        a.workspace = device_of(NULL, weft_cuda_attention_backward_bytes(&a));
        run(weft_cuda_attention_backward(&a, NULL));
        assert_device("dk", a.dk, dk, n_out);
        assert_device("dv", a.dv, dv, n_out);
        assert_device("dq", a.dq, dq, n);
        device_free_all();
    }
    free(q), free(dout), free(k), free(v), free(dq), free(dk), free(dv), free(want.scratch);
}

/* ---- 16-bit operands: documents of n_kv_heads heads, each read by n_q query heads ---- */

enum { DOCUMENTS = 3 };

typedef struct HalfCase {
    uint32_t rows[DOCUMENTS], head_size, n_kv_heads, n_q;
    uint32_t items_at_once; /* that the workspace has room for; 0: all */
} HalfCase;

/* Within `close` of the largest value. */
static void expect_close(const char *what, const HalfCase *c, const float *device,
                         const float *want, uint32_t n, size_t ld, float close)
{
    const uint32_t rows = c->rows[0] + c->rows[1] + c->rows[2];
    float *got = malloc(rows * ld * sizeof *got), largest = 0.0f, apart = 0.0f;
    device_read(got, device, rows * ld * sizeof *got);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t i = 0; i < n; i++) {
            const float w = want[r * ld + i], d = fabsf(got[r * ld + i] - w);
            largest = fmaxf(largest, fabsf(w));
            apart = d <= apart ? apart : d; /* a NaN stays */
        }
        for (size_t i = n; i < ld; i++) { /* left alone */
            assert_true(isnan(got[r * ld + i]));
        }
    }
    if (!(apart <= close * largest)) {
        fail_msg("%s of %u, %u and %u rows, head size %u: %g apart with %g as the largest, at most "
                 "%g of it",
                 what, c->rows[0], c->rows[1], c->rows[2], c->head_size, (double)apart,
                 (double)largest, (double)close);
    }
    note_closeness("attention's gradients of 16 bits", what, (double)(apart / largest),
                   (double)close, "the largest value");
    free(got);
}

/* What generic makes of each document and KV head. */
static void specified(const HalfCase *c, const float *q, const float *dout, const float *k,
                      const float *v, size_t q_ld, size_t kv_ld, const TreeStep *steps, float *dq,
                      float *dk, float *dv)
{
    for (uint32_t d = 0, row = 0; d < DOCUMENTS; row += c->rows[d++]) {
        for (uint32_t h = 0; h < c->n_kv_heads; h++) {
            const size_t at = row * q_ld + h * c->n_q * c->head_size,
                         kv = row * kv_ld + h * c->head_size;
            AttentionBackwardArgs a = {.q = q + at,
                                       .dout = dout + at,
                                       .k = k + kv,
                                       .v = v + kv,
                                       .q_ld = q_ld,
                                       .kv_ld = kv_ld,
                                       .dq = dq + at,
                                       .dk = dk + kv,
                                       .dv = dv + kv,
                                       .n_rows = c->rows[d],
                                       .n_q = c->n_q,
                                       .head_size = c->head_size,
                                       .steps = steps,
                                       .scale = 0.15f};
            a.scratch = malloc(attention_backward_scratch_floats(a.n_rows, a.head_size, a.n_q) *
                               sizeof(float));
            generic->train.attention_backward(&a);
            free(a.scratch);
        }
    }
}

static void half_case(Numbers *numbers, const HalfCase *c, Dtype operands, float close)
{
    const uint32_t rows = c->rows[0] + c->rows[1] + c->rows[2];
    const uint32_t width = c->n_kv_heads * c->n_q * c->head_size,
                   kv_width = c->n_kv_heads * c->head_size;
    const size_t q_ld = width + 3, kv_ld = kv_width + 1, n = rows * q_ld, n_kv = rows * kv_ld;
    TreeStep steps[64];
    assert_int_equal(tree_program(c->n_q, 0, c->n_q, steps), 1);
    float *q = padded_rows(numbers, rows, width, q_ld, -2, 2),
          *dout = padded_rows(numbers, rows, width, q_ld, -2, 2),
          *k = padded_rows(numbers, rows, kv_width, kv_ld, -2, 2),
          *v = padded_rows(numbers, rows, kv_width, kv_ld, -2, 2);
    float *dq = malloc(n * sizeof *dq), *dk = malloc(n_kv * sizeof *dk),
          *dv = malloc(n_kv * sizeof *dv), *first = malloc(n * sizeof *first),
          *again = malloc(n * sizeof *again);
    specified(c, q, dout, k, v, q_ld, kv_ld, steps, dq, dk, dv);
    CudaSegment segments[DOCUMENTS] = {0};
    uint32_t longest = 0;
    for (uint32_t d = 0, row = 0; d < DOCUMENTS; row += c->rows[d++]) {
        segments[d].row0 = row;
        segments[d].n_rows = c->rows[d];
        longest = c->rows[d] > longest ? c->rows[d] : longest;
    }
    FOR_EACH_ORDER
    {
        if (order_ > 0 && operands == DTYPE_BF16) {
            break; /* the same way as f16 */
        }
        CudaAttentionBackward a = on_device(q, dout, n, q_ld, k, v, n_kv, kv_ld, n_kv);
        a.n_rows = longest;
        a.n_q = c->n_q;
        a.head_size = c->head_size;
        a.steps = steps;
        a.scale = 0.15f;
        a.segments = device_of(segments, sizeof segments);
        a.n_segments = DOCUMENTS;
        a.n_kv_heads = c->n_kv_heads;
        a.operands = operands;
        const uint32_t items = DOCUMENTS * c->n_kv_heads;
        a.workspace_bytes = weft_cuda_attention_backward_bytes(&a) *
                            (c->items_at_once > 0 ? c->items_at_once : items);
        a.workspace = device_of(NULL, a.workspace_bytes);
        run(weft_cuda_attention_backward(&a, NULL));
        expect_close("dk", c, a.dk, dk, kv_width, kv_ld, close);
        expect_close("dv", c, a.dv, dv, kv_width, kv_ld, close);
        expect_close("dq", c, a.dq, dq, width, q_ld, close);
        device_read(order_ == 0 ? first : again, a.dq, n * sizeof *first);
        if (order_ > 0) {
            assert_memory_equal(first, again, n * sizeof *first);
        }
        device_free_all();
    }
    free(q), free(dout), free(k), free(v), free(dq), free(dk), free(dv), free(first), free(again);
}

/* Lengths beside the tiles of 64 rows and the turns of 32, head sizes beside multiples of 16, two
 * and four passes' worth of dimensions, groups of heads, a workspace that has not room for all. */
static void test_attention_gradients_of_16_bits(void **state)
{
    static const HalfCase cases[] = {
        {{1, 2, 17}, 16, 1, 1, 0},  {{31, 32, 33}, 48, 2, 1, 0}, {{64, 65, 100}, 64, 1, 3, 0},
        {{63, 5, 97}, 72, 2, 2, 3}, {{40, 1, 66}, 128, 1, 1, 1}, {{35, 3, 66}, 200, 1, 1, 0},
        {{33, 9, 1}, 256, 1, 2, 2}, {{3, 20, 7}, 7, 2, 5, 0},
    };
    Numbers numbers = {71};
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        half_case(&numbers, &cases[i], DTYPE_F16, 0x1p-9f);
        half_case(&numbers, &cases[i], DTYPE_BF16, 0x1p-5f);
    }
}

/* A document's bits are its own: beside others or alone, in whatever order. */
static void test_attention_gradients_of_a_document_alone(void **state)
{
    enum { ROWS = 70, WIDTH = 64 };
    const size_t n = 2 * ROWS * WIDTH;
    Numbers numbers = {72};
    TreeStep steps[64];
    tree_program(1, 0, 1, steps);
    float *x[4], *whole[3], *alone[3];
    for (unsigned i = 0; i < 4; i++) {
        x[i] = padded_rows(&numbers, 2 * ROWS, WIDTH, WIDTH, -2, 2);
    }
    for (unsigned together = 0; together < 2; together++) {
        const CudaSegment segments[2] = {{.row0 = together ? 0 : ROWS, .n_rows = ROWS},
                                         {.row0 = ROWS, .n_rows = ROWS}};
        CudaAttentionBackward a = {.q = device_floats(x[0], n),
                                   .dout = device_floats(x[1], n),
                                   .k = device_floats(x[2], n),
                                   .v = device_floats(x[3], n),
                                   .q_ld = WIDTH,
                                   .kv_ld = WIDTH,
                                   .dq = device_floats(NULL, n),
                                   .dk = device_floats(NULL, n),
                                   .dv = device_floats(NULL, n),
                                   .n_rows = ROWS,
                                   .n_q = 1,
                                   .head_size = WIDTH,
                                   .steps = steps,
                                   .scale = 0.125f,
                                   .segments = device_of(segments, sizeof segments),
                                   .n_segments = together ? 2 : 1,
                                   .operands = DTYPE_BF16};
        a.workspace_bytes = 2 * weft_cuda_attention_backward_bytes(&a);
        a.workspace = device_of(NULL, a.workspace_bytes);
        run(weft_cuda_attention_backward(&a, NULL));
        float *const out[3] = {a.dq, a.dk, a.dv};
        for (unsigned i = 0; i < 3; i++) {
            float **to = together ? &whole[i] : &alone[i];
            *to = malloc(n * sizeof **to);
            device_read(*to, out[i], n * sizeof **to);
        }
        device_free_all();
    }
    for (unsigned i = 0; i < 3; i++) {
        assert_memory_equal(whole[i] + n / 2, alone[i] + n / 2, n / 2 * sizeof(float));
        free(whole[i]), free(alone[i]);
    }
    for (unsigned i = 0; i < 4; i++) {
        free(x[i]);
    }
}

static void test_attention_gradients(void **state)
{
    Numbers numbers = {7};
    attention_case(&numbers, 1, 16, 1, 0, 1);
    attention_case(&numbers, 43, 48, 3, 0, 3);
    attention_case(&numbers, 70, 64, 2, 0, 2);
    attention_case(&numbers, 20, 160, 7, 1, 6); /* a range with several subtrees */
    attention_case(&numbers, 261, 8, 1, 0, 1);
}

int main(void)
{
    leave_without_device();
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_activation_gradients),
        cmocka_unit_test(test_optimizers),
        cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_norm_gradients),
        cmocka_unit_test(test_stats_and_loss),
        cmocka_unit_test(test_logit_that_is_not_finite),
        cmocka_unit_test(test_chunk_parts),
        cmocka_unit_test(test_candidates),
        cmocka_unit_test(test_attention_gradients),
        cmocka_unit_test(test_attention_gradients_of_16_bits),
        cmocka_unit_test(test_attention_gradients_of_a_document_alone),
    };
    return tell_closeness(cmocka_run_group_tests(tests, NULL, NULL));
}
