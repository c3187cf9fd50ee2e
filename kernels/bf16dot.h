/* The choice of the instruction that computes bf16dot (NUMERICS 10). Internal to kernels/. */
#pragma once

#include "kernels/ops/gemm.h"

typedef struct Bf16Choice {
    bool dots; /* VDPBF16PS, else two fmas */
    double dots_ops_per_s, fma_ops_per_s;
} Bf16Choice;

/* Takes about 2 ms. */
Bf16Choice bf16_choose(GemmFn fma, GemmFn dots);
/* What is taken and why, for people; choice is read where has_dots. Returned. */
char *bf16_text(bool has_dots, const Bf16Choice *choice);
