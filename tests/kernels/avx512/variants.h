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

/* The next after `last` (NULL: the first) of those named in argv[1..], or of all where none is
 * named, that runs here; says of each it passes why not. NULL: no more. Ends the program on a name
 * that is none. */
const Variant *variants_next(const Variant *last, int argc, char **argv);

/* Whether it runs here and is worth whole engines: of the two meanings of AVX-512's instructions
 * the faster. */
bool variant_for_engines(const Variant *variant);

/* Complete, as dispatch fills it. */
void variant_table(const Variant *variant, Kernels *table);
