/* The definition does not change by accident (NUMERICS, "Definition"): `generic` gives the
 * committed digests, and so does every other instruction set; kernels/avx512 also where the CPU
 * lacks its instructions (tests/kernels/avx512/variants.h).
 *
 * With an argument it prints the lines of tests/golden/digests.txt instead: for a new numerics
 * version, or a new model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "proto/base/version.h"
#include "tests/kernels/avx512/variants.h"
#include "tests/unit/worker/golden_digests.h"

#include <stdio.h>
#include <string.h>

static void expect_digest(const GoldenCase *c, const char *variant, const Kernels *kernels,
                          const char *committed)
{
    char hex[33];
    golden_digest(c, kernels, hex);
    if (strcmp(hex, committed) != 0) {
        fail_msg("%s gives %s on %s, and numerics version %u is %s: what changes a result raises "
                 "WEFT_NUMERICS_VERSION",
                 c->name, hex, variant, WEFT_NUMERICS_VERSION, committed);
    }
}

static void test_case(void **state)
{
    const GoldenCase *c = *state;
    unsigned version = 0;
    g_autofree char *committed = golden_digest_committed(c->name, &version);
    if (committed == NULL || version != WEFT_NUMERICS_VERSION) {
        fail_msg("no digest of %s under numerics version %u; print the lines of "
                 "tests/golden/digests.txt again",
                 c->name, WEFT_NUMERICS_VERSION);
    }
    expect_digest(c, "generic", kernels_get(ISA_GENERIC), committed);
    for (const Variant *v = variants; v->name != NULL; v++) {
        if (variant_for_engines(v) && (!v->dots || c->config.type[ROLE_ATTN_V] == DTYPE_BF16)) {
            Kernels table;
            variant_table(v, &table);
            expect_digest(c, v->name, &table, committed);
        }
    }
}

static int print_lines(void)
{
    for (unsigned i = 0; i < golden_case_count(); i++) {
        GoldenCase c;
        char hex[33];
        golden_case(i, &c);
        golden_digest(&c, kernels_get(ISA_GENERIC), hex);
        printf("%s %u %s\n", c.name, WEFT_NUMERICS_VERSION, hex);
    }
    return 0;
}

int main(int argc, char **argv)
{
    (void)argv;
    if (argc > 1) {
        return print_lines();
    }
    const unsigned n = golden_case_count();
    g_autofree GoldenCase *cases = g_new0(GoldenCase, n);
    g_autofree struct CMUnitTest *tests = g_new0(struct CMUnitTest, n);
    for (unsigned i = 0; i < n; i++) {
        golden_case(i, &cases[i]);
        tests[i] = (struct CMUnitTest){
            .name = cases[i].name, .test_func = test_case, .initial_state = &cases[i]};
    }
    return _cmocka_run_group_tests("golden digests", tests, n, NULL, NULL);
}
