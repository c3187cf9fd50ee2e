/* plan_check(): every rule looks at the whole plan and reports all that it finds, so that a user
 * mends a plan in one go. No rule relies on another having passed: indices are clipped, sums are
 * 64-bit. */
#include "proto/plan/plan.h"

#include "proto/base/units.h"
#include "proto/plan/rank_span.h"

#include <string.h>

#define REPLICAS_LIMIT 1024u
#define MAX_ROWS_LIMIT 65536u
#define KV_PAGES_LIMIT (1ull << 31)

typedef struct Check {
    const Plan *plan; /* a measured copy */
    const ModelSpec *spec;
    const PlanMember *members;
    uint32_t n_members;
    GPtrArray *found;
} Check;

void plan_violation_free(PlanViolation *v)
{
    if (v != NULL) {
        g_free(v->text);
        g_free(v);
    }
}

static void report(const Check *c, PlanRule rule, const char *format, ...) G_GNUC_PRINTF(3, 4);

static void report(const Check *c, PlanRule rule, const char *format, ...)
{
    PlanViolation *v = g_new0(PlanViolation, 1);
    va_list args;
    va_start(args, format);
    v->rule = rule;
    v->text = g_strdup_vprintf(format, args);
    va_end(args);
    g_ptr_array_add(c->found, v);
}

static uint32_t devices_of(const Check *c, const char *worker)
{
    uint32_t n = 0;
    for (uint32_t i = 0; worker != NULL && i < c->n_members; i++) {
        n += strcmp(c->members[i].worker, worker) == 0;
    }
    return n;
}

/* ---- coverage ---------------------------------------------------------------------------------
 */

typedef struct Range {
    uint32_t first;
    uint64_t end; /* exclusive */
} Range;

/* Reports each run of items of [0, n) that no range or several ranges hold, ranges that leave [0,
 * n), and ranges that do not ascend: the tree is completed in rank order. `where` names the ranges.
 */
static void check_cover(const Check *c, PlanRule rule, const char *where, const char *items,
                        const Range *ranges, uint32_t n_ranges, uint32_t n)
{
    g_autofree uint8_t *owners = g_new0(uint8_t, (gsize)n + 1);
    uint64_t last_end = 0;
    for (uint32_t i = 0; i < n_ranges; i++) {
        if (ranges[i].end == ranges[i].first) {
            continue;
        }
        if (ranges[i].end > n) {
            report(c, rule,
                   "%s: part %u holds %s %u to %" G_GUINT64_FORMAT
                   ", and there are %u; end it at %u",
                   where, i, items, ranges[i].first, ranges[i].end - 1, n, n);
        }
        if (ranges[i].first < last_end) {
            report(c, rule,
                   "%s: part %u begins at %s %u, before the end of an earlier part; order the "
                   "parts",
                   where, i, items, ranges[i].first);
        }
        last_end = MAX(last_end, ranges[i].end);
        for (uint64_t k = ranges[i].first; k < MIN(ranges[i].end, n); k++) {
            owners[k] = (uint8_t)MIN(owners[k] + 1, 2);
        }
    }
    owners[n] = 255; /* ends the last run */
    for (uint32_t k = 0, start = 0; k < n; k++) {
        if (owners[k] == owners[k + 1]) {
            continue;
        }
        if (owners[start] != 1) {
            report(c, rule, "%s: %s %u to %u %s; give each to one part", where, items, start, k,
                   owners[start] == 0 ? "belong to nobody" : "belong to several");
        }
        start = k + 1;
    }
}

static Range range_of(uint32_t first, uint32_t count)
{
    return (Range){first, (uint64_t)first + count};
}

static void check_layers(const Check *c, uint32_t r)
{
    const PlanReplica *replica = &c->plan->replicas[r];
    g_autofree Range *ranges = g_new0(Range, replica->n_stages + 1);
    g_autofree char *where = g_strdup_printf("replica %u", r);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        const PlanStage *stage = &replica->stages[s];
        if (stage->n_more > 0) {
            report(c, PLAN_RULE_LIMIT,
                   "replica %u stage %u has %u chunks of layers, which only training runs; give it "
                   "one",
                   r, s, stage->n_more + 1);
        }
        if (stage->layer_last < stage->layer_first) {
            report(c, PLAN_RULE_LAYERS,
                   "replica %u stage %u holds no layer (%u to %u); give it one", r, s,
                   stage->layer_first, stage->layer_last);
            ranges[s] = (Range){stage->layer_first, stage->layer_first};
        } else {
            ranges[s] = (Range){stage->layer_first, (uint64_t)stage->layer_last + 1};
        }
    }
    check_cover(c, PLAN_RULE_LAYERS, where, "layers", ranges, replica->n_stages, c->spec->n_layers);
}

static void check_units(const Check *c, uint32_t r, uint32_t s)
{
    const PlanStage *stage = &c->plan->replicas[r].stages[s];
    g_autofree Range *attn = g_new0(Range, stage->n_ranks + 1);
    g_autofree Range *ffn = g_new0(Range, stage->n_ranks + 1);
    g_autofree char *where = g_strdup_printf("replica %u stage %u", r, s);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        const PlanRank *rank = &stage->ranks[k];
        attn[k] = range_of(rank->attn_first, rank->attn_count);
        ffn[k] = range_of(rank->ffn_first, rank->ffn_count);
        if (rank->attn_count == 0 || rank->ffn_count == 0) {
            report(c, PLAN_RULE_UNITS,
                   "%s: rank %u holds %u attention and %u FFN units; give it at least one of each",
                   where, k, rank->attn_count, rank->ffn_count);
        }
    }
    check_cover(c, PLAN_RULE_UNITS, where, "attention units", attn, stage->n_ranks,
                c->spec->n_attn_units);
    check_cover(c, PLAN_RULE_UNITS, where, "FFN units", ffn, stage->n_ranks, c->spec->n_ffn_units);
}

static void check_vocab(const Check *c, uint32_t r, uint32_t s)
{
    const PlanReplica *replica = &c->plan->replicas[r];
    const PlanStage *stage = &replica->stages[s];
    bool holds = s == 0 || s + 1 == replica->n_stages;
    g_autofree Range *vocab = g_new0(Range, stage->n_ranks + 1);
    g_autofree char *where = g_strdup_printf("replica %u stage %u", r, s);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        const PlanRank *rank = &stage->ranks[k];
        vocab[k] = range_of(rank->vocab_first, rank->vocab_count);
        if (!holds && rank->vocab_count != 0) {
            report(c, PLAN_RULE_VOCAB,
                   "%s: rank %u holds %u vocabulary chunks, and only the first and last stage have "
                   "any",
                   where, k, rank->vocab_count);
        }
    }
    if (holds) {
        check_cover(c, PLAN_RULE_VOCAB, where, "vocabulary chunks", vocab, stage->n_ranks,
                    c->spec->n_vocab_chunks);
    }
}

/* ---- ranks and members ------------------------------------------------------------------------
 */

static void check_types(const Check *c, const char *where, const PlanReplica *replica,
                        const PlanStage *stage, const PlanRank *rank, const PlanMember *member)
{
    bool told[DTYPE_LIMIT] = {false};
    for (uint32_t i = 0; i < c->spec->n_tensors; i++) {
        const TensorSpec *t = &c->spec->tensors[i];
        if (t->rows == 1 || told[t->type] || member->packed_block_bytes[t->type] != 0 ||
            rank_span(c->spec, replica, stage, rank, t).count == 0) {
            continue;
        }
        told[t->type] = true;
        report(
            c, PLAN_RULE_TYPE,
            "%s: worker %s cannot compute %s weights (%s); use a worker of the newest release or "
            "another file",
            where, member->worker, dtype_info(t->type)->name, t->name);
    }
}

static void check_numerics(const Check *c, const char *where, const PlanMember *member)
{
    const Definition *d = &c->plan->definition;
    if (member->numerics_version != d->numerics_version) {
        report(c, PLAN_RULE_NUMERICS,
               "%s: worker %s computes by numerics version %u and the plan by %u; run one release",
               where, member->worker, member->numerics_version, d->numerics_version);
    }
    if ((uint32_t)d->numerics <= NUMERICS_FAST &&
        (member->numerics_classes >> (uint32_t)d->numerics & 1u) == 0 && member->device != NULL) {
        report(c, PLAN_RULE_NUMERICS,
               "%s: worker %s computes on %s, which offers numerics fast only, and a plan has one "
               "class; say --numerics fast, or leave this worker out",
               where, member->worker, member->device);
    } else if ((uint32_t)d->numerics <= NUMERICS_FAST &&
               (member->numerics_classes >> (uint32_t)d->numerics & 1u) == 0) {
        report(c, PLAN_RULE_NUMERICS,
               "%s: worker %s does not offer numerics %s; choose the other class", where,
               member->worker, numerics_name(d->numerics));
    }
}

/* "hosts' cores", or the kind itself. */
static const char *kind_text(const char *kind)
{
    return kind[0] != '\0' ? kind : "hosts' cores";
}

/* Class exact: all ranks give the bits that the definition names. */
static void check_kind(const Check *c, const char *where, const PlanMember *member)
{
    const Definition *d = &c->plan->definition;
    const char *kind = plan_member_kind(member);
    if (d->numerics == NUMERICS_EXACT && strncmp(kind, d->exact_kind, sizeof d->exact_kind) != 0) {
        report(
            c, PLAN_RULE_NUMERICS,
            "%s: worker %s computes on %s, and the plan's exact bits are those of %s; plan hosts "
            "alone, or devices of one kind alone, or say --numerics fast",
            where, member->worker,
            kind[0] == '\0' && member->device != NULL ? member->device : kind_text(kind),
            kind_text(d->exact_kind));
    }
}

static void check_memory(const Check *c, const char *where, const PlanRank *rank,
                         const PlanMember *member)
{
    if (rank->peak_bytes <= member->memory_bytes) {
        return;
    }
    g_autofree char *need = units_format_size(rank->peak_bytes);
    g_autofree char *have = units_format_size(member->memory_bytes);
    g_autofree char *missing = units_format_size(rank->peak_bytes - member->memory_bytes);
    report(
        c, PLAN_RULE_MEMORY,
        "%s: worker %s needs %s and offers %s, %s are missing; use more workers, less context or "
        "fewer streams",
        where, member->worker, need, have, missing);
}

static void check_rank(const Check *c, uint32_t r, uint32_t s, uint32_t k, GHashTable *used)
{
    const PlanReplica *replica = &c->plan->replicas[r];
    const PlanStage *stage = &replica->stages[s];
    const PlanRank *rank = &stage->ranks[k];
    const PlanMember *member =
        plan_member_find(c->members, c->n_members, rank->worker, rank->device);
    const uint32_t n_devices = devices_of(c, rank->worker);
    g_autofree char *where = g_strdup_printf("replica %u stage %u rank %u", r, s, k);
    if (member == NULL && n_devices > 0) {
        report(c, PLAN_RULE_MEMBER, "%s: worker %s has no device %u; use device 0%s%.0u", where,
               rank->worker, rank->device, n_devices > 1 ? " to " : "", n_devices - 1);
        return;
    }
    if (member == NULL) {
        report(c, PLAN_RULE_MEMBER, "%s: worker '%s' is unknown; start it or plan again", where,
               rank->worker != NULL ? rank->worker : "");
        return;
    }
    if (!member->usable) {
        report(c, PLAN_RULE_MEMBER, "%s: worker %s is lost or draining; plan without it", where,
               rank->worker);
    }
    char *place = g_strdup_printf("%u %s", rank->device, rank->worker);
    if (!g_hash_table_add(used, place)) {
        report(c, PLAN_RULE_MEMBER, "%s: worker %s device %u is used twice; give it one rank",
               where, rank->worker, rank->device);
    }
    check_numerics(c, where, member);
    check_kind(c, where, member);
    check_types(c, where, replica, stage, rank, member);
    check_memory(c, where, rank, member);
}

/* ---- counts -----------------------------------------------------------------------------------
 */

static void check_count(const Check *c, const char *what, uint64_t value, uint64_t least,
                        uint64_t most)
{
    if (value < least || value > most) {
        report(c, PLAN_RULE_LIMIT,
               "%s is %" G_GUINT64_FORMAT "; choose %" G_GUINT64_FORMAT " to %" G_GUINT64_FORMAT,
               what, value, least, most);
    }
}

static void check_counts(const Check *c)
{
    const Plan *plan = c->plan;
    const Definition *d = &plan->definition;
    check_count(c, "the number of replicas", plan->n_replicas, 1, REPLICAS_LIMIT);
    check_count(c, "the context", d->context, 1, c->spec->context);
    check_count(c, "the number of streams", plan->streams, 1, G_MAXUINT32);
    check_count(c, "the number of KV pages", plan->kv_pages,
                ((uint64_t)d->context + KV_BLOCK - 1) / KV_BLOCK, KV_PAGES_LIMIT);
    check_count(c, "the rows of a step", plan->max_rows, 1, MAX_ROWS_LIMIT);
    check_count(c, "the KV type", (uint32_t)d->kv_type, KV_F16, KV_TYPE_LIMIT - 1);
    check_count(c, "the numerics class", (uint32_t)d->numerics, NUMERICS_EXACT, NUMERICS_FAST);
    check_count(c, "the wire format", d->wire, 0, 0);
    if (d->numerics == NUMERICS_FAST && d->exact_kind[0] != '\0') {
        report(c, PLAN_RULE_NUMERICS,
               "the plan is of class fast and names a kind of exact bits (%.*s); plan again",
               (int)sizeof d->exact_kind, d->exact_kind);
    }
    static const Hash128 none;
    if (!hash128_equal(&c->spec->file_hash, &none) &&
        !hash128_equal(&c->spec->file_hash, &d->file_hash)) {
        char planned[33], given[33];
        hash128_hex(&d->file_hash, planned);
        hash128_hex(&c->spec->file_hash, given);
        report(c, PLAN_RULE_NUMERICS,
               "the plan is for file %s and the model is file %s; plan again", planned, given);
    }
}

static void check_degree(const Check *c, uint32_t r, uint32_t s)
{
    uint32_t n_ranks = c->plan->replicas[r].stages[s].n_ranks;
    uint32_t limit = MIN(plan_tp_limit(c->spec), PLAN_RANKS_LIMIT);
    if (n_ranks < 1 || n_ranks > limit) {
        report(c, PLAN_RULE_LIMIT,
               "replica %u stage %u has %u ranks; this model allows 1 to %u (%u attention units, "
               "%u FFN "
               "units)",
               r, s, n_ranks, limit, c->spec->n_attn_units, c->spec->n_ffn_units);
    }
}

static void check_replica(const Check *c, uint32_t r, GHashTable *used)
{
    const PlanReplica *replica = &c->plan->replicas[r];
    if (replica->n_stages < 1 || replica->n_stages > c->spec->n_layers) {
        report(c, PLAN_RULE_LIMIT, "replica %u has %u stages for %u layers; choose 1 to %u", r,
               replica->n_stages, c->spec->n_layers, c->spec->n_layers);
    }
    check_layers(c, r);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        check_degree(c, r, s);
        check_units(c, r, s);
        check_vocab(c, r, s);
        for (uint32_t k = 0; k < replica->stages[s].n_ranks; k++) {
            check_rank(c, r, s, k, used);
        }
    }
}

GPtrArray *plan_check(const Plan *plan, const ModelSpec *spec, const PlanMember *members,
                      uint32_t n_members)
{
    g_autoptr(Plan) measured = plan_copy(plan); /* the numbers in the plan are nobody's proof */
    plan_measure(measured, spec, members, n_members);
    g_autoptr(GHashTable) used = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
    Check c = {measured, spec, members, n_members,
               g_ptr_array_new_with_free_func((GDestroyNotify)plan_violation_free)};
    check_counts(&c);
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        check_replica(&c, r, used);
    }
    return c.found;
}
