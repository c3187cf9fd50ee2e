/* Search over layouts. Small clusters are searched wholly; the number of tries is bounded by taking
 * tensor degrees and stage counts of large ones in steps. Whatever is chosen has passed
 * plan_check(). */
#include "coordinator/planner/planner.h"

#include "coordinator/planner/class.h"
#include "coordinator/planner/explain.h"
#include "coordinator/planner/layout.h"
#include "coordinator/planner/pool.h"
#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/plan_context.h"
#include "proto/plan/rank_span.h"

#include <string.h>

#define ROWS_MOST 512u
#define ROWS_LEAST 128u /* a block of the products of many rows */
#define ROWS_BUFFER_BYTES                                                                          \
    ((uint64_t)20 << 20)         /* of a rank on a host: beyond it steps get no faster */
#define SEARCH_WORKERS_LIMIT 64u /* automatic choice looks at no more than this many */
#define SMALL_CLUSTER 8u         /* up to here every pp and tp is tried */
#define GAIN_LEAST 1.02          /* more workers must be worth it */
#define ALTERNATIVES_LIMIT 3u

typedef struct Found {
    Plan *plan; /* legal, or NULL */
    Layout layout;
    Plan *nearest; /* the try that missed the least memory */
    uint64_t missing_bytes;
} Found;

static bool impossible(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static bool impossible(GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *text = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE, text);
    return false;
}

/* ---- search -----------------------------------------------------------------------------------
 */

static bool is_legal(const Plan *plan, const Task *task)
{
    g_autoptr(GPtrArray) violations = plan_check(plan, task->spec, task->members, task->n_members);
    return violations->len == 0;
}

static bool same_order(const PlanMember *const *a, const PlanMember *const *b, uint32_t n)
{
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* The best of the member orders for one layout; nothing if none is legal. */
static void try_layout(const Task *task, const Pool *pool, Layout layout, Found *found)
{
    uint32_t n = layout.dp * layout.pp * layout.tp;
    g_autofree const PlanMember **members = g_new(const PlanMember *, n);
    bool is_found = false;
    for (int i = 0; i < 3; i++) {
        if ((i > 0 && same_order(pool->order[i], pool->order[0], n)) ||
            (i > 1 && same_order(pool->order[i], pool->order[1], n))) {
            continue;
        }
        uint64_t missing;
        if (i == 2 && is_found) {
            break; /* by memory only where speed leads nowhere */
        }
        pool_take(pool, i, layout, members);
        g_autoptr(Plan) plan = layout_try(task, layout, members, &missing);
        if (missing == 0 && is_legal(plan, task)) {
            is_found = true;
            double least = found->plan != NULL ? found->plan->predicted.decode_tokens_per_s : 0.0;
            if (found->plan != NULL && n > found->layout.dp * found->layout.pp * found->layout.tp) {
                least *= GAIN_LEAST;
            }
            if (plan->predicted.decode_tokens_per_s > least) {
                plan_free(found->plan);
                found->plan = g_steal_pointer(&plan);
                found->layout = layout;
            }
        } else if (found->nearest == NULL || missing < found->missing_bytes) {
            plan_free(found->nearest);
            found->nearest = g_steal_pointer(&plan);
            found->missing_bytes = missing;
        }
    }
}

static void found_clear(Found *found)
{
    plan_free(found->plan);
    plan_free(found->nearest);
}

/* Degrees worth trying: all small ones, then powers of two and what is asked for. */
static bool is_tried(uint32_t degree, uint32_t wished)
{
    return wished != 0 ? degree == wished : degree <= SMALL_CLUSTER || (degree & (degree - 1)) == 0;
}

/* Calls `fit` for each layout that the wish, the model and the number of members allow, few workers
 * first. */
static void search(const Task *task, const Pool *pool, uint32_t dp, uint32_t pp_wish,
                   uint32_t tp_wish, Found *found)
{
    uint32_t limit = MIN(plan_tp_limit(task->spec), PLAN_RANKS_LIMIT);
    uint32_t most =
        pp_wish != 0 && tp_wish != 0 ? pool->n : MIN(pool->n, MAX(SEARCH_WORKERS_LIMIT, dp));
    for (uint32_t n = 1; n <= most / dp; n++) {
        for (uint32_t tp = 1; tp <= MIN(n, limit); tp++) {
            uint32_t pp = n / tp;
            if (n % tp == 0 && pp <= task->spec->n_layers && is_tried(tp, tp_wish) &&
                is_tried(pp, pp_wish)) {
                try_layout(task, pool, (Layout){dp, pp, tp}, found);
            }
        }
    }
}

/* ---- refusals ---------------------------------------------------------------------------------
 */

/* "; worker g0 is left out: why", of the first on a device that is; returned, or "". */
static char *left_out_text(const Task *task)
{
    for (uint32_t i = 0; i < task->n_members; i++) {
        const PlanMember *m = &task->members[i];
        const char *why = m->device != NULL ? planner_refusal(m, task->spec, task->wish) : NULL;
        if (why != NULL) {
            return g_strdup_printf("; worker %s is left out: %s", m->worker, why);
        }
    }
    return g_strdup("");
}

static bool check_wish(const Task *task, const PlanWish *wish, const Pool *pool, GError **error)
{
    const ModelSpec *spec = task->spec;
    uint32_t limit = MIN(plan_tp_limit(spec), PLAN_RANKS_LIMIT);
    if (wish->context > spec->context) {
        return impossible(
            error, "context %u is beyond the model's own limit of %u; choose --context %u or less",
            wish->context, spec->context, spec->context);
    }
    if (wish->tp > limit) {
        return impossible(error,
                          "tensor parallel %u is more than this model allows: it has %u attention "
                          "units and %u FFN "
                          "units; choose --tp 1 to %u",
                          wish->tp, spec->n_attn_units, spec->n_ffn_units, limit);
    }
    if (wish->pp > spec->n_layers) {
        return impossible(error,
                          "%u stages are more than the model's %u layers; choose --pp 1 to %u",
                          wish->pp, spec->n_layers, spec->n_layers);
    }
    if (pool->n == 0) {
        const char *why =
            task->n_members > 0 ? planner_refusal(&task->members[0], spec, task->wish) : NULL;
        if (why == NULL && task->n_members > 0) {
            return impossible(error, "none of %u workers gives the exact bits of %s",
                              task->n_members, kind_text(task->kind));
        }
        return why != NULL
                   ? impossible(
                         error,
                         "none of %u workers can serve this model: worker %s: %s; start another",
                         task->n_members, task->members[0].worker, why)
                   : impossible(
                         error,
                         "there is no worker; start one with `weft up` or `weft-worker --join`");
    }
    uint64_t need = (uint64_t)MAX(wish->dp, 1) * MAX(wish->pp, 1) * MAX(wish->tp, 1);
    if (need > pool->n) {
        g_autofree char *left_out = left_out_text(task);
        return impossible(error,
                          "dp %u x pp %u x tp %u needs %" G_GUINT64_FORMAT
                          " workers and %u can be used; start %" G_GUINT64_FORMAT
                          " more or choose a smaller layout%s",
                          MAX(wish->dp, 1), MAX(wish->pp, 1), MAX(wish->tp, 1), need, pool->n,
                          need - pool->n, left_out);
    }
    return true;
}

static bool refuse_memory(const Found *found, const PlanWish *wish, GError **error)
{
    g_autofree char *missing = units_format_size(found->missing_bytes);
    g_autofree char *layout = plan_layout_text(found->nearest);
    if (found->missing_bytes > 0) {
        return impossible(error,
                          "the model does not fit: %s of memory are missing with %s, context %u "
                          "and %u stream%s; use more "
                          "workers, less context or fewer streams",
                          missing, layout, found->nearest->definition.context,
                          found->nearest->streams, found->nearest->streams == 1 ? "" : "s");
    }
    if (wish->kv_memory != 0) {
        g_autofree char *given = units_format_size(wish->kv_memory);
        return impossible(
            error,
            "KV memory of %s a worker holds %" G_GUINT64_FORMAT
            " positions with %s, less than a context of %u; give more or choose less context",
            given, found->nearest->kv_pages * KV_BLOCK, layout, found->nearest->definition.context);
    }
    return impossible(error, "%s cannot be had; see the violations", layout);
}

/* "--dp 2 --pp 1 --tp 3"; returned. */
static GString *layout_flags(Layout layout)
{
    GString *text = g_string_new(NULL);
    if (layout.dp > 1) {
        g_string_append_printf(text, "--dp %u ", layout.dp);
    }
    g_string_append_printf(text, "--pp %u --tp %u", layout.pp, layout.tp);
    return text;
}

static void add_alternative(GPtrArray *alternatives, const Plan *plan, Layout layout)
{
    if (plan == NULL || alternatives->len >= ALTERNATIVES_LIMIT) {
        return;
    }
    g_autoptr(GString) text = layout_flags(layout);
    for (guint i = 0; i < alternatives->len; i++) {
        if (strcmp(g_ptr_array_index(alternatives, i), text->str) == 0) {
            return;
        }
    }
    g_ptr_array_add(alternatives, g_strdup(text->str));
}

/* The largest degree that the workers and the model allow beside `other` of the other kind, if it
 * is less than the wish; else 0 = free. */
static uint32_t smaller(uint32_t wished, uint32_t other, uint32_t dp, uint32_t n_workers,
                        uint32_t limit)
{
    const uint32_t most = MIN(n_workers / dp / MAX(other, 1), limit);
    return wished > most ? most : 0;
}

/* Legal layouts nearest to the wish: a degree that is too large cut to what can be had, then one of
 * pp and tp kept, then neither, each once; what was tried already is not tried again. */
static void find_alternatives(const Task *task, const Pool *pool, const PlanWish *wish,
                              GPtrArray *alternatives)
{
    const ModelSpec *spec = task->spec;
    const uint32_t dp = MAX(wish->dp, 1);
    const uint32_t tries[5][2] = {
        {wish->pp,
         smaller(wish->tp, wish->pp, dp, pool->n, MIN(spec->n_attn_units, spec->n_ffn_units))},
        {smaller(wish->pp, wish->tp, dp, pool->n, spec->n_layers), wish->tp},
        {0, wish->tp},
        {wish->pp, 0},
        {0, 0}};
    for (unsigned i = 0; i < G_N_ELEMENTS(tries); i++) {
        bool is_wish = tries[i][0] == wish->pp && tries[i][1] == wish->tp;
        bool is_repeat = i + 1 < G_N_ELEMENTS(tries) && tries[i][0] == 0 && tries[i][1] == 0;
        if (is_wish || is_repeat) {
            continue;
        }
        Found found = {0};
        search(task, pool, dp, tries[i][0], tries[i][1], &found);
        add_alternative(alternatives, found.plan, found.layout);
        found_clear(&found);
    }
    if (alternatives->len == 0 && dp > 1) {
        Found found = {0};
        search(task, pool, 1, 0, 0, &found);
        add_alternative(alternatives, found.plan, found.layout);
        found_clear(&found);
    }
}

/* ---- planning ---------------------------------------------------------------------------------
 */

static GPtrArray *new_texts(void)
{
    return g_ptr_array_new_with_free_func(g_free);
}

static GPtrArray *new_violations(void)
{
    return g_ptr_array_new_with_free_func((GDestroyNotify)plan_violation_free);
}

/* What stopped the planner before there was a plan to check. */
static void add_violation(GPtrArray *violations, const char *text)
{
    PlanViolation *v = g_new0(PlanViolation, 1);
    v->rule = PLAN_RULE_LIMIT;
    v->text = g_strdup(text);
    g_ptr_array_add(violations, v);
}

/* Searches among the members of one pool; when it fails, *violations are those of what missed
 * memory. */
static Plan *plan_pool(const Task *task, const PlanWish *wish, const Pool *pool,
                       GPtrArray **violations, GError **error)
{
    Found found = {0};
    if (check_wish(task, wish, pool, error)) {
        search(task, pool, MAX(wish->dp, 1), wish->pp, wish->tp, &found);
        if (found.plan == NULL && found.nearest != NULL) {
            refuse_memory(&found, wish, error);
        } else if (found.plan == NULL) {
            impossible(error,
                       "no layout of dp %u pp %u tp %u fits %u workers; choose other degrees",
                       wish->dp, wish->pp, wish->tp, pool->n);
        }
    }
    if (found.plan == NULL && found.nearest != NULL) {
        g_ptr_array_unref(*violations);
        *violations = plan_check(found.nearest, task->spec, task->members, task->n_members);
    }
    Plan *plan = g_steal_pointer(&found.plan);
    found_clear(&found);
    return plan;
}

/* ---- kinds ------------------------------------------------------------------------------------
 */

/* What came of one kind's members. */
typedef struct Outcome {
    const char *kind;
    uint32_t n_members;
    Plan *plan; /* or NULL, with: */
    GPtrArray *violations;
    GError *error;
} Outcome;

static void outcome_clear(Outcome *o)
{
    plan_free(o->plan);
    g_clear_pointer(&o->violations, g_ptr_array_unref);
    g_clear_error(&o->error);
}

/* Plans before refusals; the faster plan; the refusal of more members. The first of equals. */
static bool is_better(const Outcome *a, const Outcome *b)
{
    if (a->plan != NULL && b->plan != NULL) {
        return a->plan->predicted.decode_tokens_per_s > b->plan->predicted.decode_tokens_per_s;
    }
    return a->plan != NULL || (b->plan == NULL && a->n_members > b->n_members);
}

static void add_kind(GPtrArray *kinds, const char *kind)
{
    for (guint i = 0; i < kinds->len; i++) {
        if (strcmp(kinds->pdata[i], kind) == 0) {
            return;
        }
    }
    g_ptr_array_add(kinds, (char *)kind);
}

/* Of char *, borrowed, hosts first: those that an exact plan may be of; one for class fast. */
static GPtrArray *kinds_of(const Task *task)
{
    GPtrArray *kinds = g_ptr_array_new();
    const PlanWish *wish = task->wish;
    const bool exact = wish->numerics == NUMERICS_EXACT, all = exact && wish->exact_kind == NULL;
    add_kind(kinds, exact && !all ? wish->exact_kind : "");
    for (uint32_t i = 0; all && i < task->n_members; i++) {
        if (planner_refusal(&task->members[i], task->spec, wish) == NULL) {
            add_kind(kinds, plan_member_kind(&task->members[i]));
        }
    }
    return kinds;
}

/* "; an exact plan is ...: hosts' cores (1), NVIDIA H200, ... (2)", where members of another kind
 * than was asked for, or of several, are there; true if so. */
static bool add_kinds_text(const Task *all, const PlanWish *wish, GError **error)
{
    PlanWish any = *all->wish;
    Task task = *all;
    any.exact_kind = NULL;
    task.wish = &any;
    g_autoptr(GPtrArray) kinds = kinds_of(&task);
    g_autoptr(GString) text = g_string_new(NULL);
    const char *asked = wish->exact_kind;
    uint32_t n_kinds = 0, n_others = 0;
    for (guint i = 0; i < kinds->len; i++) {
        task.kind = kinds->pdata[i];
        Pool pool = pool_of(&task);
        if (pool.n > 0) {
            n_others += asked != NULL && strcmp(asked, task.kind) != 0;
            g_string_append_printf(text, "%s%s (%u)", n_kinds++ > 0 ? ", " : "",
                                   kind_text(task.kind), pool.n);
        }
        pool_clear(&pool);
    }
    if (n_kinds <= 1 && n_others == 0) {
        return false;
    }
    g_autofree char *message = g_strdup_printf(
        "%s; an exact plan is of one kind of workers%s%s, and here are: %s; --numerics fast mixes "
        "them",
        (*error)->message, asked != NULL ? ", that of the running requests is " : "",
        asked != NULL ? kind_text(asked) : "", text->str);
    g_free((*error)->message);
    (*error)->message = g_steal_pointer(&message);
    return true;
}

/* Of each kind that the plan may be of. */
static void find_all_alternatives(Task *task, const GPtrArray *kinds, const PlanWish *wish,
                                  GPtrArray *alternatives)
{
    for (guint i = 0; i < kinds->len && task->context <= task->spec->context; i++) {
        task->kind = kinds->pdata[i];
        Pool pool = pool_of(task);
        if (pool.n > 0) {
            find_alternatives(task, &pool, wish, alternatives);
        }
        pool_clear(&pool);
    }
}

/* The wish under class fast, where that mixes what exact may not. */
static void add_fast_alternative(const Task *exact, const PlanWish *wish, GPtrArray *alternatives)
{
    PlanWish fast = *exact->wish;
    Task task = *exact;
    Found found = {0};
    fast.numerics = NUMERICS_FAST;
    fast.exact_kind = NULL;
    task.wish = &fast;
    task.kind = "";
    Pool pool = pool_of(&task);
    if (pool.n > 0 && task.context <= task.spec->context) {
        search(&task, &pool, MAX(wish->dp, 1), wish->pp, wish->tp, &found);
    }
    if (found.plan != NULL) {
        g_autoptr(GString) text = layout_flags(found.layout);
        g_string_append(text, " --numerics fast");
        g_ptr_array_add(alternatives, g_strdup(text->str));
    }
    found_clear(&found);
    pool_clear(&pool);
}

/* Of all kinds; *violations and *alternatives are filled when it fails. */
static Plan *plan_kinds(Task *task, const PlanWish *wish, GPtrArray **violations,
                        GPtrArray *alternatives, GError **error)
{
    g_autoptr(GPtrArray) kinds = kinds_of(task);
    Outcome best = {0};
    for (guint i = 0; i < kinds->len; i++) {
        Outcome o = {.kind = kinds->pdata[i], .violations = new_violations()};
        task->kind = o.kind;
        Pool pool = pool_of(task);
        o.n_members = pool.n;
        o.plan = plan_pool(task, wish, &pool, &o.violations, &o.error);
        pool_clear(&pool);
        if (best.kind == NULL || is_better(&o, &best)) {
            outcome_clear(&best);
            best = o;
        } else {
            outcome_clear(&o);
        }
    }
    if (best.plan != NULL) {
        task->kind = best.kind;
        explain(best.plan, task, wish);
    } else {
        find_all_alternatives(task, kinds, wish, alternatives);
        if (wish->numerics == NUMERICS_EXACT && add_kinds_text(task, wish, &best.error)) {
            add_fast_alternative(task, wish, alternatives);
        }
        if (best.violations->len == 0) {
            add_violation(best.violations, best.error->message);
        }
        g_ptr_array_unref(*violations);
        *violations = g_steal_pointer(&best.violations);
        g_propagate_error(error, g_steal_pointer(&best.error));
    }
    Plan *plan = g_steal_pointer(&best.plan);
    outcome_clear(&best);
    return plan;
}

/* Few enough that a host's buffers stay small beside its weights; devices want many rows. */
static uint32_t rows_of_a_step(const ModelSpec *spec, const PlanMember *members, uint32_t n_members)
{
    for (uint32_t i = 0; i < n_members; i++) {
        if (members[i].device != NULL) {
            return ROWS_MOST;
        }
    }
    const uint64_t rows = ROWS_BUFFER_BYTES / plan_row_bytes(spec) / ROWS_LEAST * ROWS_LEAST;
    return (uint32_t)CLAMP(rows, ROWS_LEAST, ROWS_MOST);
}

Plan *planner_plan_class(const ModelSpec *spec, const PlanMember *members, uint32_t n_members,
                         const PlanWish *wish, GPtrArray **violations, GPtrArray **alternatives,
                         GError **error)
{
    PlanWish filled = *wish;
    g_autofree PlanMember *own = g_memdup2(members, n_members * sizeof *members);
    for (uint32_t i = 0; !wish->one_host_shared && i < n_members; i++) {
        own[i].tcp_only = true; /* then every link is counted as measured */
    }
    filled.max_rows =
        wish->max_rows != 0 ? wish->max_rows : rows_of_a_step(spec, members, n_members);
    g_autofree Task *task = g_new0(Task, 1);
    task->spec = spec;
    task->members = own;
    task->n_members = n_members;
    task->wish = &filled;
    task->context = plan_context(spec, wish->context);
    layout_task_init(task);
    g_autoptr(GPtrArray) found = new_violations(), others = new_texts();
    Plan *plan = plan_kinds(task, wish, &found, others, error);
    if (violations != NULL) {
        *violations = g_steal_pointer(&found);
    }
    if (alternatives != NULL) {
        *alternatives = g_steal_pointer(&others);
    }
    return plan;
}
