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
 * Beginnings of pages. Where a text and a page part in the middle, the positions up to there are
 * the same, so a sequence may begin its own page with a copy of them: what is left of a prompt that
 * was read before is one row. A sequence that goes leaves the page that it did not fill, its tail,
 * for the same use. They are found by the walk so far and the page's first id; of those with the
 * same the PREFIX_SIBLINGS newest are compared. A copy is made before a step's rows are computed,
 * so it may be taken only from pages that were entered before that step was built (`before`).
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

#define PREFIX_SIBLINGS 32u

typedef struct PrefixEntry {
    PrefixChain chain; /* a tail's hash is not used */
    uint64_t parent;   /* serial of the page before */
    uint32_t tokens[KV_BLOCK];
    uint32_t n_tokens;         /* KV_BLOCK; a tail's are fewer */
    uint32_t next;             /* page of the same bucket; not of a tail */
    uint32_t sibling, opening; /* next page of the same opening; the opening's number */
} PrefixEntry;

typedef struct PrefixCache {
    PagePool pool;
    Hash128 definition;
    PrefixEntry *entries; /* by page; meaningful where the pool keeps the page */
    uint32_t *buckets;    /* first page, UINT32_MAX = none */
    uint32_t *openings;   /* newest page, by the walk so far and the first id */
    uint32_t bucket_mask; /* of both */
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
/* How many of the n ids (at most KV_BLOCK) a page that may follow begins with: the most that a
 * page entered before the serial `before` has, 0 = none. *page, *serial: which one that is. */
uint32_t prefix_cache_common(const PrefixCache *cache, const PrefixChain *chain,
                             const uint32_t *tokens, uint32_t n, uint64_t before, uint32_t *page,
                             uint64_t *serial);
/* Enters a referenced page that holds n < KV_BLOCK ids behind the chain, unless another page has
 * them. */
void prefix_cache_enter_tail(PrefixCache *cache, const PrefixChain *chain, const uint32_t *tokens,
                             uint32_t n, uint32_t page);
/* Takes one promised page of the pool; what it held is forgotten. */
uint32_t prefix_cache_take(PrefixCache *cache);
/* A page's content is not to be trusted any more. Nothing happens if it is not entered. */
void prefix_cache_forget(PrefixCache *cache, uint32_t page);
/* The same of the entry with that serial, if the page still is that one. */
void prefix_cache_forget_entry(PrefixCache *cache, uint32_t page, uint64_t serial);
