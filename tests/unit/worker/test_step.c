/* The Step's wire form against hostile bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/error.h"
#include "proto/base/random.h"
#include "worker/serve/step.h"

#include <string.h>

static const StepLimits LIMITS = {
    .max_rows = 48, .max_slots = 3, .max_pages = 40, .context = 256, .vocab_size = 1000};

/* Every single changed word of a valid message is either refused or decodes to numbers within the
 * limits. */
static void test_hostile_steps(void **state)
{
    Step *step = step_new(&LIMITS), *out = step_new(&LIMITS);
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&LIMITS)),
                       *bad = g_malloc(step_wire_limit(&LIMITS));
    step->n_admits = 1;
    step->admits[0] = (StepAdmit){.slot = 2, .uid = 9, .n_prompt = 5, .n_bias = 2};
    step->n_biases = 2;
    step->biases[1] = (SampleBias){999, -3.0f};
    step->n_reuses = 1;
    step->reuses[0] = (StepReuse){.slot = 1, .page_index = 1, .n_pages = 2, .page0 = 1};
    step->n_copies = 1;
    step->copies[0] =
        (StepCopy){.slot = 1, .page_index = 3, .n_positions = 9, .from = 39, .to = 7, .token0 = 64};
    step->n_tokens = 64 + 9;
    step->n_releases = 1;
    step->n_segments = 1;
    step->segments[0] = (StepSegment){.slot = 2, .position = 3, .n_rows = 4, .n_pages = 1};
    step->n_rows = 4;
    step->n_pages = 3;
    step->pages[0] = 39;
    const size_t size = step_encode(step, wire);
    size_t used;
    for (size_t cut = 0; cut < size; cut++) {
        assert_false(step_decode(out, &LIMITS, wire, cut, &used, NULL));
    }
    static const uint32_t values[] = {0,    1,          3,          48,         49,        256,
                                      1000, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
    for (size_t at = 0; at + 4 <= size; at++) {
        for (unsigned v = 0; v < G_N_ELEMENTS(values); v++) {
            memcpy(bad, wire, size);
            memcpy(bad + at, &values[v], 4);
            if (step_decode(out, &LIMITS, bad, size, &used, NULL)) {
                assert_true(used <= size && out->n_rows <= LIMITS.max_rows &&
                            out->n_segments <= LIMITS.max_slots);
                for (uint32_t i = 0; i < out->n_segments; i++) {
                    const StepSegment *g = &out->segments[i];
                    assert_true(g->slot < LIMITS.max_slots && g->row0 + g->n_rows <= out->n_rows &&
                                g->position + g->n_rows <= LIMITS.context &&
                                g->page0 + g->n_pages <= out->n_pages &&
                                g->page_index + g->n_pages <= LIMITS.context / 32);
                }
                for (uint32_t i = 0; i < out->n_reuses; i++) {
                    const StepReuse *u = &out->reuses[i];
                    assert_true(u->slot < LIMITS.max_slots &&
                                u->page_index + u->n_pages <= LIMITS.context / 32 &&
                                u->page0 + u->n_pages <= out->n_pages &&
                                u->token0 + 32 * u->n_pages <= out->n_tokens);
                }
                for (uint32_t i = 0; i < out->n_copies; i++) {
                    const StepCopy *c = &out->copies[i];
                    assert_true(c->slot < LIMITS.max_slots && c->n_positions < 32 &&
                                (uint64_t)c->page_index * 32 + c->n_positions <= LIMITS.context &&
                                c->page_index < LIMITS.context / 32 &&
                                MAX(c->from, c->to) < LIMITS.max_pages &&
                                (uint64_t)c->token0 + c->n_positions <= out->n_tokens);
                }
                for (uint32_t i = 0; i < out->n_admits; i++) {
                    assert_true(out->admits[i].bias0 + out->admits[i].n_bias <= out->n_biases &&
                                out->n_biases <= SAMPLE_BIAS_LIMIT);
                }
            }
        }
    }
    step_free(step);
    step_free(out);
}

/* Every row is of exactly one segment: one that is in none would leave the stage without a
 * position, one that is in two would give more results than there is room for. */
static void test_segments_cover_the_rows_once(void **state)
{
    static const struct {
        uint32_t n_rows, row0[3], n[3], n_segments;
        bool good;
    } cases[] = {
        {6, {0, 4}, {4, 2}, 2, true},
        {6, {0}, {4}, 1, false},
        {6, {2}, {4}, 1, false},
        {6, {0, 0}, {6, 6}, 2, false},
        {6, {0, 3}, {4, 2}, 2, false},
        {6, {4, 0}, {2, 4}, 2, false},
        {6, {0, 4, 4}, {4, 0, 2}, 3, false},
        {6, {0}, {0}, 0, false},
    };
    Step *step = step_new(&LIMITS), *out = step_new(&LIMITS);
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&LIMITS));
    for (unsigned c = 0; c < G_N_ELEMENTS(cases); c++) {
        step_clear(step);
        step->n_rows = cases[c].n_rows;
        step->n_segments = cases[c].n_segments;
        for (uint32_t i = 0; i < step->n_segments; i++) {
            step->segments[i] =
                (StepSegment){.slot = i, .row0 = cases[c].row0[i], .n_rows = cases[c].n[i]};
        }
        size_t used;
        g_autoptr(GError) error = NULL;
        const size_t size = step_encode(step, wire);
        assert_int_equal(step_decode(out, &LIMITS, wire, size, &used, &error), cases[c].good);
        assert_true(cases[c].good || error->code == WEFT_ERROR_PROTOCOL);
    }
    step_free(step);
    step_free(out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hostile_steps),
        cmocka_unit_test(test_segments_cover_the_rows_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
