#include "proto/plan/plan.h"

#include "proto/base/checked.h"
#include "proto/plan/device_memory.h"
#include "proto/plan/rank_span.h"
#include "proto/plan/tree.h"

#include <string.h>

#define PANEL_ROWS 16u         /* kernels/ops/matmul.h: outputs of one packed panel */
#define ARRAY_ALIGN 64u        /* each array of a shard begins on a cache line */
#define LOGITS_ROWS 16u        /* rows whose logits a stage computes at once */
#define THREADS_LIMIT 4096u    /* what a member says is not trusted to be sane */
#define INDEX_ENTRY_BYTES 209u /* of a page: 192 of its text and hashes, 17 of its place */
/* Stacks, link buffers, tables that no formula below names. */
#define RANK_BASE_BYTES (16ull << 20)

/* ---- the object -------------------------------------------------------------------------------
 */

void plan_free(Plan *plan)
{
    if (plan == NULL) {
        return;
    }
    for (uint32_t r = 0; plan->replicas != NULL && r < plan->n_replicas; r++) {
        PlanReplica *replica = &plan->replicas[r];
        for (uint32_t s = 0; replica->stages != NULL && s < replica->n_stages; s++) {
            PlanStage *stage = &replica->stages[s];
            for (uint32_t k = 0; stage->ranks != NULL && k < stage->n_ranks; k++) {
                g_free(stage->ranks[k].worker);
            }
            g_free(stage->ranks);
        }
        g_free(replica->stages);
    }
    g_free(plan->replicas);
    g_free(plan->job);
    g_free(plan->model);
    if (plan->reasons != NULL) {
        g_ptr_array_unref(plan->reasons);
    }
    g_free(plan);
}

static void copy_stage(PlanStage *to, const PlanStage *from)
{
    *to = *from;
    to->ranks = g_new0(PlanRank, from->n_ranks);
    for (uint32_t k = 0; k < from->n_ranks; k++) {
        to->ranks[k] = from->ranks[k];
        to->ranks[k].worker = g_strdup(from->ranks[k].worker);
    }
}

Plan *plan_copy(const Plan *plan)
{
    Plan *copy = g_new0(Plan, 1);
    *copy = *plan;
    copy->job = g_strdup(plan->job);
    copy->model = g_strdup(plan->model);
    copy->replicas = g_new0(PlanReplica, plan->n_replicas);
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        const PlanReplica *from = &plan->replicas[r];
        copy->replicas[r].n_stages = from->n_stages;
        copy->replicas[r].stages = g_new0(PlanStage, from->n_stages);
        for (uint32_t s = 0; s < from->n_stages; s++) {
            copy_stage(&copy->replicas[r].stages[s], &from->stages[s]);
        }
    }
    copy->reasons = g_ptr_array_new_with_free_func(g_free);
    for (guint i = 0; plan->reasons != NULL && i < plan->reasons->len; i++) {
        g_ptr_array_add(copy->reasons, g_strdup(g_ptr_array_index(plan->reasons, i)));
    }
    return copy;
}

static void put_u32le(uint8_t *p, uint32_t v)
{
    for (int i = 0; i < 4; i++) {
        p[i] = (uint8_t)(v >> (8 * i));
    }
}

const char *numerics_name(NumericsClass numerics)
{
    return numerics == NUMERICS_FAST ? "fast" : "exact";
}

NumericsClass numerics_by_place(bool on_devices)
{
    return on_devices ? NUMERICS_FAST : NUMERICS_EXACT;
}

Hash128 definition_hash(const Definition *d)
{
    const uint32_t numbers[] = {d->numerics_version, (uint32_t)d->numerics, (uint32_t)d->kv_type,
                                d->context, d->wire};
    uint8_t bytes[sizeof numbers + sizeof d->file_hash.bytes + sizeof d->exact_kind];
    const size_t before = sizeof numbers + sizeof d->file_hash.bytes,
                 kind = strnlen(d->exact_kind, sizeof d->exact_kind);
    for (size_t i = 0; i < G_N_ELEMENTS(numbers); i++) {
        put_u32le(bytes + 4 * i, numbers[i]);
    }
    memcpy(bytes + sizeof numbers, d->file_hash.bytes, sizeof d->file_hash.bytes);
    memcpy(bytes + before, d->exact_kind, kind);
    return hash128(bytes, before + kind);
}

/* ---- layout as text ---------------------------------------------------------------------------
 */

void plan_layout(const Plan *plan, uint32_t *dp, uint32_t *pp, uint32_t *tp)
{
    *dp = plan->n_replicas;
    *pp = 0;
    *tp = 0;
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        *pp = MAX(*pp, plan->replicas[r].n_stages);
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            *tp = MAX(*tp, plan->replicas[r].stages[s].n_ranks);
        }
    }
}

/* "2" when all stages have 2 ranks, else "2,3". */
static char *replica_degrees(const PlanReplica *replica)
{
    bool even = true;
    for (uint32_t s = 1; s < replica->n_stages; s++) {
        even = even && replica->stages[s].n_ranks == replica->stages[0].n_ranks;
    }
    GString *text = g_string_new(NULL);
    for (uint32_t s = 0; s < (even ? MIN(replica->n_stages, 1) : replica->n_stages); s++) {
        g_string_append_printf(text, "%s%u", s > 0 ? "," : "", replica->stages[s].n_ranks);
    }
    return g_string_free(text, FALSE);
}

/* Replicas that differ are told apart by '/': "dp2 pp1/2 tp2/1". */
char *plan_layout_text(const Plan *plan)
{
    g_autoptr(GString) pp = g_string_new(NULL);
    g_autoptr(GString) tp = g_string_new(NULL);
    g_autofree char *first = NULL;
    bool same = true;
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        g_autofree char *degrees = replica_degrees(&plan->replicas[r]);
        if (first == NULL) {
            first = g_strdup(degrees);
        }
        same = same && strcmp(first, degrees) == 0 &&
               plan->replicas[r].n_stages == plan->replicas[0].n_stages;
        g_string_append_printf(pp, "%s%u", r > 0 ? "/" : "", plan->replicas[r].n_stages);
        g_string_append_printf(tp, "%s%s", r > 0 ? "/" : "", degrees);
    }
    if (same && plan->n_replicas > 0) {
        return g_strdup_printf("dp%u pp%u tp%s", plan->n_replicas, plan->replicas[0].n_stages,
                               first);
    }
    return g_strdup_printf("dp%u pp%s tp%s", plan->n_replicas, pp->str, tp->str);
}

/* ---- cuts -------------------------------------------------------------------------------------
 */

uint32_t plan_tp_limit(const ModelSpec *spec)
{
    return MIN(spec->n_attn_units, spec->n_ffn_units);
}

/* Each item goes to the part that would then have the least items per weight: that minimises the
 * largest count/weight, the time of the slowest part. Ties go to the first part, so that the same
 * weights give the same cut. */
void plan_cut(uint32_t n, const double *weight, uint32_t n_parts, uint32_t least, uint32_t *cuts)
{
    g_assert(n_parts > 0);
    g_autofree uint32_t *count = g_new0(uint32_t, n_parts);
    uint32_t left = n;
    for (uint32_t p = 0; p < n_parts; p++) {
        count[p] = MIN(least, left);
        left -= count[p];
    }
    for (; left > 0; left--) {
        uint32_t best = 0;
        for (uint32_t p = 1; p < n_parts; p++) {
            if ((count[p] + 1.0) / weight[p] < (count[best] + 1.0) / weight[best]) {
                best = p;
            }
        }
        count[best]++;
    }
    cuts[0] = 0;
    for (uint32_t p = 0; p < n_parts; p++) {
        cuts[p + 1] = cuts[p] + count[p];
    }
}

/* ---- what a rank holds ------------------------------------------------------------------------
 */

/* [first, first + count) cut to n items, whatever the plan says. */
static SliceSpan span_clipped(uint32_t first, uint32_t count, uint32_t n)
{
    first = MIN(first, n);
    return (SliceSpan){first, MIN(count, n - first)};
}

void rank_heads(const ModelSpec *spec, const PlanRank *rank, uint32_t *first, uint32_t *count)
{
    SliceSpan units = span_clipped(rank->attn_first, rank->attn_count, spec->n_attn_units);
    *first = MIN(units.first * spec->attn_unit_heads, spec->n_heads);
    *count = MIN((units.first + units.count) * spec->attn_unit_heads, spec->n_heads) - *first;
}

static bool stage_has_layer(const PlanStage *stage, uint32_t layer)
{
    bool has = layer >= stage->layer_first && layer <= stage->layer_last;
    for (uint32_t c = 0; c < MIN(stage->n_more, PLAN_CHUNKS_LIMIT - 1); c++) {
        has = has || (layer >= stage->more[c].first && layer <= stage->more[c].last);
    }
    return has;
}

/* Whether a stage of this replica holds the tensor at all. */
static bool stage_has(const ModelSpec *spec, const PlanReplica *replica, const PlanStage *stage,
                      const TensorSpec *t)
{
    bool is_first = stage == &replica->stages[0];
    bool is_last = stage == &replica->stages[replica->n_stages - 1];
    switch (t->role) {
    case ROLE_TOKEN_EMBD:
        return is_first || (is_last && spec->tied_output);
    case ROLE_POSITION_EMBD:
        return is_first;
    case ROLE_OUTPUT:
    case ROLE_OUTPUT_NORM:
    case ROLE_OUTPUT_NORM_BIAS:
        return is_last;
    case ROLE_ROPE_FACTORS:
        return true;
    default:
        return t->layer >= 0 && stage_has_layer(stage, (uint32_t)t->layer);
    }
}

SliceSpan rank_span(const ModelSpec *spec, const PlanReplica *replica, const PlanStage *stage,
                    const PlanRank *rank, const TensorSpec *t)
{
    uint32_t first, count, kv_first, kv_count;
    if (!stage_has(spec, replica, stage, t)) {
        return (SliceSpan){0, 0};
    }
    switch (t->cut) {
    case CUT_WHOLE:
        return (SliceSpan){0, 1};
    case CUT_Q_UNITS:
    case CUT_ATTN_UNITS:
        return span_clipped(rank->attn_first, rank->attn_count, t->n_slices);
    case CUT_FFN_ROWS:
    case CUT_FFN_COLS:
        return span_clipped(rank->ffn_first, rank->ffn_count, t->n_slices);
    case CUT_VOCAB:
        return span_clipped(rank->vocab_first, rank->vocab_count, t->n_slices);
    case CUT_KV_HEADS:
        rank_heads(spec, rank, &first, &count);
        model_spec_kv_heads_of(spec, first, count, &kv_first, &kv_count);
        return span_clipped(kv_first, kv_count, t->n_slices);
    }
    return (SliceSpan){0, 0};
}

GArray *plan_rank_slices(const Plan *plan, const ModelSpec *spec, uint32_t replica, uint32_t stage,
                         uint32_t rank)
{
    const PlanReplica *in = &plan->replicas[replica];
    const PlanStage *of = &in->stages[stage];
    GArray *slices = g_array_new(FALSE, FALSE, sizeof(SliceRef));
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        SliceSpan span = rank_span(spec, in, of, &of->ranks[rank], &spec->tensors[i]);
        for (uint32_t s = span.first; s < span.first + span.count; s++) {
            SliceRef ref = {i, s};
            g_array_append_val(slices, ref);
        }
    }
    return slices;
}

/* ---- memory -----------------------------------------------------------------------------------
 */

static uint64_t round_up(uint64_t n, uint64_t step)
{
    return (n + step - 1) / step * step;
}

/* Rows and columns of a contiguous range of slices. */
static void span_shape(const ModelSpec *spec, const TensorSpec *t, SliceSpan span, uint64_t *rows,
                       uint64_t *columns)
{
    SliceRect a = model_spec_slice(spec, t, span.first);
    SliceRect b = model_spec_slice(spec, t, span.first + span.count - 1);
    *rows = (uint64_t)b.row0 + b.n_rows - a.row0;
    *columns = (uint64_t)b.col0 + b.n_cols - a.col0;
}

uint64_t span_elements(const ModelSpec *spec, const TensorSpec *t, SliceSpan span)
{
    uint64_t rows = 0, columns = 0;
    if (span.count > 0) {
        span_shape(spec, t, span, &rows, &columns);
    }
    return rows * columns;
}

uint64_t packed_span_bytes(const ModelSpec *spec, const TensorSpec *t, SliceSpan span,
                           const PlanMember *member)
{
    if (span.count == 0) {
        return 0;
    }
    uint64_t rows, columns;
    span_shape(spec, t, span, &rows, &columns);
    if (t->rows == 1) {
        return round_up(rows * columns * sizeof(float), ARRAY_ALIGN);
    }
    const DtypeInfo *info = dtype_info(t->type);
    uint64_t block_bytes = member != NULL ? member->packed_block_bytes[t->type] : 0;
    if (block_bytes == 0) {
        block_bytes = info->block_bytes;
    }
    return round_up(round_up(rows, PANEL_ROWS) * (columns / info->block) * block_bytes,
                    ARRAY_ALIGN);
}

static uint32_t subtrees_of(uint32_t n_leaves, SliceSpan span)
{
    return tree_subtrees(n_leaves, span.first, span.first + span.count);
}

uint32_t rank_attn_subtrees(const ModelSpec *spec, const PlanRank *rank)
{
    return subtrees_of(spec->n_attn_units,
                       span_clipped(rank->attn_first, rank->attn_count, spec->n_attn_units));
}

uint32_t rank_ffn_subtrees(const ModelSpec *spec, const PlanRank *rank)
{
    return subtrees_of(spec->n_ffn_units,
                       span_clipped(rank->ffn_first, rank->ffn_count, spec->n_ffn_units));
}

uint32_t rank_subtrees(const ModelSpec *spec, const PlanRank *rank)
{
    return MAX(rank_attn_subtrees(spec, rank), rank_ffn_subtrees(spec, rank));
}

/* Floats per row beside the layers' own buffers: steps that wait (all in flight and one more), a
 * message on its way, and in a tensor group the other ranks' subtrees (each rank sums up its part
 * of them; arrived, early, rounded up) and what it sends. */
static uint64_t link_floats_per_row(const ModelSpec *spec, const PlanReplica *replica,
                                    const PlanStage *stage, const PlanRank *rank)
{
    uint64_t width = spec->width, floats = 0;
    if (replica->n_stages > 1) {
        floats += (replica->n_stages + 4) * width;
    }
    if (stage->n_ranks > 1) {
        uint64_t others = 0;
        for (uint32_t k = 0; k < stage->n_ranks; k++) {
            others += &stage->ranks[k] != rank ? rank_subtrees(spec, &stage->ranks[k]) : 0;
        }
        floats += (4 * others / stage->n_ranks + rank_subtrees(spec, rank) + 2) * width;
    }
    return floats;
}

uint64_t page_index_bytes(uint64_t n_pages)
{
    uint64_t n_buckets = 16;
    while (n_buckets < 2 * n_pages && n_buckets < (1u << 30)) {
        n_buckets *= 2;
    }
    return n_pages * INDEX_ENTRY_BYTES + 2 * n_buckets * sizeof(uint32_t);
}

/* The leader finds pages by their content. A plan that nobody checked may name any number. */
static uint64_t index_bytes_of(const Plan *plan, const PlanReplica *replica, const PlanRank *rank)
{
    const bool leads = rank == &replica->stages[0].ranks[0];
    return leads ? page_index_bytes(MIN(plan->kv_pages, G_MAXUINT32)) : 0;
}

/* Of a step's buffers, without sums on their way. */
static uint64_t row_floats(const ModelSpec *spec, uint32_t n_heads, uint32_t n_kv_heads,
                           uint32_t n_ffn_units)
{
    const uint64_t width = spec->width, q = (uint64_t)n_heads * spec->head_size,
                   kv = (uint64_t)n_kv_heads * spec->head_size,
                   ffn = (uint64_t)n_ffn_units * spec->ffn_unit_width;
    return 3 * width + 2 * q + 2 * kv + 2 * ffn /* x, h, gathered; q, attn; k, v; gate, up */
           + 2 * MAX(width, MAX(q, ffn));       /* activations in two kinds */
}

uint64_t plan_row_bytes(const ModelSpec *spec)
{
    return sizeof(float) *
           (row_floats(spec, spec->n_heads, spec->n_kv_heads, spec->n_ffn_units) + spec->width);
}

uint64_t rank_buffer_bytes(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                           const PlanStage *stage, const PlanRank *rank, uint32_t threads)
{
    uint32_t head_first, n_heads, kv_first, n_kv_heads;
    rank_heads(spec, rank, &head_first, &n_heads);
    model_spec_kv_heads_of(spec, head_first, n_heads, &kv_first, &n_kv_heads);
    SliceSpan units = span_clipped(rank->ffn_first, rank->ffn_count, spec->n_ffn_units);
    SliceSpan chunks = span_clipped(rank->vocab_first, rank->vocab_count, spec->n_vocab_chunks);
    uint64_t per_row = row_floats(spec, n_heads, n_kv_heads, units.count);
    uint64_t subtrees = rank_subtrees(spec, rank);
    per_row += subtrees * spec->width; /* partial sums */
    per_row += link_floats_per_row(spec, replica, stage, rank);
    uint64_t floats = per_row * plan->max_rows;
    floats += (uint64_t)plan->definition.context * spec->rope.dims; /* cos and sin */
    floats += (uint64_t)LOGITS_ROWS * chunks.count * VOCAB_CHUNK;
    /* attention's tiles and page lists of each thread */
    uint64_t per_thread = (uint64_t)spec->head_size * 4096 + plan->definition.context;
    return RANK_BASE_BYTES + floats * sizeof(float) + per_thread * threads +
           index_bytes_of(plan, replica, rank);
}

const char *plan_member_kind(const PlanMember *member)
{
    return member->exact_kind != NULL ? member->exact_kind : "";
}

const PlanMember *plan_member_find(const PlanMember *members, uint32_t n_members,
                                   const char *worker, uint32_t device)
{
    for (uint32_t i = 0; worker != NULL && i < n_members; i++) {
        if (members[i].device_index == device && strcmp(members[i].worker, worker) == 0) {
            return &members[i];
        }
    }
    return NULL;
}

static void measure_rank(const Plan *plan, const ModelSpec *spec, const PlanReplica *replica,
                         const PlanStage *stage, PlanRank *rank, const PlanMember *member)
{
    uint32_t head_first, n_heads, kv_first, n_kv_heads;
    rank_heads(spec, rank, &head_first, &n_heads);
    model_spec_kv_heads_of(spec, head_first, n_heads, &kv_first, &n_kv_heads);
    uint64_t n_layers = 0;
    if (stage->layer_first <= stage->layer_last && stage->layer_first < spec->n_layers) {
        n_layers = MIN(stage->layer_last, spec->n_layers - 1) - stage->layer_first + 1;
    }
    /* Within a role all layers have one shape, and a rank one span: only another type changes the
     * bytes. */
    const TensorSpec *last[ROLE_LIMIT] = {NULL};
    uint64_t bytes[ROLE_LIMIT] = {0};
    rank->weight_bytes = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (!stage_has(spec, replica, stage, t)) {
            continue;
        }
        if (last[t->role] == NULL || last[t->role]->type != t->type) {
            SliceSpan span = rank_span(spec, replica, stage, rank, t);
            bytes[t->role] = packed_span_bytes(spec, t, span, member);
            last[t->role] = t;
        }
        rank->weight_bytes += bytes[t->role];
    }
    rank->kv_bytes_per_token =
        n_layers * n_kv_heads * 2 * kv_row_bytes(plan->definition.kv_type, spec->head_size);
    /* kv_pages may be any number here, plan_check() runs on plans that nobody checked. */
    uint32_t threads = member != NULL ? MIN(member->threads, THREADS_LIMIT) : 1;
    const uint64_t buffers = member != NULL && member->device != NULL
                                 ? device_rank_bytes(plan, spec, replica, stage, rank, member)
                                 : rank_buffer_bytes(plan, spec, replica, stage, rank, threads);
    size_t kv_bytes, peak;
    if (!sz_mul((size_t)plan->kv_pages, (size_t)(KV_BLOCK * rank->kv_bytes_per_token), &kv_bytes) ||
        !sz_add(kv_bytes, rank->weight_bytes + buffers, &peak)) {
        peak = G_MAXUINT64;
    }
    rank->peak_bytes = peak;
}

void plan_measure(Plan *plan, const ModelSpec *spec, const PlanMember *members, uint32_t n_members)
{
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        const PlanReplica *replica = &plan->replicas[r];
        for (uint32_t s = 0; s < replica->n_stages; s++) {
            const PlanStage *stage = &replica->stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                PlanRank *rank = &stage->ranks[k];
                measure_rank(plan, spec, replica, stage, rank,
                             plan_member_find(members, n_members, rank->worker, rank->device));
            }
        }
    }
}
