/* A shard's memory and the way of a slice into it.
 *
 * One pass over the model's tensors decides both how many bytes a rank needs and where each matrix
 * lies: shard_layout() runs with base NULL to count and with the mapping to place, so the two can
 * never differ. Invariants:
 *   1. every matrix and vector lies in the arena at a multiple of ALIGNMENT and overlaps no other;
 *   2. the arena is zero before the first shard_put(): packed_put() relies on it, and unused lanes
 * of a last panel stay zero weights;
 *   3. a tensor is held once: a tied head on a stage that is first and last is the embedding
 * itself. */
#include "worker/shard/shard.h"

#include "worker/shard/upload.h"

#include "proto/model/blocks.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

#define ALIGNMENT 64u

/* ---- which part of the model is ours ---- */

static bool held_ranges(Shard *shard, const ModelSpec *spec, const Plan *plan, uint32_t replica,
                        uint32_t stage, uint32_t rank)
{
    if (replica >= plan->n_replicas || stage >= plan->replicas[replica].n_stages ||
        rank >= plan->replicas[replica].stages[stage].n_ranks) {
        return false;
    }
    const PlanReplica *of = &plan->replicas[replica];
    const PlanStage *s = &of->stages[stage];
    const PlanRank *r = &s->ranks[rank];
    if (s->layer_last < s->layer_first || s->layer_last >= spec->n_layers || r->attn_count == 0 ||
        r->ffn_count == 0 || r->attn_first >= spec->n_attn_units ||
        r->attn_count > spec->n_attn_units - r->attn_first || r->ffn_first >= spec->n_ffn_units ||
        r->ffn_count > spec->n_ffn_units - r->ffn_first || r->vocab_first > spec->n_vocab_chunks ||
        r->vocab_count > spec->n_vocab_chunks - r->vocab_first) {
        return false;
    }
    shard->spec = spec;
    shard->layer_first = s->layer_first;
    shard->n_layers = s->layer_last - s->layer_first + 1;
    shard->attn_unit_first = r->attn_first;
    shard->n_attn_units = r->attn_count;
    shard->ffn_unit_first = r->ffn_first;
    shard->n_ffn_units = r->ffn_count;
    shard->has_embedding = stage == 0;
    shard->has_head = stage + 1 == of->n_stages;

    uint32_t first, count;
    model_spec_attn_unit_heads(spec, r->attn_first, &shard->head_first, &count);
    model_spec_attn_unit_heads(spec, r->attn_first + r->attn_count - 1, &first, &count);
    shard->n_heads = first + count - shard->head_first;
    model_spec_kv_heads_of(spec, shard->head_first, shard->n_heads, &shard->kv_first,
                           &shard->n_kv_heads);

    if (shard->has_embedding || shard->has_head) {
        uint32_t begin = r->vocab_first * VOCAB_CHUNK;
        uint64_t end = (uint64_t)(r->vocab_first + r->vocab_count) * VOCAB_CHUNK;
        end = MIN(end, spec->vocab_size);
        shard->vocab_first = MIN(begin, spec->vocab_size);
        shard->vocab_count = (uint32_t)end - shard->vocab_first;
    }
    return true;
}

/* First column and number of columns of the own FFN units. */
static void ffn_range(const Shard *shard, uint32_t *first, uint32_t *count)
{
    uint32_t last, n;
    model_spec_ffn_unit(shard->spec, shard->ffn_unit_first, first, &n);
    model_spec_ffn_unit(shard->spec, shard->ffn_unit_first + shard->n_ffn_units - 1, &last, &n);
    *count = last + n - *first;
}

/* The rectangle of a tensor that this shard holds, in the tensor's rows and columns; n_rows 0 =
 * nothing of it. */
static SliceRect held_rect(const Shard *shard, const TensorSpec *t)
{
    uint32_t head = shard->spec->head_size, first, count;
    SliceRect all = {0, t->rows, 0, t->columns};
    SliceRect none = {0, 0, 0, 0};
    if (t->layer >= 0 && ((uint32_t)t->layer < shard->layer_first ||
                          (uint32_t)t->layer - shard->layer_first >= shard->n_layers)) {
        return none;
    }
    bool vector = t->rows == 1;
    switch (t->role) {
    case ROLE_TOKEN_EMBD:
        if (!shard->has_embedding && !(shard->has_head && shard->spec->tied_output)) {
            return none;
        }
        return (SliceRect){shard->vocab_first, shard->vocab_count, 0, t->columns};
    case ROLE_OUTPUT:
        return shard->has_head ? (SliceRect){shard->vocab_first, shard->vocab_count, 0, t->columns}
                               : none;
    case ROLE_POSITION_EMBD:
        return shard->has_embedding ? all : none;
    case ROLE_OUTPUT_NORM:
    case ROLE_OUTPUT_NORM_BIAS:
        return shard->has_head ? all : none;
    case ROLE_ROPE_FACTORS:
    case ROLE_ATTN_NORM:
    case ROLE_ATTN_NORM_BIAS:
    case ROLE_ATTN_OUT_BIAS:
    case ROLE_FFN_NORM:
    case ROLE_FFN_NORM_BIAS:
    case ROLE_FFN_DOWN_BIAS:
        return all;
    case ROLE_ATTN_Q:
    case ROLE_ATTN_Q_BIAS:
        first = shard->head_first * head;
        count = shard->n_heads * head;
        break;
    case ROLE_ATTN_K:
    case ROLE_ATTN_V:
    case ROLE_ATTN_K_BIAS:
    case ROLE_ATTN_V_BIAS:
        first = shard->kv_first * head;
        count = shard->n_kv_heads * head;
        break;
    case ROLE_ATTN_OUT:
        return (SliceRect){0, t->rows, shard->head_first * head, shard->n_heads * head};
    case ROLE_FFN_GATE:
    case ROLE_FFN_UP:
    case ROLE_FFN_UP_BIAS:
        ffn_range(shard, &first, &count);
        break;
    case ROLE_FFN_DOWN:
        ffn_range(shard, &first, &count);
        return (SliceRect){0, t->rows, first, count};
    default:
        return none;
    }
    return vector ? (SliceRect){0, 1, first, count} : (SliceRect){first, count, 0, t->columns};
}

/* ---- where it lies ---- */

static PackedMatrix *matrix_of(Shard *shard, LayerWeights *layer, TensorRole role)
{
    switch (role) {
    case ROLE_TOKEN_EMBD:
        return &shard->embedding;
    case ROLE_POSITION_EMBD:
        return &shard->positions;
    case ROLE_OUTPUT:
        return &shard->output;
    case ROLE_ATTN_Q:
        return &layer->q;
    case ROLE_ATTN_K:
        return &layer->k;
    case ROLE_ATTN_V:
        return &layer->v;
    case ROLE_ATTN_OUT:
        return &layer->attn_out;
    case ROLE_FFN_GATE:
        return &layer->gate;
    case ROLE_FFN_UP:
        return &layer->up;
    case ROLE_FFN_DOWN:
        return &layer->down;
    default:
        return NULL;
    }
}

static float **vector_of(Shard *shard, LayerWeights *layer, TensorRole role)
{
    switch (role) {
    case ROLE_OUTPUT_NORM:
        return &shard->output_norm;
    case ROLE_OUTPUT_NORM_BIAS:
        return &shard->output_norm_bias;
    case ROLE_ROPE_FACTORS:
        return &shard->rope_factors;
    case ROLE_ATTN_NORM:
        return &layer->attn_norm;
    case ROLE_FFN_NORM:
        return &layer->ffn_norm;
    case ROLE_ATTN_Q_BIAS:
        return &layer->q_bias;
    case ROLE_ATTN_K_BIAS:
        return &layer->k_bias;
    case ROLE_ATTN_V_BIAS:
        return &layer->v_bias;
    case ROLE_ATTN_NORM_BIAS:
        return &layer->attn_norm_bias;
    case ROLE_ATTN_OUT_BIAS:
        return &layer->attn_out_bias;
    case ROLE_FFN_NORM_BIAS:
        return &layer->ffn_norm_bias;
    case ROLE_FFN_UP_BIAS:
        return &layer->up_bias;
    case ROLE_FFN_DOWN_BIAS:
        return &layer->down_bias;
    default:
        return NULL;
    }
}

/* Takes `bytes` at the cursor, rounded up to ALIGNMENT; false on overflow. The place is NULL while
 * counting. */
static bool arena_take(uint8_t *base, size_t *cursor, size_t bytes, void **place)
{
    size_t end;
    if (!sz_add(*cursor, bytes, &end) || !sz_add(end, ALIGNMENT - 1, &end)) {
        return false;
    }
    *place = base && bytes ? base + *cursor : NULL;
    *cursor = end / ALIGNMENT * ALIGNMENT;
    return true;
}

/* One tensor's part: sizes its matrix or vector and takes its bytes. */
static bool layout_tensor(Shard *shard, LayerWeights *layer, const TensorSpec *t, uint8_t *base,
                          size_t *cursor, GError **error)
{
    SliceRect rect = held_rect(shard, t);
    void *place;
    size_t bytes;
    float **vector = vector_of(shard, layer, t->role);
    if (rect.n_rows == 0 && !(matrix_of(shard, layer, t->role) && rect.n_cols)) {
        return true;
    }
    if (vector) {
        if (!sz_mul((size_t)rect.n_rows * rect.n_cols, sizeof(float), &bytes) ||
            !arena_take(base, cursor, bytes, &place)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY, "tensor %s: its size overflows",
                        t->name);
            return false;
        }
        *vector = place;
        return true;
    }
    PackedMatrix *m = matrix_of(shard, layer, t->role);
    if (!m) {
        return true;
    }
    *m = (PackedMatrix){.type = t->type, .n_out = rect.n_rows, .n_in = rect.n_cols};
    m->panel_bytes = packed_panel_bytes(t->type, rect.n_cols);
    if (m->panel_bytes == 0) {
        const char *name = dtype_info(t->type)->name;
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tensor %s: %u columns of type %s (%u) cannot be packed by this build: use a "
                    "model of a supported type",
                    t->name, rect.n_cols, name ? name : "unknown", (unsigned)t->type);
        return false;
    }
    size_t panels = ((size_t)rect.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    if (!sz_mul(panels, m->panel_bytes, &bytes) || !arena_take(base, cursor, bytes, &place)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY, "tensor %s: its packed size overflows",
                    t->name);
        return false;
    }
    m->data = place;
    return true;
}

/* All tensors: the arena's size, and with `base` every pointer into it. Without layers[] (counting)
 * each layer is a scratch one. */
static bool shard_layout(Shard *shard, uint8_t *base, size_t *bytes_out, GError **error)
{
    size_t cursor = 0;
    for (uint32_t i = 0; i < shard->spec->n_tensors; i++) {
        const TensorSpec *t = &shard->spec->tensors[i];
        LayerWeights scratch = {0}, *layer = &scratch;
        if (shard->layers && t->layer >= 0) {
            uint32_t at = (uint32_t)t->layer - shard->layer_first;
            if ((uint32_t)t->layer < shard->layer_first || at >= shard->n_layers) {
                continue;
            }
            layer = &shard->layers[at];
        }
        if (!layout_tensor(shard, layer, t, base, &cursor, error)) {
            return false;
        }
    }
    *bytes_out = cursor;
    return true;
}

size_t shard_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                   uint32_t rank)
{
    Shard counting = {0};
    size_t bytes = 0;
    if (!held_ranges(&counting, spec, plan, replica, stage, rank) ||
        !shard_layout(&counting, NULL, &bytes, NULL)) {
        return 0;
    }
    return bytes;
}

/* Bytes of a device's buffers for slices: the largest packed one, or vector. */
static size_t largest_piece(const Shard *shard, const ModelSpec *spec)
{
    size_t most = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (held_rect(shard, t).n_rows == 0) {
            continue;
        }
        for (uint32_t slice = 0; slice < t->n_slices; slice++) {
            const SliceRect rect = model_spec_slice(spec, t, slice);
            const size_t panels = (rect.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
            const size_t bytes =
                MAX(panels * packed_panel_bytes(t->type, rect.n_cols),
                    t->rows == 1 ? sizeof(float) * (size_t)rect.n_rows * rect.n_cols : 0);
            most = MAX(most, bytes);
        }
    }
    return most;
}

/* A slice's rows are whole panels: it is packed by itself and copied as it is. */
static bool cuts_at_panels(const Device *device, const ModelSpec *spec, GError **error)
{
    if (spec->head_size % PANEL_ROWS == 0) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE,
                "%s:%u serves models whose head size is a multiple of %u, this one has %u: use "
                "workers with --device cpu",
                device->info.kind, device->info.index, PANEL_ROWS, spec->head_size);
    return false;
}

static bool zero_arena(Shard *shard, GError **error)
{
    const Device *d = shard->device;
    DeviceStream *stream = NULL;
    DeviceStatus status = d->api->stream_new(d->handle, &stream);
    if (status == DEVICE_OK) {
        status = d->api->fill(stream, shard->arena, 0, shard->arena_bytes);
    }
    if (status == DEVICE_OK) {
        status = d->api->stream_wait(stream);
    }
    if (stream != NULL) {
        d->api->stream_free(stream);
    }
    return device_check(d, status, "memory for weights", error);
}

static bool map_on_device(Shard *shard, GError **error)
{
    const Device *d = shard->device;
    shard->upload = shard_upload_new(d, largest_piece(shard, shard->spec), error);
    return shard->upload &&
           device_check(d, d->api->alloc(d->handle, shard->arena_bytes, &shard->arena),
                        "memory for weights", error) &&
           zero_arena(shard, error);
}

static bool host_rope_factors(Shard *shard, GError **error)
{
    if (shard->device && shard->rope_factors) {
        shard->rope_factors =
            weft_alloc(shard->spec->rope.dims / 2, sizeof(float), "rope factors", error);
        return shard->rope_factors != NULL;
    }
    return true;
}

Shard *shard_new(const Device *device, const ModelSpec *spec, const Plan *plan, uint32_t replica,
                 uint32_t stage, uint32_t rank, GError **error)
{
    Shard *shard = weft_alloc(1, sizeof *shard, "shard", error);
    if (!shard) {
        return NULL;
    }
    if (!held_ranges(shard, spec, plan, replica, stage, rank)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "replica %u stage %u rank %u: not in the plan, or its layers or units are "
                    "outside the model: plan again",
                    replica, stage, rank);
        weft_free(shard);
        return NULL;
    }
    if (!shard_layout(shard, NULL, &shard->arena_bytes, error) ||
        (device && !cuts_at_panels(device, spec, error))) {
        weft_free(shard);
        return NULL;
    }
    shard->device = device;
    shard->layers = weft_alloc(shard->n_layers, sizeof *shard->layers, "layer table", error);
    if (!shard->layers) {
        shard_free(shard);
        return NULL;
    }
    if (!device) {
        shard->arena = weft_map(shard->arena_bytes, "weights", error);
    }
    if (device ? !map_on_device(shard, error) : !shard->arena) {
        shard_free(shard);
        return NULL;
    }
    size_t bytes;
    bool placed = shard_layout(shard, shard->arena, &bytes, NULL);
    g_assert(placed && bytes == shard->arena_bytes);
    if (!host_rope_factors(shard, error)) {
        shard->rope_factors = NULL;
        shard_free(shard);
        return NULL;
    }
    return shard;
}

/* ---- the layout's hash ---- */

/* What becomes of fixed bytes of the type: another way of packing gives another hash. */
static void hash_packing(Hasher *hasher, Dtype type, bool is_vector)
{
    enum { ROWS = PANEL_ROWS + 1, COLUMNS = 256 };
    uint8_t file[ROWS * COLUMNS * sizeof(float)];
    _Alignas(ALIGNMENT) uint8_t packed[2 * PANEL_ROWS * COLUMNS * sizeof(float)] = {0};
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof file; i++) {
        x = x * 1664525u + 1013904223u;
        file[i] = (uint8_t)(x >> 24);
    }
    size_t row_bytes = 0;
    if (!dtype_row_bytes(type, COLUMNS, &row_bytes)) {
        return;
    }
    if (is_vector) {
        float values[COLUMNS];
        dequantise_row(type, file, COLUMNS, values);
        hasher_update(hasher, values, sizeof values);
        return;
    }
    PackedMatrix m = {.type = type,
                      .n_out = ROWS,
                      .n_in = COLUMNS,
                      .data = packed,
                      .panel_bytes = packed_panel_bytes(type, COLUMNS)};
    g_assert(2 * m.panel_bytes <= sizeof packed);
    packed_put(&m, file, row_bytes, 0, ROWS, 0, COLUMNS);
    hasher_update(hasher, packed, sizeof packed);
}

Hash128 shard_layout_hash(const Shard *shard)
{
    bool seen[2][DTYPE_LIMIT] = {0};
    Hasher *hasher = hasher_new();
    for (uint32_t i = 0; i < shard->spec->n_tensors; i++) {
        const TensorSpec *t = &shard->spec->tensors[i];
        const SliceRect rect = held_rect(shard, t);
        LayerWeights none = {0}, *layer = &none;
        if (rect.n_rows == 0) {
            continue;
        }
        if (t->layer >= 0) {
            layer = &shard->layers[(uint32_t)t->layer - shard->layer_first];
        }
        float **vector = vector_of((Shard *)shard, layer, t->role);
        const PackedMatrix *m = matrix_of((Shard *)shard, layer, t->role);
        const void *at = vector ? (const void *)*vector : m ? m->data : NULL;
        if (at) {
            const uint64_t place[] = {t->role,
                                      t->type,
                                      rect.row0,
                                      rect.n_rows,
                                      rect.col0,
                                      rect.n_cols,
                                      m ? m->panel_bytes : 0,
                                      (uint64_t)((const uint8_t *)at - (uint8_t *)shard->arena)};
            hasher_update(hasher, place, sizeof place);
        }
        if (at && !seen[vector != NULL][t->type]) {
            seen[vector != NULL][t->type] = true;
            hash_packing(hasher, t->type, vector != NULL);
        }
    }
    hasher_update(hasher, &shard->arena_bytes, sizeof shard->arena_bytes);
    const Hash128 hash = hasher_finish(hasher);
    hasher_free(hasher);
    return hash;
}

bool shard_finish(Shard *shard, GError **error)
{
    const bool ok = !shard->upload || shard_upload_finish(shard->upload, error);
    shard_upload_free(shard->upload);
    shard->upload = NULL;
    return ok;
}

void shard_free(Shard *shard)
{
    if (!shard) {
        return;
    }
    shard_upload_free(shard->upload);
    if (shard->device) {
        shard->device->api->free(shard->device->handle, shard->arena);
        weft_free(shard->layers ? shard->rope_factors : NULL);
    } else if (shard->arena) {
        weft_unmap(shard->arena, shard->arena_bytes);
    }
    weft_free(shard->layers);
    weft_free(shard);
}

const PackedMatrix *shard_head(const Shard *shard)
{
    return shard->spec->tied_output ? &shard->embedding : &shard->output;
}

/* ---- the way in ---- */

static void put_vector(Shard *shard, const TensorSpec *t, float *to, const void *bytes, uint32_t n)
{
    unsigned slot;
    if (!shard->device || t->role == ROLE_ROPE_FACTORS) {
        dequantise_row(t->type, bytes, n, to);
        return;
    }
    float *packed = shard_upload_take(shard->upload, &slot);
    if (packed) {
        dequantise_row(t->type, bytes, n, packed);
        shard_upload_send(shard->upload, slot, to, sizeof(float) * n, sizeof(float) * n, 1);
    }
}

static void put_rect(Shard *shard, PackedMatrix *m, const void *bytes, size_t row_bytes,
                     SliceRect at)
{
    unsigned slot;
    if (!shard->device) {
        packed_put(m, bytes, row_bytes, at.row0, at.n_rows, at.col0, at.n_cols);
        return;
    }
    PackedMatrix piece = {.type = m->type,
                          .n_out = at.n_rows,
                          .n_in = at.n_cols,
                          .panel_bytes = packed_panel_bytes(m->type, at.n_cols)};
    const size_t panels = (at.n_rows + PANEL_ROWS - 1) / PANEL_ROWS;
    g_assert(at.row0 % PANEL_ROWS == 0); /* cuts_at_panels() */
    piece.data = shard_upload_take(shard->upload, &slot);
    if (piece.data) {
        memset(piece.data, 0, panels * piece.panel_bytes);
        packed_put(&piece, bytes, row_bytes, 0, at.n_rows, 0, at.n_cols);
        shard_upload_send(shard->upload, slot,
                          m->data + at.row0 / PANEL_ROWS * m->panel_bytes +
                              packed_panel_bytes(m->type, at.col0),
                          m->panel_bytes, piece.panel_bytes, panels);
    }
}

void shard_put(Shard *shard, uint32_t tensor_index, uint32_t slice, const void *bytes)
{
    g_assert(tensor_index < shard->spec->n_tensors);
    const TensorSpec *t = &shard->spec->tensors[tensor_index];
    g_assert(slice < t->n_slices);
    SliceRect held = held_rect(shard, t), put = model_spec_slice(shard->spec, t, slice);
    /* The caller takes slices from plan_rank_slices(), which lists held ones only. */
    g_assert(put.row0 >= held.row0 && put.row0 + put.n_rows <= held.row0 + held.n_rows);
    g_assert(put.col0 >= held.col0 && put.col0 + put.n_cols <= held.col0 + held.n_cols);

    LayerWeights *layer =
        t->layer >= 0 ? &shard->layers[(uint32_t)t->layer - shard->layer_first] : NULL;
    LayerWeights unused = {0};
    layer = layer ? layer : &unused;
    float **vector = vector_of(shard, layer, t->role);
    if (vector) {
        /* 1-D: one row in ModelSpec, so the element is its column. */
        put_vector(shard, t, *vector + (put.row0 - held.row0) + (put.col0 - held.col0), bytes,
                   put.n_rows * put.n_cols);
        return;
    }
    PackedMatrix *m = matrix_of(shard, layer, t->role);
    g_assert(m);
    size_t row_bytes = 0;
    bool whole_blocks = dtype_row_bytes(t->type, put.n_cols, &row_bytes);
    g_assert(whole_blocks);
    put_rect(shard, m, bytes, row_bytes,
             (SliceRect){put.row0 - held.row0, put.n_rows, put.col0 - held.col0, put.n_cols});
}
