#include "proto/plan/plan_message.h"

#include "proto/base/error.h"

#include <math.h>
#include <string.h>

#define REPLICAS_LIMIT 1024u
#define STAGES_LIMIT 4096u
#define ALL_RANKS_LIMIT 65536u
#define REASONS_LIMIT 64u
#define NAME_LIMIT 256u  /* node ids, job ids */
#define TEXT_LIMIT 4096u /* paths, reasons */

/* protobuf-c frees with free(): GLib's allocator is malloc() since 2.46, and an empty string may
 * stay the shared default. */
static char *copy_text(const char *text)
{
    return text != NULL ? g_strdup(text) : (char *)protobuf_c_empty_string;
}

/* ---- to a message -----------------------------------------------------------------------------
 */

static Weft__V1__Rank *rank_to_message(const PlanRank *rank)
{
    Weft__V1__Rank *m = g_new(Weft__V1__Rank, 1);
    weft__v1__rank__init(m);
    m->worker = copy_text(rank->worker);
    m->device = rank->device;
    m->attn_first = rank->attn_first;
    m->attn_count = rank->attn_count;
    m->ffn_first = rank->ffn_first;
    m->ffn_count = rank->ffn_count;
    m->vocab_first = rank->vocab_first;
    m->vocab_count = rank->vocab_count;
    m->weight_bytes = rank->weight_bytes;
    m->kv_bytes_per_token = rank->kv_bytes_per_token;
    m->peak_bytes = rank->peak_bytes;
    return m;
}

static Weft__V1__Stage *stage_to_message(const PlanStage *stage)
{
    Weft__V1__Stage *m = g_new(Weft__V1__Stage, 1);
    weft__v1__stage__init(m);
    m->layer_first = stage->layer_first;
    m->layer_last = stage->layer_last;
    m->n_ranks = stage->n_ranks;
    m->ranks = g_new0(Weft__V1__Rank *, stage->n_ranks);
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        m->ranks[k] = rank_to_message(&stage->ranks[k]);
    }
    m->n_more = stage->n_more;
    m->more = g_new0(Weft__V1__Layers *, stage->n_more);
    for (uint32_t c = 0; c < stage->n_more; c++) {
        m->more[c] = g_new(Weft__V1__Layers, 1);
        weft__v1__layers__init(m->more[c]);
        m->more[c]->first = stage->more[c].first;
        m->more[c]->last = stage->more[c].last;
    }
    return m;
}

static Weft__V1__Replica *replica_to_message(const PlanReplica *replica)
{
    Weft__V1__Replica *m = g_new(Weft__V1__Replica, 1);
    weft__v1__replica__init(m);
    m->n_stages = replica->n_stages;
    m->stages = g_new0(Weft__V1__Stage *, replica->n_stages);
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        m->stages[s] = stage_to_message(&replica->stages[s]);
    }
    return m;
}

static Weft__V1__Definition *definition_to_message(const Definition *d)
{
    Weft__V1__Definition *m = g_new(Weft__V1__Definition, 1);
    weft__v1__definition__init(m);
    m->numerics_version = d->numerics_version;
    m->numerics = (uint32_t)d->numerics;
    m->kv_type = (uint32_t)d->kv_type;
    m->context = d->context;
    m->wire = d->wire;
    m->file_hash.len = sizeof d->file_hash.bytes;
    m->file_hash.data = g_memdup2(d->file_hash.bytes, sizeof d->file_hash.bytes);
    m->exact_kind = copy_text(d->exact_kind);
    return m;
}

Weft__V1__Plan *plan_to_message(const Plan *plan)
{
    Weft__V1__Plan *m = g_new(Weft__V1__Plan, 1);
    weft__v1__plan__init(m);
    m->job = copy_text(plan->job);
    m->model = copy_text(plan->model);
    m->definition = definition_to_message(&plan->definition);
    m->streams = plan->streams;
    m->kv_pages = plan->kv_pages;
    m->max_rows = plan->max_rows;
    m->n_replicas = plan->n_replicas;
    m->replicas = g_new0(Weft__V1__Replica *, plan->n_replicas);
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        m->replicas[r] = replica_to_message(&plan->replicas[r]);
    }
    m->predicted_prefill_tokens_per_s = plan->predicted.prefill_tokens_per_s;
    m->predicted_decode_tokens_per_s = plan->predicted.decode_tokens_per_s;
    m->predicted_bound = copy_text(plan->predicted.bound);
    m->n_reasons = plan->reasons != NULL ? plan->reasons->len : 0;
    m->reasons = g_new0(char *, m->n_reasons);
    for (size_t i = 0; i < m->n_reasons; i++) {
        m->reasons[i] = g_strdup(g_ptr_array_index(plan->reasons, i));
    }
    return m;
}

/* ---- from a message ---------------------------------------------------------------------------
 */

static bool malformed(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static bool malformed(GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                "the plan that arrived is malformed: %s; run the same release everywhere", what);
    return false;
}

static bool text_from_message(const char *what, const char *text, size_t limit, char **out,
                              GError **error)
{
    size_t length = text != NULL ? strlen(text) : 0;
    if (length > limit || (length > 0 && !g_utf8_validate(text, (gssize)length, NULL))) {
        return malformed(error, "%s has %zu bytes or is no UTF-8", what, length);
    }
    *out = g_strndup(text != NULL ? text : "", length);
    return true;
}

static bool rank_from_message(const Weft__V1__Rank *m, PlanRank *rank, GError **error)
{
    rank->device = m->device;
    rank->attn_first = m->attn_first;
    rank->attn_count = m->attn_count;
    rank->ffn_first = m->ffn_first;
    rank->ffn_count = m->ffn_count;
    rank->vocab_first = m->vocab_first;
    rank->vocab_count = m->vocab_count;
    rank->weight_bytes = m->weight_bytes;
    rank->kv_bytes_per_token = m->kv_bytes_per_token;
    rank->peak_bytes = m->peak_bytes;
    return text_from_message("a rank's worker", m->worker, NAME_LIMIT, &rank->worker, error);
}

static bool stage_from_message(const Weft__V1__Stage *m, PlanStage *stage, GError **error)
{
    if (m->n_ranks < 1 || m->n_ranks > PLAN_RANKS_LIMIT) {
        return malformed(error, "a stage has %zu ranks, not 1 to %u", m->n_ranks, PLAN_RANKS_LIMIT);
    }
    if (m->n_more >= PLAN_CHUNKS_LIMIT) {
        return malformed(error, "a stage has %zu chunks, not 1 to %u", m->n_more + 1,
                         PLAN_CHUNKS_LIMIT);
    }
    stage->layer_first = m->layer_first;
    stage->layer_last = m->layer_last;
    stage->n_more = (uint32_t)m->n_more;
    for (uint32_t c = 0; c < stage->n_more; c++) {
        stage->more[c] = (PlanLayers){m->more[c]->first, m->more[c]->last};
    }
    stage->ranks = g_new0(PlanRank, m->n_ranks);
    stage->n_ranks = (uint32_t)m->n_ranks;
    for (uint32_t k = 0; k < stage->n_ranks; k++) {
        if (!rank_from_message(m->ranks[k], &stage->ranks[k], error)) {
            return false;
        }
    }
    return true;
}

static bool replica_from_message(const Weft__V1__Replica *m, PlanReplica *replica,
                                 uint32_t *all_ranks, GError **error)
{
    if (m->n_stages < 1 || m->n_stages > STAGES_LIMIT) {
        return malformed(error, "a replica has %zu stages, not 1 to %u", m->n_stages, STAGES_LIMIT);
    }
    replica->stages = g_new0(PlanStage, m->n_stages);
    replica->n_stages = (uint32_t)m->n_stages;
    for (uint32_t s = 0; s < replica->n_stages; s++) {
        if (!stage_from_message(m->stages[s], &replica->stages[s], error)) {
            return false;
        }
        *all_ranks += replica->stages[s].n_ranks;
        if (*all_ranks > ALL_RANKS_LIMIT) {
            return malformed(error, "it has more than %u ranks", ALL_RANKS_LIMIT);
        }
    }
    return true;
}

static bool definition_from_message(const Weft__V1__Definition *m, Definition *d, GError **error)
{
    if (m == NULL) {
        return malformed(error, "it has no definition");
    }
    if (m->numerics > NUMERICS_FAST || m->kv_type >= KV_TYPE_LIMIT ||
        m->file_hash.len != sizeof d->file_hash.bytes) {
        return malformed(error, "numerics %u, KV type %u, file hash of %zu bytes", m->numerics,
                         m->kv_type, m->file_hash.len);
    }
    d->numerics_version = m->numerics_version;
    d->numerics = (NumericsClass)m->numerics;
    d->kv_type = (KvType)m->kv_type;
    d->context = m->context;
    d->wire = m->wire;
    memcpy(d->file_hash.bytes, m->file_hash.data, sizeof d->file_hash.bytes);
    g_autofree char *kind = NULL;
    if (!text_from_message("its exact kind", m->exact_kind, sizeof d->exact_kind - 1, &kind,
                           error)) {
        return false;
    }
    strcpy(d->exact_kind, kind); /* zeros are behind it: the plan is new */
    return true;
}

static bool prediction_from_message(const Weft__V1__Plan *m, PlanPrediction *p, GError **error)
{
    static const char *const bounds[] = {"", "memory", "compute", "link"};
    p->prefill_tokens_per_s = m->predicted_prefill_tokens_per_s;
    p->decode_tokens_per_s = m->predicted_decode_tokens_per_s;
    if (!isfinite(p->prefill_tokens_per_s) || !isfinite(p->decode_tokens_per_s)) {
        return malformed(error, "a predicted speed is not finite");
    }
    for (size_t i = 0; i < G_N_ELEMENTS(bounds); i++) {
        if (g_strcmp0(m->predicted_bound, bounds[i]) == 0) {
            p->bound = bounds[i];
            return true;
        }
    }
    return malformed(error, "the bound is none of memory, compute and link");
}

static bool reasons_from_message(const Weft__V1__Plan *m, Plan *plan, GError **error)
{
    if (m->n_reasons > REASONS_LIMIT) {
        return malformed(error, "it has %zu reasons", m->n_reasons);
    }
    for (size_t i = 0; i < m->n_reasons; i++) {
        char *text = NULL;
        if (!text_from_message("a reason", m->reasons[i], TEXT_LIMIT, &text, error)) {
            return false;
        }
        g_ptr_array_add(plan->reasons, text);
    }
    return true;
}

Plan *plan_from_message(const Weft__V1__Plan *message, GError **error)
{
    if (message == NULL) {
        malformed(error, "it is missing");
        return NULL;
    }
    if (message->n_replicas < 1 || message->n_replicas > REPLICAS_LIMIT) {
        malformed(error, "it has %zu replicas, not 1 to %u", message->n_replicas, REPLICAS_LIMIT);
        return NULL;
    }
    g_autoptr(Plan) plan = g_new0(Plan, 1);
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->streams = message->streams;
    plan->kv_pages = message->kv_pages;
    plan->max_rows = message->max_rows;
    if (!text_from_message("the job", message->job, NAME_LIMIT, &plan->job, error) ||
        !text_from_message("the model", message->model, TEXT_LIMIT, &plan->model, error) ||
        !definition_from_message(message->definition, &plan->definition, error) ||
        !prediction_from_message(message, &plan->predicted, error) ||
        !reasons_from_message(message, plan, error)) {
        return NULL;
    }
    plan->replicas = g_new0(PlanReplica, message->n_replicas);
    plan->n_replicas = (uint32_t)message->n_replicas;
    uint32_t all_ranks = 0;
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        if (!replica_from_message(message->replicas[r], &plan->replicas[r], &all_ranks, error)) {
            return NULL;
        }
    }
    return g_steal_pointer(&plan);
}

uint64_t plan_message_train_total(const Weft__V1__TrainMemory *m)
{
    return m->weights + m->gradients + m->optimizer + m->activations + m->buffers + m->process;
}
