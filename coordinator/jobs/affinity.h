/* Affinity: which replica has computed the beginning of a prompt and may still have it in its
 * prefix cache. A guess: replicas are not asked, and forget by themselves. A wrong one costs a
 * prompt's computation, never a result.
 *
 * A beginning is a chain of hashes, one for each full page of ids and all before it, as in the
 * replicas' caches (worker/serve/prefix_cache.h). Which replica it went to is kept in a table of
 * fixed size, where a new beginning takes the place of an older one. Loop thread. */
#pragma once

#include <stdint.h>

#define AFFINITY_PAGES 128u /* of a prompt; what follows is not looked at */

typedef struct PromptPages {
    uint64_t hashes[AFFINITY_PAGES];
    uint32_t n;
} PromptPages;

/* cache_key: beginnings are shared among equal keys only; NULL: with all that have none. */
void prompt_pages(PromptPages *pages, const uint32_t *ids, uint32_t n_ids, const char *cache_key);

typedef struct Affinity Affinity;

Affinity *affinity_new(void);
void affinity_free(Affinity *a); /* NULL-safe */
/* A prompt went to a replica in this epoch; what was known of its earlier epochs counts no more. */
void affinity_enter(Affinity *a, const PromptPages *pages, uint32_t replica, uint64_t epoch);
/* How many pages of the beginning went there. */
uint32_t affinity_find(const Affinity *a, const PromptPages *pages, uint32_t replica,
                       uint64_t epoch);
