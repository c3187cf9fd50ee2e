/* Where a prompt's beginning is looked for. */
#include "coordinator/jobs/affinity.h"

#include "proto/base/random.h"
#include "proto/model/model_spec.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define PROMPT (AFFINITY_PAGES * KV_BLOCK + 100)

static void fill(uint32_t *ids, uint64_t seed)
{
    RandomSeeded random;
    random_seeded_init(&random, seed);
    for (uint32_t i = 0; i < PROMPT; i++) {
        ids[i] = (uint32_t)random_u64(&random.base);
    }
}

/* Only full pages count, a changed id changes its page and all after it, and so does the key. */
static void test_pages(void **state)
{
    uint32_t ids[PROMPT];
    PromptPages a, b;
    fill(ids, 1);
    prompt_pages(&a, ids, KV_BLOCK - 1, NULL);
    assert_int_equal(a.n, 0);
    prompt_pages(&a, ids, 5 * KV_BLOCK + 31, NULL);
    assert_int_equal(a.n, 5);
    prompt_pages(&b, ids, PROMPT, NULL);
    assert_int_equal(b.n, AFFINITY_PAGES);
    assert_memory_equal(a.hashes, b.hashes, 5 * sizeof a.hashes[0]);
    ids[3 * KV_BLOCK + 7] ^= 1;
    prompt_pages(&b, ids, PROMPT, NULL);
    for (uint32_t i = 0; i < 5; i++) {
        assert_int_equal(a.hashes[i] == b.hashes[i], i < 3);
    }
    ids[3 * KV_BLOCK + 7] ^= 1;
    prompt_pages(&b, ids, PROMPT, "alice");
    assert_true(a.hashes[0] != b.hashes[0]);
    prompt_pages(&a, ids, PROMPT, "");
    assert_true(a.hashes[0] != b.hashes[0]);
}

static void test_replicas_and_epochs(void **state)
{
    uint32_t ids[PROMPT];
    PromptPages whole, half, other;
    Affinity *a = affinity_new();
    fill(ids, 2);
    prompt_pages(&whole, ids, 10 * KV_BLOCK, NULL);
    prompt_pages(&half, ids, 5 * KV_BLOCK, NULL);
    ids[5 * KV_BLOCK]++;
    prompt_pages(&other, ids, 10 * KV_BLOCK, NULL);
    affinity_enter(a, &half, 0, 1);
    affinity_enter(a, &other, 1, 1);
    assert_int_equal(affinity_find(a, &whole, 0, 1), 5);
    assert_int_equal(affinity_find(a, &whole, 1, 1), 5);
    assert_int_equal(affinity_find(a, &other, 1, 1), 10);
    assert_int_equal(affinity_find(a, &other, 2, 1), 0);
    assert_int_equal(affinity_find(a, &other, 1, 2), 0);
    affinity_enter(a, &whole, 1, 2);
    assert_int_equal(affinity_find(a, &whole, 1, 2), 10);
    affinity_free(a);
}

/* The last prompts are found again, whatever came before. */
static void test_bounded(void **state)
{
    static uint32_t ids[PROMPT];
    Affinity *a = affinity_new();
    PromptPages pages;
    for (uint64_t i = 0; i < 2000; i++) {
        fill(ids, i);
        prompt_pages(&pages, ids, PROMPT, NULL);
        affinity_enter(a, &pages, (uint32_t)(i % 3), 1);
        assert_int_equal(affinity_find(a, &pages, (uint32_t)(i % 3), 1), AFFINITY_PAGES);
    }
    affinity_free(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pages),
        cmocka_unit_test(test_replicas_and_epochs),
        cmocka_unit_test(test_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
