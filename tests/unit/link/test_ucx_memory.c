/* What UCX says of GPUs' memory: an answer and a sentence on every host. */
#include "transport/link/ucx_memory.h"

#include <glib.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

static void test_a_sentence_for_each_answer(void **state)
{
    char why[160] = "";
    (void)state;
    const bool knows = link_ucx_knows_cuda(why);
    assert_true(g_str_has_prefix(why, knows ? "UCX has its CUDA transports" : "UCX "));
    assert_null(strchr(why, '\n'));
    if (!knows) {
        assert_string_equal(why, "UCX has no CUDA transport here");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_a_sentence_for_each_answer)};
    return cmocka_run_group_tests_name("ucx_memory", tests, NULL, NULL);
}
