#include "coordinator/jobs/affinity.h"

#include "proto/base/hash.h"
#include "proto/model/model_spec.h"

#include <glib.h>
#include <stdbool.h>
#include <string.h>

#define SLOTS 16384u /* 512 prompts of 1,024 ids; a power of two */

typedef struct Slot {
    uint64_t page, epoch; /* epochs begin at 1: 0 = empty */
    uint32_t replica;
} Slot;

struct Affinity {
    Slot slots[SLOTS];
};

static uint64_t first_bytes(const Hash128 *hash)
{
    uint64_t value;
    memcpy(&value, hash->bytes, sizeof value);
    return value;
}

void prompt_pages(PromptPages *pages, const uint32_t *ids, uint32_t n_ids, const char *cache_key)
{
    struct {
        uint64_t before;
        uint32_t ids[KV_BLOCK];
    } page = {0};
    if (cache_key != NULL) {
        const Hash128 key = hash128(cache_key, strlen(cache_key));
        page.before = first_bytes(&key);
    }
    pages->n = MIN(n_ids / KV_BLOCK, AFFINITY_PAGES);
    for (uint32_t i = 0; i < pages->n; i++) {
        memcpy(page.ids, ids + (size_t)i * KV_BLOCK, sizeof page.ids);
        const Hash128 hash = hash128(&page, sizeof page);
        page.before = pages->hashes[i] = first_bytes(&hash);
    }
}

Affinity *affinity_new(void)
{
    return g_new0(Affinity, 1);
}

void affinity_free(Affinity *a)
{
    g_free(a);
}

/* Several replicas may have the same page. */
static uint32_t slot_of(uint64_t page, uint32_t replica)
{
    return (uint32_t)((page + replica * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (SLOTS - 1);
}

void affinity_enter(Affinity *a, const PromptPages *pages, uint32_t replica, uint64_t epoch)
{
    for (uint32_t i = 0; i < pages->n; i++) {
        a->slots[slot_of(pages->hashes[i], replica)] = (Slot){pages->hashes[i], epoch, replica};
    }
}

uint32_t affinity_find(const Affinity *a, const PromptPages *pages, uint32_t replica,
                       uint64_t epoch)
{
    /* a page's hash stands for all before it, too */
    for (uint32_t n = pages->n; n > 0; n--) {
        const uint64_t page = pages->hashes[n - 1];
        const Slot *slot = &a->slots[slot_of(page, replica)];
        if (slot->page == page && slot->replica == replica && slot->epoch == epoch) {
            return n;
        }
    }
    return 0;
}
