/* Where a training job is placed, as `weft plan` shows it: `layout: auto` and memory that is short,
 * over workers that say what a rank would hold (sim_trainer.c: 16 bytes a parameter, by stages and
 * tensor ranks; 8 with recompute: full). */
#include "tests/unit/coordinator/sim_streams.h"

#include "proto/base/error.h"
#include "proto/config/job_spec.h"
#include "proto/model/model_config.h"
#include "proto/plan/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define MODEL                                                                                      \
    "{family: gpt2, layers: 4, width: 16, heads: 2, context: 16, vocabulary: 300}" /* tp 1, 2 */

/* What 1x1x1 holds. */
static uint64_t whole(void)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 4,
                                .width = 16,
                                .heads = 2,
                                .vocabulary = 300,
                                .context = 16};
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, NULL);
    return 16 * model_spec_parameters(spec);
}

static void start(SimCluster *s, unsigned n, uint64_t memory_bytes)
{
    for (unsigned i = 0; i < n; i++) {
        s->workers[i].memory_bytes = memory_bytes;
    }
    start_workers(s, n);
}

/* What the coordinator answers to a plan of this layout, with these lines besides. */
static void ask_plan(SimCluster *s, Answer *a, const char *layout, const char *more)
{
    g_autofree char *data = g_build_filename(s->dir, "text.txt", NULL);
    g_autoptr(GString) text = g_string_new(NULL);
    for (unsigned i = 0; i < 200; i++) {
        g_string_append_printf(text, "line %u of a text that says nothing of note\n", i * i);
    }
    assert_true(g_file_set_contents(data, text->str, -1, NULL));
    g_autofree char *spec = g_strdup_printf("kind: train\nname: toy\nmodel: {config: " MODEL "}\n"
                                            "data: {train: %s, tokenizer: {train: 270}}\n"
                                            "batch: {sequences: 8, length: 16, leaves: 8}\n"
                                            "steps: 9\noptimizer: {lr: 1e-3}\nlayout: %s\n%s",
                                            data, layout, more);
    Weft__V1__PlanTrainingRequest request = WEFT__V1__PLAN_TRAINING_REQUEST__INIT;
    request.spec = spec;
    *a = (Answer){0};
    sim_call(s, a, &weft__v1__admin__descriptor, "PlanTraining", &request);
    sim_answer(s, a, 20 * SECOND);
}

static const Weft__V1__PlanTrainingResponse *plan_of(SimCluster *s, Answer *a, const char *layout)
{
    ask_plan(s, a, layout, "");
    g_assert_no_error(a->error);
    return (const Weft__V1__PlanTrainingResponse *)a->message;
}

static void check_layout(SimCluster *s, const char *layout, size_t dp, size_t pp, size_t tp,
                         const char *schedule)
{
    Answer a;
    const Weft__V1__PlanTrainingResponse *r = plan_of(s, &a, layout);
    assert_int_equal(r->n_violations, 0);
    assert_int_equal(r->plan->n_replicas, dp);
    assert_int_equal(r->plan->replicas[0]->n_stages, pp);
    assert_int_equal(r->plan->replicas[0]->stages[0]->n_ranks, tp);
    assert_string_equal(r->schedule, schedule);
    answer_clear(&a);
}

/* Replicas while a whole model fits. */
static void test_replicas(void **state)
{
    start(*state, 4, whole());
    check_layout(*state, "auto", 4, 1, 1, "1f1b");
}

/* The fewest stages that fit; of schedules the shorter one, unless the file says. */
static void test_stages(void **state)
{
    start(*state, 4, whole() * 2 / 3);
    check_layout(*state, "auto", 2, 2, 1, "zero-bubble");
    check_layout(*state, "{schedule: 1f1b}", 2, 2, 1, "1f1b");
    check_layout(*state, "{recompute: selective}", 2, 2, 1, "1f1b");
    check_layout(*state, "{dp: 2, pp: 2, tp: 1}", 2, 2, 1, "1f1b");
}

/* Tensor ranks where there are no more layers for stages. */
static void test_tensor_ranks(void **state)
{
    start(*state, 8, whole() / 8 + 1);
    check_layout(*state, "auto", 1, 4, 2, "zero-bubble");
}

/* What does not fit names layouts that do, and no others. */
static void test_names_what_fits(void **state)
{
    SimCluster *s = *state;
    Answer a;
    start(s, 4, whole() / 4 + 1);
    const Weft__V1__PlanTrainingResponse *r = plan_of(s, &a, "{dp: 1, pp: 2, tp: 1}");
    assert_int_equal(r->n_violations, 2);
    assert_non_null(strstr(r->violations[0], "w0 would hold "));
    assert_int_equal(r->n_alternatives, 3);
    g_autofree char *named =
        g_strjoin("\n", r->alternatives[0], r->alternatives[1], r->alternatives[2], NULL);
    /* what is nearest first: the same with fewer activations, then others as the file has it */
    assert_string_equal(r->alternatives[0],
                        "layout: {dp: 1, pp: 2, tp: 1, micro: 8, recompute: full}");
    assert_non_null(strstr(named, "layout: {dp: 1, pp: 2, tp: 2}"));
    assert_non_null(strstr(named, "layout: {dp: 1, pp: 4, tp: 1}"));
    answer_clear(&a);
}

/* With none that fits as it is, those with the fewest activations; else none is named. */
static void test_spares_activations(void **state)
{
    SimCluster *s = *state;
    Answer a;
    start(s, 2, whole() / 4 + 1);
    const Weft__V1__PlanTrainingResponse *r = plan_of(s, &a, "{dp: 2, pp: 1, tp: 1}");
    assert_int_equal(r->n_alternatives, 2);
    for (size_t i = 0; i < r->n_alternatives; i++) {
        assert_non_null(strstr(r->alternatives[i], ", micro: 8, recompute: full}"));
        assert_non_null(strstr(r->alternatives[i], "layout: {dp: 1, "));
    }
    answer_clear(&a);
    r = plan_of(s, &a, "{dp: 1, pp: 1, tp: 1, schedule: zero-bubble}");
    assert_int_equal(r->n_violations, 1);
    assert_int_equal(r->n_alternatives, 0);
    answer_clear(&a);
}

/* ---- the class, with a worker on a device beside one on its cores ---- */

static Weft__V1__Measured measured = WEFT__V1__MEASURED__INIT;
static Weft__V1__Device gpu = WEFT__V1__DEVICE__INIT, *gpus[] = {&gpu};

/* exact: bits by precision. */
static void start_gpu(SimCluster *s, uint32_t exact, unsigned n_workers, uint64_t budget)
{
    measured.read_bytes_per_s = 4e12;
    measured.int8_ops_per_s = measured.f32_ops_per_s = 1e14;
    gpu.kind = (char *)"cuda";
    gpu.exact_kind = (char *)"NVIDIA H200, sm_90";
    gpu.budget_bytes = budget;
    gpu.measured = &measured;
    gpu.exact_training = exact;
    s->workers[0].devices = gpus;
    s->workers[0].n_devices = 1;
    for (unsigned i = 0; i < n_workers; i++) {
        s->workers[i].numerics_classes = 1u << NUMERICS_EXACT | 1u << NUMERICS_FAST;
    }
    start(s, n_workers, whole());
}

static void expect_class(SimCluster *s, const char *more, const char *numerics, const char *worker,
                         const char *reason)
{
    Answer a;
    ask_plan(s, &a, "{dp: 1, pp: 1, tp: 1}", more);
    g_assert_no_error(a.error);
    const Weft__V1__PlanTrainingResponse *r = (const Weft__V1__PlanTrainingResponse *)a.message;
    bool said = reason == NULL;
    assert_int_equal(r->n_violations, 0);
    assert_string_equal(r->numerics, numerics);
    assert_string_equal(r->plan->replicas[0]->stages[0]->ranks[0]->worker, worker);
    for (size_t i = 0; i < r->plan->n_reasons; i++) {
        said = said || strstr(r->plan->reasons[i], reason) != NULL;
    }
    assert_true(said);
    answer_clear(&a);
}

/* A device that has hosts' bits with these operands trains exactly, where that is asked; others are
 * left to class fast, which is what a job gets on a device that asks for nothing. */
static void test_exact_on_a_device(void **state)
{
    SimCluster *s = *state;
    start_gpu(s, 1u << JOB_F32, 2, whole());
    expect_class(s, "", "fast", "w0", "numerics fast: 1 of 1 ranks compute on devices, with");
    expect_class(s, "numerics: exact\n", "exact", "w0",
                 "numerics exact: 1 of 1 ranks compute on devices and give the bits of hosts");
    expect_class(s, "numerics: exact\nprecision: bf16\n", "exact", "w1", NULL);
    expect_class(s, "numerics: fast\nprecision: bf16\n", "fast", "w0", NULL);
}

static void test_exact_leaves_devices_out(void **state)
{
    SimCluster *s = *state;
    Answer a;
    start_gpu(s, 1u << JOB_F32, 1, whole());
    ask_plan(s, &a, "auto", "numerics: exact\nprecision: bf16\n");
    assert_non_null(a.error);
    assert_int_equal(a.error->code, WEFT_ERROR_NOT_READY);
    assert_non_null(strstr(a.error->message, "say numerics: fast, or precision: f32"));
    answer_clear(&a);
    expect_class(s, "numerics: exact\nprecision: f32\n", "exact", "w0", NULL);
}

/* A device that is too small alone trains exactly beside hosts. */
static void test_exact_beside_hosts(void **state)
{
    SimCluster *s = *state;
    Answer a;
    start_gpu(s, 1u << JOB_F32, 2, whole() * 2 / 3);
    ask_plan(s, &a, "auto", "numerics: exact\n");
    g_assert_no_error(a.error);
    const Weft__V1__PlanTrainingResponse *r = (const Weft__V1__PlanTrainingResponse *)a.message;
    assert_int_equal(r->n_violations, 0);
    assert_int_equal(r->plan->replicas[0]->n_stages, 2);
    assert_string_equal(r->numerics, "exact");
    answer_clear(&a);
}

/* A layout that is larger than devices and hosts together is refused, once, at once. */
static void test_too_large_beside_hosts(void **state)
{
    SimCluster *s = *state;
    Answer a;
    start_gpu(s, 1u << JOB_F32, 2, whole());
    ask_plan(s, &a, "{dp: 8, pp: 1, tp: 1}", "numerics: exact\n");
    g_assert_no_error(a.error);
    const Weft__V1__PlanTrainingResponse *r = (const Weft__V1__PlanTrainingResponse *)a.message;
    assert_int_equal(r->n_violations, 1);
    assert_non_null(strstr(r->violations[0], "needs 8 workers and there are 2"));
    answer_clear(&a);
}

int main(void)
{
#define ROW(test) cmocka_unit_test_setup_teardown(test, cluster_set_up, cluster_tear_down)
    const struct CMUnitTest tests[] = {
        ROW(test_replicas),
        ROW(test_stages),
        ROW(test_tensor_ranks),
        ROW(test_names_what_fits),
        ROW(test_spares_activations),
        ROW(test_exact_on_a_device),
        ROW(test_exact_leaves_devices_out),
        ROW(test_exact_beside_hosts),
        ROW(test_too_large_beside_hosts),
    };
#undef ROW
    return cmocka_run_group_tests(tests, NULL, NULL);
}
