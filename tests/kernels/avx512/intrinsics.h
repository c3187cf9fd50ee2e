/* The AVX-512 intrinsics of kernels/avx512 as functions over memory, one table for each meaning
 * that a build gives them. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef union Bits512 {
    _Alignas(64) uint32_t u32[16];
    float f32[16];
    uint8_t u8[64];
} Bits512;

typedef struct Intrinsic {
    const char *name;
    bool
        arithmetic; /* of floats: which NaN comes out depends on the compiler's order of operands */
    /* Operands are read at most; what a short result leaves of *out stays. */
    void (*call)(const Bits512 *a, const Bits512 *b, const Bits512 *c, Bits512 *out);
} Intrinsic;

/* Each ended by one without a name; the same names in the same order. */
extern const Intrinsic intrinsics_emulated[]; /* emulated_ops.h: lane by lane after the manual */
extern const Intrinsic intrinsics_simde[];    /* simde.h */
extern const Intrinsic intrinsics_native[];   /* the instructions, VDPBF16PS last */
