#include "proto/base/checked.h"

#include "proto/base/error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ALLOC_ALIGN 64u

/* Countdown to the one allocation that a test lets fail; negative = off. */
static int64_t fail_after = -1;

void weft_alloc_fail_after(int64_t n)
{
    __atomic_store_n(&fail_after, n, __ATOMIC_SEQ_CST);
}

static bool alloc_fails_now(void)
{
    int64_t left = __atomic_load_n(&fail_after, __ATOMIC_RELAXED);
    while (left >= 0) {
        if (__atomic_compare_exchange_n(&fail_after, &left, left - 1, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_RELAXED)) {
            return left == 0;
        }
    }
    return false;
}

static void set_memory_error(GError **error, size_t n_bytes, const char *what, int reason)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                "cannot allocate %zu bytes for %s: %s; free memory or lower the worker's --memory",
                n_bytes, what, g_strerror(reason));
}

void *weft_alloc(size_t n, size_t size, const char *what, GError **error)
{
    size_t n_bytes, padded;
    if (!sz_mul(n, size, &n_bytes) || !sz_add(n_bytes, ALLOC_ALIGN - 1, &padded)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "cannot allocate %zu x %zu bytes for %s: the product overflows", n, size, what);
        return NULL;
    }
    /* aligned_alloc wants a multiple of the alignment, and 0 bytes must still give a pointer. */
    padded = padded / ALLOC_ALIGN * ALLOC_ALIGN;
    if (padded == 0) {
        padded = ALLOC_ALIGN;
    }
    void *p = alloc_fails_now() ? NULL : aligned_alloc(ALLOC_ALIGN, padded);
    if (p == NULL) {
        set_memory_error(error, n_bytes, what, ENOMEM);
        return NULL;
    }
    memset(p, 0, padded);
    return p;
}

void weft_free(void *p)
{
    free(p);
}

void *weft_map(size_t size, const char *what, GError **error)
{
    if (alloc_fails_now()) {
        set_memory_error(error, size, what, ENOMEM);
        return NULL;
    }
    void *p =
        mmap(NULL, size > 0 ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        set_memory_error(error, size, what, errno);
        return NULL;
    }
    /* Advice only: a kernel without transparent huge pages refuses it and nothing else changes. */
    (void)madvise(p, size > 0 ? size : 1, MADV_HUGEPAGE);
    return p;
}

void weft_unmap(void *p, size_t size)
{
    if (p != NULL) {
        munmap(p, size > 0 ? size : 1);
    }
}
