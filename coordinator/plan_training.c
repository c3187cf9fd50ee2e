/* Admin.PlanTraining: the layout that a training job would get now, what each worker would hold and
 * how long a step would take. The data are read (a vocabulary may have to be made of them), nothing
 * is loaded; memory and the schedule's time are the runtime's own numbers, from one of the workers.
 *
 *   read data and model (pool) ──▶ a place (train_placing.h) ──▶ answer */
#include "coordinator/parts.h"

#include "coordinator/message.h"
#include "coordinator/train/train_placing.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_workers.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"

#include <string.h>

#define ALTERNATIVES 3u

typedef struct PlanTraining {
    Parts *parts;
    RpcCall *call;
    JobSpec *spec;
    TrainInput *input;
    TrainPlacing *placing;
    GPtrArray *violations, *alternatives; /* of char * */
    GError *error;
} PlanTraining;

static void plan_training_free(void *user)
{
    PlanTraining *p = user;
    rpc_call_unref(p->call);
    job_spec_free(p->spec);
    train_placing_free(p->placing);
    train_input_free(p->input);
    g_ptr_array_unref(p->violations);
    g_ptr_array_unref(p->alternatives);
    g_clear_error(&p->error);
    g_free(p);
}

static const TrainPlace *place_of(const PlanTraining *p)
{
    return train_placing_place(p->placing);
}

static const TrainRate *rate_of(const PlanTraining *p)
{
    return submissions_train_rate(p->parts->submissions, p->spec->numerics);
}

static void add_alternatives(PlanTraining *p)
{
    const TrainPlace *place = place_of(p);
    g_autoptr(GPtrArray) found =
        place->fitting != NULL ? g_ptr_array_ref(place->fitting)
                               : train_layout_neighbours(p->spec, p->input->spec, place->n_workers,
                                                         &place->layout, ALTERNATIVES);
    for (guint i = 0; i < found->len; i++) {
        g_ptr_array_add(p->alternatives,
                        g_strdup_printf("layout: %s", (const char *)found->pdata[i]));
    }
}

/* ---- the answer ---- */

static void G_GNUC_PRINTF(2, 3) add_reason(const PlanTraining *p, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_ptr_array_add(place_of(p)->plan->reasons, g_strdup_vprintf(format, args));
    va_end(args);
}

static const char *schedule_name(const PlanTraining *p)
{
    return train_layout_schedule(&place_of(p)->layout);
}

static void explain_devices(const PlanTraining *p, const TrainPlace *place)
{
    uint64_t host = 0;
    for (uint32_t g = 0; g < place->n_ranks; g++) {
        host = MAX(host, place->estimate->ranks[g]->host);
    }
    g_autofree char *copies = units_format_size(host);
    add_reason(p,
               "numerics %s: %u of %u ranks compute on devices%s, with up to %s of copies in "
               "their hosts' memory",
               numerics_name((NumericsClass)p->spec->numerics), place->n_on_device, place->n_ranks,
               p->spec->numerics == NUMERICS_EXACT ? " and give the bits of hosts" : "", copies);
}

static void explain(PlanTraining *p)
{
    const JobLayout *wish = &p->spec->layout;
    const TrainLayoutChoice *l = &place_of(p)->layout;
    add_reason(p,
               wish->tp > 0 ? "tp %u: as the file says"
               : l->tp > 1  ? "tp %u: no number of stages fits with fewer tensor ranks"
                            : "tp %u: stages and replicas exchange less than tensor ranks",
               l->tp);
    add_reason(p,
               wish->pp > 0 ? "pp %u: as the file says"
                            : "pp %u: the fewest stages that fit, by what each rank would hold",
               l->pp);
    add_reason(p,
               wish->dp > 0 ? "dp %u: as the file says"
                            : "dp %u: replicas for the workers that are left, a leaf each at least",
               l->dp);
    if (wish->pp == 0 && l->pp > 1) {
        add_reason(p,
                   wish->schedule != JOB_SCHEDULE_AUTO ? "schedule %s: as the file says"
                   : l->schedule == JOB_SCHEDULE_ZERO_BUBBLE
                       ? "schedule %s: fits, and its step is shorter than 1f1b's"
                       : "schedule %s: zero-bubble does not fit, or saves less than 5 %% of a step",
                   schedule_name(p));
    }
    const uint32_t n = place_of(p)->estimate->micro_batches;
    if (place_of(p)->n_on_device > 0) {
        explain_devices(p, place_of(p));
    }
    if (wish->micro == n) {
        add_reason(p, "%u micro-batches: as the file says", n);
    } else if (wish->micro > 0) {
        add_reason(p, "%u micro-batches: the file says %" G_GUINT64_FORMAT ", cut at leaves", n,
                   wish->micro);
    } else {
        add_reason(p,
                   l->pp > 1 ? "%u micro-batches: about four a stage, cut at leaves"
                             : "%u micro-batches: a leaf each at most",
                   n);
    }
    add_reason(p, "passes at %.0f %% of the workers' measured rate of f32 products: %s",
               place_of(p)->cost.efficiency * 100,
               rate_of(p)->efficiency > 0 ? "as the last job had it" : "no job has shown it yet");
}

static void fill_predictions(const PlanTraining *p, Weft__V1__PlanTrainingResponse *r)
{
    const TrainPlace *place = place_of(p);
    const Weft__V1__TrainEstimate *e = place->estimate;
    r->memory = e->ranks;
    r->n_memory = e->n_ranks;
    r->limits = (uint64_t *)place->limits;
    r->n_limits = place->n_ranks;
    r->micro_batches = e->micro_batches;
    r->exchange_s = place->cost.exchange_s;
    r->update_s = place->cost.update_s;
    r->step_s = place->step_s;
    r->bubble = e->makespan_s > 0 ? e->bubble_s / e->makespan_s : 0;
    r->tokens_per_s =
        r->step_s > 0 ? (double)(p->spec->sequences * p->spec->length) / r->step_s : 0;
}

/* Takes p. placed: else there is no legal layout, and the violations say why. */
static void answer(PlanTraining *p, bool placed)
{
    const TrainPlace *place = place_of(p);
    Weft__V1__PlanTrainingResponse r = WEFT__V1__PLAN_TRAINING_RESPONSE__INIT;
    if (placed) {
        for (guint i = 0; i < place->too_large->len; i++) {
            g_ptr_array_add(p->violations, g_strdup(place->too_large->pdata[i]));
        }
        explain(p);
        fill_predictions(p, &r);
        r.plan = plan_to_message(place->plan);
    }
    if (p->violations->len > 0) {
        add_alternatives(p);
    }
    r.violations = (char **)p->violations->pdata;
    r.n_violations = p->violations->len;
    r.alternatives = (char **)p->alternatives->pdata;
    r.n_alternatives = p->alternatives->len;
    r.schedule = (char *)schedule_name(p);
    r.micro_sequences = place->layout.micro_sequences;
    r.chunks = place->layout.chunks;
    r.parameters = model_spec_parameters(p->input->spec);
    r.flops = place->cost.flops;
    r.numerics = (char *)numerics_name((NumericsClass)p->spec->numerics);
    rpc_call_reply(p->call, &r.base);
    message_free(r.plan);
    plan_training_free(p);
}

static void on_placed(TrainPlacing *placing, const GError *error, void *user)
{
    PlanTraining *p = user;
    if (error == NULL) {
        answer(p, true);
    } else if (g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID) ||
               g_error_matches(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE)) {
        g_ptr_array_add(p->violations, g_strdup(error->message));
        answer(p, false);
    } else {
        rpc_call_finish(p->call, error);
        plan_training_free(p);
    }
}

/* ---- data are read ---- */

static void input_work(void *user)
{
    PlanTraining *p = user;
    p->input = train_input_load(p->spec, &p->error);
}

static void input_done(void *user)
{
    PlanTraining *p = user;
    g_autoptr(GError) error = g_steal_pointer(&p->error);
    if (error != NULL) {
        rpc_call_finish(p->call, error);
        plan_training_free(p);
        return;
    }
    if (p->spec->numerics == JOB_ANY_NUMERICS) {
        p->spec->numerics = train_workers_class(p->parts->members);
    }
    const TrainPlacingOptions options = {.members = p->parts->members,
                                         .jobs = p->parts->jobs,
                                         .spec = p->spec,
                                         .input = p->input,
                                         .rate = rate_of(p)};
    train_placing_new(&options, &p->placing, on_placed, p);
}

void plan_training_answer(RpcCall *call, const ProtobufCMessage *message, void *user)
{
    const char *text = ((const Weft__V1__PlanTrainingRequest *)message)->spec;
    g_autoptr(GError) error = NULL;
    g_autoptr(JobSpec) spec = job_spec_parse(text, strlen(text), "job file", &error);
    if (spec != NULL && spec->kind != JOB_TRAIN) {
        error =
            g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID, "job %s is not of kind train", spec->name);
    }
    if (error == NULL) {
        train_settings_check(spec, &error);
    }
    if (error != NULL) {
        rpc_call_finish(call, error);
        return;
    }
    PlanTraining *p = g_new0(PlanTraining, 1);
    p->parts = user;
    p->call = rpc_call_ref(call);
    p->spec = g_steal_pointer(&spec);
    p->violations = g_ptr_array_new_with_free_func(g_free);
    p->alternatives = g_ptr_array_new_with_free_func(g_free);
    work_pool_run(p->parts->pool, input_work, input_done, plan_training_free, p);
}
