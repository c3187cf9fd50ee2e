#include "worker/train/loss_scale.h"

#define INITIAL 65536.0f
#define LARGEST 0x1p120f /* a scale that a loss near 1 still survives */
enum { WINDOW = 1000, HYSTERESIS = 2 };

static int32_t hysteresis_of(const LossScaleRule *rule)
{
    return rule->hysteresis > 0 ? (int32_t)rule->hysteresis : HYSTERESIS;
}

LossScale loss_scale_begin(const LossScaleRule *rule)
{
    return (LossScale){.scale = rule->initial > 0.0f ? rule->initial
                                : rule->dynamic      ? INITIAL
                                                     : 1.0f,
                       .hysteresis = hysteresis_of(rule)};
}

LossScale loss_scale_resume(const LossScaleRule *rule, const LossScale *saved)
{
    return rule->dynamic ? *saved : loss_scale_begin(rule);
}

void loss_scale_after(LossScale *s, const LossScaleRule *rule, bool overflow)
{
    const float minimum = rule->minimum > 0.0f ? rule->minimum : 1.0f;
    if (!rule->dynamic) {
        return;
    }
    if (overflow) {
        s->good = 0;
        s->hysteresis--;
        if (s->hysteresis <= 0 && s->scale / 2.0f >= minimum) {
            s->scale /= 2.0f;
        }
        return;
    }
    s->good++;
    if (s->good == (rule->window > 0 ? rule->window : (uint32_t)WINDOW)) {
        s->good = 0;
        s->hysteresis = hysteresis_of(rule);
        s->scale = s->scale < LARGEST ? s->scale * 2.0f : s->scale;
    }
}
