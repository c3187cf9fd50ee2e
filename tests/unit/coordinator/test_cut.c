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

static void cut(uint32_t n, const double *unit_s, uint32_t n_ranks, double subtree_s,
                uint32_t *cuts)
{
    SubtreeTable table;
    subtree_table_init(&table, n);
    cut_units(&table, unit_s, n_ranks, subtree_s, cuts);
}

/* cut_units() against all cuts of small trees on three ranks. */
static void test_cut_units_is_best(void **state)
{
    RandomSeeded random;
    random_seeded_init(&random, 17);
    for (int i = 0; i < 500; i++) {
        uint32_t n = 3 + (uint32_t)(random_u64(&random.base) % 14), cuts[4];
        double unit_s[3], subtree_s = (double)(random_u64(&random.base) % 100) / 20.0;
        for (int r = 0; r < 3; r++) {
            unit_s[r] = 0.1 + (double)(random_u64(&random.base) % 100) / 25.0;
        }
        cut(n, unit_s, 3, subtree_s, cuts);
        assert_int_equal(cuts[0], 0);
        assert_int_equal(cuts[3], n);
        double best = INFINITY, got = 0.0;
        for (uint32_t r = 0; r < 3; r++) {
            assert_true(cuts[r] < cuts[r + 1]);
            double time = (cuts[r + 1] - cuts[r]) * unit_s[r] +
                          tree_subtrees(n, cuts[r], cuts[r + 1]) * subtree_s;
            got = MAX(got, time);
        }
        for (uint32_t a = 1; a + 2 <= n; a++) {
            for (uint32_t b = a + 1; b + 1 <= n; b++) {
                double x = a * unit_s[0] + tree_subtrees(n, 0, a) * subtree_s;
                double y = (b - a) * unit_s[1] + tree_subtrees(n, a, b) * subtree_s;
                double z = (n - b) * unit_s[2] + tree_subtrees(n, b, n) * subtree_s;
                best = MIN(best, MAX(x, MAX(y, z)));
            }
        }
        assert_true(fabs(got - best) < 1e-9);
    }
}

/* 8 units on 3 equal ranks: even where partial sums are free, node-aligned (1/4, 1/4, 1/2 in some
 * order) where they are dear. */
static void test_cut_units_aligns(void **state)
{
    const double alike[3] = {1.0, 1.0, 1.0};
    uint32_t cuts[4];
    cut(8, alike, 3, 0.0, cuts);
    assert_int_equal(MAX(cuts[1], MAX(cuts[2] - cuts[1], 8 - cuts[2])), 3);
    cut(8, alike, 3, 10.0, cuts);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(tree_subtrees(8, cuts[r], cuts[r + 1]), 1);
    }
    const double two[2] = {1.0, 1.0};
    cut(9, two, 2, 0.1, cuts);
    assert_int_equal(cuts[1], 5); /* the root's own cut */
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
        cmocka_unit_test(test_cut_layers),
    };
    return cmocka_run_group_tests_name("cut", tests, NULL, NULL);
}
