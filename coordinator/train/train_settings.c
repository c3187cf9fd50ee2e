#include "coordinator/train/train_settings.h"

#include "proto/base/error.h"
#include "proto/plan/plan.h"

static bool refuse(GError **error, const char *what)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "job file: %s", what);
    return false;
}

bool train_settings_check(const JobSpec *job, GError **error)
{
    const JobOptimizerSpec *o = &job->optimizer;
    if ((o->decay_norms != 0 && o->decay_norms != o->decay) || o->decay_biases != o->decay_norms ||
        (o->decay_embeddings != 0 && o->decay_embeddings != o->decay)) {
        return refuse(error, "optimizer.groups: each is 0 or the decay of matrices, norms and "
                             "biases alike");
    }
    return true;
}

static void fill_optimizer(const JobSpec *job, Weft__V1__TrainOptimizer *out)
{
    static const uint32_t kinds[] = {0, 2, 1}; /* JobOptimizer: AdamW, Adam, SGD */
    const JobOptimizerSpec *o = &job->optimizer;
    out->kind = kinds[o->name];
    out->schedule = o->schedule == JOB_RATE_CONSTANT ? 0 : o->schedule == JOB_RATE_LINEAR ? 1 : 2;
    out->rate = o->lr;
    out->beta1 = o->name == JOB_SGD ? o->momentum : o->beta1;
    out->beta2 = o->beta2;
    out->eps = o->eps;
    out->decay = o->decay;
    out->clip = o->clip;
    out->floor = o->floor;
    out->decay_vectors = o->decay > 0 && o->decay_norms > 0;
    out->keep_embeddings = o->decay > 0 && o->decay_embeddings == 0;
    out->nesterov = o->nesterov;
    out->warmup = o->warmup;
}

static void fill_scaling(const JobSpec *job, TrainSettingsMessage *m)
{
    const JobLossScale *l = &job->loss_scale;
    if (l->policy == JOB_SCALING_NONE) {
        return;
    }
    weft__v1__train_scaling__init(&m->scaling);
    m->scaling.dynamic = l->policy == JOB_SCALING_DYNAMIC;
    m->scaling.start = (float)l->start;
    m->scaling.least = (float)l->least;
    m->scaling.growth_steps = (uint32_t)l->growth_steps;
    m->scaling.hysteresis = (uint32_t)l->hysteresis;
    m->settings.scaling = &m->scaling;
}

static void fill_state(const CheckpointState *from, TrainSettingsMessage *m)
{
    weft__v1__train_state__init(&m->state);
    m->state.updates = from->updates;
    m->state.scale = (float)from->loss_scale;
    m->state.good = (uint32_t)from->scale_growth;
    m->state.hysteresis = (int32_t)from->scale_hysteresis;
    m->settings.first_step = from->step;
    m->settings.state = &m->state;
}

void train_settings_fill(const JobSpec *job, const TrainInput *in, const TrainLayoutChoice *layout,
                         const CheckpointState *from, TrainSettingsMessage *message)
{
    Weft__V1__TrainSettings *out = &message->settings;
    weft__v1__train_settings__init(out);
    weft__v1__train_optimizer__init(&message->optimizer);
    fill_optimizer(job, &message->optimizer);
    out->optimizer = &message->optimizer;
    fill_scaling(job, message);
    if (from != NULL) {
        fill_state(from, message);
    }
    out->sequences = (uint32_t)job->sequences;
    out->length = (uint32_t)job->length;
    out->leaves = (uint32_t)job->leaves;
    out->micro_sequences = layout->micro_sequences;
    out->steps = job->steps;
    out->seed = job->seed;
    out->schedule = layout->schedule == JOB_SCHEDULE_GPIPE         ? 1
                    : layout->schedule == JOB_SCHEDULE_ZERO_BUBBLE ? 2
                    : layout->schedule == JOB_SCHEDULE_INTERLEAVED ? 3
                                                                   : 0; /* PipelineKind */
    out->recompute = job->layout.recompute;                             /* JobRecompute */
    out->whole_optimizer = job->layout.zero == 0;
    out->checkpoint_every = job->checkpoint_directory != NULL ? job->checkpoint_every : 0;
    out->validation_every = in->validation != NULL ? job->validation_every : 0;
    out->validation_sequences = job->validation_sequences;
    out->sample_every = job->sample_every;
    out->sample_tokens = (uint32_t)job->sample_tokens;
    out->sample_temperature = job->sample_temperature;
    out->sample_prompt = (uint32_t *)(void *)in->prompt->data;
    out->n_sample_prompt = in->prompt->len;
    out->trace_first = job->trace_first - 1;
    out->trace_steps = job->trace_file != NULL ? (uint32_t)job->trace_steps : 0;
    out->n_tokens = in->train->n;
    out->n_validation_tokens = in->validation != NULL ? in->validation->n : 0;
    out->documents = job->data.packing == JOB_PACK_DOCUMENTS;
    out->bounds = job->data.positions == JOB_IN_DOCUMENTS   ? 2
                  : job->data.attention == JOB_IN_DOCUMENTS ? 1
                                                            : 0;
    out->dropout = job->dropout;
    out->smoothing = job->label_smoothing;
    out->precision = job->precision; /* JobPrecision */
    out->skip_nonfinite = job->nonfinite == JOB_NONFINITE_SKIP;
    out->given = in->source != NULL;
    out->fast = job->numerics == NUMERICS_FAST;
    out->devices = layout->on_devices;
}

bool train_checkpoint_check(const JobSpec *job, const ModelSpec *model, const Checkpoint *c,
                            bool started, GError **error)
{
    for (uint32_t i = 0; i < model->n_tensors; i++) {
        const TensorSpec *t = &model->tensors[i];
        g_autofree char *name = g_strconcat("weights/", t->name, NULL);
        if (!checkpoint_has(c, name, t->rows, t->columns)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "%s is a checkpoint of another model: it has no tensor %s of %u x %u; name "
                        "another checkpoint.directory",
                        checkpoint_path(c), t->name, t->rows, t->columns);
            return false;
        }
    }
    if (checkpoint_state(c)->step > job->steps) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s is of step %" G_GUINT64_FORMAT ", and the job has steps: %" G_GUINT64_FORMAT
                    ": ask for more steps, or name another checkpoint.directory",
                    checkpoint_path(c), checkpoint_state(c)->step, job->steps);
        return false;
    }
    if (job->resume == JOB_RESUME_NONE && !started) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s is there already and checkpoint.resume is none: remove it, or name another "
                    "checkpoint.directory",
                    checkpoint_path(c));
        return false;
    }
    return true;
}
