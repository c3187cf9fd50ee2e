/* Where dropout takes place in a model (kernels/ops/dropout.h has what it does): the embedding's
 * result, and each layer's two sub-layers' results. */
#pragma once

#include "kernels/ops/dropout.h"

#define DROPOUT_SITE_EMBEDDING 0u
static inline uint32_t dropout_site_attention(uint32_t layer)
{
    return 1 + 2 * layer;
}
static inline uint32_t dropout_site_ffn(uint32_t layer)
{
    return 2 + 2 * layer;
}
