/* What the tests of device kernels share: memory of the device, and every order of execution. The
 * same source runs over tests/kernels/cuda_emulation with g++ and on a device with nvcc; which
 * cuda_runtime_api.h it gets, the emulation's or CUDA's, the build says (meson.build). */
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/kernels.h"
#include "kernels/ops/math.h"
#include "tests/unit/kernels/numbers.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { DEVICE_BUFFERS = 64 };
static void *device_buffers[DEVICE_BUFFERS];
static unsigned n_device_buffers;

/* Memory of exactly `size` bytes, a copy of `host` unless that is NULL. */
static inline void *device_of(const void *host, size_t size)
{
    void *p = NULL;
    assert_true(n_device_buffers < DEVICE_BUFFERS);
    assert_int_equal(cudaMalloc(&p, size), cudaSuccess);
    device_buffers[n_device_buffers++] = p;
    if (host != NULL) {
        assert_int_equal(cudaMemcpy(p, host, size, cudaMemcpyHostToDevice), cudaSuccess);
    } else {
        assert_int_equal(cudaMemset(p, 0xff, size), cudaSuccess);
    }
    return p;
}
static inline float *device_floats(const float *host, size_t n)
{
    return (float *)device_of(host, n * sizeof(float));
}
static inline void device_read(void *host, const void *device, size_t size)
{
    assert_int_equal(cudaMemcpy(host, device, size, cudaMemcpyDeviceToHost), cudaSuccess);
}
static inline void device_free_all(void)
{
    while (n_device_buffers > 0) {
        cudaFree(device_buffers[--n_device_buffers]);
    }
}

/* A launch that must succeed, waited for. */
static inline void run(int status)
{
    if (status != 0 || cudaDeviceSynchronize() != cudaSuccess) {
        fail_msg("launch: error %d, %s", status, cudaGetErrorString(cudaGetLastError()));
    }
}

/* Exit status of a program for a device where there is none. */
#ifdef WEFT_ON_DEVICE
static inline void leave_without_device(void)
{
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess || n == 0) {
        printf("no device: %s\n", cudaGetErrorString(error));
        exit(77);
    }
}
#else
static inline void leave_without_device(void)
{
}
#endif

/* The loop's body for each order in which threads may run. On a device: once. */
#ifdef WEFT_ON_DEVICE
#define FOR_EACH_ORDER for (int order_ = 0; order_ < 1; order_++)
#else
#define FOR_EACH_ORDER                                                                             \
    for (int order_ = 0; order_ < 3 && (emulation_set_order((EmulationOrder)order_, 7), true);     \
         order_++)
#endif

/* Bits equal, or both NaN. */
static inline void assert_bits(const char *what, const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (float_bits(got[i]) != float_bits(want[i]) && !(isnan(got[i]) && isnan(want[i]))) {
            fail_msg("%s: element %zu of %zu: %a, specified %a", what, i, n, (double)got[i],
                     (double)want[i]);
        }
    }
}

/* How close an op that is not held to bits came to what is specified, over all of its cases. Told
 * at the end, a line each: tools/gpu-check makes a table of them. */
typedef struct Closeness {
    char op[64];
    double error, limit;
    const char *of; /* what both are a share of */
} Closeness;
enum { CLOSENESS_LIMIT = 64 };
static Closeness closeness[CLOSENESS_LIMIT];
static unsigned n_closeness;

static inline void note_closeness(const char *op, const char *variant, double error, double limit,
                                  const char *of)
{
    char name[sizeof closeness[0].op];
    unsigned i = 0;
    snprintf(name, sizeof name, "%s%s%s", op, variant[0] != '\0' ? ", " : "", variant);
    while (i < n_closeness && strcmp(closeness[i].op, name) != 0) {
        i++;
    }
    assert_true(i < CLOSENESS_LIMIT);
    Closeness *c = &closeness[i];
    if (i == n_closeness || error / limit > c->error / c->limit) {
        n_closeness += i == n_closeness;
        *c = (Closeness){.error = error, .limit = limit, .of = of};
        memcpy(c->op, name, sizeof name);
    }
}
/* The exit status of a test program, given back. */
static inline int tell_closeness(int status)
{
    for (unsigned i = 0; i < n_closeness; i++) {
        const Closeness *c = &closeness[i];
        print_message("# closeness: %s | %.2g | %.2g | %s\n", c->op, c->error, c->limit, c->of);
    }
    return status;
}

/* Rows of n floats, ld apart, the rest of each row NaN: nothing may be read or written there. */
static inline float *padded_rows(Numbers *numbers, uint32_t rows, uint32_t n, size_t ld, double low,
                                 double high)
{
    float *x = (float *)malloc(rows * ld * sizeof(float));
    memset(x, 0xff, rows * ld * sizeof(float));
    for (uint32_t r = 0; r < rows; r++) {
        numbers_fill(numbers, x + r * ld, n, low, high);
    }
    return x;
}
