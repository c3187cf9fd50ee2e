/* Whom the wait-for graph blames. */
#include "coordinator/wait_graph.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

static void test_nobody_waits(void **state)
{
    assert_null(wait_graph_sink(NULL, 0, NULL));
    WaitEdge edges[] = {{"a", "b", "x", 5, false}};
    assert_null(wait_graph_sink(edges, 1, "b"));
}

/* The first to time out (a) is not to blame, nor the one it waited for (b). */
static void test_chain_names_its_end(void **state)
{
    WaitEdge edges[] = {{"a", "b", "tokens of a step", 2100, true},
                        {"b", "c", "all-reduce of layer 3", 2000, false},
                        {"d", "b", "x", 100, false}};
    const WaitEdge *sink = wait_graph_sink(edges, 3, NULL);
    assert_string_equal(sink->waits_for, "c");
    assert_string_equal(sink->waiter, "b");
    assert_string_equal(sink->operation, "all-reduce of layer 3");
}

static void test_the_longest_wait_leads(void **state)
{
    WaitEdge edges[] = {{"a", "b", "x", 10, false}, {"a", "c", "y", 900, false}};
    assert_string_equal(wait_graph_sink(edges, 2, "a")->waits_for, "c");
}

static void test_cycle_names_the_youngest_waiter(void **state)
{
    WaitEdge edges[] = {
        {"a", "b", "x", 900, true}, {"b", "c", "y", 950, false}, {"c", "a", "z", 20, false}};
    assert_string_equal(wait_graph_sink(edges, 3, NULL)->waits_for, "c");
    WaitEdge into[] = {
        {"s", "a", "w", 5000, true}, {"a", "b", "x", 30, false}, {"b", "a", "y", 40, false}};
    assert_string_equal(wait_graph_sink(into, 3, "s")->waits_for, "a");
}

static void test_self_wait_is_no_edge(void **state)
{
    WaitEdge edges[] = {{"a", "a", "x", 900, true}};
    assert_null(wait_graph_sink(edges, 1, NULL));
}

/* Any graph of up to six nodes gives an answer, and one of its own edges. */
static void test_random_graphs_end(void **state)
{
    static const char *const names[] = {"a", "b", "c", "d", "e", "f"};
    srand(1);
    for (int round = 0; round < 20000; round++) {
        WaitEdge edges[12];
        unsigned n = (unsigned)rand() % 13;
        for (unsigned i = 0; i < n; i++) {
            edges[i] = (WaitEdge){names[rand() % 6], names[rand() % 6], "x", (uint64_t)(rand() % 5),
                                  rand() % 4 == 0};
        }
        const WaitEdge *sink = wait_graph_sink(edges, n, NULL);
        assert_true(sink == NULL || (sink >= edges && sink < edges + n));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_waits),
        cmocka_unit_test(test_chain_names_its_end),
        cmocka_unit_test(test_the_longest_wait_leads),
        cmocka_unit_test(test_cycle_names_the_youngest_waiter),
        cmocka_unit_test(test_self_wait_is_no_edge),
        cmocka_unit_test(test_random_graphs_end),
    };
    return cmocka_run_group_tests_name("coordinator wait graph", tests, NULL, NULL);
}
