#include "worker/model/training_precision.h"

#include "proto/base/error.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FLUSH 0x8040u /* FTZ and DAZ */

static const char *const names[PRECISION_LIMIT] = {"f32", "bf16", "f16"};

const char *precision_name(Precision p)
{
    return names[p];
}

Dtype precision_dtype(Precision p)
{
    return p == PRECISION_BF16 ? DTYPE_BF16 : p == PRECISION_F16 ? DTYPE_F16 : DTYPE_F32;
}

bool precision_parse(const char *name, Precision *out, GError **error)
{
    for (uint32_t i = 0; i < PRECISION_LIMIT; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = (Precision)i;
            return true;
        }
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "precision %s is unknown; choose f32, bf16 or f16", name);
    return false;
}

#if defined(__x86_64__)
unsigned precision_begin(Precision precision)
{
    const unsigned modes = _mm_getcsr();
    if (precision == PRECISION_BF16) {
        _mm_setcsr(modes | FLUSH);
    }
    return modes;
}

void precision_end(unsigned modes)
{
    _mm_setcsr(modes);
}
#else
#error "bf16dot wants the flush modes of x86"
#endif

GemmFn precision_gemm(const Kernels *kernels, Precision precision)
{
    const TrainKernels *k = &kernels->train;
    return precision == PRECISION_BF16  ? k->gemm_bf16
           : precision == PRECISION_F16 ? k->gemm_f16
                                        : k->gemm;
}
