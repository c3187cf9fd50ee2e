/* The control register's FTZ and DAZ around fmas that are to do what VDPBF16PS does (NUMERICS 10).
 * For AVX2 and AVX-512. */
#pragma once

#include <immintrin.h>

#define FLUSH_MODES 0x8040u /* FTZ and DAZ */

/* The memory clobber keeps loads and stores, and by them the arithmetic, on their side; what is in
 * registers is to be tied besides (result_done(), vec_done()). */
static inline void flush_set_modes(unsigned modes)
{
    __asm__ volatile("ldmxcsr %0" : : "m"(modes) : "memory");
}

/* Returns what flush_end() restores. */
static inline unsigned flush_begin(void)
{
    const unsigned saved = _mm_getcsr();
    flush_set_modes(saved | FLUSH_MODES);
    return saved;
}

static inline void flush_end(unsigned saved)
{
    flush_set_modes(saved);
}
