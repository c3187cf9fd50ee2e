/* What parity and golden tests hold to `generic`: the instruction sets of this CPU, and on any CPU
 * with AVX2 the sources of kernels/avx512 compiled over AVX-512 instructions written in C
 * (emulated.h) and taken from SIMDe (simde.h). */
#pragma once

#include "kernels/kernels.h"

typedef struct Variant {
    const char *name;
    bool dots; /* bf16 products by VDPBF16PS; the rest is the variant without */
    /* Why it cannot run here, for a skip; NULL: it can. */
    const char *(*lacks)(void);
    void (*fill)(Kernels *table, bool dots);
} Variant;

/* All, ended by one without a name: avx2, avx512, avx512-dots, avx512-emulated,
 * avx512-dots-emulated, avx512-simde, avx512-dots-simde. */
extern const Variant variants[];

/* Whether it runs here and is worth whole engines: of the two meanings of AVX-512's instructions
 * the faster. */
bool variant_for_engines(const Variant *variant);

/* Complete, as dispatch fills it. */
void variant_table(const Variant *variant, Kernels *table);

/* How many tests of it failed. */
typedef int (*VariantRun)(const Variant *variant, const Kernels *table);
/* Runs those named in argv[1..], or all where none is named, that can run here, and says of each
 * other why not; with dots only where the op under test has them. For main(): 0, 1 (some failed) or
 * 77 (none ran); 2: a name is none. */
int variants_run(int argc, char **argv, bool dots, VariantRun run);
