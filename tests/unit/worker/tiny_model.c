#include "tests/unit/worker/tiny_model.h"

#include "proto/model/blocks.h"
#include "proto/base/checked.h"
#include "proto/base/random.h"
#include "proto/model/model_message.h"

#include <stdio.h>
#include <string.h>

#define HEADER_BYTES 96u /* so that offsets are not 0 */

static TensorSpec *add(ModelSpec *spec, TensorRole role, int32_t layer, Dtype type, uint32_t rows,
                       uint32_t columns)
{
    TensorSpec *t = &spec->tensors[spec->n_tensors++];
    size_t row_bytes = 0;
    g_assert(dtype_row_bytes(type, columns, &row_bytes));
    t->name = g_strdup_printf("t%u.%d", role, layer);
    t->role = role;
    t->layer = layer;
    t->type = type;
    t->rows = rows;
    t->columns = columns;
    t->size_bytes = (uint64_t)row_bytes * rows;
    return t;
}

static void add_layer(ModelSpec *spec, const TinyShape *s, int32_t layer)
{
    uint32_t q = s->n_heads * s->head_size, kv = s->n_kv_heads * s->head_size;
    add(spec, ROLE_ATTN_NORM, layer, DTYPE_F32, 1, s->width);
    add(spec, ROLE_ATTN_Q, layer, s->matrices, q, s->width);
    add(spec, ROLE_ATTN_K, layer, s->matrices, kv, s->width);
    add(spec, ROLE_ATTN_V, layer, s->matrices, kv, s->width);
    if (s->biases) {
        add(spec, ROLE_ATTN_Q_BIAS, layer, DTYPE_F32, 1, q);
        add(spec, ROLE_ATTN_K_BIAS, layer, DTYPE_F32, 1, kv);
        add(spec, ROLE_ATTN_V_BIAS, layer, DTYPE_F32, 1, kv);
    }
    add(spec, ROLE_ATTN_OUT, layer, s->matrices, s->width, q);
    add(spec, ROLE_FFN_NORM, layer, DTYPE_F32, 1, s->width);
    add(spec, ROLE_FFN_GATE, layer, s->matrices, s->ffn_width, s->width);
    add(spec, ROLE_FFN_UP, layer, s->matrices, s->ffn_width, s->width);
    add(spec, ROLE_FFN_DOWN, layer, s->down, s->width, s->ffn_width);
}

static void fill_tensor(uint8_t *bytes, const TensorSpec *t, RandomSeeded *random)
{
    g_autofree float *row = g_new(float, t->columns);
    size_t row_bytes = t->size_bytes / t->rows;
    for (uint32_t r = 0; r < t->rows; r++) {
        for (uint32_t c = 0; c < t->columns; c++) {
            row[c] =
                (float)((double)(random_u64(&random->base) >> 11) / (double)(1ull << 53) - 0.5);
        }
        quantise_row(t->type, row, t->columns, bytes + r * row_bytes);
    }
}

TinyModel *tiny_model_new(const TinyShape *s, uint64_t seed)
{
    TinyModel *model = g_new0(TinyModel, 1);
    ModelSpec *spec = model->spec = g_new0(ModelSpec, 1);
    *spec = (ModelSpec){.family = FAMILY_LLAMA,
                        .name = g_strdup("tiny"),
                        .n_layers = s->n_layers,
                        .width = s->width,
                        .n_heads = s->n_heads,
                        .n_kv_heads = s->n_kv_heads,
                        .head_size = s->head_size,
                        .ffn_width = s->ffn_width,
                        .vocab_size = s->vocab_size,
                        .context = 128,
                        .norm_eps = 1e-5f,
                        .attention_scale = 0.125f,
                        .tied_output = s->tied};
    spec->rope = (RopeSpec){.dims = s->head_size,
                            .freq_base = 10000,
                            .factor = 1,
                            .scaling = s->rope_factors ? ROPE_SCALING_FACTORS : ROPE_SCALING_NONE};
    spec->tensors = weft_alloc(s->n_layers * 12 + 4, sizeof(TensorSpec), "tensors", NULL);
    add(spec, ROLE_TOKEN_EMBD, -1, s->embedding, s->vocab_size, s->width);
    for (uint32_t layer = 0; layer < s->n_layers; layer++) {
        add_layer(spec, s, (int32_t)layer);
    }
    if (s->rope_factors) {
        add(spec, ROLE_ROPE_FACTORS, -1, DTYPE_F32, 1, s->head_size / 2);
    }
    add(spec, ROLE_OUTPUT_NORM, -1, DTYPE_F32, 1, s->width);
    if (!s->tied) {
        add(spec, ROLE_OUTPUT, -1, s->embedding, s->vocab_size, s->width);
    }
    uint64_t at = HEADER_BYTES;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        spec->tensors[i].offset = at;
        at = (at + spec->tensors[i].size_bytes + 31) / 32 * 32;
    }
    model->file_bytes = at;
    GError *error = NULL;
    if (!model_spec_finish(spec, &error)) {
        g_error("%s", error->message);
    }
    memset(spec->file_hash.bytes, 0x5a, sizeof spec->file_hash.bytes);
    spec->file_hash.bytes[0] = (uint8_t)seed;
    model->bytes = g_new0(uint8_t *, spec->n_tensors);
    RandomSeeded random;
    random_seeded_init(&random, seed);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        model->bytes[i] = g_malloc(spec->tensors[i].size_bytes);
        fill_tensor(model->bytes[i], &spec->tensors[i], &random);
    }
    return model;
}

void tiny_model_free(TinyModel *model)
{
    for (uint32_t i = 0; i < model->spec->n_tensors; i++) {
        g_free(model->bytes[i]);
    }
    g_free(model->bytes);
    model_spec_free(model->spec);
    g_free(model);
}

void *tiny_model_slice(const TinyModel *model, uint32_t tensor, uint32_t slice, size_t *size_out)
{
    const TensorSpec *t = &model->spec->tensors[tensor];
    SliceRect rect = model_spec_slice(model->spec, t, slice);
    size_t row_bytes = t->size_bytes / t->rows, before = 0, part = 0;
    g_assert(dtype_row_bytes(t->type, rect.col0, &before) &&
             dtype_row_bytes(t->type, rect.n_cols, &part));
    uint8_t *out = g_malloc(part * rect.n_rows);
    for (uint32_t r = 0; r < rect.n_rows; r++) {
        memcpy(out + r * part, model->bytes[tensor] + (rect.row0 + r) * row_bytes + before, part);
    }
    *size_out = part * rect.n_rows;
    g_assert(*size_out == model_spec_slice_bytes(model->spec, t, slice));
    return out;
}

void tiny_model_row(const TinyModel *model, const TensorSpec *t, uint32_t row, float *out)
{
    size_t row_bytes = t->size_bytes / t->rows;
    dequantise_row(t->type, model->bytes[t - model->spec->tensors] + row * row_bytes, t->columns,
                   out);
}

Weft__V1__Model *tiny_model_message(const TinyModel *model, const char *file_name)
{
    Weft__V1__Model *message = model_to_message(model->spec, true);
    model_message_set_files(message, &file_name, 1);
    for (uint32_t t = 0; t < model->spec->n_tensors; t++) {
        uint32_t n = model->spec->tensors[t].n_slices;
        g_autofree Hash128 *hashes = g_new(Hash128, n);
        for (uint32_t s = 0; s < n; s++) {
            size_t size;
            g_autofree void *bytes = tiny_model_slice(model, t, s, &size);
            hashes[s] = hash128(bytes, size);
        }
        model_message_set_hashes(message, t, hashes, n);
    }
    return message;
}

void tiny_model_write(const TinyModel *model, const char *path)
{
    g_autofree uint8_t *file = g_malloc0(model->file_bytes);
    for (uint32_t i = 0; i < model->spec->n_tensors; i++) {
        memcpy(file + model->spec->tensors[i].offset, model->bytes[i],
               model->spec->tensors[i].size_bytes);
    }
    g_assert(g_file_set_contents(path, (const char *)file, (gssize)model->file_bytes, NULL));
}

static void cut(uint32_t n, const double *weight, uint32_t parts, uint32_t least, uint32_t rank,
                uint32_t *first, uint32_t *count)
{
    uint32_t cuts[PLAN_RANKS_LIMIT + 1];
    plan_cut(n, weight, parts, least, cuts);
    *first = cuts[rank];
    *count = cuts[rank + 1] - cuts[rank];
}

Plan *tiny_plan(const ModelSpec *spec, uint32_t n_stages, const uint32_t *n_ranks,
                const double *weight)
{
    Plan *plan = g_new0(Plan, 1);
    plan->job = g_strdup("job");
    plan->model = g_strdup("tiny.gguf");
    plan->definition =
        (Definition){.numerics_version = 1, .context = 128, .file_hash = spec->file_hash};
    plan->streams = 2;
    plan->kv_pages = 8;
    plan->max_rows = 16;
    plan->reasons = g_ptr_array_new_with_free_func(g_free);
    plan->n_replicas = 1;
    plan->replicas = g_new0(PlanReplica, 1);
    plan->replicas[0].n_stages = n_stages;
    plan->replicas[0].stages = g_new0(PlanStage, n_stages);
    plan->predicted.bound = "memory";
    unsigned worker = 0;
    for (uint32_t s = 0; s < n_stages; s++) {
        PlanStage *stage = &plan->replicas[0].stages[s];
        stage->layer_first = spec->n_layers * s / n_stages;
        stage->layer_last = spec->n_layers * (s + 1) / n_stages - 1;
        stage->n_ranks = n_ranks[s];
        stage->ranks = g_new0(PlanRank, n_ranks[s]);
        for (uint32_t r = 0; r < n_ranks[s]; r++) {
            PlanRank *rank = &stage->ranks[r];
            rank->worker = g_strdup_printf("w%u", worker++);
            cut(spec->n_attn_units, weight, n_ranks[s], 1, r, &rank->attn_first, &rank->attn_count);
            cut(spec->n_ffn_units, weight, n_ranks[s], 1, r, &rank->ffn_first, &rank->ffn_count);
            cut(spec->n_vocab_chunks, weight, n_ranks[s], 0, r, &rank->vocab_first,
                &rank->vocab_count);
        }
    }
    return plan;
}
