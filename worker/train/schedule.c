#include "worker/train/schedule.h"

#include "kernels/ops/act.h"

double schedule_rate(const OptimizerSettings *s, uint64_t step)
{
    if (step < s->warmup) {
        return s->rate * (double)(step + 1) / (double)s->warmup;
    }
    if (s->schedule == RATE_CONSTANT || s->steps <= s->warmup) {
        return s->rate;
    }
    const double done = (double)(step - s->warmup) / (double)(s->steps - s->warmup);
    const double part = done < 1.0 ? done : 1.0;
    const double left = s->schedule == RATE_LINEAR
                            ? 1.0 - part
                            : 0.5 * (1.0 + det_cos(part * 0x1.921fb54442d18p+1));
    return s->floor + (s->rate - s->floor) * left;
}

bool schedule_decays(const OptimizerSettings *s, const TensorSpec *tensor)
{
    const bool embeds = tensor->role == ROLE_TOKEN_EMBD || tensor->role == ROLE_POSITION_EMBD;
    return s->kind == OPTIMIZER_ADAM ? false
           : tensor->rows == 1       ? s->decay_vectors
                                     : !(embeds && s->keep_embeddings);
}

float schedule_clip(const OptimizerSettings *s, float norm)
{
    const double part = s->clip / ((double)norm + 1e-6);
    return s->clip > 0.0 && part < 1.0 ? (float)part : 1.0f;
}

AdamwScalars schedule_adamw(const OptimizerSettings *s, uint64_t step, float clip, bool decays)
{
    const double t = (double)(step + 1);
    return (AdamwScalars){
        .rate = (float)schedule_rate(s, step),
        .beta1 = (float)s->beta1,
        .rest1 = (float)(1.0 - s->beta1),
        .beta2 = (float)s->beta2,
        .rest2 = (float)(1.0 - s->beta2),
        .correct1 = (float)(1.0 / (1.0 - (s->beta1 > 0.0 ? det_pow(s->beta1, t) : 0.0))),
        .correct2 = (float)(1.0 / (1.0 - (s->beta2 > 0.0 ? det_pow(s->beta2, t) : 0.0))),
        .eps = (float)s->eps,
        .decay = decays ? (float)s->decay : 0.0f,
        .clip = clip,
    };
}

SgdScalars schedule_sgd(const OptimizerSettings *s, uint64_t step, float clip, bool decays)
{
    return (SgdScalars){.rate = (float)schedule_rate(s, step),
                        .momentum = (float)s->beta1,
                        .decay = decays ? (float)s->decay : 0.0f,
                        .clip = clip,
                        .nesterov = s->nesterov};
}
