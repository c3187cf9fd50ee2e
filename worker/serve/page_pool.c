#include "worker/serve/page_pool.h"

enum { NONE = UINT32_MAX };

void page_pool_init(PagePool *p, uint64_t n_pages)
{
    p->free_list = g_new(uint32_t, n_pages);
    p->references = g_new0(uint32_t, n_pages);
    p->older = g_new(uint32_t, n_pages);
    p->newer = g_new(uint32_t, n_pages);
    p->kept = g_new0(bool, n_pages);
    p->oldest = p->newest = NONE;
    p->n_pages = p->n_free = n_pages;
    p->n_idle = p->n_reserved = 0;
    for (uint64_t i = 0; i < n_pages; i++) {
        p->free_list[i] = (uint32_t)(n_pages - 1 - i); /* page 0 is taken first */
    }
}

void page_pool_clear(PagePool *p)
{
    g_clear_pointer(&p->free_list, g_free);
    g_clear_pointer(&p->references, g_free);
    g_clear_pointer(&p->older, g_free);
    g_clear_pointer(&p->newer, g_free);
    g_clear_pointer(&p->kept, g_free);
}

size_t page_pool_bytes(uint64_t n_pages)
{
    return n_pages * (4 * sizeof(uint32_t) + sizeof(bool));
}

/* ---- the line of idle pages ---- */

static void line_append(PagePool *p, uint32_t page)
{
    p->older[page] = p->newest;
    p->newer[page] = NONE;
    if (p->newest == NONE) {
        p->oldest = page;
    } else {
        p->newer[p->newest] = page;
    }
    p->newest = page;
    p->n_idle++;
}

static void line_remove(PagePool *p, uint32_t page)
{
    const uint32_t older = p->older[page], newer = p->newer[page];
    if (older == NONE) {
        p->oldest = newer;
    } else {
        p->newer[older] = newer;
    }
    if (newer == NONE) {
        p->newest = older;
    } else {
        p->older[newer] = older;
    }
    p->n_idle--;
}

/* ---- promises and references ---- */

bool page_pool_reserve(PagePool *p, uint64_t n)
{
    if (n > page_pool_available(p)) {
        return false;
    }
    p->n_reserved += n;
    return true;
}

void page_pool_unreserve(PagePool *p, uint64_t n)
{
    g_assert(n <= p->n_reserved);
    p->n_reserved -= n;
}

uint32_t page_pool_take(PagePool *p, bool *was_kept)
{
    g_assert(p->n_reserved > 0 && p->n_free + p->n_idle > 0);
    p->n_reserved--;
    *was_kept = p->n_free == 0;
    uint32_t page;
    if (*was_kept) {
        page = p->oldest;
        line_remove(p, page);
        p->kept[page] = false;
    } else {
        page = p->free_list[--p->n_free];
    }
    p->references[page] = 1;
    return page;
}

void page_pool_ref(PagePool *p, uint32_t page)
{
    g_assert(page < p->n_pages && (p->references[page] > 0 || p->kept[page]));
    if (p->references[page]++ == 0) {
        line_remove(p, page);
    }
    g_assert(p->n_reserved <= p->n_free + p->n_idle);
}

void page_pool_unref(PagePool *p, uint32_t page)
{
    g_assert(page < p->n_pages && p->references[page] > 0);
    if (--p->references[page] > 0) {
        return;
    }
    if (p->kept[page]) {
        line_append(p, page);
    } else {
        p->free_list[p->n_free++] = page;
    }
}

void page_pool_touch(PagePool *p, uint32_t page)
{
    if (p->kept[page] && p->references[page] == 0) {
        line_remove(p, page);
        line_append(p, page);
    }
}

void page_pool_keep(PagePool *p, uint32_t page)
{
    g_assert(p->references[page] > 0);
    p->kept[page] = true;
}

void page_pool_unkeep(PagePool *p, uint32_t page)
{
    g_assert(p->kept[page]);
    p->kept[page] = false;
    if (p->references[page] == 0) {
        line_remove(p, page);
        p->free_list[p->n_free++] = page;
    }
}
