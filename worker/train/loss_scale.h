/* LossScale: the dynamic scale of a loss in narrow types (FORMULAS 20, Megatron's rule): a power of
 * two; a step whose gradient overflows anywhere is skipped everywhere. State of a checkpoint. Pure.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct LossScaleRule {
    bool dynamic;           /* false: the scale stays, and an overflow is an error */
    float initial, minimum; /* powers of two; 0: 2^16 (1 where it is not dynamic), and 1 */
    uint32_t window;        /* good steps after which it doubles; 0: 1000 */
    uint32_t hysteresis;    /* overflows until it halves; 0: 2 */
} LossScaleRule;

typedef struct LossScale {
    float scale;
    uint32_t good;      /* steps since the last change or overflow */
    int32_t hysteresis; /* left */
} LossScale;

LossScale loss_scale_begin(const LossScaleRule *rule);
/* Going on from a checkpoint's state; a scale that is not dynamic is the rule's. */
LossScale loss_scale_resume(const LossScaleRule *rule, const LossScale *saved);
/* After a step: whether its gradient overflowed. */
void loss_scale_after(LossScale *s, const LossScaleRule *rule, bool overflow);
