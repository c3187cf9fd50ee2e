/* How the table is filled: each ISA folder overlays the slots that it has. Internal to kernels/. */
#pragma once

#include "kernels/kernels.h"

void kernels_fill_generic_matmul(Kernels *kernels);
void kernels_fill_generic_ops(Kernels *kernels);
void kernels_fill_avx2_matmul(Kernels *kernels);
void kernels_fill_avx2_ops(Kernels *kernels);
/* has_bf16: the CPU has VDPBF16PS (avx512_bf16), which gets its own CPU check. */
void kernels_fill_avx512_matmul(Kernels *kernels, bool has_bf16);
void kernels_fill_avx512_ops(Kernels *kernels);

/* Parts of the above, one per file. */
void quant_fill_generic(Kernels *kernels);
void quant_fill_avx2(Kernels *kernels);

/* Complete tables, as data: a function compiled for an instruction set that the CPU lacks must not
 * run, and this one would (gcc fills neighbouring slots with vector stores). */
extern const TrainKernels train_generic, train_avx2, train_avx512;
