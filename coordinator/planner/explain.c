#include "coordinator/planner/explain.h"

#include "coordinator/planner/pool.h"
#include "proto/base/units.h"
#include "proto/plan/device_memory.h"

#include <string.h>

static void reason(Plan *plan, const char *format, ...) G_GNUC_PRINTF(2, 3);

static void reason(Plan *plan, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_ptr_array_add(plan->reasons, g_strdup_vprintf(format, args));
    va_end(args);
}

static bool uses_member(const Plan *plan, const PlanMember *member)
{
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            for (uint32_t k = 0; k < plan->replicas[r].stages[s].n_ranks; k++) {
                const PlanRank *rank = &plan->replicas[r].stages[s].ranks[k];
                if (rank->device == member->device_index &&
                    strcmp(rank->worker, member->worker) == 0) {
                    return true;
                }
            }
        }
    }
    return false;
}

static void explain_choice(Plan *plan, const Task *task, const PlanWish *wish, const Pool *pool)
{
    g_autofree char *layout = plan_layout_text(plan);
    bool is_free = wish->pp == 0 || wish->tp == 0;
    reason(plan, "%s %s: %.*f tokens/s decode, %.0f tokens/s prefill, bound by %s", layout,
           is_free ? "has the best predicted decode speed of what fits" : "as asked for",
           plan->predicted.decode_tokens_per_s < 100 ? 1 : 0, plan->predicted.decode_tokens_per_s,
           plan->predicted.prefill_tokens_per_s, plan->predicted.bound);
    if (wish->dp == 0 && pool->n >= 2 && plan->n_replicas == 1) {
        reason(plan, "one replica, which serves one request fastest; --dp uses more workers for "
                     "more streams");
    }
    uint32_t n_idle = 0;
    for (uint32_t i = 0; i < pool->n; i++) {
        n_idle += !uses_member(plan, pool->order[0][i]);
    }
    if (n_idle > 0) {
        reason(plan, "%u of %u workers stay idle: %s", n_idle, pool->n,
               is_free ? "using them would not make one request faster"
                       : "this layout has no rank for them");
    }
    for (uint32_t i = 0; i < task->n_members; i++) {
        const char *why = planner_refusal(&task->members[i], task->spec, wish);
        if (why != NULL) {
            reason(plan, "worker %s is not used: %s", task->members[i].worker, why);
        } else if (!is_of_kind(&task->members[i], task)) {
            reason(plan,
                   "worker %s is not used: an exact plan is of one kind, and this one is of %s "
                   "(--numerics fast mixes them)",
                   task->members[i].worker, kind_text(task->kind));
        }
    }
}

/* Who computes on what, where not on its cores; and what that makes of the plan. */
static void explain_devices(Plan *plan, const Task *task)
{
    uint32_t n_devices = 0, n_used = 0;
    for (uint32_t i = 0; i < task->n_members; i++) {
        const PlanMember *m = &task->members[i];
        const bool used = uses_member(plan, m);
        n_used += used;
        if (used && m->device != NULL) {
            n_devices++;
            g_autofree char *beside = units_format_size(device_beside_bytes(m, false));
            reason(plan, "worker %s computes on %s; %s beside all that is counted, %s", m->worker,
                   m->device, beside,
                   m->device_rank_bytes > 0 ? "as it was seen to hold" : "by estimate");
        }
    }
    if (plan->definition.exact_kind[0] != '\0') {
        reason(plan, "numerics exact: the bits of %s; other devices and hosts have others",
               plan->definition.exact_kind);
    }
    if (n_devices > 0 && n_devices < n_used) {
        reason(plan, "hosts and GPUs in one plan: numerics fast, %u of %u workers on a GPU",
               n_devices, n_used);
    }
}

/* "16/11, 16/11": attention and FFN units of each rank; returned. */
static char *units_text(const PlanStage *stage)
{
    GString *text = g_string_new(NULL);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        g_string_append_printf(text, "%s%u/%u", k > 0 ? ", " : "", stage->ranks[k].attn_count,
                               stage->ranks[k].ffn_count);
    }
    return g_string_free(text, FALSE);
}

static bool is_even(const PlanStage *stage)
{
    bool even = true;
    for (uint32_t k = 1; k < stage->n_ranks; k++) {
        even = even && stage->ranks[k].attn_count == stage->ranks[0].attn_count &&
               stage->ranks[k].ffn_count == stage->ranks[0].ffn_count;
    }
    return even;
}

/* One sentence for a stage whose ranks are not alike, or would not be by measured speed alone. */
static bool explain_units(Plan *plan, uint32_t s, const PlanStage *by_speed)
{
    const PlanStage *stage = &plan->replicas[0].stages[s];
    g_autofree char *units = units_text(stage);
    g_autofree char *others = by_speed != NULL ? units_text(by_speed) : NULL;
    if (others != NULL && strcmp(units, others) != 0) {
        reason(plan,
               "stage %u shares its attention/FFN units %s for fewer partial sums: %s, by measured "
               "speed, would gain less than what measurements vary by",
               s, units, others);
        return true;
    }
    if (!is_even(stage)) {
        reason(plan,
               "stage %u shares its attention/FFN units %s: by measured speed, memory and the "
               "number of partial sums that each cut sends",
               s, units);
    }
    return false;
}

/* Of a token through replica 0. */
static double sums_bytes(const Plan *plan, const Task *task)
{
    return planner_cost(plan, task->spec, task->members, task->n_members, 0, 1, 0).sums_bytes;
}

static void explain_sums(Plan *plan, const Plan *by_speed, const Task *task)
{
    const double bytes = sums_bytes(plan, task), more = sums_bytes(by_speed, task);
    g_autofree char *bytes_text = units_format_size((uint64_t)bytes);
    g_autofree char *more_text = units_format_size((uint64_t)more);
    reason(
        plan,
        "its partial sums are %s a token; by measured speed %s, for %.1f instead of %.1f tokens/s "
        "decode",
        bytes_text, more_text, by_speed->predicted.decode_tokens_per_s,
        plan->predicted.decode_tokens_per_s);
}

/* Of units, and one sentence for a replica whose stages are not alike. */
static void explain_cuts(Plan *plan, const Task *task)
{
    const PlanReplica *replica = &plan->replicas[0];
    uint32_t fewest = G_MAXUINT32, most = 0;
    bool is_other = false;
    g_autoptr(Plan) by_speed = layout_by_speed(task, plan);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        uint32_t n_layers = replica->stages[s].layer_last - replica->stages[s].layer_first + 1;
        fewest = MIN(fewest, n_layers);
        most = MAX(most, n_layers);
        if (s < 4) {
            is_other |=
                explain_units(plan, s, by_speed != NULL ? &by_speed->replicas[0].stages[s] : NULL);
        }
    }
    if (is_other) {
        explain_sums(plan, by_speed, task);
    }
    if (most > fewest) {
        reason(plan,
               "stages hold %u to %u layers: by measured speed, the CPUs that stages share, and "
               "memory; the last one also has the vocabulary projection",
               fewest, most);
    }
}

static void explain_memory(Plan *plan)
{
    uint64_t kv = 0, peak = 0;
    for (uint32_t s = 0; s < plan->replicas[0].n_stages; s++) {
        for (uint32_t k = 0; k < plan->replicas[0].stages[s].n_ranks; k++) {
            const PlanRank *rank = &plan->replicas[0].stages[s].ranks[k];
            kv = MAX(kv, rank->kv_bytes_per_token * KV_BLOCK * plan->kv_pages);
            peak = MAX(peak, rank->peak_bytes);
        }
    }
    g_autofree char *kv_text = units_format_size(kv);
    g_autofree char *peak_text = units_format_size(peak);
    reason(plan,
           "KV memory for %u stream%s of %u positions: at most %s a worker, of at most %s in all",
           plan->streams, plan->streams == 1 ? "" : "s", plan->definition.context, kv_text,
           peak_text);
}

static void explain_seal(Plan *plan, const PlanWish *wish)
{
    if (plan->replicas[0].n_stages > 1 || plan->replicas[0].stages[0].n_ranks > 1) {
        reason(plan, wish->seal_off ? "payloads between workers are NOT sealed (--seal off): "
                                      "CRC32C only, for trusted fabrics"
                                    : "payloads between workers are sealed with AES-256-GCM");
    }
}

void explain(Plan *plan, const Task *task, const PlanWish *wish)
{
    Pool pool = pool_of(task);
    explain_choice(plan, task, wish, &pool);
    explain_devices(plan, task);
    explain_cuts(plan, task);
    explain_memory(plan);
    explain_seal(plan, wish);
    pool_clear(&pool);
}
