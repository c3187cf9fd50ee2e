/* Every operand ends where memory ends: what a variant reads or writes beyond an array is a fault,
 * however little, and the results are those of `generic`. A fault is a bug of the variant whose
 * name was printed last. */
#include "tests/kernels/avx512/variants.h"
#include "tests/unit/kernels/numbers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

enum { MOST = 1100, OPERANDS = 6 };

static const Kernels *generic, *variant;
static uint8_t *ends[OPERANDS]; /* readable and writable before, nothing behind */

static int setup(void **state)
{
    const size_t bytes = 4 * MOST * sizeof(float);
    if (ends[0] != NULL) {
        return 0;
    }
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t mapped = (bytes + page - 1) / page * page;
    for (int i = 0; i < OPERANDS; i++) {
        uint8_t *at =
            mmap(NULL, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_true(at != MAP_FAILED);
        assert_int_equal(mprotect(at + mapped, page, PROT_NONE), 0);
        ends[i] = at + mapped;
    }
    return 0;
}

/* The last n floats of operand i, filled. */
static float *operand(int i, size_t n, Numbers *numbers)
{
    float *at = (float *)(void *)(ends[i] - n * sizeof(float));
    numbers_fill(numbers, at, n, -2.0, 2.0);
    return at;
}

static const uint32_t sizes[] = {1,  2,  3,  5,  7,  8,  9,  15,  16,  17,  23,  31,
                                 32, 33, 47, 48, 63, 64, 65, 100, 127, 576, 1023};
#define EACH_SIZE(n)                                                                               \
    for (uint32_t each = 0, n; each < sizeof sizes / sizeof sizes[0] && (n = sizes[each]); each++)

/* What an op makes of the same operands: call(table) writes n floats to out. */
#define COMPARE(out, n, call)                                                                      \
    do {                                                                                           \
        static float before[4 * MOST], want[4 * MOST];                                             \
        const Kernels *k = generic;                                                                \
        memcpy(before, out, (n) * sizeof(float));                                                  \
        call;                                                                                      \
        memcpy(want, out, (n) * sizeof(float));                                                    \
        memcpy(out, before, (n) * sizeof(float));                                                  \
        k = variant;                                                                               \
        call;                                                                                      \
        assert_memory_equal(out, want, (n) * sizeof(float));                                       \
    } while (0)

static void test_serving(void **state)
{
    Numbers numbers = {1};
    EACH_SIZE(n)
    {
        float *a = operand(0, n, &numbers), *b = operand(1, n, &numbers),
              *c = operand(2, n, &numbers), *out = operand(3, n, &numbers);
        const GumbelKey key = {3, 1, n, 1};
        COMPARE(out, n, k->rms_norm(a, b, 1e-5f, n, out));
        COMPARE(out, n, k->swiglu(a, b, n, out));
        COMPARE(out, n, k->add(out, c, n));
        COMPARE(out, n, k->gumbel(&key, 4 * n, n, out));
        float stats[2];
        COMPARE(stats, 2, k->chunk_stats(a, n, &stats[0], &stats[1]));
    }
}

static void test_rope(void **state)
{
    Numbers numbers = {2};
    for (uint32_t dims = 2; dims <= 256; dims += dims < 36 ? 2 : 44) {
        float *x = operand(0, 2 * dims, &numbers), *cos = operand(1, dims / 2, &numbers),
              *sin = operand(2, dims / 2, &numbers);
        COMPARE(x, 2 * dims, k->rope_apply(x, 2, dims, dims, ROPE_ADJACENT, cos, sin));
        COMPARE(x, 2 * dims, k->rope_apply(x, 2, dims, dims, ROPE_HALVES, cos, sin));
    }
}

static void test_training(void **state)
{
    Numbers numbers = {3};
    EACH_SIZE(n)
    {
        float *a = operand(0, n, &numbers), *b = operand(1, n, &numbers),
              *c = operand(2, n, &numbers), *d = operand(3, n, &numbers),
              *out = operand(4, n, &numbers), *other = operand(5, n, &numbers);
        float stats[2];
        COMPARE(out, n, k->train.layer_norm(a, b, c, 1e-5f, n, out));
        COMPARE(out, n, k->train.rms_norm_backward(a, b, c, 1e-5f, n, out, stats));
        COMPARE(out, n, k->train.layer_norm_backward(a, b, c, 1e-5f, n, out, stats));
        COMPARE(out, n, k->train.gelu(a, n, out));
        COMPARE(out, n, k->train.gelu_backward(a, b, n, out));
        COMPARE(out, n, k->train.swiglu_backward(a, b, c, n, out, other));
        COMPARE(out, n, k->train.gradient_finish(out, n, 2.0f, 3.0f));
        COMPARE(stats, 1, stats[0] = k->train.sum_squares(d, n, 1, n));
        COMPARE(out, n, k->train.sum_rows(a, n, 1, n, out));
        COMPARE(out, n, k->train.xent_backward(a, n, 2.0f, 3.0f, n / 2, 0.5f, out));
    }
}

static int test_variant(const Variant *v, const Kernels *table)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_serving), cmocka_unit_test(test_rope),
                                       cmocka_unit_test(test_training)};
    variant = table;
    return cmocka_run_group_tests_name(v->name, tests, setup, NULL);
}

int main(int argc, char **argv)
{
    generic = kernels_get(ISA_GENERIC);
    return variants_run(argc, argv, false, test_variant);
}
