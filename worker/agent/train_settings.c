#include "worker/agent/train_settings.h"

#include "proto/base/error.h"
#include "proto/plan/train_limits.h"

#include <math.h>

#define TOKENS_LIMIT (UINT64_C(1) << 34)

typedef struct Bound {
    const char *name;
    uint64_t value, least, most;
} Bound;

static bool check(const Bound *bounds, size_t n, GError **error)
{
    for (size_t i = 0; i < n; i++) {
        const Bound *b = &bounds[i];
        if (b->value < b->least || b->value > b->most) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "training settings: %s is %" G_GUINT64_FORMAT ", not %" G_GUINT64_FORMAT
                        " to %" G_GUINT64_FORMAT,
                        b->name, b->value, b->least, b->most);
            return false;
        }
    }
    return true;
}

static bool check_numbers(const Weft__V1__TrainSettings *m, GError **error)
{
    const Weft__V1__TrainOptimizer *o = m->optimizer;
    const double numbers[] = {o->rate, o->beta1, o->beta2,   o->eps,       o->decay,
                              o->clip, o->floor, m->dropout, m->smoothing, m->sample_temperature};
    for (size_t i = 0; i < G_N_ELEMENTS(numbers); i++) {
        if (!isfinite(numbers[i]) || numbers[i] < 0) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                        "training settings: number %zu of the optimizer is %g", i, numbers[i]);
            return false;
        }
    }
    if (m->dropout >= 1 || m->smoothing >= 1) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "training settings: dropout %g and label smoothing %g are not below 1",
                    m->dropout, m->smoothing);
        return false;
    }
    return true;
}

static bool is_scale(float x)
{
    int power;
    return isfinite(x) && x > 0.0f && frexpf(x, &power) == 0.5f;
}

static bool check_scaling(const Weft__V1__TrainSettings *m, GError **error)
{
    const Weft__V1__TrainScaling *s = m->scaling;
    const bool ok = (s == NULL || (is_scale(s->start) && is_scale(s->least))) &&
                    (m->first_step == 0 || (m->state != NULL && is_scale(m->state->scale) &&
                                            m->state->updates <= m->first_step));
    if (!ok) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "training settings: a loss scale is no power of two, or the state of step "
                    "%" G_GUINT64_FORMAT " has more updates or is not there",
                    m->first_step);
    }
    return ok;
}

static LossScaleRule scaling_of(const Weft__V1__TrainSettings *m)
{
    const Weft__V1__TrainScaling *s = m->scaling;
    return s == NULL ? (LossScaleRule){.dynamic = false}
                     : (LossScaleRule){.dynamic = s->dynamic,
                                       .initial = s->start,
                                       .minimum = s->least,
                                       .window = s->growth_steps,
                                       .hysteresis = s->hysteresis};
}

static TrainProgress state_of(const Weft__V1__TrainSettings *m)
{
    const Weft__V1__TrainState *s = m->state;
    return m->first_step == 0 ? (TrainProgress){.step = 0}
                              : (TrainProgress){.step = m->first_step,
                                                .updates = s->updates,
                                                .scale = {s->scale, s->good, s->hysteresis}};
}

static bool check_prompt(const Weft__V1__TrainSettings *m, const ModelSpec *spec, GError **error)
{
    for (size_t i = 0; m->sample_every > 0 && i < m->n_sample_prompt; i++) {
        if (m->sample_prompt[i] >= spec->vocab_size) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "sample.prompt: token %zu has id %u, and the model a vocabulary of %u ids; "
                        "use the model's tokenizer, or another prompt",
                        i, m->sample_prompt[i], spec->vocab_size);
            return false;
        }
    }
    return true;
}

static OptimizerSettings optimizer_of(const Weft__V1__TrainSettings *m)
{
    static const RateSchedule schedules[] = {RATE_CONSTANT, RATE_LINEAR, RATE_COSINE};
    const Weft__V1__TrainOptimizer *o = m->optimizer;
    OptimizerSettings s = {.rate = o->rate,
                           .beta1 = o->beta1,
                           .beta2 = o->beta2,
                           .eps = o->eps,
                           .decay = o->decay,
                           .decay_vectors = o->decay_vectors,
                           .keep_embeddings = o->keep_embeddings,
                           .clip = o->clip,
                           .nesterov = o->nesterov,
                           .schedule = schedules[o->schedule],
                           .warmup = o->warmup,
                           .steps = m->steps,
                           .floor = o->floor};
    s.kind = o->kind == 0 ? OPTIMIZER_ADAMW : o->kind == 1 ? OPTIMIZER_SGD : OPTIMIZER_ADAM;
    return s;
}

bool train_settings_read(const Weft__V1__TrainSettings *m, const ModelSpec *spec, TrainWork *out,
                         GError **error)
{
    if (m->optimizer == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL, "training settings: no optimizer");
        return false;
    }
    const Bound bounds[] = {
        {"sequences", m->sequences, 1, TRAIN_SEQUENCES_LIMIT},
        {"length", m->length, 1, spec->context},
        {"leaves", m->leaves, 1, TRAIN_LEAVES_LIMIT},
        {"micro-batch", m->micro_sequences, 1, TRAIN_SEQUENCES_LIMIT},
        {"steps", m->steps, 1, TRAIN_STEPS_LIMIT},
        {"first step", m->first_step, 0, m->steps},
        {"schedule", m->schedule, 0, PIPELINE_KIND_LIMIT - 1},
        {"recompute", m->recompute, 0, RECOMPUTE_LIMIT - 1},
        {"tokens", m->n_tokens, 1, TOKENS_LIMIT},
        {"validation tokens", m->n_validation_tokens, 0, TOKENS_LIMIT},
        {"optimizer", m->optimizer->kind, 0, 2},
        {"precision", m->precision, 0, PRECISION_LIMIT - 1},
        {"bounds", m->bounds, 0, BOUNDS_POSITIONS},
        {"rate schedule", m->optimizer->schedule, 0, 2},
        {"sampled tokens", m->sample_tokens, m->sample_every > 0, TRAIN_SAMPLE_LIMIT},
        {"traced steps", m->trace_steps, 0, TRAIN_TRACE_STEPS_LIMIT},
        {"tokens to go on from", m->n_sample_prompt, m->sample_every > 0, TRAIN_SAMPLE_LIMIT},
    };
    if (!check(bounds, G_N_ELEMENTS(bounds), error) || !check_numbers(m, error) ||
        !check_scaling(m, error) || !check_prompt(m, spec, error)) {
        return false;
    }
    *out = (TrainWork){.sequences = m->sequences,
                       .length = m->length,
                       .leaves = m->leaves,
                       .micro_sequences = m->micro_sequences,
                       .steps = m->steps,
                       .seed = m->seed,
                       .optimizer = optimizer_of(m),
                       .dropout = m->dropout,
                       .smoothing = (float)m->smoothing,
                       .precision = (Precision)m->precision,
                       .scaling = scaling_of(m),
                       .skip_nonfinite = m->skip_nonfinite,
                       .fast = m->fast,
                       .devices = m->devices,
                       .given = m->given,
                       .schedule = (PipelineKind)m->schedule,
                       .recompute = (Recompute)m->recompute,
                       .whole_optimizer = m->whole_optimizer,
                       .bounds = (TokenBounds)m->bounds,
                       .packing = m->documents ? TOKENS_DOCUMENTS : TOKENS_STREAM,
                       .checkpoint_every = m->checkpoint_every,
                       .validation_every = m->validation_every,
                       .validation_sequences = m->validation_sequences,
                       .sample_every = m->sample_every,
                       .trace_first = m->trace_first,
                       .trace_steps = m->trace_steps,
                       .sample = {.prompt = m->sample_prompt,
                                  .n_prompt = (uint32_t)m->n_sample_prompt,
                                  .n_tokens = m->sample_tokens,
                                  .temperature = (float)m->sample_temperature,
                                  .seed = m->seed},
                       .n_tokens = m->n_tokens,
                       .n_validation_tokens = m->n_validation_tokens,
                       .from = state_of(m)};
    return true;
}
