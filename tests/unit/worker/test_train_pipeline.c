/* Schedules: what they cost when played through is what the literature's formulas say (FORMULAS 1,
 * 3, 4, 5), and wrong ones are refused. */
#include "worker/train/pipeline.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static const PipelineOp *op(const Pipeline *p, uint32_t stage, uint32_t i)
{
    return &g_array_index(p->stages[stage], PipelineOp, i);
}

static uint32_t forwards_before_backward(const Pipeline *p, uint32_t stage)
{
    uint32_t n = 0;
    for (uint32_t i = 0; op(p, stage, i)->kind != PIPELINE_BACKWARD; i++) {
        n += op(p, stage, i)->kind == PIPELINE_FORWARD;
    }
    return n;
}

static void assert_near(double got, double want)
{
    if (!(fabs(got - want) <= 1e-9 * MAX(fabs(want), 1.0))) {
        fail_msg("%.12g, not %.12g", got, want);
    }
}

/* Bubble (p-1)(tF+tB) of a whole m(tF+tB) + bubble: (p-1)/(m+p-1). */
static void test_bubble(void **state)
{
    const PipelineTimes times = {.forward = 1.0, .backward = 2.25};
    for (uint32_t p = 1; p <= 8; p++) {
        for (uint32_t m = p; m <= 3 * p; m++) { /* 1F1B and GPipe alike */
            for (PipelineKind kind = PIPELINE_1F1B; kind <= PIPELINE_GPIPE; kind++) {
                g_autoptr(Pipeline) line = pipeline_new(kind, p, 1, m);
                g_autoptr(GError) error = NULL;
                assert_true(pipeline_check(line, &error));
                const PipelineCost cost = pipeline_simulate(line, &times);
                assert_near(cost.bubble, (p - 1) * 3.25);
                assert_near(cost.bubble / cost.makespan, (p - 1.0) / (m + p - 1.0));
            }
        }
    }
}

/* Warm-up of stage r: min(m, p-r-1) forwards; in flight at most one more. GPipe: m. */
static void test_in_flight(void **state)
{
    for (uint32_t p = 1; p <= 8; p++) {
        for (uint32_t m = 1; m <= 20; m += 3) {
            g_autoptr(Pipeline) alternate = pipeline_new(PIPELINE_1F1B, p, 1, m);
            g_autoptr(Pipeline) gpipe = pipeline_new(PIPELINE_GPIPE, p, 1, m);
            for (uint32_t r = 0; r < p; r++) {
                const uint32_t warm = MIN(m, p - r - 1);
                assert_int_equal(forwards_before_backward(alternate, r), MIN(warm + 1, m));
                assert_int_equal(pipeline_in_flight(alternate, r), MIN(warm + 1, m));
                assert_int_equal(pipeline_in_flight(gpipe, r), m);
            }
        }
    }
}

/* ZB-H1: (p-1)(TF+TB-TW) with B the gradients of inputs, W those of weights; 1F1B (p-1)(TF+TB+TW).
 * Its peak of memory is 1F1B's: p micro-batches. */
static void test_zero_bubble(void **state)
{
    const PipelineTimes apart = {.forward = 1.0, .backward = 1.0, .weights = 1.0},
                        together = {.forward = 1.0, .backward = 2.0};
    for (uint32_t p = 1; p <= 8; p++) {
        for (uint32_t m = 2 * p; m <= 4 * p; m += p) {
            g_autoptr(Pipeline) zero = pipeline_new(PIPELINE_ZERO_BUBBLE, p, 1, m);
            g_autoptr(Pipeline) alternate = pipeline_new(PIPELINE_1F1B, p, 1, m);
            g_autoptr(GError) error = NULL;
            if (!pipeline_check(zero, &error)) {
                fail_msg("%s", error->message);
            }
            assert_near(pipeline_simulate(zero, &apart).bubble, p - 1.0);
            assert_near(pipeline_simulate(alternate, &together).bubble, 3.0 * (p - 1.0));
            for (uint32_t r = 0; r < p; r++) {
                assert_true(pipeline_in_flight(zero, r) <= p);
            }
        }
    }
}

/* A transfer's time shows where a stage waits for it: twice at every boundary. */
static void test_transfers(void **state)
{
    const PipelineTimes times = {.forward = 1.0, .backward = 2.0, .transfer = 0.25};
    g_autoptr(Pipeline) line = pipeline_new(PIPELINE_GPIPE, 4, 1, 8);
    assert_near(pipeline_simulate(line, &times).bubble, 3 * (3.0 + 2 * 0.25));
}

/* Interleaved, v chunks: bubble 1/v of 1F1B's, (p-1)(tF+tB)/v; stage r has 2(p-r-1) + (v-1)p
 * chunks of micro-batches forward before the first backward (or all there are). */
static void test_interleaved(void **state)
{
    const PipelineTimes times = {.forward = 1.0, .backward = 2.25};
    for (uint32_t p = 2; p <= 6; p++) {
        for (uint32_t v = 1; v <= 4; v++) {
            for (uint32_t m = p; m <= 4 * p; m += p) {
                g_autoptr(Pipeline) line = pipeline_new(PIPELINE_INTERLEAVED, p, v, m);
                g_autoptr(GError) error = NULL;
                if (!pipeline_check(line, &error)) {
                    fail_msg("%s", error->message);
                }
                const PipelineCost cost = pipeline_simulate(line, &times);
                assert_near(cost.bubble, (p - 1) * 3.25 / v);
                for (uint32_t r = 0; r < p; r++) {
                    const uint32_t warm = MIN(2 * (p - r - 1) + (v - 1) * p, m * v);
                    assert_int_equal(forwards_before_backward(line, r), MIN(warm + 1, m * v));
                    assert_int_equal(pipeline_in_flight(line, r), MIN(warm + 1, m * v));
                }
            }
        }
    }
}

/* Any number of micro-batches is legal; it costs no more than the next multiple of p. */
static void test_interleaved_uneven(void **state)
{
    const PipelineTimes times = {.forward = 1.0, .backward = 2.0};
    for (uint32_t p = 2; p <= 5; p++) {
        for (uint32_t v = 2; v <= 3; v++) {
            for (uint32_t m = 1; m <= 3 * p; m++) {
                const uint32_t whole = (m + p - 1) / p * p;
                g_autoptr(Pipeline) line = pipeline_new(PIPELINE_INTERLEAVED, p, v, m);
                g_autoptr(Pipeline) next = pipeline_new(PIPELINE_INTERLEAVED, p, v, whole);
                g_autoptr(GError) error = NULL;
                if (!pipeline_check(line, &error)) {
                    fail_msg("%s", error->message);
                }
                assert_true(pipeline_simulate(line, &times).makespan <=
                            pipeline_simulate(next, &times).makespan + 1e-9);
                for (uint32_t r = 0; r < p; r++) {
                    assert_true(pipeline_in_flight(line, r) <= pipeline_in_flight(next, r));
                }
            }
        }
    }
}

/* No two micro-batches in flight share a slot, and there are no more slots than are needed. */
static void test_slots(void **state)
{
    const struct {
        PipelineKind kind;
        uint32_t p, v, m;
    } rows[] = {{PIPELINE_1F1B, 4, 1, 9},
                {PIPELINE_GPIPE, 3, 1, 5},
                {PIPELINE_ZERO_BUBBLE, 4, 1, 8},
                {PIPELINE_INTERLEAVED, 3, 2, 7},
                {PIPELINE_INTERLEAVED, 2, 4, 6}};
    for (size_t i = 0; i < G_N_ELEMENTS(rows); i++) {
        g_autoptr(Pipeline) line = pipeline_new(rows[i].kind, rows[i].p, rows[i].v, rows[i].m);
        const PipelineOpKind ends =
            rows[i].kind == PIPELINE_ZERO_BUBBLE ? PIPELINE_WEIGHTS : PIPELINE_BACKWARD;
        for (uint32_t r = 0; r < rows[i].p; r++) {
            g_autofree uint32_t *slots = g_new(uint32_t, rows[i].v * rows[i].m);
            bool taken[64] = {false};
            pipeline_slots(line, r, slots);
            for (uint32_t k = 0; k < line->stages[r]->len; k++) {
                const PipelineOp *o = op(line, r, k);
                const uint32_t slot = slots[o->chunk * rows[i].m + o->micro];
                assert_true(slot < pipeline_in_flight(line, r));
                if (o->kind == PIPELINE_FORWARD) {
                    assert_false(taken[slot]);
                    taken[slot] = true;
                }
                assert_true(taken[slot] || o->kind == PIPELINE_RECEIVE_FORWARD ||
                            o->kind == PIPELINE_SEND_BACKWARD);
                taken[slot] = taken[slot] && o->kind != ends;
            }
        }
    }
}

/* A trace of what the simulator would do, and one in which every stage is late: the first is equal,
 * the second shows the time that the schedule does not explain. */
static void test_comparison(void **state)
{
    g_autoptr(Pipeline) line = pipeline_new(PIPELINE_1F1B, 2, 1, 2);
    /* F 10 us, B 20 us; stage 0: F F . B . B, stage 1: . F B F B */
    const struct {
        uint32_t stage;
        PipelineOpKind kind;
        uint32_t micro;
        int64_t begin, end;
    } ops[] = {{0, PIPELINE_FORWARD, 0, 0, 10},           {0, PIPELINE_SEND_FORWARD, 0, 10, 10},
               {0, PIPELINE_FORWARD, 1, 10, 20},          {0, PIPELINE_SEND_FORWARD, 1, 20, 20},
               {0, PIPELINE_RECEIVE_BACKWARD, 0, 20, 40}, {0, PIPELINE_BACKWARD, 0, 40, 60},
               {0, PIPELINE_RECEIVE_BACKWARD, 1, 60, 70}, {0, PIPELINE_BACKWARD, 1, 70, 90},
               {1, PIPELINE_RECEIVE_FORWARD, 0, 0, 10},   {1, PIPELINE_FORWARD, 0, 10, 20},
               {1, PIPELINE_BACKWARD, 0, 20, 40},         {1, PIPELINE_SEND_BACKWARD, 0, 40, 40},
               {1, PIPELINE_RECEIVE_FORWARD, 1, 40, 40},  {1, PIPELINE_FORWARD, 1, 40, 50},
               {1, PIPELINE_BACKWARD, 1, 50, 70},         {1, PIPELINE_SEND_BACKWARD, 1, 70, 70}};
    GArray *traces[2] = {g_array_new(FALSE, FALSE, sizeof(PipelineOpTime)),
                         g_array_new(FALSE, FALSE, sizeof(PipelineOpTime))};
    for (size_t i = 0; i < G_N_ELEMENTS(ops); i++) {
        const PipelineOpTime time = {{ops[i].kind, 0, ops[i].micro}, ops[i].begin, ops[i].end};
        g_array_append_val(traces[ops[i].stage], time);
    }
    PipelineComparison c;
    assert_true(pipeline_compare(line, traces, &c, NULL));
    assert_near(c.makespan, 90e-6);
    assert_near(c.simulated_makespan, 90e-6);
    assert_near(c.idle, 1.0 / 3.0);
    assert_near(c.simulated_idle, 1.0 / 3.0);
    /* the last stage was done with the step before earlier than the first */
    g_array_index(traces[1], PipelineOpTime, 0).begin_us = -50;
    assert_true(pipeline_compare(line, traces, &c, NULL));
    assert_near(c.makespan, 90e-6);
    assert_near(c.idle, 1.0 / 3.0);
    g_array_index(traces[0], PipelineOpTime, 7).begin_us += 30;
    g_array_index(traces[0], PipelineOpTime, 7).end_us += 30;
    assert_true(pipeline_compare(line, traces, &c, NULL));
    assert_near(c.makespan, 120e-6);
    assert_near(c.idle, 0.5);
    assert_near(c.simulated_idle, 1.0 / 3.0);
    /* or later: then all that it does comes later, also by the simulator */
    for (guint i = 0; i < traces[1]->len; i++) {
        PipelineOpTime *t = &g_array_index(traces[1], PipelineOpTime, i);
        t->begin_us = i == 0 ? 40 : t->begin_us + 30;
        t->end_us += 30;
    }
    assert_true(pipeline_compare(line, traces, &c, NULL));
    assert_near(c.makespan, 120e-6);
    assert_near(c.simulated_makespan, 120e-6);
    g_autoptr(GError) error = NULL;
    g_array_index(traces[1], PipelineOpTime, 2).op.micro = 1;
    assert_false(pipeline_compare(line, traces, &c, &error));
    assert_non_null(strstr(error->message, "stage 1"));
    g_array_unref(traces[0]);
    g_array_unref(traces[1]);
}

static void swap(Pipeline *p, uint32_t stage, uint32_t a, uint32_t b)
{
    PipelineOp *x = (PipelineOp *)op(p, stage, a), *y = (PipelineOp *)op(p, stage, b), kept = *x;
    *x = *y;
    *y = kept;
}

static void assert_refused(Pipeline *p, const char *says)
{
    g_autoptr(GError) error = NULL;
    assert_false(pipeline_check(p, &error));
    assert_non_null(strstr(error->message, says));
    pipeline_free(p);
}

static void test_refused(void **state)
{
    Pipeline *p = pipeline_new(PIPELINE_1F1B, 2, 1, 2); /* last stage: R F R.. */
    swap(p, 1, 0, 1);
    assert_refused(p, "before what it needs");
    p = pipeline_new(PIPELINE_GPIPE, 2, 1, 3); /* first stage: F S F S */
    swap(p, 0, 0, 2);
    assert_refused(p, "out of order");
    p = pipeline_new(PIPELINE_1F1B, 1, 1, 2);
    swap(p, 0, 0, 1);
    assert_refused(p, "backward before forward");
    p = pipeline_new(PIPELINE_1F1B, 2, 1, 2);
    g_array_remove_index(p->stages[0], p->stages[0]->len - 1);
    assert_refused(p, "never done");
    /* the first stage sends chunk 1 of a micro-batch before chunk 0 of the next one */
    p = pipeline_new(PIPELINE_INTERLEAVED, 2, 3, 2); /* F S, F S, R F S */
    for (uint32_t i = 4; i < 7; i++) {
        swap(p, 0, i, i - 1);
        swap(p, 0, i - 1, i - 2);
    }
    assert_refused(p, "another order than sent");
    p = pipeline_new(PIPELINE_INTERLEAVED, 2, 2, 2);
    g_array_index(p->stages[1], PipelineOp, 0).chunk = 1;
    assert_refused(p, "before what it needs");
    /* the first stage waits for a gradient before it sends what the gradient comes from */
    p = pipeline_new(PIPELINE_1F1B, 2, 1, 1);
    swap(p, 0, 1, 2);
    assert_refused(p, "for ever");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bubble),      cmocka_unit_test(test_in_flight),
        cmocka_unit_test(test_zero_bubble), cmocka_unit_test(test_transfers),
        cmocka_unit_test(test_interleaved), cmocka_unit_test(test_interleaved_uneven),
        cmocka_unit_test(test_slots),       cmocka_unit_test(test_comparison),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
