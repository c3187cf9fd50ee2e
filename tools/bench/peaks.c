/* The loops are assembly: a compiler would find out that they compute nothing. Their operands are
 * registers only, eleven or twelve independent sums. Which sequence is the peak of an instruction
 * set is told by the widest one that a kernel may use: vpdpbusd with AVX-512, vpmaddubsw and the
 * i16 addition that its result needs with AVX2 (without VNNI). */
#include "tools/bench/peaks.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { ROUNDS = 5, LOOPS = 200000, SUMS = 12 };
#define READ_BYTES ((size_t)256 << 20)

double peaks_now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double peaks_median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, compare);
    return values[n / 2];
}

#if defined(__x86_64__)
#define REPEAT(X)                                                                                  \
    X("0") X("1") X("2") X("3") X("4") X("5") X("6") X("7") X("8") X("9") X("10") X("11")
#define VECTORS                                                                                    \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",       \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define CLEAR_OPERANDS "vpxor %%xmm12, %%xmm12, %%xmm12\n vpxor %%xmm13, %%xmm13, %%xmm13\n"
#define MADDUBS(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n vpaddw %%ymm14, %%ymm" i ", %%ymm" i "\n"
#define DPBUSD(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" i "\n"
#define FMA256(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" i "\n"
#define FMA512(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" i "\n"
#define LOOP(body)                                                                                 \
    for (int n = 0; n < LOOPS; n++) {                                                              \
        __asm__ volatile(CLEAR_OPERANDS REPEAT(body)::: VECTORS);                                  \
    }

double peaks_int8_loop(KernelIsa isa)
{
    if (isa == ISA_AVX512) {
        LOOP(DPBUSD)
        return 128.0 * SUMS * LOOPS;
    }
    LOOP(MADDUBS)
    return 64.0 * SUMS * LOOPS;
}

double peaks_f32_loop(KernelIsa isa)
{
    if (isa == ISA_AVX512) {
        LOOP(FMA512)
        return 32.0 * SUMS * LOOPS;
    }
    LOOP(FMA256)
    return 16.0 * SUMS * LOOPS;
}
#else
double peaks_int8_loop(KernelIsa isa)
{
    (void)isa;
    return 0;
}

double peaks_f32_loop(KernelIsa isa)
{
    (void)isa;
    return 0;
}
#endif

uint64_t peaks_read_loop(const uint8_t *p, size_t n)
{
    uint64_t sum = 0;
#if defined(__x86_64__)
    const uint8_t *end = p + n / 256 * 256;
    if (p == end) {
        return 0;
    }
    __asm__ volatile("1:\n"
                     "prefetcht0 8192(%[p])\n prefetcht0 8256(%[p])\n"
                     "prefetcht0 8320(%[p])\n prefetcht0 8384(%[p])\n"
                     "vpaddq (%[p]), %%ymm0, %%ymm0\n vpaddq 32(%[p]), %%ymm1, %%ymm1\n"
                     "vpaddq 64(%[p]), %%ymm2, %%ymm2\n vpaddq 96(%[p]), %%ymm3, %%ymm3\n"
                     "vpaddq 128(%[p]), %%ymm4, %%ymm4\n vpaddq 160(%[p]), %%ymm5, %%ymm5\n"
                     "vpaddq 192(%[p]), %%ymm6, %%ymm6\n vpaddq 224(%[p]), %%ymm7, %%ymm7\n"
                     "add $256, %[p]\n cmp %[end], %[p]\n jb 1b\n"
                     "vmovq %%xmm0, %[sum]\n"
                     : [p] "+r"(p), [sum] "=r"(sum)
                     : [end] "r"(end)
                     : VECTORS, "memory", "cc");
#else
    for (size_t i = 0; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, p + i, sizeof word);
        sum += word;
    }
#endif
    return sum;
}

typedef struct Measuring {
    Pool *pool;
    KernelIsa isa;
    uint8_t *memory;
    double read[ROUNDS], int8[ROUNDS], f32[ROUNDS];
    volatile uint64_t sink;
} Measuring;

/* Seconds from barrier to barrier, on thread 0. */
#define TIMED(seconds, work)                                                                       \
    do {                                                                                           \
        pool_barrier(m->pool);                                                                     \
        const double start = peaks_now_s();                                                        \
        work;                                                                                      \
        pool_barrier(m->pool);                                                                     \
        (seconds) = peaks_now_s() - start;                                                         \
    } while (0)

static void measure(void *user, unsigned t, unsigned n_threads)
{
    Measuring *m = user;
    for (int i = 0; i < ROUNDS; i++) {
        const size_t part = READ_BYTES / n_threads / 64 * 64;
        double seconds, ops = 0;
        TIMED(seconds, m->sink += peaks_read_loop(m->memory + t * part, part));
        if (t == 0) {
            m->read[i] = (double)(part * n_threads) / seconds;
        }
        TIMED(seconds, ops = peaks_int8_loop(m->isa));
        if (t == 0) {
            m->int8[i] = ops * n_threads / seconds;
        }
        TIMED(seconds, ops = peaks_f32_loop(m->isa));
        if (t == 0) {
            m->f32[i] = ops * n_threads / seconds;
        }
    }
}

bool peaks_measure(Pool *pool, KernelIsa isa, Peaks *out)
{
    Measuring m = {.pool = pool, .isa = isa, .memory = aligned_alloc(2u << 20, READ_BYTES)};
    if (m.memory == NULL) {
        return false;
    }
    madvise(m.memory, READ_BYTES, MADV_HUGEPAGE);
    memset(m.memory, 1, READ_BYTES);
    pool_run(pool, measure, &m);
    free(m.memory);
    *out = (Peaks){peaks_median(m.read, ROUNDS), peaks_median(m.int8, ROUNDS),
                   peaks_median(m.f32, ROUNDS)};
    return true;
}
