#include "worker/serve/kv_pages.h"

#include "kernels/ops/attention.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

bool kv_pages_size(KvPages *pages, uint64_t n_pages, uint32_t n_layers, uint32_t n_kv_heads,
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
    return true;
}

bool kv_pages_init(KvPages *pages, uint64_t n_pages, uint32_t n_layers, uint32_t n_kv_heads,
                   uint32_t head_size, KvType type, GError **error)
{
    if (!kv_pages_size(pages, n_pages, n_layers, n_kv_heads, head_size, type, error)) {
        return false;
    }
    pages->memory = weft_map(pages->page_bytes * n_pages, "KV cache", error);
    return pages->memory != NULL;
}

void kv_pages_clear(KvPages *pages)
{
    if (pages->memory != NULL) {
        weft_unmap(pages->memory, pages->page_bytes * pages->n_pages);
        pages->memory = NULL;
    }
}
