/* bf16dot (NUMERICS 10) by two fmas: subnormals flushed by the control register, elements of pairs
 * as f32. */
#pragma once

#include "kernels/avx512/matmul.h"
#include "kernels/vector/flush.h"

ALWAYS_INLINE void result_done(__m512 *v)
{
#ifdef WEFT_EMULATE_AVX512
    __asm__ volatile("" : "+m"(*v) : : "memory");
#else
    __asm__ volatile("" : "+v"(*v) : : "memory");
#endif
}

ALWAYS_INLINE __m512 bf16_even(__m512i pairs)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

ALWAYS_INLINE __m512 bf16_odd(__m512i pairs)
{
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}
