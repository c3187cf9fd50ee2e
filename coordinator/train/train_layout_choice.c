#include "coordinator/train/train_layout_choice.h"

#include "proto/base/error.h"

#define MICRO_PER_STAGE 4u

static uint64_t parameters_of(const ModelSpec *model)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < model->n_tensors; i++) {
        n += (uint64_t)model->tensors[i].rows * model->tensors[i].columns;
    }
    return n;
}

static uint32_t tensor_ranks(const JobSpec *job)
{
    return job->layout.tp > 0 ? (uint32_t)job->layout.tp : 1;
}

uint32_t train_layout_least_stages(const JobSpec *job, const ModelSpec *model,
                                   uint64_t least_memory)
{
    const uint64_t need = parameters_of(model) * TRAIN_LEAST_BYTES / tensor_ranks(job);
    const uint64_t stages = least_memory > 0 ? need / least_memory : 1;
    return (uint32_t)CLAMP(stages, 1, model->n_layers);
}

static void give_up_ranks(TrainLayoutChoice *c, uint32_t n_workers)
{
    while (c->pp * c->tp > n_workers) {
        if (c->pp > 1) {
            c->pp--;
        } else {
            c->tp--;
        }
    }
    c->dp = MIN(c->dp, n_workers / (c->pp * c->tp));
}

static uint32_t micro_sequences(const JobSpec *job, const TrainLayoutChoice *c)
{
    const uint64_t own = (job->sequences + c->dp - 1) / c->dp;
    const uint64_t micro = job->layout.micro > 0 ? job->layout.micro
                           : c->pp > 1           ? (uint64_t)MICRO_PER_STAGE * c->pp
                                                 : job->leaves;
    return (uint32_t)MAX((own + micro - 1) / micro, 1);
}

bool train_layout_choose(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                         uint32_t stages, bool shrink, TrainLayoutChoice *out, GError **error)
{
    const JobLayout *l = &job->layout;
    TrainLayoutChoice c = {.tp = tensor_ranks(job)};
    const uint32_t most = (uint32_t)MIN(job->leaves, job->sequences);
    c.pp = l->pp > 0 ? (uint32_t)l->pp : CLAMP(stages, 1, model->n_layers);
    c.dp = l->dp > 0 ? (uint32_t)l->dp : CLAMP(n_workers / (c.pp * c.tp), 1, most);
    if ((uint64_t)c.dp * c.pp * c.tp > n_workers) {
        if (!shrink) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                        "layout dp %u, pp %u, tp %u needs %u workers and there are %u: start more, "
                        "or choose dp 1, pp %u, tp 1",
                        c.dp, c.pp, c.tp, c.dp * c.pp * c.tp, n_workers,
                        MIN(n_workers, model->n_layers));
            return false;
        }
        give_up_ranks(&c, n_workers);
    }
    c.micro_sequences = micro_sequences(job, &c);
    c.chunks = l->schedule == JOB_SCHEDULE_INTERLEAVED && c.pp > 1
                   ? (uint32_t)CLAMP(l->chunks, 1, MAX(model->n_layers / c.pp, 1))
                   : 1;
    *out = c;
    return true;
}
