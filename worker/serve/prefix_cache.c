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
    c->openings = g_new(uint32_t, n_buckets);
    c->bucket_mask = n_buckets - 1;
    c->next_serial = 1;
    memset(c->buckets, 0xff, sizeof(uint32_t) * n_buckets);
    memset(c->openings, 0xff, sizeof(uint32_t) * n_buckets);
}

void prefix_cache_clear(PrefixCache *c)
{
    page_pool_clear(&c->pool);
    g_clear_pointer(&c->entries, g_free);
    g_clear_pointer(&c->buckets, g_free);
    g_clear_pointer(&c->openings, g_free);
}

size_t prefix_cache_bytes(uint64_t n_pages)
{
    return page_pool_bytes(n_pages) + n_pages * sizeof(PrefixEntry) +
           2 * (size_t)bucket_count(n_pages) * sizeof(uint32_t);
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

static uint32_t first_word(const Hash128 *hash)
{
    uint32_t word;
    memcpy(&word, hash->bytes, sizeof word);
    return word;
}

static uint32_t *bucket_of(const PrefixCache *c, const Hash128 *hash)
{
    return &c->buckets[first_word(hash) & c->bucket_mask];
}

static uint32_t opening_of(const PrefixCache *c, const PrefixChain *chain, uint32_t token)
{
    return (first_word(&chain->hash) + token * 0x9e3779b1u) & c->bucket_mask;
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

static uint32_t common(const PrefixEntry *e, const uint32_t *tokens, uint32_t n)
{
    uint32_t k = 0;
    while (k < MIN(n, e->n_tokens) && e->tokens[k] == tokens[k]) {
        k++;
    }
    return k;
}

uint32_t prefix_cache_common(const PrefixCache *c, const PrefixChain *chain, const uint32_t *tokens,
                             uint32_t n, uint64_t before, uint32_t *page, uint64_t *serial)
{
    uint32_t most = 0, at = n > 0 ? c->openings[opening_of(c, chain, tokens[0])] : NONE;
    for (uint32_t i = 0; i < PREFIX_SIBLINGS && at != NONE && most < n; i++) {
        const PrefixEntry *e = &c->entries[at];
        const uint32_t k = e->parent == chain->serial && e->chain.serial < before &&
                                   hash128_equal(&e->chain.salt, &chain->salt)
                               ? common(e, tokens, n)
                               : 0;
        if (k > most) {
            most = k;
            *page = at;
            *serial = e->chain.serial;
        }
        at = e->sibling;
    }
    return most;
}

/* The page's entry among those of its opening; the pool keeps it from now on. */
static PrefixEntry *link_opening(PrefixCache *c, const PrefixChain *chain, const uint32_t *tokens,
                                 uint32_t n, uint32_t page)
{
    PrefixEntry *e = &c->entries[page];
    const uint32_t opening = opening_of(c, chain, tokens[0]);
    *e = (PrefixEntry){.chain = {.salt = chain->salt, .serial = c->next_serial++},
                       .parent = chain->serial,
                       .n_tokens = n,
                       .next = NONE,
                       .sibling = c->openings[opening],
                       .opening = opening};
    memcpy(e->tokens, tokens, sizeof(uint32_t) * n);
    c->openings[opening] = page;
    page_pool_keep(&c->pool, page);
    return e;
}

void prefix_cache_enter(PrefixCache *c, PrefixChain *chain, const uint32_t *tokens, uint32_t page)
{
    const Hash128 hash = follow(chain, tokens);
    const uint32_t found = look_up(c, chain, &hash, tokens);
    if (found != NONE) {
        *chain = c->entries[found].chain;
        return;
    }
    uint32_t *bucket = bucket_of(c, &hash);
    PrefixEntry *e = link_opening(c, chain, tokens, KV_BLOCK, page);
    e->chain.hash = hash;
    e->next = *bucket;
    *bucket = page;
    *chain = e->chain;
}

void prefix_cache_enter_tail(PrefixCache *c, const PrefixChain *chain, const uint32_t *tokens,
                             uint32_t n, uint32_t page)
{
    uint32_t other;
    uint64_t serial;
    g_assert(n > 0 && n < KV_BLOCK);
    if (prefix_cache_common(c, chain, tokens, n, UINT64_MAX, &other, &serial) < n) {
        link_opening(c, chain, tokens, n, page);
    }
}

static void unlink_bucket(PrefixCache *c, uint32_t page)
{
    uint32_t *at = bucket_of(c, &c->entries[page].chain.hash);
    while (*at != page) {
        at = &c->entries[*at].next;
    }
    *at = c->entries[page].next;
}

static void unlink_entry(PrefixCache *c, uint32_t page)
{
    const PrefixEntry *e = &c->entries[page];
    uint32_t *at = &c->openings[e->opening];
    while (*at != page) {
        at = &c->entries[*at].sibling;
    }
    *at = e->sibling;
    if (e->n_tokens == KV_BLOCK) {
        unlink_bucket(c, page);
    }
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

void prefix_cache_forget_entry(PrefixCache *c, uint32_t page, uint64_t serial)
{
    if (c->pool.kept[page] && c->entries[page].chain.serial == serial) {
        prefix_cache_forget(c, page);
    }
}
