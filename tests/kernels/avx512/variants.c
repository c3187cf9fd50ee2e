#include "tests/kernels/avx512/variants.h"

#include "kernels/fill.h"

#include <glib.h>
#include <stdio.h>
#include <string.h>

static const char *lacks_avx2(void)
{
    return kernels_best_isa() >= ISA_AVX2 ? NULL : "this CPU has no AVX2";
}

static const char *lacks_avx512(void)
{
    return kernels_best_isa() >= ISA_AVX512 ? NULL : "this CPU has no AVX-512";
}

static const char *lacks_dots(void)
{
    return lacks_avx512() != NULL                      ? lacks_avx512()
           : __builtin_cpu_supports("avx512bf16") == 0 ? "this CPU has no VDPBF16PS"
                                                       : NULL;
}

static void fill_avx2(Kernels *table, bool dots)
{
    kernels_fill_avx2_matmul(table);
    kernels_fill_avx2_ops(table);
    kernels_fill_avx2_train(table);
}

/* kernels/avx512 over itself, and compiled under other names over other instructions. */
#define AVX512_FILL(suffix)                                                                        \
    void kernels_fill_avx512_train##suffix(Kernels *kernels);                                      \
    void train_fill_avx512_bf16##suffix(Kernels *kernels);                                         \
    void kernels_fill_avx512_matmul##suffix(Kernels *kernels, bool has_bf16);                      \
    void kernels_fill_avx512_ops##suffix(Kernels *kernels);                                        \
    static void fill_avx512##suffix(Kernels *table, bool dots)                                     \
    {                                                                                              \
        fill_avx2(table, false);                                                                   \
        kernels_fill_avx512_train##suffix(table);                                                  \
        if (dots) {                                                                                \
            train_fill_avx512_bf16##suffix(table);                                                 \
        }                                                                                          \
        kernels_fill_avx512_matmul##suffix(table, dots);                                           \
        kernels_fill_avx512_ops##suffix(table);                                                    \
    }
AVX512_FILL()
AVX512_FILL(_emulated)
#ifdef WEFT_SIMDE
AVX512_FILL(_simde)
#define lacks_simde lacks_avx2
#else
#define fill_avx512_simde NULL
static const char *lacks_simde(void)
{
    return "built without SIMDe's headers (package libsimde-dev)";
}
#endif

const Variant variants[] = {
    {"avx2", false, lacks_avx2, fill_avx2},
    {"avx512", false, lacks_avx512, fill_avx512},
    {"avx512-dots", true, lacks_dots, fill_avx512},
    {"avx512-emulated", false, lacks_avx2, fill_avx512_emulated},
    {"avx512-dots-emulated", true, lacks_avx2, fill_avx512_emulated},
    {"avx512-simde", false, lacks_simde, fill_avx512_simde},
    {"avx512-dots-simde", true, lacks_simde, fill_avx512_simde},
    {NULL},
};

bool variant_for_engines(const Variant *v)
{
    const bool has_faster = v->fill == fill_avx512_emulated && lacks_simde() == NULL;
    return v->lacks() == NULL && !has_faster;
}

static bool is_named(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], name) == 0) {
            return true;
        }
    }
    return argc < 2;
}

static bool check_names(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const Variant *v = variants;
        while (v->name != NULL && strcmp(v->name, argv[i]) != 0) {
            v++;
        }
        if (v->name == NULL) {
            fprintf(stderr, "no variant is named %s\n", argv[i]);
            return false;
        }
    }
    return true;
}

/* A table that were another's would pass every test. */
static void check_filled(const Variant *variant, const Kernels *table)
{
    const Kernels *below = kernels_get(variant->fill == fill_avx2 ? ISA_GENERIC : ISA_AVX2);
    for (int i = 0; i < DTYPE_LIMIT; i++) {
        g_assert(below->matmul[i] == NULL || table->matmul[i] != below->matmul[i]);
    }
    g_assert(table->rms_norm != below->rms_norm && table->train.gemm != below->train.gemm);
    g_assert(table->train.gemm_bf16 != below->train.gemm_bf16);
}

void variant_table(const Variant *variant, Kernels *table)
{
    *table = *kernels_get(ISA_GENERIC);
    variant->fill(table, variant->dots);
    check_filled(variant, table);
}

static bool may_run(const Variant *v)
{
    const char *reason = v->lacks();
    if (reason != NULL) {
        fprintf(stderr, "%s: not run, %s\n", v->name, reason);
    }
    return reason == NULL;
}

int variants_run(int argc, char **argv, bool dots, VariantRun run)
{
    if (!check_names(argc, argv)) {
        return 2;
    }
    int ran = 0, failed = 0;
    for (const Variant *v = variants; v->name != NULL; v++) {
        if (is_named(v->name, argc, argv) && may_run(v) && (dots || !v->dots)) {
            Kernels table;
            variant_table(v, &table);
            ran++;
            failed += run(v, &table);
        }
    }
    return failed != 0 ? 1 : ran == 0 ? 77 : 0;
}
