/* PrefixCache: which pages already hold the keys and values of a beginning of a text, so that a
 * system prompt, a conversation's earlier turns and the choices of one request are computed once.
 * The idea is that of vLLM's automatic prefix caching (Kwon et al. 2023, arXiv 2309.06180, 4.3).
 *
 * A full page's content is a function of the definition, the adapter or isolation key (the salt)
 * and all ids up to its end (NUMERICS), so it is found by a chained hash: chain 0 =
 * hash(definition, salt), chain i + 1 = hash(chain i, the page's 32 ids). A hash only finds the
 * place: the ids are and the salt are compared, and the page before must be the very one that the
 * walk has reached, so that a collision (XXH3 does not resist an attacker) can cost a hit and never
 * gives a foreign page.
 *
 * A page is entered when the step that computes its last position is built. That is early enough
 * and not too early: steps run in order, and inside a step keys are stored before they are read
 * (step.h).
 *
 * Engine thread only; nothing allocates after prefix_cache_init(). */
#pragma once

#include "proto/base/hash.h"
#include "proto/model/model_spec.h"
#include "worker/serve/page_pool.h"

/* How far a walk has come: the pages of a text so far. */
typedef struct PrefixChain {
    Hash128 hash, salt;
    uint64_t serial; /* of the entry reached; 0 = the beginning */
} PrefixChain;

typedef struct PrefixEntry {
    PrefixChain chain;
    uint64_t parent; /* serial of the page before */
    uint32_t tokens[KV_BLOCK];
    uint32_t next; /* page of the same bucket */
} PrefixEntry;

typedef struct PrefixCache {
    PagePool pool;
    Hash128 definition;
    PrefixEntry *entries; /* by page; meaningful where the pool keeps the page */
    uint32_t *buckets;    /* first page, UINT32_MAX = none */
    uint32_t bucket_mask;
    uint64_t next_serial;
} PrefixCache;

void prefix_cache_init(PrefixCache *cache, uint64_t n_pages, const Hash128 *definition);
void prefix_cache_clear(PrefixCache *cache);
/* Bytes that prefix_cache_init() allocates, the pool's included. */
size_t prefix_cache_bytes(uint64_t n_pages);

PrefixChain prefix_cache_begin(const PrefixCache *cache, const Hash128 *salt);
/* The page that follows with these KV_BLOCK ids; *chain then stands behind it. false: none. The
 * page is not referenced. */
bool prefix_cache_find(const PrefixCache *cache, PrefixChain *chain, const uint32_t *tokens,
                       uint32_t *page);
/* Enters a referenced page as the one that follows, and keeps it; *chain then stands behind it. If
 * there is one already, *chain stands behind that one and the page stays its owner's alone. */
void prefix_cache_enter(PrefixCache *cache, PrefixChain *chain, const uint32_t *tokens,
                        uint32_t page);
/* Takes one promised page of the pool; what it held is forgotten. */
uint32_t prefix_cache_take(PrefixCache *cache);
/* A page's content is not to be trusted any more. Nothing happens if it is not entered. */
void prefix_cache_forget(PrefixCache *cache, uint32_t page);
