/* How the table is filled: each ISA folder overlays the slots that it has. Internal to kernels/.
 *
 * These functions are compiled for their instruction set like the kernels beside them (gcc stores
 * neighbouring slots with its vectors): call one only on a CPU that has it. */
#pragma once

#include "kernels/kernels.h"

void kernels_fill_generic_matmul(Kernels *kernels);
void kernels_fill_generic_ops(Kernels *kernels);
void kernels_fill_generic_train(Kernels *kernels);
void kernels_fill_avx2_matmul(Kernels *kernels);
void kernels_fill_avx2_ops(Kernels *kernels);
void kernels_fill_avx2_train(Kernels *kernels);
/* has_bf16: with VDPBF16PS, which the CPU then has (avx512_bf16). */
void kernels_fill_avx512_matmul(Kernels *kernels, bool has_bf16);
void kernels_fill_avx512_ops(Kernels *kernels);
void kernels_fill_avx512_train(Kernels *kernels);
/* Products of bf16 by VDPBF16PS: only on a CPU that has it. */
void train_fill_avx512_bf16(Kernels *kernels);

/* Parts of the above, one per file. */
void quant_fill_generic(Kernels *kernels);
void quant_fill_avx2(Kernels *kernels);
