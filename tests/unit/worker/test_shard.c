/* The union of what the ranks hold equals the whole model, element by element, for every cut, type,
 * tie and layout. */
#include "kernels/kernels.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "tests/unit/worker/tiny_model.h"
#include "worker/shard/shard.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

static const TinyShape shapes[] = {
    /* 6 query heads on 3 KV heads in 6 units of one head; 10 FFN units; 3 vocabulary chunks, the
       last of 452 ids */
    {3, 256, 6, 3, 64, 640, 2500, DTYPE_F32, DTYPE_F32, DTYPE_F32, true, true, true},
    {3, 256, 6, 3, 64, 640, 2500, DTYPE_Q8_0, DTYPE_Q4_1, DTYPE_Q8_0, true, false, false},
    {4, 256, 6, 2, 64, 640, 1030, DTYPE_F16, DTYPE_BF16, DTYPE_F16, false, true, false},
    /* blocks of 256: two attention units of four heads, three FFN units */
    {2, 512, 8, 2, 64, 768, 1024, DTYPE_Q4_K, DTYPE_Q6_K, DTYPE_Q6_K, false, false, true},
    {2, 256, 9, 3, 64, 1536, 2049, DTYPE_Q5_1, DTYPE_Q5_0, DTYPE_Q4_0, true, false, false},
};

static const struct {
    uint32_t n_stages, n_ranks[3];
    double weight[3];
} layouts[] = {
    {1, {1}, {1, 1, 1}},    {1, {2}, {1, 1, 1}},    {1, {2}, {1, 3, 1}},
    {2, {1, 2}, {2, 1, 1}}, {2, {2, 1}, {1, 5, 1}}, {2, {1, 1}, {1, 1, 1}},
};

static void put_all(Shard *shard, const TinyModel *model, const Plan *plan, uint32_t stage,
                    uint32_t rank)
{
    g_autoptr(GArray) refs = plan_rank_slices(plan, model->spec, 0, stage, rank);
    for (guint i = 0; i < refs->len; i++) {
        SliceRef ref = g_array_index(refs, SliceRef, i);
        size_t size;
        g_autofree void *bytes = tiny_model_slice(model, ref.tensor, ref.slice, &size);
        shard_put(shard, ref.tensor, ref.slice, bytes);
    }
}

/* m holds rows [row0, +n) and columns [col0, +n) of the tensor. */
static void check_matrix(const TinyModel *model, TensorRole role, int32_t layer,
                         const PackedMatrix *m, uint32_t row0, uint32_t n_rows, uint32_t col0,
                         uint32_t n_cols)
{
    const TensorSpec *t = model_spec_tensor(model->spec, role, layer);
    assert_non_null(t);
    assert_int_equal(m->type, t->type);
    assert_int_equal(m->n_out, n_rows);
    assert_int_equal(m->n_in, n_cols);
    g_autofree float *expected = g_new(float, t->columns), *got = g_new(float, n_cols);
    for (uint32_t r = 0; r < n_rows; r++) {
        tiny_model_row(model, t, row0 + r, expected);
        packed_get_row(m, r, got);
        assert_memory_equal(got, expected + col0, n_cols * sizeof(float));
    }
}

static void check_vector(const TinyModel *model, TensorRole role, int32_t layer, const float *got,
                         uint32_t first, uint32_t count)
{
    const TensorSpec *t = model_spec_tensor(model->spec, role, layer);
    if (!t) {
        assert_null(got);
        return;
    }
    assert_non_null(got);
    assert_memory_equal(got,
                        (const float *)(const void *)model->bytes[t - model->spec->tensors] + first,
                        count * sizeof(float));
}

static void check_layer(const TinyModel *model, const Shard *s, int32_t layer)
{
    const ModelSpec *spec = model->spec;
    const LayerWeights *w = &s->layers[(uint32_t)layer - s->layer_first];
    uint32_t h = spec->head_size, first_ffn, last_ffn, n;
    model_spec_ffn_unit(spec, s->ffn_unit_first, &first_ffn, &n);
    model_spec_ffn_unit(spec, s->ffn_unit_first + s->n_ffn_units - 1, &last_ffn, &n);
    uint32_t n_ffn = last_ffn + n - first_ffn;
    check_vector(model, ROLE_ATTN_NORM, layer, w->attn_norm, 0, spec->width);
    check_vector(model, ROLE_FFN_NORM, layer, w->ffn_norm, 0, spec->width);
    check_vector(model, ROLE_ATTN_Q_BIAS, layer, w->q_bias, s->head_first * h, s->n_heads * h);
    check_vector(model, ROLE_ATTN_K_BIAS, layer, w->k_bias, s->kv_first * h, s->n_kv_heads * h);
    check_vector(model, ROLE_ATTN_V_BIAS, layer, w->v_bias, s->kv_first * h, s->n_kv_heads * h);
    check_matrix(model, ROLE_ATTN_Q, layer, &w->q, s->head_first * h, s->n_heads * h, 0,
                 spec->width);
    check_matrix(model, ROLE_ATTN_K, layer, &w->k, s->kv_first * h, s->n_kv_heads * h, 0,
                 spec->width);
    check_matrix(model, ROLE_ATTN_V, layer, &w->v, s->kv_first * h, s->n_kv_heads * h, 0,
                 spec->width);
    check_matrix(model, ROLE_ATTN_OUT, layer, &w->attn_out, 0, spec->width, s->head_first * h,
                 s->n_heads * h);
    check_matrix(model, ROLE_FFN_GATE, layer, &w->gate, first_ffn, n_ffn, 0, spec->width);
    check_matrix(model, ROLE_FFN_UP, layer, &w->up, first_ffn, n_ffn, 0, spec->width);
    check_matrix(model, ROLE_FFN_DOWN, layer, &w->down, 0, spec->width, first_ffn, n_ffn);
}

static void check_shard(const TinyModel *model, const Shard *s)
{
    const ModelSpec *spec = model->spec;
    for (uint32_t l = 0; l < s->n_layers; l++) {
        check_layer(model, s, (int32_t)(s->layer_first + l));
    }
    if (s->has_embedding || (s->has_head && spec->tied_output)) {
        check_matrix(model, ROLE_TOKEN_EMBD, -1, &s->embedding, s->vocab_first, s->vocab_count, 0,
                     spec->width);
    }
    if (s->has_head) {
        check_vector(model, ROLE_OUTPUT_NORM, -1, s->output_norm, 0, spec->width);
        assert_ptr_equal(shard_head(s), spec->tied_output ? &s->embedding : &s->output);
        if (!spec->tied_output) {
            check_matrix(model, ROLE_OUTPUT, -1, &s->output, s->vocab_first, s->vocab_count, 0,
                         spec->width);
        }
    } else {
        assert_null(s->output_norm);
    }
    check_vector(model, ROLE_ROPE_FACTORS, -1, s->rope_factors, 0, spec->rope.dims / 2);
}

/* The independent part: heads, layers and ids of all ranks together are the model's, each as often
 * as it must be. */
static void check_cover(const ModelSpec *spec, const Plan *plan, Shard *const *shards)
{
    uint32_t layers = 0, at = 0;
    for (uint32_t s = 0; s < plan->replicas[0].n_stages; s++) {
        uint32_t n = plan->replicas[0].stages[s].n_ranks, heads = 0, ffn = 0, ids = 0;
        assert_int_equal(shards[at]->layer_first, layers);
        layers += shards[at]->n_layers;
        for (uint32_t r = 0; r < n; r++, at++) {
            const Shard *shard = shards[at];
            assert_int_equal(shard->head_first, heads);
            heads += shard->n_heads;
            ffn += shard->n_ffn_units;
            ids += shard->vocab_count;
            uint32_t group = spec->n_heads / spec->n_kv_heads;
            assert_int_equal(shard->kv_first, shard->head_first / group);
            assert_int_equal(shard->kv_first + shard->n_kv_heads - 1,
                             (shard->head_first + shard->n_heads - 1) / group);
        }
        assert_int_equal(heads, spec->n_heads);
        assert_int_equal(ffn, spec->n_ffn_units);
        assert_int_equal(ids, s == 0 || s + 1 == plan->replicas[0].n_stages ? spec->vocab_size : 0);
    }
    assert_int_equal(layers, spec->n_layers);
}

static void check_memory(const Plan *plan, const ModelSpec *spec, const Shard *shard,
                         uint32_t stage, uint32_t rank)
{
    assert_int_equal(shard->arena_bytes, shard_bytes(spec, plan, 0, stage, rank));
    /* What the planner counts must suffice. */
    assert_true(shard->arena_bytes <= plan->replicas[0].stages[stage].ranks[rank].weight_bytes);
}

static void measure(Plan *plan, const ModelSpec *spec)
{
    PlanMember members[3] = {{.worker = "w0"}, {.worker = "w1"}, {.worker = "w2"}};
    for (unsigned m = 0; m < 3; m++) {
        for (unsigned type = 0; type < DTYPE_LIMIT; type++) {
            members[m].packed_block_bytes[type] = packed_block_bytes((Dtype)type);
        }
    }
    plan_measure(plan, spec, members, 3);
}

static void test_union_is_the_model(void **state)
{
    (void)state;
    for (size_t m = 0; m < G_N_ELEMENTS(shapes); m++) {
        TinyModel *model = tiny_model_new(&shapes[m], 100 + m);
        for (size_t l = 0; l < G_N_ELEMENTS(layouts); l++) {
            g_autoptr(Plan) plan =
                tiny_plan(model->spec, layouts[l].n_stages, layouts[l].n_ranks, layouts[l].weight);
            measure(plan, model->spec);
            Shard *shards[4];
            unsigned n = 0;
            for (uint32_t s = 0; s < layouts[l].n_stages; s++) {
                for (uint32_t r = 0; r < layouts[l].n_ranks[s]; r++) {
                    GError *error = NULL;
                    Shard *shard = shards[n++] =
                        shard_new(NULL, model->spec, plan, 0, s, r, &error);
                    assert_null(error);
                    put_all(shard, model, plan, s, r);
                    check_shard(model, shard);
                    check_memory(plan, model->spec, shard, s, r);
                }
            }
            check_cover(model->spec, plan, shards);
            while (n > 0) {
                shard_free(shards[--n]);
            }
        }
        tiny_model_free(model);
    }
}

/* On a device (the trivial one, whose memory can be read here): every matrix and vector by itself,
 * and the whole arena byte by byte where RoPE factors, which stay on the host, are none. */
static void test_a_device_holds_the_same(void **state)
{
    g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
    (void)state;
    for (size_t m = 0; m < G_N_ELEMENTS(shapes); m++) {
        TinyModel *model = tiny_model_new(&shapes[m], 100 + m);
        for (size_t l = 0; l < G_N_ELEMENTS(layouts); l++) {
            g_autoptr(Plan) plan =
                tiny_plan(model->spec, layouts[l].n_stages, layouts[l].n_ranks, layouts[l].weight);
            const uint32_t s = layouts[l].n_stages - 1, r = layouts[l].n_ranks[s] - 1;
            Shard *host = shard_new(NULL, model->spec, plan, 0, s, r, NULL),
                  *there = shard_new(device, model->spec, plan, 0, s, r, NULL);
            put_all(host, model, plan, s, r);
            put_all(there, model, plan, s, r);
            assert_true(shard_finish(host, NULL) && shard_finish(there, NULL));
            check_shard(model, there);
            assert_int_equal(host->arena_bytes, there->arena_bytes);
            if (host->rope_factors == NULL) {
                assert_memory_equal(host->arena, there->arena, host->arena_bytes);
            }
            shard_free(host);
            shard_free(there);
        }
        tiny_model_free(model);
    }
}

#ifdef WEFT_FAILPOINTS
static void test_a_device_that_fails(void **state)
{
    g_autoptr(Device) device = device_open_module(device_module_cpu(), 0, NULL);
    g_autoptr(GError) error = NULL;
    TinyModel *model = tiny_model_new(&shapes[1], 3);
    g_autoptr(Plan) plan = tiny_plan(model->spec, 1, (uint32_t[]){1}, (double[]){1});
    (void)state;
    Shard *shard = shard_new(device, model->spec, plan, 0, 0, 0, NULL);
    failpoint_set("device-fail", true, -(int64_t)DEVICE_LOST);
    put_all(shard, model, plan, 0, 0);
    failpoint_set("device-fail", false, 0);
    assert_false(shard_finish(shard, &error));
    assert_non_null(strstr(error->message, "weights: lost from the bus"));
    shard_free(shard);
    g_clear_error(&error);
    assert_null(shard_new(device, model->spec, plan, 0, 0, 0, &error)); /* it stays lost */
    assert_int_equal(error->code, WEFT_ERROR_WORKER_LOST);
    tiny_model_free(model);
}
#endif

static void test_tied_head_is_one_copy(void **state)
{
    (void)state;
    TinyModel *model = tiny_model_new(&shapes[0], 7);
    g_autoptr(Plan) one = tiny_plan(model->spec, 1, (uint32_t[]){1}, (double[]){1});
    g_autoptr(Plan) two = tiny_plan(model->spec, 3, (uint32_t[]){1, 1, 1}, (double[]){1});
    size_t vocab = shard_bytes(model->spec, two, 0, 0, 0) - shard_bytes(model->spec, two, 0, 1, 0);
    assert_true(vocab >= (size_t)model->spec->vocab_size * model->spec->width * sizeof(float));
    size_t whole = shard_bytes(model->spec, one, 0, 0, 0);
    size_t split = 0;
    for (uint32_t s = 0; s < 3; s++) {
        split += shard_bytes(model->spec, two, 0, s, 0);
    }
    /* three stages: the table at both ends, rope factors thrice; one stage: once. */
    assert_int_equal(split - whole, vocab + 2 * 128);
    tiny_model_free(model);
}

static void test_plan_outside_the_model(void **state)
{
    (void)state;
    TinyModel *model = tiny_model_new(&shapes[3], 8);
    g_autoptr(Plan) plan = tiny_plan(model->spec, 1, (uint32_t[]){2}, (double[]){1, 1});
    PlanRank *rank = &plan->replicas[0].stages[0].ranks[1];
    uint32_t *fields[] = {&rank->attn_first, &rank->attn_count,  &rank->ffn_first,
                          &rank->ffn_count,  &rank->vocab_first, &rank->vocab_count};
    for (size_t i = 0; i < G_N_ELEMENTS(fields); i++) {
        uint32_t right = *fields[i];
        *fields[i] = UINT32_MAX;
        g_autoptr(GError) error = NULL;
        assert_null(shard_new(NULL, model->spec, plan, 0, 0, 1, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        assert_int_equal(shard_bytes(model->spec, plan, 0, 0, 1), 0);
        *fields[i] = right;
    }
    g_autoptr(GError) error = NULL;
    assert_null(shard_new(NULL, model->spec, plan, 0, 0, 2, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
    tiny_model_free(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_union_is_the_model),
        cmocka_unit_test(test_a_device_holds_the_same),
#ifdef WEFT_FAILPOINTS
        cmocka_unit_test(test_a_device_that_fails),
#endif
        cmocka_unit_test(test_tied_head_is_one_copy),
        cmocka_unit_test(test_plan_outside_the_model),
    };
    return cmocka_run_group_tests_name("shard", tests, NULL, NULL);
}
