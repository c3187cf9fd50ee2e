/* Crowding against what counting on one's fingers gives. */
#include "proto/plan/cpu_share.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const uint32_t zero[] = {0}, one[] = {1}, both[] = {0, 1}, far[] = {4095, CPU_LIMIT, 70};

static void assert_crowding(const CpuShare *shares, uint32_t n, uint32_t own, double want)
{
    assert_true(cpu_crowding(shares, n, own) == want);
}

static void test_own_cpus(void **state)
{
    const CpuShare shares[] = {{"a", 1, zero, 1}, {"a", 1, one, 1}, {"b", 1, zero, 1}};
    for (uint32_t i = 0; i < 3; i++) {
        assert_crowding(shares, 3, i, 1.0);
    }
}

static void test_same_cpu(void **state)
{
    const CpuShare shares[] = {{"a", 1, zero, 1}, {"a", 1, one, 1}, {"a", 1, zero, 1}};
    assert_crowding(shares, 3, 0, 2.0);
    assert_crowding(shares, 3, 1, 1.0);
    assert_crowding(shares, 3, 2, 2.0);
}

/* Threads over the CPUs of all that overlap. */
static void test_parts(void **state)
{
    const CpuShare shares[] = {{"a", 2, both, 2}, {"a", 1, zero, 1}, {"a", 1, far, 3}};
    assert_crowding(shares, 3, 0, 1.5);
    assert_crowding(shares, 3, 1, 1.5);
    assert_crowding(shares, 3, 2, 1.0);
    const CpuShare roomy[] = {{"a", 1, both, 2}, {"a", 1, both, 2}};
    assert_crowding(roomy, 2, 0, 1.0);
}

static void test_unknown(void **state)
{
    const CpuShare shares[] = {{"a", 4, NULL, 0},  {"a", 4, NULL, 0}, {NULL, 4, zero, 1},
                               {NULL, 4, zero, 1}, {"", 4, zero, 1},  {"", 4, zero, 1}};
    for (uint32_t i = 0; i < 6; i++) {
        assert_crowding(shares, 6, i, 1.0);
    }
    const CpuShare alone = {"a", 4, zero, 1}; /* its own affair: it has no choice to make */
    assert_crowding(&alone, 1, 0, 1.0);
}

static void test_stages_at_once(void **state)
{
    static const uint32_t two[] = {2, 3}, own_stage[] = {0, 1, 2, 3}, by_two[] = {0, 0, 1, 1};
    const CpuShare apart[] = {
        {"a", 1, zero, 1}, {"a", 1, one, 1}, {"b", 1, zero, 1}, {"b", 1, one, 1}};
    assert_int_equal(cpu_stages_at_once(apart, own_stage, 4), 4);
    assert_int_equal(cpu_stages_at_once(apart, by_two, 4), 2);
    const CpuShare together[] = {
        {"a", 1, both, 2}, {"a", 1, both, 2}, {"a", 1, both, 2}, {"a", 1, both, 2}};
    assert_int_equal(cpu_stages_at_once(together, own_stage, 4), 2);
    assert_int_equal(cpu_stages_at_once(together, own_stage, 3), 2);
    assert_int_equal(cpu_stages_at_once(together, own_stage, 2), 2);
    assert_int_equal(cpu_stages_at_once(together, by_two, 4), 1);
    const CpuShare mixed[] = {
        {"a", 2, both, 2}, {"a", 2, both, 2}, {"a", 2, two, 2}, {"b", 2, both, 2}};
    assert_int_equal(cpu_stages_at_once(mixed, own_stage, 4), 3); /* two of them in turns */
    const CpuShare one_cpu[] = {{"a", 4, zero, 1}, {"a", 4, zero, 1}};
    assert_int_equal(cpu_stages_at_once(one_cpu, own_stage, 2), 1);
    const CpuShare unknown[] = {{NULL, 4, zero, 1}, {NULL, 4, zero, 1}};
    assert_int_equal(cpu_stages_at_once(unknown, own_stage, 2), 2);
}

static void assert_turns(const CpuShare *shares, const uint32_t *stages, uint32_t n, uint32_t own,
                         const char *want)
{
    char *name = cpu_turn_name(shares, stages, n, own);
    if (want == NULL) {
        assert_null(name);
    } else {
        assert_string_equal(name, want);
    }
    free(name);
}

static void test_turns(void **state)
{
    static const uint32_t own_stage[] = {0, 1, 2, 3}, by_two[] = {0, 0, 1, 1};
    const CpuShare pairs[] = {
        {"a", 1, zero, 1}, {"a", 1, zero, 1}, {"a", 1, one, 1}, {"b", 1, one, 1}};
    assert_turns(pairs, own_stage, 4, 0, "weft-cpus-0");
    assert_turns(pairs, own_stage, 4, 1, "weft-cpus-0");
    assert_turns(pairs, own_stage, 4, 2, NULL); /* alone there: the fourth is on another host */
    assert_turns(pairs, own_stage, 4, 3, NULL);
    assert_turns(pairs, by_two, 4, 0, NULL); /* ranks of one stage wait for each other */
    const CpuShare wide[] = {{"a", 2, both, 2}, {"a", 2, both, 2}, {"a", 1, zero, 1}};
    assert_turns(wide, own_stage, 2, 0, "weft-cpus-0-1");
    assert_turns(wide, own_stage, 3, 0, NULL); /* has but a part of them */
    const CpuShare roomy[] = {{"a", 1, both, 2}, {"a", 1, both, 2}, {"a", 1, both, 2}};
    assert_turns(roomy, own_stage, 3, 0, NULL); /* two at a time find a CPU each */
    const CpuShare unknown[] = {
        {NULL, 1, zero, 1}, {NULL, 1, zero, 1}, {"a", 1, NULL, 0}, {"a", 1, NULL, 0}};
    for (uint32_t i = 0; i < 4; i++) {
        assert_turns(unknown, own_stage, 4, i, NULL);
    }
}

/* CPUs that a name has no room for still have one of their own. */
static void test_long_names(void **state)
{
    static uint32_t even[100], other[100];
    static const uint32_t stages[] = {0, 1};
    (void)state;
    for (uint32_t i = 0; i < 100; i++) {
        even[i] = other[i] = 2 * i;
    }
    other[99]++;
    const CpuShare a[] = {{"a", 100, even, 100}, {"a", 100, even, 100}},
                   b[] = {{"a", 100, other, 100}, {"a", 100, other, 100}};
    char *first = cpu_turn_name(a, stages, 2, 0), *same = cpu_turn_name(a, stages, 2, 1),
         *second = cpu_turn_name(b, stages, 2, 0);
    assert_string_equal(first, same);
    assert_string_not_equal(first, second);
    assert_true(strlen(first) <= CPU_TURN_NAME_LIMIT);
    free(first);
    free(same);
    free(second);
}

static void test_roaming(void **state)
{
    static uint32_t cpus[CPU_LIMIT];
    const CpuShare pairs[] = {
        {"a", 1, zero, 1}, {"a", 1, zero, 1}, {"a", 1, one, 1}, {"b", 1, far, 3}};
    assert_int_equal(cpu_roam(pairs, 4, 0, cpus), 2);
    assert_memory_equal(cpus, both, sizeof both);
    assert_int_equal(cpu_roam(pairs, 4, 2, cpus), 0); /* not crowded */
    assert_int_equal(cpu_roam(pairs, 4, 3, cpus), 0);
}

static void test_rank_threads(void **state)
{
    static const struct {
        uint32_t threads;
        size_t n_devices;
        uint32_t want;
    } cases[] = {{8, 0, 8}, {8, 1, 8}, {8, 3, 2}, {2, 8, 1}, {0, 0, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(cpu_rank_threads(cases[i].threads, cases[i].n_devices), cases[i].want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_own_cpus),     cmocka_unit_test(test_same_cpu),
        cmocka_unit_test(test_parts),        cmocka_unit_test(test_unknown),
        cmocka_unit_test(test_rank_threads), cmocka_unit_test(test_stages_at_once),
        cmocka_unit_test(test_turns),        cmocka_unit_test(test_long_names),
        cmocka_unit_test(test_roaming),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
