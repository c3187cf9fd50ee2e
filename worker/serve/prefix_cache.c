#include "worker/serve/prefix_cache.h"

#include <string.h>

enum { NONE = UINT32_MAX };

static uint32_t bucket_count(uint64_t n_pages)
{
    uint32_t n = 16;
    while (n < 2 * n_pages && n < (1u << 30)) {
        n *= 2;
    }
    return n;
}

void prefix_cache_init(PrefixCache *c, uint64_t n_pages, const Hash128 *definition)
{
    const uint32_t n_buckets = bucket_count(n_pages);
    page_pool_init(&c->pool, n_pages);
    c->definition = *definition;
    c->entries = g_new0(PrefixEntry, n_pages);
    c->buckets = g_new(uint32_t, n_buckets);
    c->bucket_mask = n_buckets - 1;
    c->next_serial = 1;
    memset(c->buckets, 0xff, sizeof(uint32_t) * n_buckets);
}

void prefix_cache_clear(PrefixCache *c)
{
    page_pool_clear(&c->pool);
    g_clear_pointer(&c->entries, g_free);
    g_clear_pointer(&c->buckets, g_free);
}

size_t prefix_cache_bytes(uint64_t n_pages)
{
    return page_pool_bytes(n_pages) + n_pages * sizeof(PrefixEntry) +
           bucket_count(n_pages) * sizeof(uint32_t);
}

PrefixChain prefix_cache_begin(const PrefixCache *c, const Hash128 *salt)
{
    uint8_t bytes[2 * sizeof(Hash128)];
    memcpy(bytes, c->definition.bytes, sizeof(Hash128));
    memcpy(bytes + sizeof(Hash128), salt->bytes, sizeof(Hash128));
    return (PrefixChain){.hash = hash128(bytes, sizeof bytes), .salt = *salt};
}

static Hash128 follow(const PrefixChain *chain, const uint32_t *tokens)
{
    uint8_t bytes[sizeof(Hash128) + sizeof(uint32_t) * KV_BLOCK];
    memcpy(bytes, chain->hash.bytes, sizeof(Hash128));
    memcpy(bytes + sizeof(Hash128), tokens, sizeof(uint32_t) * KV_BLOCK);
    return hash128(bytes, sizeof bytes);
}

static uint32_t *bucket_of(const PrefixCache *c, const Hash128 *hash)
{
    uint32_t word;
    memcpy(&word, hash->bytes, sizeof word);
    return &c->buckets[word & c->bucket_mask];
}

static uint32_t look_up(const PrefixCache *c, const PrefixChain *from, const Hash128 *hash,
                        const uint32_t *tokens)
{
    for (uint32_t page = *bucket_of(c, hash); page != NONE; page = c->entries[page].next) {
        const PrefixEntry *e = &c->entries[page];
        if (e->parent == from->serial && hash128_equal(&e->chain.hash, hash) &&
            hash128_equal(&e->chain.salt, &from->salt) &&
            memcmp(e->tokens, tokens, sizeof e->tokens) == 0) {
            return page;
        }
    }
    return NONE;
}

bool prefix_cache_find(const PrefixCache *c, PrefixChain *chain, const uint32_t *tokens,
                       uint32_t *page)
{
    const Hash128 hash = follow(chain, tokens);
    const uint32_t found = look_up(c, chain, &hash, tokens);
    if (found == NONE) {
        return false;
    }
    *chain = c->entries[found].chain;
    *page = found;
    return true;
}

void prefix_cache_enter(PrefixCache *c, PrefixChain *chain, const uint32_t *tokens, uint32_t page)
{
    const Hash128 hash = follow(chain, tokens);
    const uint32_t found = look_up(c, chain, &hash, tokens);
    if (found != NONE) {
        *chain = c->entries[found].chain;
        return;
    }
    PrefixEntry *e = &c->entries[page];
    uint32_t *bucket = bucket_of(c, &hash);
    *e = (PrefixEntry){
        .chain = {hash, chain->salt, c->next_serial++}, .parent = chain->serial, .next = *bucket};
    memcpy(e->tokens, tokens, sizeof e->tokens);
    *bucket = page;
    *chain = e->chain;
    page_pool_keep(&c->pool, page);
}

static void unlink_entry(PrefixCache *c, uint32_t page)
{
    uint32_t *at = bucket_of(c, &c->entries[page].chain.hash);
    while (*at != page) {
        at = &c->entries[*at].next;
    }
    *at = c->entries[page].next;
}

uint32_t prefix_cache_take(PrefixCache *c)
{
    bool was_kept;
    const uint32_t page = page_pool_take(&c->pool, &was_kept);
    if (was_kept) {
        unlink_entry(c, page);
    }
    return page;
}

void prefix_cache_forget(PrefixCache *c, uint32_t page)
{
    if (c->pool.kept[page]) {
        unlink_entry(c, page);
        page_pool_unkeep(&c->pool, page);
    }
}
