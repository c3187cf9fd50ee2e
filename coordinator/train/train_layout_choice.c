#include "coordinator/train/train_layout_choice.h"

#include "proto/base/error.h"
#include "proto/plan/train_layout.h"

#define MICRO_PER_STAGE 4u
#define NEIGHBOURS 3u /* that an error names */

static uint32_t tensor_ranks(const JobSpec *job)
{
    return job->layout.tp > 0 ? (uint32_t)job->layout.tp : 1;
}

uint32_t train_layout_least_stages(const JobSpec *job, const ModelSpec *model,
                                   uint64_t least_memory)
{
    const uint64_t need = model_spec_parameters(model) * TRAIN_LEAST_BYTES / tensor_ranks(job);
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

/* ---- legal neighbours ---- */

static uint32_t apart(uint64_t wish, uint32_t got)
{
    uint32_t n = 0;
    for (uint64_t a = MIN(wish, got), b = MAX(wish, got); wish > 0 && a < b; a = a * 2) {
        n += 2;
    }
    return n;
}

static gint by_distance(gconstpointer a, gconstpointer b)
{
    const TrainNeighbour *x = a, *y = b;
    return x->distance < y->distance ? -1 : x->distance > y->distance;
}

static void add_neighbours(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                           uint32_t pp, uint32_t tp, GArray *out)
{
    const JobLayout *wish = &job->layout;
    const uint32_t replicas = (uint32_t)MIN(job->leaves, job->sequences);
    for (uint32_t dp = 1; dp <= replicas && dp * pp * tp <= n_workers; dp++) {
        g_autoptr(Plan) legal = train_plan_new(model, dp, pp, tp, NULL);
        const TrainNeighbour n = {dp, pp, tp,
                                  apart(wish->dp, dp) + apart(wish->pp, pp) + apart(wish->tp, tp) +
                                      (dp * pp * tp < n_workers ? 1 : 0)};
        if (legal != NULL) {
            g_array_append_val(out, n);
        }
    }
}

GArray *train_layout_legal(const JobSpec *job, const ModelSpec *model, uint32_t n_workers)
{
    GArray *found = g_array_new(FALSE, FALSE, sizeof(TrainNeighbour));
    for (uint32_t pp = 1; pp <= MIN(n_workers, model->n_layers); pp++) {
        for (uint32_t tp = 1; tp * pp <= n_workers; tp++) {
            add_neighbours(job, model, n_workers, pp, tp, found);
        }
    }
    g_array_sort(found, by_distance);
    return found;
}

GPtrArray *train_layout_neighbours(const JobSpec *job, const ModelSpec *model, uint32_t n_workers,
                                   const TrainLayoutChoice *without, uint32_t most)
{
    GPtrArray *texts = g_ptr_array_new_with_free_func(g_free);
    g_autoptr(GArray) found = train_layout_legal(job, model, n_workers);
    for (guint i = 0; i < found->len && texts->len < most; i++) {
        const TrainNeighbour *n = &g_array_index(found, TrainNeighbour, i);
        if (without == NULL || n->dp != without->dp || n->pp != without->pp ||
            n->tp != without->tp) {
            g_ptr_array_add(texts,
                            g_strdup_printf("{dp: %u, pp: %u, tp: %u}", n->dp, n->pp, n->tp));
        }
    }
    return texts;
}

static void refuse(const TrainLayoutChoice *c, const JobSpec *job, const ModelSpec *model,
                   uint32_t n_workers, GError **error)
{
    g_autoptr(GPtrArray) legal = train_layout_neighbours(job, model, n_workers, NULL, NEIGHBOURS);
    g_ptr_array_add(legal, NULL);
    g_autofree char *texts = g_strjoinv(" or ", (char **)legal->pdata);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                "layout dp %u, pp %u, tp %u needs %u workers and there are %u: start more, or "
                "choose layout: %s",
                c->dp, c->pp, c->tp, c->dp * c->pp * c->tp, n_workers, texts);
}

/* ---- the choice ---- */

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
            refuse(&c, job, model, n_workers, error);
            return false;
        }
        give_up_ranks(&c, n_workers);
    }
    c.micro_sequences = micro_sequences(job, &c);
    c.chunks = l->schedule == JOB_SCHEDULE_INTERLEAVED && c.pp > 1
                   ? (uint32_t)CLAMP(l->chunks, 1, MAX(model->n_layers / c.pp, 1))
                   : 1;
    c.schedule = l->schedule == JOB_SCHEDULE_AUTO ||
                         (l->schedule == JOB_SCHEDULE_INTERLEAVED && c.chunks == 1)
                     ? JOB_SCHEDULE_1F1B
                     : l->schedule;
    *out = c;
    return true;
}

const char *train_layout_schedule(const TrainLayoutChoice *layout)
{
    return layout->schedule == JOB_SCHEDULE_GPIPE         ? "gpipe"
           : layout->schedule == JOB_SCHEDULE_ZERO_BUBBLE ? "zero-bubble"
           : layout->schedule == JOB_SCHEDULE_INTERLEAVED ? "interleaved"
                                                          : "1f1b";
}
