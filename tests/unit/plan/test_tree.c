/* Tree programs against the recursive definition of NUMERICS 2, for every n <= 64 and every range.
 * Sums are written out as text, so that another shape, order or a missing operand shows. */
#include "proto/plan/tree.h"

#include "proto/base/random.h"

#include <glib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* node(a, b) as the text "(left+right)". */
static void node_text(uint32_t a, uint32_t b, GString *out)
{
    if (b == a + 1) {
        g_string_append_printf(out, "%u", a);
        return;
    }
    uint32_t m = a + (b - a) / 2 + (b - a) % 2;
    g_string_append_c(out, '(');
    node_text(a, m, out);
    g_string_append_c(out, '+');
    node_text(m, b, out);
    g_string_append_c(out, ')');
}

/* Maximal nodes of node(a, b) inside [first, last), in order, each one's text in `out`. */
static void maximal(uint32_t a, uint32_t b, uint32_t first, uint32_t last, GPtrArray *out)
{
    if (first <= a && b <= last) {
        GString *text = g_string_new(NULL);
        node_text(a, b, text);
        g_ptr_array_add(out, g_string_free(text, FALSE));
    } else if (a < last && first < b && b - a > 1) {
        uint32_t m = a + (b - a) / 2 + (b - a) % 2;
        maximal(a, m, first, last, out);
        maximal(m, b, first, last, out);
    }
}

typedef struct Stack {
    char *items[80];
    uint32_t n;
} Stack;

static void push(Stack *s, char *text /* taken */)
{
    s->items[s->n++] = text;
}

static void merge(Stack *s)
{
    assert_true(s->n >= 2);
    char *right = s->items[--s->n], *left = s->items[--s->n];
    push(s, g_strdup_printf("(%s+%s)", left, right));
    g_free(left);
    g_free(right);
}

/* Runs a program over leaves [first, last); what it hands over is added to `out`. */
static void run_program(uint32_t n, uint32_t first, uint32_t last, GPtrArray *out)
{
    g_autofree TreeStep *steps = g_new(TreeStep, last - first);
    Stack stack = {.n = 0};
    guint before = out->len;
    memset(steps, 0xff, (last - first) * sizeof *steps); /* the program fills all it uses */
    uint32_t n_subtrees = tree_program(n, first, last, steps);
    for (uint32_t i = 0; i < last - first; i++) {
        push(&stack, g_strdup_printf("%u", first + i));
        for (uint32_t k = 0; k < steps[i].n_merges; k++) {
            merge(&stack);
        }
        if (steps[i].emit) {
            g_ptr_array_add(out, stack.items[--stack.n]);
        }
    }
    assert_int_equal(stack.n, 0);
    assert_int_equal(out->len - before, n_subtrees);
    assert_int_equal(tree_subtrees(n, first, last), n_subtrees);
    assert_true(n_subtrees <= TREE_SUBTREES_LIMIT);
}

static void test_programs(void **state)
{
    for (uint32_t n = 1; n <= TREE_LEAVES_LIMIT; n++) {
        for (uint32_t first = 0; first < n; first++) {
            for (uint32_t last = first + 1; last <= n; last++) {
                g_autoptr(GPtrArray) got = g_ptr_array_new_with_free_func(g_free);
                g_autoptr(GPtrArray) wanted = g_ptr_array_new_with_free_func(g_free);
                run_program(n, first, last, got);
                maximal(0, n, first, last, wanted);
                assert_int_equal(got->len, wanted->len);
                for (guint i = 0; i < got->len; i++) {
                    if (strcmp(got->pdata[i], wanted->pdata[i]) != 0) {
                        fail_msg("n %u [%u, %u): %s, not %s", n, first, last, (char *)got->pdata[i],
                                 (char *)wanted->pdata[i]);
                    }
                }
            }
        }
    }
}

/* Everybody's subtrees, completed, give node(0, n). */
static void check_completion(uint32_t n, const uint32_t *cuts, uint32_t n_ranks)
{
    g_autoptr(GPtrArray) subtrees = g_ptr_array_new();
    g_autoptr(GString) wanted = g_string_new(NULL);
    uint8_t merges[TREE_OPERANDS_LIMIT];
    Stack stack = {.n = 0};
    for (uint32_t r = 0; r < n_ranks; r++) {
        if (cuts[r] < cuts[r + 1]) {
            run_program(n, cuts[r], cuts[r + 1], subtrees);
        }
    }
    assert_int_equal(tree_completion(n, 0, cuts, n_ranks, merges), subtrees->len);
    for (guint i = 0; i < subtrees->len; i++) {
        push(&stack, subtrees->pdata[i]);
        for (uint32_t k = 0; k < merges[i]; k++) {
            merge(&stack);
        }
    }
    assert_int_equal(stack.n, 1);
    node_text(0, n, wanted);
    assert_string_equal(stack.items[0], wanted->str);
    g_free(stack.items[0]);
}

static void test_completion_of_two(void **state)
{
    for (uint32_t n = 1; n <= TREE_LEAVES_LIMIT; n++) {
        for (uint32_t cut = 0; cut <= n; cut++) { /* 0 and n: an empty rank */
            const uint32_t cuts[3] = {0, cut, n};
            check_completion(n, cuts, 2);
        }
    }
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void test_completion_of_many(void **state)
{
    RandomSeeded random;
    random_seeded_init(&random, 99);
    for (int i = 0; i < 20000; i++) {
        uint32_t n = 1 + (uint32_t)(random_u64(&random.base) % TREE_LEAVES_LIMIT);
        uint32_t n_ranks = 1 + (uint32_t)(random_u64(&random.base) % TREE_LEAVES_LIMIT);
        uint32_t cuts[TREE_LEAVES_LIMIT + 1];
        for (uint32_t r = 0; r <= n_ranks; r++) {
            cuts[r] = (uint32_t)(random_u64(&random.base) % (n + 1));
        }
        qsort(cuts, n_ranks + 1, sizeof *cuts, by_value);
        cuts[0] = 0;
        cuts[n_ranks] = n;
        check_completion(n, cuts, n_ranks);
    }
}

/* Chunks of large vocabularies: Llama 3 has 126; as many ranks as there can be, and the largest. */
static void test_completion_of_chunks(void **state)
{
    static const uint32_t counts[] = {65, 126, 127, 200, 1000, TREE_CHUNKS_LIMIT};
    RandomSeeded random;
    random_seeded_init(&random, 7);
    for (uint32_t i = 0; i < 60; i++) {
        const uint32_t n = counts[i % G_N_ELEMENTS(counts)];
        const uint32_t n_ranks = 1 + (uint32_t)(random_u64(&random.base) % TREE_LEAVES_LIMIT);
        uint32_t cuts[TREE_LEAVES_LIMIT + 1];
        if (n > 1000 && i > 6) {
            continue; /* its sums are long texts */
        }
        for (uint32_t r = 0; r <= n_ranks; r++) {
            cuts[r] = (uint32_t)(random_u64(&random.base) % (n + 1));
        }
        qsort(cuts, n_ranks + 1, sizeof *cuts, by_value);
        cuts[0] = 0;
        cuts[n_ranks] = n;
        check_completion(n, cuts, n_ranks);
    }
}

/* The most that a rank and that all of them hand over. */
static void test_limits(void **state)
{
    uint32_t cuts[TREE_LEAVES_LIMIT + 1];
    uint8_t merges[TREE_OPERANDS_LIMIT];
    assert_int_equal(tree_subtrees(TREE_CHUNKS_LIMIT, 1, TREE_CHUNKS_LIMIT - 1), 26);
    for (uint32_t r = 0; r <= TREE_LEAVES_LIMIT; r++) {
        cuts[r] =
            r * (TREE_CHUNKS_LIMIT / TREE_LEAVES_LIMIT) + (r % TREE_LEAVES_LIMIT != 0 ? 85 : 0);
    }
    const uint32_t n = tree_completion(TREE_CHUNKS_LIMIT, 0, cuts, TREE_LEAVES_LIMIT, merges);
    assert_true(n > 400 && n <= TREE_OPERANDS_LIMIT);
}

/* FORMULAS 7a: 9 heads on 3 ranks send 1, 2, 2 partial sums... of the even cut 3, 3, 3. */
static void test_known_counts(void **state)
{
    assert_int_equal(tree_subtrees(9, 0, 3), 1);
    assert_int_equal(tree_subtrees(9, 3, 6), 2);
    assert_int_equal(tree_subtrees(9, 6, 9), 2);
    assert_int_equal(tree_subtrees(8, 0, 4), 1);
    assert_int_equal(tree_subtrees(8, 3, 5), 2);
    assert_int_equal(tree_subtrees(8, 3, 3), 0);
    assert_int_equal(tree_subtrees(8, 3, 9), 0);
    TreeStep none;
    assert_int_equal(tree_program(8, 3, 3, &none), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_programs),
        cmocka_unit_test(test_completion_of_two),
        cmocka_unit_test(test_completion_of_many),
        cmocka_unit_test(test_completion_of_chunks),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_known_counts),
    };
    return cmocka_run_group_tests_name("tree", tests, NULL, NULL);
}
