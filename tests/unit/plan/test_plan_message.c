/* Plan -> message -> bytes -> message -> Plan, and messages that lie. */
#include "proto/plan/plan_message.h"

#include "proto/base/error.h"
#include "proto/base/random.h"
#include "tests/golden/gguf_builder.h"
#include "tests/golden/plan_builder.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static Plan *sample(void)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    spec->file_hash.bytes[9] = 9;
    Plan *plan = plan_builder_even(spec, 2, 2, 2);
    plan->predicted = (PlanPrediction){123.5, 45.25, "link"};
    strcpy(plan->definition.exact_kind, "NVIDIA H200, sm_90, CUDA 13.0");
    plan->replicas[1].stages[0].n_more = 2;
    plan->replicas[1].stages[0].more[1] = (PlanLayers){7, 9};
    g_ptr_array_add(plan->reasons, g_strdup("one"));
    g_ptr_array_add(plan->reasons, g_strdup(""));
    return plan;
}

static Weft__V1__Plan *through_wire(Weft__V1__Plan *m /* taken */)
{
    size_t size = weft__v1__plan__get_packed_size(m);
    g_autofree uint8_t *bytes = g_malloc(size);
    assert_int_equal(weft__v1__plan__pack(m, bytes), size);
    weft__v1__plan__free_unpacked(m, NULL);
    m = weft__v1__plan__unpack(NULL, size, bytes);
    assert_non_null(m);
    return m;
}

static void test_round_trip(void **state)
{
    g_autoptr(Plan) a = sample();
    Weft__V1__Plan *m = through_wire(plan_to_message(a));
    g_autoptr(GError) error = NULL;
    g_autoptr(Plan) b = plan_from_message(m, &error);
    weft__v1__plan__free_unpacked(m, NULL);
    assert_non_null(b);
    assert_string_equal(b->job, a->job);
    assert_string_equal(b->model, a->model);
    assert_memory_equal(&b->definition, &a->definition, sizeof a->definition);
    assert_int_equal(b->streams, a->streams);
    assert_true(b->kv_pages == a->kv_pages);
    assert_int_equal(b->max_rows, a->max_rows);
    assert_true(b->predicted.prefill_tokens_per_s == 123.5 &&
                b->predicted.decode_tokens_per_s == 45.25);
    assert_string_equal(b->predicted.bound, "link");
    assert_int_equal(b->reasons->len, 2);
    assert_string_equal(b->reasons->pdata[0], "one");
    assert_int_equal(b->n_replicas, 2);
    for (uint32_t r = 0; r < 2; r++) {
        for (uint32_t s = 0; s < 2; s++) {
            const PlanStage *x = &a->replicas[r].stages[s], *y = &b->replicas[r].stages[s];
            assert_int_equal(y->layer_first, x->layer_first);
            assert_int_equal(y->layer_last, x->layer_last);
            assert_int_equal(y->n_ranks, x->n_ranks);
            assert_int_equal(y->n_more, x->n_more);
            assert_memory_equal(y->more, x->more, sizeof x->more);
            for (uint32_t k = 0; k < x->n_ranks; k++) {
                PlanRank p = x->ranks[k], q = y->ranks[k];
                assert_string_equal(p.worker, q.worker);
                p.worker = q.worker = NULL;
                assert_memory_equal(&p, &q, sizeof p);
            }
        }
    }
}

typedef void (*BreakFn)(Weft__V1__Plan *m);

static void drop_definition(Weft__V1__Plan *m)
{
    weft__v1__definition__free_unpacked(m->definition, NULL);
    m->definition = NULL;
}
static void short_hash(Weft__V1__Plan *m)
{
    m->definition->file_hash.len = 3;
}
static void strange_numerics(Weft__V1__Plan *m)
{
    m->definition->numerics = 2;
}
static void strange_kv(Weft__V1__Plan *m)
{
    m->definition->kv_type = KV_TYPE_LIMIT;
}
static void long_kind(Weft__V1__Plan *m)
{
    g_free(m->definition->exact_kind);
    m->definition->exact_kind = g_strnfill(EXACT_KIND_BYTES, 'k');
}
static void bad_kind(Weft__V1__Plan *m)
{
    g_free(m->definition->exact_kind);
    m->definition->exact_kind = g_strdup("\xc3");
}
static void nan_speed(Weft__V1__Plan *m)
{
    m->predicted_decode_tokens_per_s = NAN;
}
static void infinite_speed(Weft__V1__Plan *m)
{
    m->predicted_prefill_tokens_per_s = INFINITY;
}
static void strange_bound(Weft__V1__Plan *m)
{
    g_free(m->predicted_bound);
    m->predicted_bound = g_strdup("luck");
}
static void bad_job(Weft__V1__Plan *m)
{
    g_free(m->job);
    m->job = g_strdup("\xc3");
}
static void long_worker(Weft__V1__Plan *m)
{
    Weft__V1__Rank *rank = m->replicas[1]->stages[1]->ranks[1];
    g_free(rank->worker);
    rank->worker = g_strnfill(300, 'w');
}
static void no_stages(Weft__V1__Plan *m)
{
    for (size_t s = 0; s < m->replicas[1]->n_stages; s++) {
        weft__v1__stage__free_unpacked(m->replicas[1]->stages[s], NULL);
    }
    m->replicas[1]->n_stages = 0;
}
static void no_ranks(Weft__V1__Plan *m)
{
    Weft__V1__Stage *stage = m->replicas[0]->stages[1];
    for (size_t k = 0; k < stage->n_ranks; k++) {
        weft__v1__rank__free_unpacked(stage->ranks[k], NULL);
    }
    stage->n_ranks = 0;
}
static void many_ranks(Weft__V1__Plan *m)
{
    Weft__V1__Stage *stage = m->replicas[0]->stages[1];
    stage->ranks = g_renew(Weft__V1__Rank *, stage->ranks, PLAN_RANKS_LIMIT + 1);
    for (size_t k = stage->n_ranks; k < PLAN_RANKS_LIMIT + 1; k++) {
        stage->ranks[k] = g_new(Weft__V1__Rank, 1);
        weft__v1__rank__init(stage->ranks[k]);
    }
    stage->n_ranks = PLAN_RANKS_LIMIT + 1;
}
static void no_replicas(Weft__V1__Plan *m)
{
    for (size_t r = 0; r < m->n_replicas; r++) {
        weft__v1__replica__free_unpacked(m->replicas[r], NULL);
    }
    m->n_replicas = 0;
}
static void many_reasons(Weft__V1__Plan *m)
{
    m->reasons = g_renew(char *, m->reasons, 1000);
    for (size_t i = m->n_reasons; i < 1000; i++) {
        m->reasons[i] = g_strdup("x");
    }
    m->n_reasons = 1000;
}

static void test_refusals(void **state)
{
    static const BreakFn breaks[] = {drop_definition, short_hash,     strange_numerics, strange_kv,
                                     nan_speed,       infinite_speed, strange_bound,    bad_job,
                                     long_worker,     no_stages,      no_ranks,         many_ranks,
                                     no_replicas,     many_reasons,   long_kind,        bad_kind};
    for (size_t i = 0; i < G_N_ELEMENTS(breaks); i++) {
        g_autoptr(Plan) plan = sample();
        g_autoptr(GError) error = NULL;
        Weft__V1__Plan *m = plan_to_message(plan);
        breaks[i](m);
        g_autoptr(Plan) back = plan_from_message(m, &error);
        if (back != NULL) {
            fail_msg("break %zu was accepted", i);
        }
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL));
        weft__v1__plan__free_unpacked(m, NULL);
    }
    g_autoptr(GError) error = NULL;
    assert_null(plan_from_message(NULL, &error));
    assert_non_null(error);
}

/* Damaged bytes: refused, or a plan that can be checked, measured and copied. */
static void test_damaged_bytes(void **state)
{
    GgufBuilderConfig c;
    gguf_builder_defaults(&c);
    g_autoptr(ModelSpec) spec = gguf_builder_spec(&c, NULL);
    PlanMember members[8];
    plan_builder_members(members, 8);
    g_autoptr(Plan) plan = sample();
    Weft__V1__Plan *m = plan_to_message(plan);
    size_t size = weft__v1__plan__get_packed_size(m);
    g_autofree uint8_t *bytes = g_malloc(size), *copy = g_malloc(size);
    weft__v1__plan__pack(m, bytes);
    weft__v1__plan__free_unpacked(m, NULL);
    RandomSeeded random;
    random_seeded_init(&random, 8);
    for (int i = 0; i < 5000; i++) {
        memcpy(copy, bytes, size);
        for (int k = 0; k < 1 + i % 3; k++) {
            copy[random_u64(&random.base) % size] ^= (uint8_t)(1u << random_u64(&random.base) % 8);
        }
        m = weft__v1__plan__unpack(NULL, size, copy);
        if (m == NULL) {
            continue;
        }
        g_autoptr(GError) error = NULL;
        g_autoptr(Plan) back = plan_from_message(m, &error);
        weft__v1__plan__free_unpacked(m, NULL);
        assert_int_equal(back == NULL, error != NULL);
        if (back != NULL) {
            g_autoptr(GPtrArray) found = plan_check(back, spec, members, 8);
            g_autofree char *text = plan_layout_text(back);
            assert_non_null(text);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_damaged_bytes),
    };
    return cmocka_run_group_tests_name("plan-message", tests, NULL, NULL);
}
