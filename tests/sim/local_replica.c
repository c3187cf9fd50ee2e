#include "tests/sim/local_replica.h"

#include "kernels/kernels.h"
#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "transport/daemon/daemon.h"

#include <string.h>

struct LocalReplica {
    const Gguf *gguf;
    ModelSpec *spec;
    Dtype matrices;
    Plan *plan;
    uint32_t n;
    Shard **shards;
    Engine **engines;
    MainLoop *loop;
    LinkFill *own_fill;
    uint32_t n_ready;
    char *start_error;
    bool ready;
};

static Plan *layout_plan(const ModelSpec *spec, const LocalLayout *layout)
{
    Plan *plan = g_new0(Plan, 1);
    plan->job = g_strdup("job-1");
    plan->model = g_strdup("local");
    plan->definition = (Definition){.numerics_version = 1,
                                    .numerics = layout->numerics,
                                    .kv_type = layout->kv_type,
                                    .context = layout->context ? layout->context : 256};
    plan->streams = layout->streams ? layout->streams : 4;
    plan->kv_pages =
        layout->kv_pages != 0
            ? layout->kv_pages
            : (uint64_t)plan->streams * ((plan->definition.context + KV_BLOCK - 1) / KV_BLOCK);
    plan->max_rows = layout->max_rows ? layout->max_rows : 64;
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->n_replicas = 1;
    plan->replicas = g_new0(PlanReplica, 1);
    plan->replicas[0].n_stages = layout->pp;
    plan->replicas[0].stages = g_new0(PlanStage, layout->pp);
    uint32_t cuts[PLAN_RANKS_LIMIT + 1], layers[PLAN_RANKS_LIMIT + 1], id = 0;
    double even[PLAN_RANKS_LIMIT];
    for (unsigned i = 0; i < PLAN_RANKS_LIMIT; i++) {
        even[i] = 1.0;
    }
    plan_cut(spec->n_layers, even, layout->pp, 1, layers);
    for (uint32_t s = 0; s < layout->pp; s++) {
        PlanStage *stage = &plan->replicas[0].stages[s];
        const double *weight = layout->weight != NULL ? layout->weight : even;
        stage->layer_first = layers[s];
        stage->layer_last = layers[s + 1] - 1;
        stage->n_ranks = layout->tp[s];
        stage->ranks = g_new0(PlanRank, stage->n_ranks);
        for (uint32_t r = 0; r < stage->n_ranks; r++) {
            stage->ranks[r].worker = g_strdup_printf("node%u", id++);
        }
        plan_cut(spec->n_attn_units, weight, stage->n_ranks, 1, cuts);
        for (uint32_t r = 0; r < stage->n_ranks; r++) {
            stage->ranks[r].attn_first = cuts[r];
            stage->ranks[r].attn_count = cuts[r + 1] - cuts[r];
        }
        plan_cut(spec->n_ffn_units, weight, stage->n_ranks, 1, cuts);
        for (uint32_t r = 0; r < stage->n_ranks; r++) {
            stage->ranks[r].ffn_first = cuts[r];
            stage->ranks[r].ffn_count = cuts[r + 1] - cuts[r];
        }
        plan_cut(spec->n_vocab_chunks, weight, stage->n_ranks, 0, cuts);
        for (uint32_t r = 0; r < stage->n_ranks; r++) {
            stage->ranks[r].vocab_first = cuts[r];
            stage->ranks[r].vocab_count = cuts[r + 1] - cuts[r];
        }
    }
    return plan;
}

/* ---- the file's tensors, or what they are rounded to ---- */

static bool round_spec(ModelSpec *spec, Dtype type, GError **error)
{
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        TensorSpec *t = &spec->tensors[i];
        size_t row_bytes = 0;
        if (t->rows > 1 && t->role != ROLE_POSITION_EMBD) {
            dtype_row_bytes(type, t->columns, &row_bytes);
            t->type = type;
            t->size_bytes = (uint64_t)t->rows * row_bytes;
        }
    }
    return model_spec_finish(spec, error);
}

static void *slice_bytes(const LocalReplica *l, const TensorSpec *t, uint32_t slice)
{
    uint8_t *bytes = g_malloc(model_spec_slice_bytes(l->spec, t, slice));
    if (l->matrices == 0 || t->type != l->matrices) {
        gguf_copy_slice(l->gguf, l->spec, t, slice, bytes);
        return bytes;
    }
    const SliceRect rect = model_spec_slice(l->spec, t, slice);
    g_autofree float *floats = g_new(float, (size_t)rect.n_rows *rect.n_cols);
    TensorSpec stored = *t;
    size_t row_bytes = 0;
    stored.type = DTYPE_F32;
    gguf_copy_slice(l->gguf, l->spec, &stored, slice, floats);
    dtype_row_bytes(t->type, rect.n_cols, &row_bytes);
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        quantise_row(t->type, floats + (size_t)r * rect.n_cols, rect.n_cols, bytes + r * row_bytes);
    }
    return bytes;
}

static Shard *load_shard(LocalReplica *l, uint32_t stage, uint32_t rank, const Device *device,
                         GError **error)
{
    Shard *shard = shard_new(device, l->spec, l->plan, 0, stage, rank, error);
    if (shard == NULL) {
        return NULL;
    }
    g_autoptr(GArray) slices = plan_rank_slices(l->plan, l->spec, 0, stage, rank);
    for (guint i = 0; i < slices->len; i++) {
        const SliceRef ref = g_array_index(slices, SliceRef, i);
        const TensorSpec *t = &l->spec->tensors[ref.tensor];
        g_autofree void *bytes = slice_bytes(l, t, ref.slice);
        shard_put(shard, ref.tensor, ref.slice, bytes);
    }
    if (!shard_finish(shard, error)) {
        shard_free(shard);
        return NULL;
    }
    return shard;
}

static void on_ready(const GError *error, void *user)
{
    LocalReplica *l = user;
    if (error != NULL && l->start_error == NULL) {
        l->start_error = g_strdup(error->message);
    }
    if (++l->n_ready == l->n) {
        l->ready = true;
    }
}

static void boot_id_of(uint32_t global, uint8_t out[16])
{
    memset(out, (int)(global + 1), 16);
}

static void start_all(LocalReplica *l, bool seal)
{
    g_autofree EnginePeer *peers = g_new0(EnginePeer, l->n);
    uint8_t secret[32];
    memset(secret, 7, sizeof secret);
    uint32_t i = 0;
    for (uint32_t s = 0; s < l->plan->replicas[0].n_stages; s++) {
        for (uint32_t r = 0; r < l->plan->replicas[0].stages[s].n_ranks; r++, i++) {
            peers[i] = (EnginePeer){.stage = s,
                                    .rank = r,
                                    .worker = l->plan->replicas[0].stages[s].ranks[r].worker,
                                    .address = engine_address(l->engines[i])};
            boot_id_of(i, peers[i].boot_id);
        }
    }
    for (i = 0; i < l->n; i++) {
        engine_start(l->engines[i], secret, peers[i].boot_id, seal, peers, l->n,
                     main_loop_loop(l->loop), on_ready, l);
    }
    if (!main_loop_run_until(l->loop, &l->ready, 20000000)) {
        l->start_error = g_strdup("engines did not greet each other within 20 s");
    }
    for (i = 0; i < l->n; i++) {
        g_bytes_unref(peers[i].address);
    }
}

LocalReplica *local_replica_new(const Gguf *gguf, const LocalLayout *layout, const LinkFill *fill,
                                GError **error)
{
    LocalReplica *l = g_new0(LocalReplica, 1);
    l->gguf = gguf;
    l->loop = main_loop_new();
    l->spec = gguf_model_spec(gguf, error);
    l->matrices = layout->matrices;
    if (l->spec == NULL || (l->matrices != 0 && !round_spec(l->spec, l->matrices, error))) {
        local_replica_free(l);
        return NULL;
    }
    if (fill == NULL) {
        l->own_fill = link_fill_inproc_new();
        fill = l->own_fill;
    }
    l->plan = layout_plan(l->spec, layout);
    for (uint32_t s = 0; s < layout->pp; s++) {
        l->n += layout->tp[s];
    }
    l->shards = g_new0(Shard *, l->n);
    l->engines = g_new0(Engine *, l->n);
    uint32_t i = 0;
    for (uint32_t s = 0; s < layout->pp; s++) {
        for (uint32_t r = 0; r < layout->tp[s]; r++, i++) {
            l->shards[i] =
                load_shard(l, s, r, layout->devices != NULL ? layout->devices[i] : NULL, error);
            const EngineOptions options = {
                .spec = l->spec,
                .plan = l->plan,
                .shard = l->shards[i],
                .stage = s,
                .rank = r,
                .generation = 1,
                .epoch = 1,
                .threads = MAX(layout->threads, 1u),
                .isa = layout->isa,
                .kernels = layout->kernels,
                .fill = fill,
                .crowded = true,
                .direct_trivial = layout->direct,
                .predicted_step_s = layout->predicted_step_s > 0 ? layout->predicted_step_s : 1};
            l->engines[i] = l->shards[i] != NULL ? engine_new(&options, error) : NULL;
            if (l->engines[i] == NULL) {
                local_replica_free(l);
                return NULL;
            }
        }
    }
    start_all(l, !layout->plain);
    if (l->start_error != NULL) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_FAILED, l->start_error);
        local_replica_free(l);
        return NULL;
    }
    return l;
}

void local_replica_free(LocalReplica *l)
{
    if (l == NULL) {
        return;
    }
    for (uint32_t i = 0; l->engines != NULL && i < l->n; i++) {
        engine_free(l->engines[i]);
    }
    for (uint32_t i = 0; l->shards != NULL && i < l->n; i++) {
        shard_free(l->shards[i]);
    }
    g_free(l->engines);
    g_free(l->shards);
    plan_free(l->plan);
    model_spec_free(l->spec);
    if (l->own_fill != NULL) {
        link_fill_free(l->own_fill);
    }
    main_loop_free(l->loop);
    g_free(l->start_error);
    g_free(l);
}

Engine *local_replica_engine(LocalReplica *l, uint32_t global_rank)
{
    return l->engines[global_rank];
}

/* ---- requests ---- */

typedef struct Waiter {
    LocalResult *result;
    GArray *ids, *logprobs, *hashes, *logits, *trace;
    unsigned *left;
    bool *done;
} Waiter;

static void on_token(const EngineToken *t, void *user)
{
    Waiter *w = user;
    if (!t->done) {
        g_array_append_val(w->ids, t->id);
        g_array_append_val(w->logprobs, t->logprob);
        g_array_append_vals(w->hashes, t->row_hash, 1);
        if (t->logits != NULL) {
            gsize size;
            const void *data = g_bytes_get_data(t->logits, &size);
            g_array_append_vals(w->logits, data, (guint)(size / sizeof(float)));
        }
        if (t->trace != NULL) {
            gsize size;
            const void *data = g_bytes_get_data(t->trace, &size);
            g_array_append_vals(w->trace, data, (guint)size);
        }
        return;
    }
    w->result->finish_reason = g_strdup(t->finish_reason);
    w->result->error = t->error != NULL ? g_strdup(t->error->message) : NULL;
    if (--*w->left == 0) {
        *w->done = true;
    }
}

void local_replica_run(LocalReplica *l, const EngineRequest *requests, unsigned n,
                       LocalResult *results)
{
    g_autofree Waiter *w = g_new0(Waiter, n);
    unsigned left = n;
    bool done = false;
    for (unsigned i = 0; i < n; i++) {
        results[i] = (LocalResult){0};
        w[i] = (Waiter){&results[i],
                        g_array_new(FALSE, FALSE, 4),
                        g_array_new(FALSE, FALSE, 4),
                        g_array_new(FALSE, FALSE, 16),
                        g_array_new(FALSE, FALSE, 4),
                        g_array_new(FALSE, FALSE, 1),
                        &left,
                        &done};
        engine_submit(l->engines[0], &requests[i], main_loop_loop(l->loop), on_token, &w[i]);
    }
    if (!main_loop_run_until(l->loop, &done, 60000000)) {
        g_error("requests did not end within 60 s");
    }
    for (unsigned i = 0; i < n; i++) {
        LocalResult *r = &results[i];
        r->n = w[i].ids->len;
        const Hash128 digest = hash128(w[i].hashes->data, (size_t)r->n * 16);
        hash128_hex(&digest, r->digest);
        r->ids = (uint32_t *)(void *)g_array_free(w[i].ids, FALSE);
        r->logprobs = (float *)(void *)g_array_free(w[i].logprobs, FALSE);
        r->hashes = (void *)g_array_free(w[i].hashes, FALSE);
        r->trace_bytes = w[i].trace->len;
        r->trace = (uint8_t *)g_array_free(w[i].trace, FALSE);
        r->logits = (float *)(void *)g_array_free(w[i].logits, FALSE);
    }
}

void local_result_clear(LocalResult *r)
{
    g_free(r->ids);
    g_free(r->logprobs);
    g_free(r->hashes);
    g_free(r->logits);
    g_free(r->trace);
    g_free(r->finish_reason);
    g_free(r->error);
    *r = (LocalResult){0};
}

void local_replica_greedy(LocalReplica *l, const uint32_t *prompt, uint32_t n_prompt,
                          uint32_t n_tokens, LocalResult *result)
{
    const EngineRequest request = {.prompt = prompt, .n_prompt = n_prompt, .max_tokens = n_tokens};
    local_replica_run(l, &request, 1, result);
}
