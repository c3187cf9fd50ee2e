/* Cuts of units and of layers, against all that there are and by hand. */
#include "coordinator/planner/cut.h"

#include "proto/base/random.h"
#include "proto/plan/tree.h"

#include <glib.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

static void cut(uint32_t n, const double *unit_s, uint32_t n_ranks, double subtree_s, double margin,
                uint32_t *cuts)
{
    SubtreeTable table;
    subtree_table_init(&table, n);
    cut_units(&table, unit_s, n_ranks, subtree_s, margin, cuts);
}

typedef struct Choice {
    double slowest;
    uint32_t subtrees; /* of all three ranks */
} Choice;

static Choice choice_of(uint32_t n, const double *unit_s, double subtree_s, const uint32_t *cuts)
{
    Choice c = {0};
    for (uint32_t r = 0; r < 3; r++) {
        uint32_t subtrees = tree_subtrees(n, cuts[r], cuts[r + 1]);
        c.slowest = MAX(c.slowest, (cuts[r + 1] - cuts[r]) * unit_s[r] + subtrees * subtree_s);
        c.subtrees += subtrees;
    }
    return c;
}

/* Of all cuts on three ranks: the shortest; and the one that cut_units() is to find. */
static void try_all(uint32_t n, const double *unit_s, double subtree_s, double margin,
                    Choice *shortest, Choice *wanted)
{
    *shortest = *wanted = (Choice){INFINITY, UINT32_MAX};
    for (int round = 0; round < 2; round++) {
        for (uint32_t a = 1; a + 2 <= n; a++) {
            for (uint32_t b = a + 1; b + 1 <= n; b++) {
                const Choice c = choice_of(n, unit_s, subtree_s, (uint32_t[]){0, a, b, n});
                if (round == 0 && c.slowest < shortest->slowest) {
                    *shortest = c;
                }
                if (round == 1 && c.slowest <= shortest->slowest * (1.0 + margin) &&
                    (c.subtrees < wanted->subtrees ||
                     (c.subtrees == wanted->subtrees && c.slowest < wanted->slowest))) {
                    *wanted = c;
                }
            }
        }
    }
}

/* cut_units() against all cuts of small trees on three ranks. */
static void test_cut_units_is_best(void **state)
{
    static const double margins[] = {0.0, 0.05, 0.4};
    RandomSeeded random;
    uint32_t n_other = 0;
    random_seeded_init(&random, 17);
    for (int i = 0; i < 600; i++) {
        uint32_t n = 3 + (uint32_t)(random_u64(&random.base) % 14), cuts[4];
        double unit_s[3], subtree_s = (double)(random_u64(&random.base) % 100) / 20.0;
        for (int r = 0; r < 3; r++) {
            unit_s[r] = 0.1 + (double)(random_u64(&random.base) % 100) / 25.0;
        }
        cut(n, unit_s, 3, subtree_s, margins[i % 3], cuts);
        assert_int_equal(cuts[0], 0);
        assert_int_equal(cuts[3], n);
        for (uint32_t r = 0; r < 3; r++) {
            assert_true(cuts[r] < cuts[r + 1]);
        }
        Choice shortest, wanted;
        try_all(n, unit_s, subtree_s, margins[i % 3], &shortest, &wanted);
        const Choice got = choice_of(n, unit_s, subtree_s, cuts);
        assert_int_equal(got.subtrees, wanted.subtrees);
        assert_true(fabs(got.slowest - wanted.slowest) < 1e-9);
        n_other += got.slowest > shortest.slowest + 1e-9;
    }
    assert_true(n_other > 50); /* margins do take fewer subtrees */
}

/* 8 units on 3 equal ranks: even where partial sums are free, node-aligned (1/4, 1/4, 1/2 in some
 * order) where they are dear. */
static void test_cut_units_aligns(void **state)
{
    const double alike[3] = {1.0, 1.0, 1.0};
    uint32_t cuts[4];
    cut(8, alike, 3, 0.0, 0.0, cuts);
    assert_int_equal(MAX(cuts[1], MAX(cuts[2] - cuts[1], 8 - cuts[2])), 3);
    cut(8, alike, 3, 10.0, 0.0, cuts);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(tree_subtrees(8, cuts[r], cuts[r + 1]), 1);
    }
    const double two[2] = {1.0, 1.0};
    cut(9, two, 2, 0.1, 0.0, cuts);
    assert_int_equal(cuts[1], 5); /* the root's own cut */
}

/* 32 units on two ranks of which one measured 8 % more: 17 and 15 by speed, and six subtrees; at
 * the root's own cut where that is within the margin. Twice as fast, it keeps its share. */
static void test_cut_units_within_noise(void **state)
{
    const double alike[2] = {1.0 / 1.08, 1.0}, apart[2] = {0.5, 1.0};
    uint32_t cuts[3];
    cut(32, alike, 2, 0.001, 0.0, cuts);
    assert_int_equal(cuts[1], 17);
    assert_int_equal(tree_subtrees(32, 0, 17) + tree_subtrees(32, 17, 32), 6);
    cut(32, alike, 2, 0.001, 0.05, cuts);
    assert_int_equal(cuts[1], 16);
    cut(32, apart, 2, 0.001, 0.05, cuts);
    assert_in_range(cuts[1], 20, 22);
}

static void test_cut_layers(void **state)
{
    uint32_t counts[3];
    cut_layers(30, (double[]){1, 1, 1}, (double[]){0, 0, 0}, 3, counts);
    assert_int_equal(counts[0] + counts[1] + counts[2], 30);
    assert_int_equal(counts[0], 10);
    assert_int_equal(counts[2], 10);
    cut_layers(30, (double[]){1, 1, 1}, (double[]){0, 0, 9}, 3, counts);
    assert_int_equal(counts[2], 4);
    cut_layers(30, (double[]){1, 1, 1}, (double[]){0, 0, 1000}, 3, counts);
    assert_int_equal(counts[2], 1);
    cut_layers(3, (double[]){1, 5, 9}, (double[]){0, 0, 0}, 3, counts);
    assert_int_equal(counts[0], 1);
    assert_int_equal(counts[1], 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cut_units_is_best),
        cmocka_unit_test(test_cut_units_aligns),
        cmocka_unit_test(test_cut_units_within_noise),
        cmocka_unit_test(test_cut_layers),
    };
    return cmocka_run_group_tests_name("cut", tests, NULL, NULL);
}
