/* The kernel table: one slot per op (and weight type), filled from kernels/generic (the
 * specification), overlaid by avx2 and avx512 where the CPU has them (DESIGN 5, "Kernel table").
 * All variants give the same bits; a slot never falls back silently: what a variant lacks stays
 * generic and kernels_report() says so.
 *
 * Kernels work on caller-owned memory, never allocate, log or talk. MXCSR = 0x1F80 is the caller's
 * duty (parallel.h sets it). */
#pragma once

#include "kernels/ops/act.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/attention_backward.h"
#include "proto/model/blocks.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/optimizer.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/sample.h"
#include "kernels/ops/xent.h"

typedef enum KernelIsa { ISA_GENERIC = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 } KernelIsa;

/* What training has beyond serving; of these, serving GPT-2 has layer_norm and gelu. */
typedef struct TrainKernels {
    GemmFn gemm, gemm_bf16, gemm_f16;
    LayerNormFn layer_norm;
    NormBackwardFn rms_norm_backward;
    NormBackwardFn layer_norm_backward;
    NormWeightBackwardFn norm_weight_backward;
    SumRowsFn sum_rows;
    GeluFn gelu;
    GeluBackwardFn gelu_backward;
    SwigluBackwardFn swiglu_backward;
    AttentionBackwardFn attention_backward;
    XentBackwardFn xent_backward;
    GradientFinishFn gradient_finish;
    SumSquaresFn sum_squares;
    AdamwFn adamw;
    SgdFn sgd;
} TrainKernels;

typedef struct Kernels {
    KernelIsa isa;
    MatmulFn matmul[DTYPE_LIMIT]; /* by weight type; NULL = type not supported */
    ActQuantiseFn act_quantise[ACT_KIND_LIMIT];
    RmsNormFn rms_norm;
    SwigluFn swiglu;
    AddFn add;
    RopeApplyFn rope_apply;
    KvWriteFn kv_write[KV_TYPE_LIMIT];    /* by KvType */
    AttentionFn attention[KV_TYPE_LIMIT]; /* by KvType */
    AttentionCombineFn attention_combine;
    ChunkStatsFn chunk_stats;
    GumbelFn gumbel;
    TrainKernels train;
} Kernels;

/* The best ISA of this CPU. */
KernelIsa kernels_best_isa(void);
const char *kernels_isa_name(KernelIsa isa);
bool kernels_parse_isa(const char *name /* auto|generic|avx2|avx512 */,
                       KernelIsa *out); /* false: unknown or not on this CPU */
/* Immutable, process-wide; complete for each isa, with the slots of the one below where this CPU
 * lacks the instructions. */
const Kernels *kernels_get(KernelIsa isa);
/* "matmul Q6_K: generic" for each slot that the isa does not fill itself; text, static. */
const char *kernels_report(KernelIsa isa);
/* Which instruction multiplies bf16, chosen by measurement, and why; text, static. */
const char *kernels_bf16(KernelIsa isa);
