/* Which variant of each kernel this CPU runs. Tables are filled once, on first use, and never
 * change. */
#include "kernels/bf16dot.h"
#include "kernels/fill.h"

#include <glib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t xcr0(void)
{
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

typedef struct Cpu {
    bool avx2, avx512, avx512_bf16;
} Cpu;

static Cpu cpu_detect(void)
{
    const uint64_t ymm_state = 0x6, zmm_state = 0xe6;
    uint32_t a, b, c, d, b7, c7, d7;
    Cpu cpu = {0};
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) ||
        !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) {
        return cpu;
    }
    const uint64_t enabled = xcr0();
    const uint32_t need1 = bit_AVX | bit_FMA | bit_F16C;
    const uint32_t need512 = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    cpu.avx2 = (c & need1) == need1 && (b7 & bit_AVX2) && (enabled & ymm_state) == ymm_state;
    cpu.avx512 = cpu.avx2 && (b7 & need512) == need512 && (c7 & bit_AVX512VNNI) &&
                 (enabled & zmm_state) == zmm_state;
    cpu.avx512_bf16 = cpu.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
    return cpu;
}
#else
typedef struct Cpu {
    bool avx2, avx512, avx512_bf16;
} Cpu;
static Cpu cpu_detect(void)
{
    return (Cpu){0};
}
#endif

static Kernels tables[3];
static char *reports[3], *bf16[3];
static Cpu cpu;
static Bf16Choice bf16_choice;

static void report_add(GString *report, const char *what, const char *name)
{
    g_string_append_printf(report, "%s%s%s: generic\n", what, name ? " " : "", name ? name : "");
}

static char *report_make(const Kernels *k, const Kernels *generic)
{
    static const char *const acts[] = {"F32", "BF16", "Q8_32", "Q8_256"};
    static const char *const kv[] = {"F16", "BF16", "F32", "Q8"};
    GString *report = g_string_new(NULL);
    if (k == generic) {
        return g_string_free(report, FALSE);
    }
    for (uint32_t i = 0; i < DTYPE_LIMIT; i++) {
        if (k->matmul[i] && k->matmul[i] == generic->matmul[i]) {
            report_add(report, "matmul", dtype_info(i)->name);
        }
    }
    for (uint32_t i = 0; i < ACT_KIND_LIMIT; i++) {
        if (k->act_quantise[i] == generic->act_quantise[i]) {
            report_add(report, "act_quantise", acts[i]);
        }
    }
    for (uint32_t i = 0; i < KV_TYPE_LIMIT; i++) {
        if (k->kv_write[i] && k->kv_write[i] == generic->kv_write[i]) {
            report_add(report, "kv_write", kv[i]);
        }
        if (k->attention[i] && k->attention[i] == generic->attention[i]) {
            report_add(report, "attention", kv[i]);
        }
    }
#define REPORT_SLOT(slot)                                                                          \
    if (k->slot && k->slot == generic->slot) {                                                     \
        report_add(report, #slot, NULL);                                                           \
    }
    REPORT_SLOT(rms_norm)
    REPORT_SLOT(swiglu)
    REPORT_SLOT(add)
    REPORT_SLOT(rope_apply)
    REPORT_SLOT(attention_combine)
    REPORT_SLOT(chunk_stats)
    REPORT_SLOT(gumbel)
    REPORT_SLOT(train.gemm)
    REPORT_SLOT(train.gemm_bf16)
    REPORT_SLOT(train.gemm_f16)
    REPORT_SLOT(train.layer_norm)
    REPORT_SLOT(train.rms_norm_backward)
    REPORT_SLOT(train.layer_norm_backward)
    REPORT_SLOT(train.norm_weight_backward)
    REPORT_SLOT(train.sum_rows)
    REPORT_SLOT(train.gelu)
    REPORT_SLOT(train.gelu_backward)
    REPORT_SLOT(train.swiglu_backward)
    REPORT_SLOT(train.attention_backward)
    REPORT_SLOT(train.xent_backward)
    REPORT_SLOT(train.gradient_finish)
    REPORT_SLOT(train.sum_squares)
    REPORT_SLOT(train.adamw)
    REPORT_SLOT(train.sgd)
#undef REPORT_SLOT
    return g_string_free(report, FALSE);
}

/* Few rows or many, products of bf16 are by the instruction that was faster with many. */
static void fill_avx512(Kernels *table)
{
    kernels_fill_avx512_train(table);
    if (cpu.avx512_bf16) {
        Kernels with_dots = *table;
        train_fill_avx512_bf16(&with_dots);
        bf16_choice = bf16_choose(table->train.gemm_bf16, with_dots.train.gemm_bf16);
        table->train.gemm_bf16 =
            bf16_choice.dots ? with_dots.train.gemm_bf16 : table->train.gemm_bf16;
    }
    kernels_fill_avx512_matmul(table, bf16_choice.dots);
    kernels_fill_avx512_ops(table);
}

/* Each table is the one below, overlaid; where this CPU lacks the instructions it stays that one.
 */
static void fill_once(void)
{
    static gsize filled;
    if (!g_once_init_enter(&filled)) {
        return;
    }
    cpu = cpu_detect();
    kernels_fill_generic_matmul(&tables[ISA_GENERIC]);
    kernels_fill_generic_ops(&tables[ISA_GENERIC]);
    kernels_fill_generic_train(&tables[ISA_GENERIC]);
    tables[ISA_AVX2] = tables[ISA_GENERIC];
    if (cpu.avx2) {
        kernels_fill_avx2_matmul(&tables[ISA_AVX2]);
        kernels_fill_avx2_ops(&tables[ISA_AVX2]);
        kernels_fill_avx2_train(&tables[ISA_AVX2]);
    }
    tables[ISA_AVX512] = tables[ISA_AVX2];
    if (cpu.avx512) {
        fill_avx512(&tables[ISA_AVX512]);
    }
    for (int i = 0; i < 3; i++) {
        tables[i].isa = (KernelIsa)i;
        reports[i] = report_make(&tables[i], &tables[ISA_GENERIC]);
        bf16[i] = bf16_text(i == ISA_AVX512 && cpu.avx512_bf16, &bf16_choice);
    }
    g_once_init_leave(&filled, 1);
}

KernelIsa kernels_best_isa(void)
{
    fill_once();
    return cpu.avx512 ? ISA_AVX512 : cpu.avx2 ? ISA_AVX2 : ISA_GENERIC;
}

const char *kernels_isa_name(KernelIsa isa)
{
    static const char *const names[] = {"generic", "avx2", "avx512"};
    return names[isa];
}

bool kernels_parse_isa(const char *name, KernelIsa *out)
{
    const KernelIsa best = kernels_best_isa();
    if (strcmp(name, "auto") == 0) {
        *out = best;
        return true;
    }
    for (int i = ISA_GENERIC; i <= (int)best; i++) {
        if (strcmp(name, kernels_isa_name((KernelIsa)i)) == 0) {
            *out = (KernelIsa)i;
            return true;
        }
    }
    return false;
}

const Kernels *kernels_get(KernelIsa isa)
{
    fill_once();
    return &tables[isa];
}

const char *kernels_report(KernelIsa isa)
{
    fill_once();
    return reports[isa];
}

const char *kernels_bf16(KernelIsa isa)
{
    fill_once();
    return bf16[isa];
}
