/* The two meanings in C of each AVX-512 instruction that kernels/avx512 uses, independent of each
 * other, give the same bits; on a CPU that has the instruction so does it. */
#include "kernels/kernels.h"
#include "tests/kernels/avx512/intrinsics.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

enum { TIMES = 20000 };

static const Intrinsic *judged;

/* Any bits; floats of near magnitudes, whose sums cancel; subnormals and their neighbours; bytes at
 * their limits. */
static void fill(Numbers *numbers, Bits512 *out)
{
    static const uint32_t special[] = {0,          0x80000000, 0x3f800000, 0xbf800000, 0x7f800000,
                                       0xff800000, 0x7fc00000, 0x7fffffff, 1,          0x007fffff,
                                       0x00800000, 0x80808080, 0x7f7f7f7f, 0xff80ff80, 0x33000000};
    const unsigned kind = (unsigned)(numbers_u64(numbers) % 4);
    for (int i = 0; i < 16; i++) {
        const uint32_t random = (uint32_t)numbers_u64(numbers);
        out->u32[i] = kind == 0         ? random
                      : kind == 1       ? (random & 0x81ffffffu) + 0x3f000000u
                      : kind == 2       ? (random & 0x80ffffffu) + (random >> 24 & 1) * 0x1f000000u
                      : random % 3 == 0 ? random
                                        : special[random % (sizeof special / sizeof special[0])];
    }
}

static bool same(const Intrinsic *f, const Bits512 *x, const Bits512 *y)
{
    for (int i = 0; i < 16; i++) {
        if (x->u32[i] != y->u32[i] && !(f->arithmetic && isnan(x->f32[i]) && isnan(y->f32[i]))) {
            return false;
        }
    }
    return true;
}

static void test_same_bits(void **state)
{
    Numbers numbers = {512};
    const bool has_dots = judged != intrinsics_native || __builtin_cpu_supports("avx512bf16");
    for (int i = 0; intrinsics_emulated[i].name != NULL; i++) {
        const Intrinsic *f = &intrinsics_emulated[i];
        assert_string_equal(f->name, judged[i].name);
        if (!has_dots && strcmp(f->name, "dpbf16_ps") == 0) {
            fprintf(stderr, "dpbf16_ps: not run, this CPU does not have it\n");
            continue;
        }
        for (int t = 0; t < TIMES; t++) {
            Bits512 a, b, c, want, got;
            fill(&numbers, &a);
            fill(&numbers, &b);
            fill(&numbers, &c);
            fill(&numbers, &want);
            got = want;
            f->call(&a, &b, &c, &want);
            judged[i].call(&a, &b, &c, &got);
            if (!same(f, &want, &got)) {
                for (int lane = 0; lane < 16; lane++) {
                    print_error("lane %d: %08x %08x %08x: %08x, emulated %08x\n", lane, a.u32[lane],
                                b.u32[lane], c.u32[lane], got.u32[lane], want.u32[lane]);
                }
                fail_msg("%s", f->name);
            }
        }
    }
}

static int run(const char *name, const Intrinsic *table)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_bits)};
    judged = table;
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}

int main(void)
{
    int failed = 0, ran = 0;
    if (kernels_best_isa() < ISA_AVX2) {
        fprintf(stderr, "this CPU has no AVX2\n");
        return 77;
    }
#ifdef WEFT_SIMDE
    failed += run("simde", intrinsics_simde);
    ran++;
#else
    fprintf(stderr, "simde: built without its headers (package libsimde-dev)\n");
#endif
    if (kernels_best_isa() >= ISA_AVX512) {
        failed += run("native", intrinsics_native);
        ran++;
    } else {
        fprintf(stderr, "native: this CPU has no AVX-512\n");
    }
    return failed != 0 ? 1 : ran == 0 ? 77 : 0;
}
