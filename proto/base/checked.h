/* Checked arithmetic and allocation for every size that a file, peer or request names. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* *out = a op b; false (and *out untouched) on overflow. */
static inline bool sz_add(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) {
        return false;
    }
    *out = r;
    return true;
}
static inline bool sz_mul(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) {
        return false;
    }
    *out = r;
    return true;
}

/* malloc for n*size bytes, 64-byte aligned, zeroed; NULL + WEFT_ERROR_MEMORY (with the amount and
 * `what`) on overflow or failure. Freed with weft_free(). */
void *weft_alloc(size_t n, size_t size, const char *what, GError **error);
void weft_free(void *p);

/* Anonymous mapping for big arrays (weights, KV): zero pages that take memory once they are
 * touched; from 2 MiB on it begins at a multiple of 2 MiB and transparent huge pages are asked for.
 * NULL + error as above. Released with weft_unmap(p, size). */
void *weft_map(size_t size, const char *what, GError **error);
void weft_unmap(void *p, size_t size);

/* Tests: the n-th allocation from now fails (0 = the next), once; negative turns it off. */
void weft_alloc_fail_after(int64_t n);
