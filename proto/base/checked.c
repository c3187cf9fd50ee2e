#include "proto/base/checked.h"

#include "proto/base/error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ALLOC_ALIGN 64u
#define HUGE_PAGE_BYTES ((size_t)2 << 20)

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

/* A huge page begins at multiples of its size only. Of a mapping of size + HUGE_PAGE_BYTES, what
 * lies before the first multiple and behind `size` bytes from there is given back. */
static uint8_t *trim_to_huge_page(uint8_t *p, size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t before = (HUGE_PAGE_BYTES - (uintptr_t)p % HUGE_PAGE_BYTES) % HUGE_PAGE_BYTES;
    const size_t kept = (size + page - 1) / page * page, mapped = kept + HUGE_PAGE_BYTES;
    if (before > 0) {
        munmap(p, before);
    }
    if (before < HUGE_PAGE_BYTES) {
        munmap(p + before + kept, mapped - before - kept);
    }
    return p + before;
}

void *weft_map(size_t size, const char *what, GError **error)
{
    const bool large = size >= HUGE_PAGE_BYTES;
    size_t reserved = MAX(size, 1u);
    if (alloc_fails_now() || (large && !sz_add(size, HUGE_PAGE_BYTES, &reserved))) {
        set_memory_error(error, size, what, ENOMEM);
        return NULL;
    }
    uint8_t *p = mmap(NULL, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        set_memory_error(error, size, what, errno);
        return NULL;
    }
    if (large) {
        p = trim_to_huge_page(p, size);
        /* Advice only: a kernel without huge pages refuses it and nothing else changes. */
        (void)madvise(p, size, MADV_HUGEPAGE);
    }
    return p;
}

void weft_unmap(void *p, size_t size)
{
    if (p != NULL) {
        munmap(p, size > 0 ? size : 1);
    }
}
