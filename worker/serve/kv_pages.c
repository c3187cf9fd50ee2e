#include "worker/serve/kv_pages.h"

#include "kernels/ops/attention.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

bool kv_pages_init(KvPages *pages, uint64_t n_pages, uint32_t n_layers, uint32_t n_kv_heads,
                   uint32_t head_size, KvType type, GError **error)
{
    pages->block_bytes = kv_block_bytes(type, head_size);
    pages->n_pages = n_pages;
    pages->n_layers = n_layers;
    pages->n_kv_heads = n_kv_heads;
    size_t total;
    if (!sz_mul(pages->block_bytes, (size_t)2 * n_layers * n_kv_heads, &pages->page_bytes) ||
        !sz_mul(pages->page_bytes, n_pages, &total)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "%" G_GUINT64_FORMAT " KV pages exceed the address space", n_pages);
        return false;
    }
    pages->memory = weft_map(total, "KV cache", error);
    return pages->memory != NULL;
}

void kv_pages_clear(KvPages *pages)
{
    if (pages->memory != NULL) {
        weft_unmap(pages->memory, pages->page_bytes * pages->n_pages);
        pages->memory = NULL;
    }
}

void page_allocator_init(PageAllocator *a, uint64_t n_pages)
{
    a->free_list = g_new(uint32_t, n_pages);
    a->references = g_new0(uint16_t, n_pages);
    a->n_pages = a->n_free = n_pages;
    a->n_reserved = 0;
    for (uint64_t i = 0; i < n_pages; i++) {
        a->free_list[i] = (uint32_t)(n_pages - 1 - i); /* page 0 is taken first */
    }
}

void page_allocator_clear(PageAllocator *a)
{
    g_clear_pointer(&a->free_list, g_free);
    g_clear_pointer(&a->references, g_free);
}

bool page_allocator_reserve(PageAllocator *a, uint64_t n)
{
    if (n > a->n_free - a->n_reserved) {
        return false;
    }
    a->n_reserved += n;
    return true;
}

void page_allocator_unreserve(PageAllocator *a, uint64_t n)
{
    g_assert(n <= a->n_reserved);
    a->n_reserved -= n;
}

uint32_t page_allocator_take(PageAllocator *a)
{
    g_assert(a->n_reserved > 0 && a->n_free > 0);
    a->n_reserved--;
    uint32_t page = a->free_list[--a->n_free];
    a->references[page] = 1;
    return page;
}

void page_allocator_unref(PageAllocator *a, uint32_t page)
{
    g_assert(page < a->n_pages && a->references[page] > 0);
    if (--a->references[page] == 0) {
        a->free_list[a->n_free++] = page;
    }
}
