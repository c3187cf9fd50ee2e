#include "coordinator/train/train_status.h"

#include "coordinator/planner/cost.h"
#include "coordinator/reason.h"
#include "coordinator/train/train_call.h"
#include "coordinator/train/train_cost.h"
#include "coordinator/train/train_log.h"
#include "coordinator/train/train_plot.h"
#include "proto/base/units.h"
#include "proto/plan/train_layout.h"

#include <math.h>

#define WAIT_SHARE 0.1 /* from here on a wait is worth a line */
#define SILENT_MS 5000 /* the failure detector speaks by then */

typedef Weft__V1__TrainingStatus Status;

/* ---- numbers ---- */

static const TrainPoint *point_at(const GArray *points, guint i)
{
    return &g_array_index(points, TrainPoint, i);
}

/* What the cores of these workers reach in f32 products; those that share cores, together. */
static double peak_of(const TrainJobOptions *options, const TrainJobView *v)
{
    MemberSnapshot snapshot = jobs_snapshot(options->jobs, JOBS_ALL);
    const PlanMember *members[PLAN_RANKS_LIMIT];
    double crowding[PLAN_RANKS_LIMIT], sum = 0;
    uint32_t n = 0;
    for (; n < v->calls->len && n < PLAN_RANKS_LIMIT; n++) {
        const TrainCall *call = v->calls->pdata[n];
        members[n] = plan_member_find(snapshot.members, snapshot.n, call->worker, call->device);
    }
    crowding_of(members, n, crowding);
    for (uint32_t i = 0; i < n; i++) {
        sum += speed_shared(speed_of(members[i]), crowding[i]).f32_ops_per_s;
    }
    member_snapshot_free(&snapshot);
    return sum;
}

double train_status_share(const TrainJobOptions *options, const TrainJobView *v)
{
    const double peak = v->model != NULL ? peak_of(options, v) : 0;
    return peak > 0 ? train_flops_per_token(v->model, (uint32_t)v->spec->length) / peak : 0;
}

static void fill_progress(const TrainJobOptions *options, const TrainJobView *v, Status *s)
{
    const uint64_t batch = v->spec->sequences * v->spec->length;
    const guint n = v->points != NULL ? v->points->len : 0;
    s->loss = s->validation_loss = (double)NAN;
    for (guint i = n; i > 0 && isnan(s->validation_loss); i--) {
        s->validation_loss = point_at(v->points, i - 1)->validation;
    }
    if (n > 0) {
        s->loss = point_at(v->points, n - 1)->loss;
        s->tokens_per_s = train_log_speed(v->points);
    }
    if (v->plan == NULL || s->tokens_per_s <= 0) {
        return;
    }
    s->eta_s = (double)((s->steps - MIN(s->step, s->steps)) * batch) / s->tokens_per_s;
    s->mfu = s->tokens_per_s * train_status_share(options, v);
}

/* ---- ranks ---- */

static const char *state_of(const TrainCall *c)
{
    return c->done ? "done" : c->running ? "running" : c->loaded ? "loaded" : "loading";
}

static void fill_ranks(const TrainJobOptions *options, const TrainJobView *v, Status *s)
{
    const int64_t now = loop_now_us(options->loop);
    s->n_ranks = v->plan != NULL ? v->calls->len : 0;
    s->ranks = g_new0(Weft__V1__TrainingRank *, s->n_ranks);
    for (uint32_t g = 0; g < s->n_ranks; g++) {
        const TrainCall *c = v->calls->pdata[g];
        Weft__V1__TrainingRank *r = s->ranks[g] = g_new(Weft__V1__TrainingRank, 1);
        TrainPosition at;
        train_plan_rank(v->plan, g, &at);
        weft__v1__training_rank__init(r);
        reason_set(&r->worker, g_strdup(c->worker));
        reason_set(&r->state, g_strdup(state_of(c)));
        r->device = c->device;
        r->replica = at.replica;
        r->stage = at.stage;
        r->rank = at.rank;
        r->wait_share = c->wait_share;
        r->memory_bytes = c->memory_bytes;
        r->silent_ms = (uint64_t)MAX(now - c->heard_us, 0) / 1000;
    }
}

Status *train_status(const TrainJob *job, const TrainJobOptions *options)
{
    const TrainJobView v = train_job_view(job);
    const GError *problem = train_job_problem(job);
    Status *s = g_new(Status, 1);
    weft__v1__training_status__init(s);
    reason_set(&s->name, g_strdup(v.spec->name));
    reason_set(&s->state, g_strdup(train_job_state(job)));
    if (v.plan != NULL) {
        reason_set(&s->layout,
                   g_strdup_printf("dp%u pp%u tp%u%s", v.layout.dp, v.layout.pp, v.layout.tp,
                                   v.spec->numerics == NUMERICS_FAST ? " fast" : ""));
    }
    if (!v.any_numerics) {
        reason_set(&s->numerics, g_strdup(numerics_name((NumericsClass)v.spec->numerics)));
    }
    reason_set(&s->reason, g_strdup(problem != NULL ? problem->message : ""));
    reason_set(&s->checkpoint, g_strdup(v.checkpoint != NULL ? v.checkpoint : ""));
    s->epoch = v.epoch;
    s->step = v.steps;
    s->steps = v.spec->steps;
    s->state_ms = (uint64_t)MAX(loop_now_us(options->loop) - v.entered_us, 0) / 1000;
    fill_progress(options, &v, s);
    fill_ranks(options, &v, s);
    return s;
}

/* ---- why ---- */

static char *words(const Status *s)
{
    g_autoptr(GString) text = g_string_new(s->reason);
    if (s->step > 0) {
        g_string_append_printf(
            text, "%sstep %" G_GUINT64_FORMAT " of %" G_GUINT64_FORMAT " is done, loss %.4f",
            text->len > 0 ? "; " : "", s->step, s->steps, s->loss);
    }
    if (s->eta_s > 0) {
        g_autofree char *left = units_format_duration((int64_t)s->eta_s * 1000000);
        g_string_append_printf(text, ", %.0f tokens/s (%.0f %% of the cores' rate), %s left",
                               s->tokens_per_s, s->mfu * 100, left);
    }
    return g_strdup(text->str);
}

/* The rank that waits least: the one that the others wait for. */
static const Weft__V1__TrainingRank *busiest(const Status *s)
{
    const Weft__V1__TrainingRank *found = NULL;
    for (size_t i = 0; i < s->n_ranks; i++) {
        if (s->ranks[i]->wait_share >= 0 &&
            (found == NULL || s->ranks[i]->wait_share < found->wait_share)) {
            found = s->ranks[i];
        }
    }
    return found;
}

static void add_waits(const Status *s, Weft__V1__Reason *reason)
{
    const Weft__V1__TrainingRank *most = busiest(s);
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Weft__V1__TrainingRank *r = s->ranks[i];
        const bool is_done = g_strcmp0(r->state, "done") == 0;
        if (g_strcmp0(r->state, "loading") == 0) {
            reason_wait(reason, s->name, r->worker, g_strdup("its data and weights"), r->silent_ms);
        } else if (r->silent_ms >= SILENT_MS && !is_done) {
            Weft__V1__Wait *wait =
                reason_wait(reason, s->name, r->worker, g_strdup("its next word"), r->silent_ms);
            wait->sink = true;
        } else if (most != NULL && r != most && r->wait_share >= WAIT_SHARE) {
            reason_wait(reason, r->worker, most->worker,
                        g_strdup_printf("%.0f %% of its steps' time", r->wait_share * 100), 0);
        }
    }
}

Weft__V1__Reason *train_status_reason(const TrainJob *job, const TrainJobOptions *options)
{
    Status *s = train_status(job, options);
    Weft__V1__Reason *reason = reason_new("job", s->name);
    reason_set(&reason->state, g_strdup(s->state));
    reason_set(&reason->text, words(s));
    reason_set(&reason->job, g_strdup(s->name));
    reason->state_ms = s->state_ms;
    reason->placed = s->n_ranks > 0;
    reason->epoch = s->epoch;
    add_waits(s, reason);
    weft__v1__training_status__free_unpacked(s, NULL);
    return reason;
}
