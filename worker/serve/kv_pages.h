/* KV pages: the cache memory of one rank; the leader gives out the numbers (page_pool.h).
 *
 * A page holds KV_BLOCK = 32 positions of every layer and KV head of the rank: [layer][KV head]{K
 * block [head_size][32], V block [32][head_size]} (NUMERICS 5, DESIGN 7.1 and 7.9). Page numbers
 * are the same on all ranks of a replica; only their sizes differ. */
#pragma once

#include "proto/plan/plan.h"

#include <glib.h>
#include <stdint.h>

typedef struct KvPages {
    uint8_t *memory;
    size_t page_bytes, block_bytes; /* of one K or V block */
    uint64_t n_pages;
    uint32_t n_layers, n_kv_heads;
} KvPages;

/* Sizes alone: for pages that lie on a device. */
bool kv_pages_size(KvPages *pages, uint64_t n_pages, uint32_t n_layers, uint32_t n_kv_heads,
                   uint32_t head_size, KvType type, GError **error);
/* Maps (lazily backed) memory, too. */
bool kv_pages_init(KvPages *pages, uint64_t n_pages, uint32_t n_layers, uint32_t n_kv_heads,
                   uint32_t head_size, KvType type, GError **error);
void kv_pages_clear(KvPages *pages);

static inline uint8_t *kv_pages_k(const KvPages *p, uint32_t page, uint32_t layer, uint32_t head)
{
    return p->memory + page * p->page_bytes +
           ((size_t)layer * p->n_kv_heads + head) * 2 * p->block_bytes;
}
static inline uint8_t *kv_pages_v(const KvPages *p, uint32_t page, uint32_t layer, uint32_t head)
{
    return kv_pages_k(p, page, layer, head) + p->block_bytes;
}
