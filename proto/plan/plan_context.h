/* How many positions a sequence may have where a wish leaves it open: one rule for whoever plans,
 * shares, checks or tells it. */
#pragma once

#include "proto/model/model_spec.h"

#include <stdint.h>

#define PLAN_CONTEXT_DEFAULT 8192u

/* wished: 0 = none. */
static inline uint32_t plan_context(const ModelSpec *spec, uint32_t wished)
{
    const uint32_t most =
        spec->context < PLAN_CONTEXT_DEFAULT ? spec->context : PLAN_CONTEXT_DEFAULT;
    return wished != 0 ? wished : most;
}
