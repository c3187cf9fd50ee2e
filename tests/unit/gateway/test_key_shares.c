/* Places of a bounded queue, by key (coordinator/gateway/openai/key_shares.h). */
#include "coordinator/gateway/openai/key_shares.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <glib.h>

/* As many as a key gets, one by one. */
static uint64_t fill(KeyShares *shares, const char *key, uint64_t bound)
{
    uint64_t n = 0;
    while (key_shares_open(shares, key, 1, bound)) {
        n++;
    }
    return n;
}

static void test_a_flood_leaves_room(void **state)
{
    KeyShares *shares = key_shares_new();
    assert_int_equal(fill(shares, "ann", 512), 448);
    assert_int_equal(fill(shares, "bob", 512), 56);
    assert_int_equal(fill(shares, "cec", 512), 7);
    assert_int_equal(fill(shares, "dee", 512), 1);
    assert_int_equal(fill(shares, "eve", 512), 0);
    assert_int_equal(key_shares_count(shares), 512);
    key_shares_close(shares, "bob", 16);
    assert_int_equal(key_shares_count_of(shares, "bob"), 40);
    assert_int_equal(fill(shares, "eve", 512), 14);
    assert_false(key_shares_open(shares, "ann", 1, 512)); /* its share is full, the queue is not */
    key_shares_close(shares, "ann", 448);
    assert_int_equal(key_shares_count_of(shares, "ann"), 0);
    key_shares_free(shares);
}

static void test_the_whole_is_a_bound_for_all(void **state)
{
    KeyShares *shares = key_shares_new();
    assert_int_equal(fill(shares, NULL, 512), 512); /* without keys nobody is told apart */
    assert_false(key_shares_open(shares, "ann", 1, 512));
    assert_true(key_shares_open(shares, "ann", 0, 512));
    key_shares_close(shares, NULL, 512);
    assert_int_equal(fill(shares, "ann", 6), 6); /* of few places there is no eighth */
    assert_false(key_shares_open(shares, NULL, 1, 6));
    assert_false(key_shares_open(shares, NULL, 1, 4)); /* the bound became less */
    assert_false(key_shares_open(shares, "bob", UINT64_MAX, UINT64_MAX));
    assert_true(key_shares_open(shares, "bob", 1000, UINT64_MAX));
    key_shares_free(shares);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_flood_leaves_room),
        cmocka_unit_test(test_the_whole_is_a_bound_for_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
