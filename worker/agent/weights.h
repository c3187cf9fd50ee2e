/* Weights: a loaded shard with the model that it was cut from, one owner at a time. They outlive
 * the deployment that loaded them, so that a new plan which wants the same part finds it in memory.
 * Loop thread. */
#pragma once

#include "worker/shard/packed_images.h"
#include "worker/shard/shard.h"
#include "worker/task_pool.h"

typedef struct Weights {
    ModelSpec *spec;
    Shard *shard;
    bool complete;       /* every slice is in */
    bool mapped;         /* from the image of its part */
    ImageKeeper *keeper; /* writes that image; or NULL */
    char *part;          /* what it is: equal texts = equal bytes; NULL when the file has no hash */
    int64_t kept_since_us;
} Weights;

/* The text for a rank's part of a model; NULL when the file hash is unknown. Returned. */
char *weights_part(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                   uint32_t rank);
/* Complete ones that were packed become an image in the background, once; images may be NULL. */
void weights_keep(Weights *weights, PackedImages *images);
void weights_free(Weights *weights); /* NULL-safe */

/* ---- weights that no deployment uses at the moment ---- */
typedef struct WeightsShelf WeightsShelf;
WeightsShelf *weights_shelf_new(TaskPool *pool /* borrowed: unmapping gigabytes takes long */);
void weights_shelf_free(WeightsShelf *shelf); /* and what is on it; NULL-safe */
/* Taken always; incomplete ones and those without a name are freed. */
void weights_shelf_put(WeightsShelf *shelf, Weights *weights, int64_t now_us);
/* The weights of this part, or NULL; returned. */
Weights *weights_shelf_take(WeightsShelf *shelf, const char *part);
/* Frees the oldest until at most `bytes` are left. */
void weights_shelf_shrink(WeightsShelf *shelf, uint64_t bytes);
/* Frees those kept longer than age_us. */
void weights_shelf_expire(WeightsShelf *shelf, int64_t now_us, int64_t age_us);
uint64_t weights_shelf_bytes(const WeightsShelf *shelf);
