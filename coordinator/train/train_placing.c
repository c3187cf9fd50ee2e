#include "coordinator/train/train_placing.h"

#include "coordinator/message.h"
#include "coordinator/planner/cost.h"
#include "coordinator/train/train_settings.h"
#include "coordinator/train/train_workers.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/model/model_message.h"
#include "proto/plan/plan_message.h"
#include "proto/plan/train_layout.h"

#define ESTIMATE_DEADLINE_MS 60000
#define ADVICE_QUESTIONS 48u /* at most, and so many layouts are named */
#define ADVICE_LAYOUTS 3u
#define FASTER 0.95 /* of a step: what another schedule must make of it to be taken */

/* What else might fit: layouts, as the file has all else, then with the least activations. */
typedef struct Advice {
    TrainPlace refused; /* what is told at the end */
    GArray *legal;      /* of TrainNeighbour; NULL: nothing is looked for (yet) */
    guint next;         /* of them */
    bool spares;        /* activations: small micro-batches, and all of them computed again */
    uint32_t asked;
} Advice;

struct TrainPlacing {
    TrainPlacingOptions o;
    TrainPlaced done;
    void *user;
    JobSpec spec; /* borrows all of o.spec; its layout is what is tried */
    TrainPlace place;
    TrainPlace first; /* while another schedule is asked of: what is taken unless it is faster */
    Advice advice;
    MemberSnapshot members;
    const PlanMember *of_rank[PLAN_RANKS_LIMIT];
    RpcClientCall *call;
    bool with_hosts; /* devices alone were too few or too small */
    bool freed;
};

static void place_clear(TrainPlace *place)
{
    plan_free(place->plan);
    message_free(place->estimate);
    g_clear_pointer(&place->too_large, g_ptr_array_unref);
    g_clear_pointer(&place->fitting, g_ptr_array_unref);
    *place = (TrainPlace){0};
}

static void placing_clear(TrainPlacing *p)
{
    place_clear(&p->place);
    member_snapshot_free(&p->members);
    p->members = (MemberSnapshot){0};
}

static void placing_release(TrainPlacing *p)
{
    placing_clear(p);
    place_clear(&p->first);
    place_clear(&p->advice.refused);
    g_clear_pointer(&p->advice.legal, g_array_unref);
    g_free(p);
}

void train_placing_free(TrainPlacing *p)
{
    if (p == NULL) {
        return;
    }
    p->freed = true;
    if (p->call != NULL) {
        rpc_client_cancel(p->call); /* its end releases */
    } else {
        placing_release(p);
    }
}

const TrainPlace *train_placing_place(const TrainPlacing *p)
{
    return &p->place;
}

Plan *train_placing_take_plan(TrainPlacing *p)
{
    return g_steal_pointer(&p->place.plan);
}

static char *joined(const GPtrArray *texts, const char *between)
{
    GString *out = g_string_new(NULL);
    for (guint i = 0; i < texts->len; i++) {
        g_string_append_printf(out, "%s%s", i > 0 ? between : "", (const char *)texts->pdata[i]);
    }
    return g_string_free(out, FALSE);
}

static char *what_would_do(const TrainPlace *place)
{
    if (place->fitting == NULL) {
        return g_strdup("start more workers");
    }
    if (place->fitting->len == 0) {
        return g_strdup("start more workers, or ones with more memory: no layout of these fits, "
                        "nor with recompute: full");
    }
    g_autofree char *layouts = joined(place->fitting, " or ");
    return g_strdup_printf("start more workers, or choose layout: %s", layouts);
}

GError *train_place_error(const TrainPlace *place)
{
    if (place->too_large->len == 0) {
        return NULL;
    }
    g_autofree char *who = joined(place->too_large, "; "), *advice = what_would_do(place);
    return g_error_new(WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                       "layout dp %u, pp %u, tp %u over %u workers: %s: %s", place->layout.dp,
                       place->layout.pp, place->layout.tp, place->n_workers, who, advice);
}

/* ---- what a worker says ---- */

static void add_too_large(TrainPlacing *p)
{
    TrainPlace *place = &p->place;
    TrainPosition at;
    for (uint32_t g = 0; g < place->n_ranks; g++) {
        const Weft__V1__TrainMemory *m = place->estimate->ranks[g];
        const uint64_t total = plan_message_train_total(m);
        if (total > place->limits[g]) {
            g_autofree char *needed = units_format_size(total),
                            *had = units_format_size(place->limits[g]);
            g_ptr_array_add(place->too_large,
                            g_strdup_printf("%s would hold %s of its %s",
                                            train_plan_rank(place->plan, g, &at)->worker, needed,
                                            had));
        }
    }
}

static void try_stages(TrainPlacing *p, uint32_t stages);
static void advise(TrainPlacing *p);
static bool take_advice(TrainPlacing *p);
static void placed(TrainPlacing *p);
static void compare_schedules(TrainPlacing *p, bool answered);

static bool is_advising(const TrainPlacing *p)
{
    return p->advice.legal != NULL;
}

static TrainWorkers all_workers(const TrainPlacing *p)
{
    return train_workers_usable(p->o.members, (NumericsClass)p->spec.numerics,
                                (uint32_t)p->spec.precision);
}

/* Devices alone do not do: hosts' cores take part, where there are any. True: another try began,
 * and p may be gone. */
static bool try_with_hosts(TrainPlacing *p)
{
    if (p->with_hosts) {
        return false;
    }
    TrainWorkers workers = all_workers(p);
    const bool may = workers.n_on_device > 0 && workers.n_on_device < workers.seats->len;
    train_workers_clear(&workers);
    if (may) {
        p->with_hosts = true;
        try_stages(p, 0);
    }
    return may;
}

/* Whether the spec leaves it to us to take one stage more, and there are workers for it. */
static bool may_grow(const TrainPlacing *p)
{
    const TrainLayoutChoice *l = &p->place.layout;
    return p->spec.layout.pp == 0 && l->pp < p->o.input->spec->n_layers &&
           (l->pp + 1) * l->tp <= p->place.n_workers;
}

static void on_estimate(const ProtobufCMessage *message, void *user)
{
    message_replace(&((TrainPlacing *)user)->place.estimate, message);
}

static void on_estimated(const GError *error, void *user)
{
    TrainPlacing *p = user;
    TrainPlace *place = &p->place;
    g_autoptr(GError) odd = NULL;
    p->call = NULL;
    if (p->freed) {
        placing_release(p);
        return;
    }
    if (error == NULL && (place->estimate == NULL || place->estimate->n_ranks != place->n_ranks)) {
        odd = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                                  "a worker that was asked for an estimate gave none");
    }
    if (p->first.plan != NULL) {
        compare_schedules(p, error == NULL && odd == NULL);
        return;
    }
    if (is_advising(p)) {
        if (error == NULL && odd == NULL && take_advice(p)) {
            placed(p);
        } else {
            advise(p);
        }
        return;
    }
    if (error != NULL || odd != NULL) {
        p->done(p, error != NULL ? error : odd, p->user);
        return;
    }
    add_too_large(p);
    if (place->too_large->len > 0 && may_grow(p)) {
        try_stages(p, place->layout.pp + 1);
        return;
    }
    if (place->too_large->len > 0 && try_with_hosts(p)) {
        return;
    }
    if (place->too_large->len > 0 && !p->o.shrink) {
        advise(p);
        return;
    }
    placed(p);
}

static bool is_on_device(const TrainPlacing *p, uint32_t rank)
{
    return p->of_rank[rank] != NULL && p->of_rank[rank]->device != NULL;
}

/* One on a device if there is any: it knows what a rank there holds. */
static const Member *worker_to_ask(const TrainWorkers *w)
{
    return g_array_index(w->seats, TrainSeat, 0).member;
}

static void ask_worker(TrainPlacing *p, const Member *worker)
{
    const TrainPlace *place = &p->place;
    TrainSettingsMessage settings;
    Weft__V1__TrainEstimateRequest request = WEFT__V1__TRAIN_ESTIMATE_REQUEST__INIT;
    Weft__V1__TrainLoad load = WEFT__V1__TRAIN_LOAD__INIT;
    uint32_t threads[PLAN_RANKS_LIMIT];
    protobuf_c_boolean on_device[PLAN_RANKS_LIMIT];
    const RpcCallbacks callbacks = {.on_message = on_estimate, .on_done = on_estimated};
    train_settings_fill(&p->spec, p->o.input, &place->layout, NULL, &settings);
    load.plan = plan_to_message(place->plan);
    load.model = model_to_message(p->o.input->spec, true);
    load.settings = &settings.settings;
    request.load = &load;
    for (uint32_t g = 0; g < place->n_ranks; g++) {
        threads[g] = p->of_rank[g] != NULL ? p->of_rank[g]->threads : 1;
        on_device[g] = is_on_device(p, g);
    }
    request.on_device = on_device;
    request.n_on_device = place->n_ranks;
    request.threads = threads;
    request.n_threads = place->n_ranks;
    request.forward_s = place->cost.forward_s;
    request.backward_s = place->cost.backward_s;
    request.weights_s = place->cost.weights_s;
    request.transfer_s = place->cost.transfer_s;
    p->call = rpc_call_start(member_channel(worker), &weft__v1__trainer__descriptor, "Estimate",
                             &request.base, ESTIMATE_DEADLINE_MS, false, callbacks, p);
    weft__v1__plan__free_unpacked(load.plan, NULL);
    weft__v1__model__free_unpacked(load.model, NULL);
}

/* ---- a layout ---- */

static void find_members(TrainPlacing *p)
{
    TrainPlace *place = &p->place;
    TrainPosition at;
    p->members = jobs_snapshot(p->o.jobs, JOBS_ALL);
    for (uint32_t g = 0; g < place->n_ranks; g++) {
        const PlanRank *rank = train_plan_rank(place->plan, g, &at);
        p->of_rank[g] =
            plan_member_find(p->members.members, p->members.n, rank->worker, rank->device);
        place->limits[g] = p->of_rank[g] != NULL ? p->of_rank[g]->memory_bytes : 0;
        place->n_on_device += is_on_device(p, g);
    }
    place->layout.on_devices = place->n_on_device > 0;
}

/* A legal layout of at least so many stages, where the spec leaves them open; false + error. */
static bool choose(TrainPlacing *p, const TrainWorkers *workers, uint32_t stages, GError **error)
{
    TrainPlace *place = &p->place;
    const ModelSpec *model = p->o.input->spec;
    place->n_on_device = 0;
    place->n_workers = workers->seats->len;
    place->too_large = g_ptr_array_new_with_free_func(g_free);
    if (place->n_workers == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_READY, "no worker is usable: waits for one");
        return false;
    }
    if (!train_layout_choose(&p->spec, model, place->n_workers, stages, p->o.shrink, &place->layout,
                             error)) {
        return false;
    }
    place->plan = train_workers_plan(workers, &place->layout, model, p->spec.name, error);
    place->n_ranks = place->layout.dp * place->layout.pp * place->layout.tp;
    return place->plan != NULL;
}

/* What is wrong, and what would help: workers that the numerics class leaves out. */
static void add_advice(GError *error, const TrainWorkers *workers)
{
    char *said = g_strconcat(error->message, train_workers_advice(workers), NULL);
    g_free(error->message);
    error->message = said;
}

/* Asks a worker of the layout that the spec as it is tried gets; false + error: there is none. */
static bool try_layout(TrainPlacing *p, const TrainWorkers *workers, uint32_t stages,
                       GError **error)
{
    placing_clear(p);
    if (stages == 0) {
        stages = train_layout_least_stages(&p->spec, p->o.input->spec, workers->least_memory);
    }
    if (!choose(p, workers, stages, error)) {
        return false;
    }
    find_members(p);
    p->place.cost = train_cost(&p->spec, p->o.input->spec, &p->place.layout, p->place.plan,
                               p->of_rank, train_rate_efficiency(p->o.rate));
    ask_worker(p, worker_to_ask(workers));
    return true;
}

static TrainWorkers usable_workers(const TrainPlacing *p)
{
    TrainWorkers workers = all_workers(p);
    if (!p->with_hosts && workers.n_on_device > 0) {
        train_workers_keep_devices(&workers);
    }
    return workers;
}

static void try_stages(TrainPlacing *p, uint32_t stages)
{
    g_autoptr(GError) error = NULL;
    TrainWorkers workers = usable_workers(p);
    if (!try_layout(p, &workers, stages, &error) && !try_with_hosts(p)) {
        add_advice(error, &workers);
        p->done(p, error, p->user);
    }
    train_workers_clear(&workers);
}

/* ---- the schedule ---- */

static double step_s(const TrainPlace *place)
{
    return place->estimate->makespan_s + place->cost.exchange_s + place->cost.update_s;
}

/* Of `layout: auto`; activations that are made again leave no weights' gradients for later. */
static bool may_choose_schedule(const TrainPlacing *p)
{
    const JobLayout *wish = &p->o.spec->layout;
    return wish->pp == 0 && wish->schedule == JOB_SCHEDULE_AUTO &&
           wish->recompute == JOB_RECOMPUTE_NONE && p->place.layout.pp > 1 &&
           p->place.n_on_device == 0;
}

/* There is a place: it is told, or another schedule is asked of first. */
static void placed(TrainPlacing *p)
{
    p->place.step_s = p->place.too_large->len == 0 ? step_s(&p->place) : 0;
    if (p->place.too_large->len > 0 || !may_choose_schedule(p)) {
        p->done(p, NULL, p->user);
        return;
    }
    TrainWorkers workers = usable_workers(p);
    p->first = p->place;
    p->place = (TrainPlace){0};
    p->spec = *p->o.spec;
    p->spec.layout.dp = p->first.layout.dp;
    p->spec.layout.pp = p->first.layout.pp;
    p->spec.layout.tp = p->first.layout.tp;
    p->spec.layout.schedule = JOB_SCHEDULE_ZERO_BUBBLE;
    const bool asked = try_layout(p, &workers, p->first.layout.pp, NULL);
    train_workers_clear(&workers);
    if (!asked) {
        compare_schedules(p, false);
    }
}

static void compare_schedules(TrainPlacing *p, bool answered)
{
    if (answered) {
        add_too_large(p);
        p->place.step_s = step_s(&p->place);
    }
    if (answered && p->place.too_large->len == 0 && p->place.step_s < FASTER * p->first.step_s) {
        place_clear(&p->first);
    } else {
        place_clear(&p->place);
        p->place = p->first;
        p->first = (TrainPlace){0};
    }
    p->done(p, NULL, p->user);
}

/* ---- what would fit instead ---- */

/* The refused layout itself may do with fewer activations; others also as the file says. */
static void begin_advice(TrainPlacing *p)
{
    Advice *a = &p->advice;
    a->refused = p->place;
    p->place = (TrainPlace){0};
    a->refused.fitting = g_ptr_array_new_with_free_func(g_free);
    a->legal = train_layout_legal(p->o.spec, p->o.input->spec, a->refused.n_workers);
    const TrainLayoutChoice *l = &a->refused.layout;
    const TrainNeighbour same = {l->dp, l->pp, l->tp, 0};
    g_array_prepend_val(a->legal, same);
}

/* p->spec with layout n; spares: with the fewest activations that the file can ask for. */
static void set_layout(TrainPlacing *p, const TrainNeighbour *n, bool spares)
{
    JobLayout *l = &p->spec.layout;
    p->spec = *p->o.spec;
    l->dp = n->dp;
    l->pp = n->pp;
    l->tp = n->tp;
    if (spares) {
        const uint64_t most = job_spec_least_samples(&p->spec),
                       step = l->schedule == JOB_SCHEDULE_INTERLEAVED ? n->pp : 1;
        l->recompute = JOB_RECOMPUTE_FULL;
        l->micro = MAX(most / step * step, 1);
    }
}

/* Whether a file may say so. */
static bool is_legal(const JobSpec *spec)
{
    g_autoptr(GString) text = g_string_new(NULL);
    job_spec_print(spec, text);
    g_autoptr(JobSpec) read = job_spec_parse(text->str, text->len, "layout", NULL);
    return read != NULL;
}

/* The next one to be asked of, as p->spec; false: there is none, or enough are known. */
static bool next_layout(TrainPlacing *p)
{
    Advice *a = &p->advice;
    if (a->next == a->legal->len && !a->spares && a->refused.fitting->len == 0) {
        a->spares = true;
        a->next = 1;
    }
    if (a->next == a->legal->len || a->asked == ADVICE_QUESTIONS ||
        a->refused.fitting->len == ADVICE_LAYOUTS) {
        return false;
    }
    set_layout(p, &g_array_index(a->legal, TrainNeighbour, a->next), a->spares || a->next == 0);
    a->next++;
    return true;
}

static void advise(TrainPlacing *p)
{
    TrainWorkers workers = usable_workers(p);
    if (!is_advising(p)) {
        begin_advice(p);
    }
    while (workers.seats->len > 0 && next_layout(p)) {
        if (is_legal(&p->spec) && try_layout(p, &workers, 1, NULL)) {
            p->advice.asked++;
            train_workers_clear(&workers);
            return; /* on_estimated() goes on */
        }
    }
    train_workers_clear(&workers);
    placing_clear(p);
    p->place = p->advice.refused;
    p->advice.refused = (TrainPlace){0};
    placed(p);
}

/* The file names nothing of the layout. */
static bool is_automatic(const JobSpec *spec)
{
    return spec->layout.dp == 0 && spec->layout.pp == 0 && spec->layout.tp == 0;
}

/* The layout that was asked of is noted, if it fits and is another one. True: it is the place:
 * the file leaves it to us, and fewer tensor ranks do not fit. */
static bool take_advice(TrainPlacing *p)
{
    const TrainPlace *place = &p->place;
    const TrainLayoutChoice *l = &place->layout, *old = &p->advice.refused.layout;
    const bool spares = p->spec.layout.recompute != p->o.spec->layout.recompute ||
                        p->spec.layout.micro != p->o.spec->layout.micro,
               same = l->dp == old->dp && l->pp == old->pp && l->tp == old->tp;
    add_too_large(p);
    if (place->too_large->len > 0 || (same && !spares)) {
        return false;
    }
    if (!spares && is_automatic(p->o.spec)) {
        place_clear(&p->advice.refused);
        return true;
    }
    g_autofree char *more = spares
                                ? g_strdup_printf(", micro: %" G_GUINT64_FORMAT ", recompute: full",
                                                  p->spec.layout.micro)
                                : g_strdup("");
    g_ptr_array_add(p->advice.refused.fitting,
                    g_strdup_printf("{dp: %u, pp: %u, tp: %u%s}", l->dp, l->pp, l->tp, more));
    return false;
}

void train_placing_new(const TrainPlacingOptions *options, TrainPlacing **out, TrainPlaced done,
                       void *user)
{
    TrainPlacing *p = g_new0(TrainPlacing, 1);
    p->o = *options;
    p->spec = *options->spec;
    p->done = done;
    p->user = user;
    *out = p;
    try_stages(p, 0);
}
