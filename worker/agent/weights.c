#include "worker/agent/weights.h"

#include "proto/base/hash.h"

#include <string.h>

char *weights_part(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                   uint32_t rank)
{
    static const Hash128 unknown;
    if (hash128_equal(&spec->file_hash, &unknown)) {
        return NULL;
    }
    const PlanReplica *of = &plan->replicas[replica];
    const PlanStage *s = &of->stages[stage];
    const PlanRank *r = &s->ranks[rank];
    char hex[33];
    hash128_hex(&spec->file_hash, hex);
    bool first = stage == 0, last = stage + 1 == of->n_stages;
    return g_strdup_printf("%s layers %u-%u attention %u+%u ffn %u+%u vocabulary %u+%u%s%s", hex,
                           s->layer_first, s->layer_last, r->attn_first, r->attn_count,
                           r->ffn_first, r->ffn_count, first || last ? r->vocab_first : 0,
                           first || last ? r->vocab_count : 0, first ? " embedding" : "",
                           last ? " head" : "");
}

void weights_keep(Weights *weights, PackedImages *images)
{
    if (images && weights->complete && !weights->mapped && !weights->keeper) {
        weights->keeper = image_keeper_start(images, weights->part, weights->shard);
    }
}

void weights_free(Weights *weights)
{
    if (weights) {
        image_keeper_stop(weights->keeper);
        shard_free(weights->shard);
        model_spec_free(weights->spec);
        g_free(weights->part);
        g_free(weights);
    }
}

struct WeightsShelf {
    TaskPool *pool;
    GQueue kept; /* of Weights, oldest first */
};

static void free_run(void *user)
{
    weights_free(user);
}
static void free_done(void *user)
{
    (void)user;
}

static void free_later(WeightsShelf *shelf, Weights *weights)
{
    if (weights) {
        task_pool_run(shelf->pool, free_run, free_done, weights);
    }
}

WeightsShelf *weights_shelf_new(TaskPool *pool)
{
    WeightsShelf *shelf = g_new0(WeightsShelf, 1);
    shelf->pool = pool;
    g_queue_init(&shelf->kept);
    return shelf;
}

void weights_shelf_free(WeightsShelf *shelf)
{
    if (shelf) {
        g_queue_clear_full(&shelf->kept, (GDestroyNotify)weights_free);
        g_free(shelf);
    }
}

void weights_shelf_put(WeightsShelf *shelf, Weights *weights, int64_t now_us)
{
    if (!weights || !weights->complete || !weights->part) {
        free_later(shelf, weights);
        return;
    }
    weights->kept_since_us = now_us;
    g_queue_push_tail(&shelf->kept, weights);
}

Weights *weights_shelf_take(WeightsShelf *shelf, const char *part)
{
    for (GList *l = shelf->kept.head; l && part; l = l->next) {
        Weights *weights = l->data;
        if (strcmp(weights->part, part) == 0) {
            g_queue_delete_link(&shelf->kept, l);
            return weights;
        }
    }
    return NULL;
}

uint64_t weights_shelf_bytes(const WeightsShelf *shelf)
{
    uint64_t bytes = 0;
    for (const GList *l = shelf->kept.head; l; l = l->next) {
        bytes += ((const Weights *)l->data)->shard->arena_bytes;
    }
    return bytes;
}

void weights_shelf_shrink(WeightsShelf *shelf, uint64_t bytes)
{
    while (shelf->kept.head && weights_shelf_bytes(shelf) > bytes) {
        free_later(shelf, g_queue_pop_head(&shelf->kept));
    }
}

void weights_shelf_expire(WeightsShelf *shelf, int64_t now_us, int64_t age_us)
{
    while (shelf->kept.head &&
           now_us - ((Weights *)shelf->kept.head->data)->kept_since_us >= age_us) {
        free_later(shelf, g_queue_pop_head(&shelf->kept));
    }
}
