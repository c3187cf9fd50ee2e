/* Admin.PlanTraining: the layout that a training job would get now, what each worker would hold and
 * how long a step would take. The data are read (a vocabulary may have to be made of them), nothing
 * is loaded; memory and the schedule's time are the runtime's own numbers, from one of the workers.
 *
 *   read data and model (pool) ──▶ choose layout, cost ──▶ Trainer.Estimate ──▶ answer */
#include "coordinator/parts.h"

#include "coordinator/message.h"
#include "coordinator/planner/cost.h"
#include "coordinator/train/train_cost.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_workers.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"

#include <stdlib.h>
#include <string.h>

#define ESTIMATE_DEADLINE_MS 60000
#define ALTERNATIVES 3u

typedef struct PlanTraining {
    Parts *parts;
    RpcCall *call;
    JobSpec *spec;
    TrainInput *input;
    TrainLayoutChoice layout;
    Plan *plan;
    MemberSnapshot members;
    const PlanMember *of_rank[PLAN_RANKS_LIMIT];
    uint32_t n_workers;
    TrainCost cost;
    Weft__V1__TrainEstimate *estimate;
    GPtrArray *violations, *alternatives; /* of char * */
    GError *error;
} PlanTraining;

static void plan_training_free(void *user)
{
    PlanTraining *p = user;
    rpc_call_unref(p->call);
    job_spec_free(p->spec);
    train_input_free(p->input);
    plan_free(p->plan);
    member_snapshot_free(&p->members);
    message_free(p->estimate);
    g_ptr_array_unref(p->violations);
    g_ptr_array_unref(p->alternatives);
    g_clear_error(&p->error);
    g_free(p);
}

static uint32_t n_ranks(const PlanTraining *p)
{
    return p->layout.dp * p->layout.pp * p->layout.tp;
}

/* ---- legal neighbours ---- */

typedef struct Neighbour {
    uint32_t dp, pp, tp;
    uint32_t distance; /* of the wish: factors of two, roughly; and idle workers */
} Neighbour;

static uint32_t apart(uint64_t wish, uint32_t got)
{
    uint32_t n = 0;
    for (uint64_t a = MIN(wish, got), b = MAX(wish, got); wish > 0 && a < b; a = a * 2) {
        n += 2;
    }
    return n;
}

static int by_distance(const void *a, const void *b)
{
    const Neighbour *x = a, *y = b;
    return x->distance < y->distance ? -1 : x->distance > y->distance;
}

static void add_alternatives(PlanTraining *p)
{
    const JobLayout *wish = &p->spec->layout;
    const ModelSpec *model = p->input->spec;
    const uint32_t replicas = (uint32_t)MIN(p->spec->leaves, p->spec->sequences);
    g_autoptr(GArray) found = g_array_new(FALSE, FALSE, sizeof(Neighbour));
    for (uint32_t pp = 1; pp <= MIN(p->n_workers, model->n_layers); pp++) {
        for (uint32_t tp = 1; tp * pp <= p->n_workers; tp++) {
            for (uint32_t dp = 1; dp <= replicas && dp * pp * tp <= p->n_workers; dp++) {
                g_autoptr(Plan) legal = train_plan_new(model, dp, pp, tp, NULL);
                const Neighbour n = {dp, pp, tp,
                                     apart(wish->dp, dp) + apart(wish->pp, pp) +
                                         apart(wish->tp, tp) +
                                         (dp * pp * tp < p->n_workers ? 1 : 0)};
                if (legal != NULL) {
                    g_array_append_val(found, n);
                }
            }
        }
    }
    qsort(found->data, found->len, sizeof(Neighbour), by_distance);
    for (guint i = 0, kept = 0; i < found->len && kept < ALTERNATIVES; i++) {
        const Neighbour *n = &g_array_index(found, Neighbour, i);
        const bool same = n->dp == p->layout.dp && n->pp == p->layout.pp && n->tp == p->layout.tp;
        if (!same) {
            kept++;
            g_ptr_array_add(p->alternatives, g_strdup_printf("layout: {dp: %u, pp: %u, tp: %u}",
                                                             n->dp, n->pp, n->tp));
        }
    }
}

/* ---- the answer ---- */

static void G_GNUC_PRINTF(2, 3) add_reason(const PlanTraining *p, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_ptr_array_add(p->plan->reasons, g_strdup_vprintf(format, args));
    va_end(args);
}

static const char *schedule_name(const PlanTraining *p)
{
    return p->spec->layout.schedule == JOB_SCHEDULE_GPIPE         ? "gpipe"
           : p->spec->layout.schedule == JOB_SCHEDULE_ZERO_BUBBLE ? "zero-bubble"
           : p->layout.chunks > 1                                 ? "interleaved"
                                                                  : "1f1b";
}

static void explain(PlanTraining *p)
{
    const JobLayout *wish = &p->spec->layout;
    const TrainLayoutChoice *l = &p->layout;
    const uint64_t state = train_parameters(p->input->spec) * TRAIN_STATE_BYTES;
    g_autofree char *need = units_format_size(state);
    add_reason(p,
               wish->tp > 0 ? "tp %u: as the file says"
                            : "tp %u: stages and replicas exchange less than tensor ranks",
               l->tp);
    if (wish->pp > 0) {
        add_reason(p, "pp %u: as the file says", l->pp);
    } else {
        add_reason(p, "pp %u: the fewest stages that %s (%u bytes a parameter) fit", l->pp, need,
                   TRAIN_STATE_BYTES);
    }
    add_reason(p,
               wish->dp > 0 ? "dp %u: as the file says"
                            : "dp %u: replicas for the workers that are left, a leaf each at least",
               l->dp);
    const uint32_t n = p->estimate->micro_batches;
    if (wish->micro > 0) {
        add_reason(p, "%u micro-batches: the file says %" G_GUINT64_FORMAT ", cut at leaves", n,
                   wish->micro);
    } else {
        add_reason(p,
                   l->pp > 1 ? "%u micro-batches: about four a stage, cut at leaves"
                             : "%u micro-batches: a leaf each at most",
                   n);
    }
}

static void check_memory(PlanTraining *p)
{
    for (uint32_t g = 0; g < n_ranks(p); g++) {
        TrainPosition at;
        const Weft__V1__TrainMemory *m = p->estimate->ranks[g];
        const uint64_t total = m->weights + m->gradients + m->optimizer + m->activations,
                       limit = p->of_rank[g] != NULL ? p->of_rank[g]->memory_bytes : 0;
        const char *worker = train_plan_rank(p->plan, g, &at)->worker;
        if (total > limit) {
            g_autofree char *needed = units_format_size(total), *had = units_format_size(limit);
            g_ptr_array_add(p->violations,
                            g_strdup_printf("%s would hold %s of its %s", worker, needed, had));
        }
    }
}

static void fill_predictions(const PlanTraining *p, Weft__V1__PlanTrainingResponse *r)
{
    const Weft__V1__TrainEstimate *e = p->estimate;
    r->memory = e->ranks;
    r->n_memory = e->n_ranks;
    r->micro_batches = e->micro_batches;
    r->exchange_s = p->cost.exchange_s;
    r->update_s = p->cost.update_s;
    r->step_s = e->makespan_s + p->cost.exchange_s + p->cost.update_s;
    r->bubble = e->makespan_s > 0 ? e->bubble_s / e->makespan_s : 0;
    r->tokens_per_s =
        r->step_s > 0 ? (double)(p->spec->sequences * p->spec->length) / r->step_s : 0;
}

/* Takes p. */
static void answer(PlanTraining *p)
{
    Weft__V1__PlanTrainingResponse r = WEFT__V1__PLAN_TRAINING_RESPONSE__INIT;
    uint64_t limits[PLAN_RANKS_LIMIT];
    if (p->estimate != NULL) {
        check_memory(p);
        explain(p);
        fill_predictions(p, &r);
        for (r.n_limits = 0; r.n_limits < n_ranks(p); r.n_limits++) {
            const PlanMember *m = p->of_rank[r.n_limits];
            limits[r.n_limits] = m != NULL ? m->memory_bytes : 0;
        }
        r.limits = limits;
        r.plan = plan_to_message(p->plan);
    }
    if (p->violations->len > 0) {
        add_alternatives(p);
    }
    r.violations = (char **)p->violations->pdata;
    r.n_violations = p->violations->len;
    r.alternatives = (char **)p->alternatives->pdata;
    r.n_alternatives = p->alternatives->len;
    r.schedule = (char *)schedule_name(p);
    r.micro_sequences = p->layout.micro_sequences;
    r.chunks = p->layout.chunks;
    r.parameters = train_parameters(p->input->spec);
    r.flops = p->cost.flops;
    rpc_call_reply(p->call, &r.base);
    message_free(r.plan);
    plan_training_free(p);
}

/* ---- what a worker says ---- */

static void on_estimate(const ProtobufCMessage *message, void *user)
{
    message_replace(&((PlanTraining *)user)->estimate, message);
}

static void on_estimated(const GError *error, void *user)
{
    PlanTraining *p = user;
    g_autoptr(GError) odd = NULL;
    if (error == NULL && (p->estimate == NULL || p->estimate->n_ranks != n_ranks(p))) {
        odd = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                  "a worker that was asked for an estimate gave none");
    }
    if (error != NULL && g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID)) {
        g_ptr_array_add(p->violations, g_strdup(error->message));
        message_free(g_steal_pointer(&p->estimate));
        answer(p);
    } else if (error != NULL || odd != NULL) {
        rpc_call_finish(p->call, error != NULL ? error : odd);
        plan_training_free(p);
    } else {
        answer(p);
    }
}

static void ask_worker(PlanTraining *p, const Member *worker)
{
    TrainSettingsMessage settings;
    Weft__V1__TrainEstimateRequest request = WEFT__V1__TRAIN_ESTIMATE_REQUEST__INIT;
    Weft__V1__TrainLoad load = WEFT__V1__TRAIN_LOAD__INIT;
    uint32_t threads[PLAN_RANKS_LIMIT];
    const RpcCallbacks callbacks = {.on_message = on_estimate, .on_done = on_estimated};
    train_settings_fill(p->spec, p->input, &p->layout, NULL, &settings);
    load.plan = plan_to_message(p->plan);
    load.model = model_to_message(p->input->spec, true);
    load.settings = &settings.settings;
    request.load = &load;
    for (uint32_t g = 0; g < n_ranks(p); g++) {
        threads[g] = p->of_rank[g] != NULL ? p->of_rank[g]->threads : 1;
    }
    request.threads = threads;
    request.n_threads = n_ranks(p);
    request.forward_s = p->cost.forward_s;
    request.backward_s = p->cost.backward_s;
    request.weights_s = p->cost.weights_s;
    request.transfer_s = p->cost.transfer_s;
    rpc_call_start(member_channel(worker), &weft__v1__trainer__descriptor, "Estimate",
                   &request.base, ESTIMATE_DEADLINE_MS, false, callbacks, p);
    weft__v1__plan__free_unpacked(load.plan, NULL);
    weft__v1__model__free_unpacked(load.model, NULL);
}

/* ---- data are read ---- */

static void input_work(void *user)
{
    PlanTraining *p = user;
    p->input = train_input_load(p->spec, &p->error);
}

static void find_members(PlanTraining *p)
{
    p->members = jobs_snapshot(p->parts->jobs, JOBS_ALL);
    for (uint32_t g = 0; g < n_ranks(p); g++) {
        TrainPosition at;
        p->of_rank[g] = member_named(p->members.members, p->members.n,
                                     train_plan_rank(p->plan, g, &at)->worker);
    }
}

static void input_done(void *user)
{
    PlanTraining *p = user;
    g_autoptr(GError) error = g_steal_pointer(&p->error);
    TrainWorkers workers = train_workers_usable(p->parts->members);
    p->n_workers = workers.members->len;
    if (error == NULL && p->n_workers == 0) {
        error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_NOT_READY,
                                    "no worker is usable: a plan is made for those that are there");
    }
    if (error != NULL) {
        rpc_call_finish(p->call, error);
        plan_training_free(p);
    } else if (!train_layout_choose(p->spec, p->input->spec, p->n_workers, workers.least_memory,
                                    false, &p->layout, &error) ||
               (p->plan = train_workers_plan(&workers, &p->layout, p->input->spec, p->spec->name,
                                             &error)) == NULL) {
        g_ptr_array_add(p->violations, g_strdup(error->message));
        answer(p);
    } else {
        find_members(p);
        p->cost = train_cost(p->spec, p->input->spec, &p->layout, p->plan, p->of_rank);
        ask_worker(p, workers.members->pdata[0]);
    }
    train_workers_clear(&workers);
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
    work_pool_run_full(p->parts->pool, input_work, input_done, plan_training_free, p);
}
