/* PagePool: the leader's page numbers, which are the same on all ranks of a replica.
 *
 * A page is one of
 *   free        nothing is in it that anybody wants
 *   referenced  by one or more running sequences; never taken away
 *   idle        referenced by none, but kept: its content may serve a later sequence. Idle pages
 *               stand in a line, oldest first, and are given away when the free ones are used up.
 *
 * Invariants
 *   1. n_reserved <= free + idle: a promise can always be kept, at the price of idle pages.
 *   2. A kept page is never on the free list; a free page is never kept.
 *
 * Engine thread only; nothing allocates after page_pool_init(). */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct PagePool {
    uint32_t *free_list; /* stack */
    uint32_t *references;
    uint32_t *older, *newer; /* neighbours of an idle page in the line; UINT32_MAX = none */
    bool *kept;
    uint32_t oldest, newest;
    uint64_t n_free, n_idle, n_pages, n_reserved;
} PagePool;

void page_pool_init(PagePool *pool, uint64_t n_pages);
void page_pool_clear(PagePool *pool);
/* Bytes that page_pool_init() allocates. */
size_t page_pool_bytes(uint64_t n_pages);

/* Pages that can still be promised. */
static inline uint64_t page_pool_available(const PagePool *pool)
{
    return pool->n_free + pool->n_idle - pool->n_reserved;
}
/* Promises n pages; false if that many are not there. */
bool page_pool_reserve(PagePool *pool, uint64_t n);
/* Gives back the promise of n pages. */
void page_pool_unreserve(PagePool *pool, uint64_t n);
/* Takes one promised page, referenced once. *was_kept: it was idle, and its content is gone. */
uint32_t page_pool_take(PagePool *pool, bool *was_kept);
/* One more reference to a referenced or idle page. For an idle one the caller makes sure that
 * invariant 1 holds afterwards. */
void page_pool_ref(PagePool *pool, uint32_t page);
static inline bool page_pool_is_idle(const PagePool *pool, uint32_t page)
{
    return pool->references[page] == 0;
}
/* One reference less: the last one makes the page idle (the newest of the line), or free. */
void page_pool_unref(PagePool *pool, uint32_t page);
/* The page was of use: an idle one becomes the newest of the line. */
void page_pool_touch(PagePool *pool, uint32_t page);
/* The page's content is wanted, or no longer; of a referenced or idle page. */
void page_pool_keep(PagePool *pool, uint32_t page);
void page_pool_unkeep(PagePool *pool, uint32_t page);
