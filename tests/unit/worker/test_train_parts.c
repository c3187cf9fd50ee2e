/* The parts of a training step by themselves: order of samples, schedules, tiles, first weights,
 * the fold of gradients, and the training forward pass beside what defines it. */
#include "tests/unit/worker/text_data.h"
#include "tests/unit/worker/toy_training.h"
#include "worker/train/gradient_fold.h"
#include "worker/train/tiles.h"

#include "proto/base/error.h"

#include <glib/gstdio.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* ---- data ---- */

static TokenData *counted(size_t n, uint32_t length)
{
    g_autofree uint32_t *ids = g_new(uint32_t, n);
    for (size_t i = 0; i < n; i++) {
        ids[i] = (uint32_t)i;
    }
    return token_data_new(ids, n, length, NULL);
}

/* Each epoch visits every window once; epochs and seeds have orders of their own. */
static void test_each_window_once_an_epoch(void **state)
{
    for (uint32_t windows = 1; windows < 200; windows += windows < 20 ? 1 : 37) {
        g_autoptr(TokenData) data = counted((size_t)windows * 3 + 1 + windows % 3, 3);
        assert_int_equal(token_data_windows(data), windows);
        uint32_t moved = 0, other = 0;
        for (uint64_t epoch = 0; epoch < 3; epoch++) {
            g_autofree bool *seen = g_new0(bool, windows);
            for (uint64_t i = 0; i < windows; i++) {
                const uint64_t w = token_data_window_of(data, 42, epoch * windows + i);
                assert_true(w < windows && !seen[w]);
                seen[w] = true;
                moved += w != token_data_window_of(data, 42, i);
                other += w != token_data_window_of(data, 43, epoch * windows + i);
            }
        }
        assert_true(windows < 8 || (moved > windows / 2 && other > windows / 2));
    }
}

static void test_windows(void **state)
{
    uint32_t tokens[4], targets[4];
    g_autoptr(TokenData) data = counted(13, 4);
    assert_int_equal(token_data_windows(data), 3);
    token_data_read(data, 2, tokens, targets);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(tokens[i], 8 + i);
        assert_int_equal(targets[i], 9 + i);
    }
    g_autoptr(GError) error = NULL;
    assert_null(token_data_new(tokens, 4, 4, &error));
    assert_non_null(strstr(error->message, "4 tokens, fewer than one sequence of 4"));
}

static void test_text_as_bytes(void **state)
{
    uint32_t tokens[4], targets[4];
    g_autoptr(GError) error = NULL;
    g_autofree char *path = NULL;
    const int fd = g_file_open_tmp("weft-train-XXXXXX", &path, NULL);
    assert_true(g_close(fd, NULL) && g_file_set_contents(path, "abc\xff\n", 5, NULL));
    g_autoptr(TokenData) data = text_data(path, 4, &error);
    assert_non_null(data);
    token_data_read(data, 0, tokens, targets);
    assert_int_equal(tokens[0], 'a');
    assert_int_equal(tokens[3], 0xff);
    assert_int_equal(targets[3], '\n');
    g_remove(path);
    assert_null(text_data(path, 4, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND));
}

/* ---- schedules ---- */

static void test_rates(void **state)
{
    OptimizerSettings s = {
        .rate = 1.0, .schedule = RATE_COSINE, .warmup = 10, .steps = 110, .floor = 0.1};
    assert_true(fabs(schedule_rate(&s, 0) - 0.1) < 1e-12);
    assert_true(fabs(schedule_rate(&s, 9) - 1.0) < 1e-12);
    assert_true(fabs(schedule_rate(&s, 10) - 1.0) < 1e-12);
    for (uint64_t step = 10; step < 110; step += 7) {
        const double want = 0.1 + 0.45 * (1.0 + cos(M_PI * (double)(step - 10) / 100.0));
        assert_true(fabs(schedule_rate(&s, step) - want) < 1e-12);
    }
    assert_true(fabs(schedule_rate(&s, 500) - 0.1) < 1e-12);
    s.schedule = RATE_LINEAR;
    assert_true(fabs(schedule_rate(&s, 60) - 0.55) < 1e-12);
    s.schedule = RATE_CONSTANT;
    assert_true(schedule_rate(&s, 60) == 1.0);
}

static void test_scalars(void **state)
{
    const OptimizerSettings s = {
        .rate = 0.5, .beta1 = 0.9, .beta2 = 0.99, .decay = 0.1, .clip = 2.0, .eps = 1e-8};
    const AdamwScalars a = schedule_adamw(&s, 2, 0.25f, true);
    assert_true(fabs((double)a.correct1 - 1.0 / (1.0 - 0.9 * 0.9 * 0.9)) < 1e-6);
    assert_true(a.decay == 0.1f && a.clip == 0.25f && a.rate == 0.5f);
    assert_true(schedule_adamw(&s, 0, 1.0f, false).decay == 0.0f);
    assert_true(fabs((double)schedule_clip(&s, 8.0f) - 0.25) < 1e-6);
    assert_true(schedule_clip(&s, 1.5f) == 1.0f);
    const OptimizerSettings none = {.clip = 0.0};
    assert_true(schedule_clip(&none, 1e9f) == 1.0f);
}

/* ---- tiles ---- */

/* Every element in one tile; no tile crosses an edge. */
static void test_tiles(void **state)
{
    const Toy *toys[] = {&toy_gpt2, &toy_llama};
    for (int n = 0; n < 2; n++) {
        g_autoptr(ModelSpec) spec = toy_spec(toys[n]);
        g_autoptr(GArray) tiles = tiles_of(spec);
        uint32_t at = 0;
        for (uint32_t i = 0; i < spec->n_tensors; i++) {
            const TensorSpec *t = &spec->tensors[i];
            g_autofree uint8_t *covered = g_new0(uint8_t, (size_t)t->rows * t->columns);
            for (; at < tiles->len && g_array_index(tiles, Tile, at).tensor == i; at++) {
                const SliceRect r = g_array_index(tiles, Tile, at).rect;
                const bool by_head = t->cut == CUT_Q_UNITS || t->cut == CUT_KV_HEADS;
                assert_true(r.n_rows >= 1 && r.n_rows <= 32 && r.n_cols >= 1);
                assert_true(t->rows == 1 || !by_head || r.row0 / 4 == (r.row0 + r.n_rows - 1) / 4);
                if (t->cut == CUT_FFN_COLS) {
                    assert_int_equal(r.col0 % 32, 0);
                    assert_true(r.n_cols <= 32);
                }
                for (uint32_t y = r.row0; y < r.row0 + r.n_rows; y++) {
                    for (uint32_t x = r.col0; x < r.col0 + r.n_cols; x++) {
                        assert_int_equal(covered[(size_t)y * t->columns + x]++, 0);
                    }
                }
            }
            assert_null(memchr(covered, 0, (size_t)t->rows * t->columns));
        }
        assert_int_equal(at, tiles->len);
    }
}

/* ---- first weights ---- */

static void test_first_weights(void **state)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 2,
                                .width = 64,
                                .heads = 4,
                                .vocabulary = 300,
                                .context = 16};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, NULL);
    g_autoptr(Parameters) a = parameters_new(spec, false, NULL);
    g_autoptr(Parameters) b = parameters_new(spec, false, NULL);
    Pool *one = pool_new(1, NULL, false, 0), *three = pool_new(3, NULL, false, 0);
    parameters_initialise(a, 7, one);
    parameters_initialise(b, 7, three);
    assert_memory_equal(a->floats, b->floats, a->n_floats * sizeof(float));
    parameters_initialise(b, 8, one);
    assert_memory_not_equal(a->floats, b->floats, a->n_floats * sizeof(float));
    const struct {
        TensorRole role;
        double deviation;
    } rows[] = {{ROLE_ATTN_Q, 0.02}, {ROLE_FFN_UP, 0.02}, {ROLE_FFN_DOWN, 0.01}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        const TensorSpec *t = model_spec_tensor(spec, rows[i].role, 1);
        const float *x = parameters_at(a, rows[i].role, 1);
        const size_t n = (size_t)t->rows * t->columns;
        double sum = 0.0, square = 0.0;
        for (size_t e = 0; e < n; e++) {
            sum += (double)x[e];
            square += (double)x[e] * (double)x[e];
        }
        assert_true(fabs(sum / (double)n) < 5.0 * rows[i].deviation / sqrt((double)n));
        assert_true(fabs(sqrt(square / (double)n) / rows[i].deviation - 1.0) < 0.05);
    }
    assert_true(parameters_at(a, ROLE_FFN_NORM, 0)[63] == 1.0f);
    assert_true(parameters_at(a, ROLE_ATTN_Q_BIAS, 1)[5] == 0.0f);
    assert_memory_not_equal(parameters_at(a, ROLE_ATTN_Q, 0), parameters_at(a, ROLE_ATTN_Q, 1), 64);
    pool_free(one);
    pool_free(three);
}

/* ---- the fold ---- */

/* A missing operand is skipped, not added as +0: -0 stays -0. */
static void test_fold_skips_missing_leaves(void **state)
{
    g_autoptr(ModelSpec) spec = toy_spec(&toy_llama);
    Pool *pool = pool_new(1, NULL, false, 0);
    g_autoptr(Holding) holding = holding_whole(spec);
    GradientFold *fold = gradient_fold_new(holding, pool, NULL, kernels_get(ISA_GENERIC)->add);
    Parameters *x = gradient_fold_take(fold, NULL);
    x->floats[3] = -0.0f;
    gradient_fold_push(fold, NULL, 0);
    gradient_fold_push(fold, x, 1);
    gradient_fold_push(fold, NULL, 0);
    gradient_fold_push(fold, NULL, 2);
    Parameters *sum = gradient_fold_pop(fold);
    assert_ptr_equal(sum, x);
    assert_true(signbit(sum->floats[3]) && sum->floats[3] == 0.0f);
    gradient_fold_give(fold, sum);
    gradient_fold_push(fold, gradient_fold_take(fold, NULL), 0); /* cleared when taken again */
    sum = gradient_fold_pop(fold);
    assert_false(signbit(sum->floats[3]));
    assert_int_equal(gradient_fold_made(fold), 1);
    gradient_fold_give(fold, sum);
    gradient_fold_free(fold);
    pool_free(pool);
}

/* ---- configurations ---- */

static void test_configurations(void **state)
{
    const struct {
        ModelConfig config;
        const char *says;
    } rows[] = {
        {{.family = FAMILY_GPT2,
          .layers = 1,
          .width = 10,
          .heads = 3,
          .vocabulary = 9,
          .context = 4},
         "width 10 does not give 3 heads"},
        {{.family = FAMILY_LLAMA,
          .layers = 1,
          .width = 9,
          .heads = 3,
          .vocabulary = 9,
          .context = 4},
         "an even number"},
        {{.family = FAMILY_GPT2, .width = 8, .heads = 2, .vocabulary = 9, .context = 4}, "layers"},
        {{.family = FAMILY_BERT, .layers = 1}, "choose gpt2 or llama"},
        {{.family = FAMILY_LLAMA,
          .layers = 1,
          .width = 32,
          .heads = 4,
          .kv_heads = 3,
          .vocabulary = 9,
          .context = 4},
         "do not share"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(GError) error = NULL;
        assert_null(model_spec_from_config(&rows[i].config, &error));
        assert_non_null(strstr(error->message, rows[i].says));
    }
    const ModelConfig gpt2 = {.family = FAMILY_GPT2,
                              .layers = 12,
                              .width = 768,
                              .heads = 12,
                              .vocabulary = 50257,
                              .context = 1024};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&gpt2, NULL);
    assert_int_equal(model_spec_parameters(spec), 124439808); /* GPT-2 124M */
    assert_int_equal(spec->n_attn_units, 12);                 /* NUMERICS 3 */
    assert_int_equal(spec->n_ffn_units, 12);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_window_once_an_epoch),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_text_as_bytes),
        cmocka_unit_test(test_rates),
        cmocka_unit_test(test_scalars),
        cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_first_weights),
        cmocka_unit_test(test_fold_skips_missing_leaves),
        cmocka_unit_test(test_configurations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
