/* StageTrace: XXH3-128 of the residual stream of chosen rows after each sub-layer of a stage, so
 * that two layouts can be compared site by site.
 *
 * Sites of the whole model, in order: 0 the embedding, 1 + 2l attention of layer l, 2 + 2l
 * feed-forward of layer l. A stage has its own, the first stage also site 0. Rows are hashed by the
 * thread that has just written them: disjoint entries, no barrier. */
#pragma once

#include "proto/base/hash.h"

#include <stddef.h>
#include <stdint.h>

typedef struct StageTrace {
    uint32_t n_rows;
    const uint32_t *rows;         /* of the step, ascending */
    uint32_t first_site, n_sites; /* of this stage */
    Hash128 *hashes;              /* [n_rows][n_sites] */
} StageTrace;

static inline uint32_t trace_site_attention(uint32_t layer)
{
    return 1 + 2 * layer;
}
static inline uint32_t trace_site_ffn(uint32_t layer)
{
    return 2 + 2 * layer;
}

/* Hashes the traced ones of rows [first, last) of x [rows][width]. Any thread of the pool, each its
 * own rows. */
static inline void stage_trace_rows(StageTrace *trace, uint32_t site, const float *x,
                                    uint32_t width, uint32_t first, uint32_t last)
{
    for (uint32_t i = 0; i < trace->n_rows; i++) {
        if (trace->rows[i] >= first && trace->rows[i] < last) {
            trace->hashes[(size_t)i * trace->n_sites + site - trace->first_site] =
                hash128(x + (size_t)trace->rows[i] * width, sizeof(float) * width);
        }
    }
}
