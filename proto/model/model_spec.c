/* Dimensions in, units and cuts out (NUMERICS 3). Everything here is computed again by each worker
 * from what it was sent, so nothing may trust the dimensions: every limit is checked before it is
 * used, and the products below then fit 64 bits by a wide margin. */
#include "proto/model/model_spec.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/plan/tree.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS_LIMIT 4096u
#define WIDTH_LIMIT (1u << 20)
#define HEADS_LIMIT 4096u
#define HEAD_SIZE_LIMIT 256u /* attention.h */
#define FFN_LIMIT (1u << 22)
#define VOCAB_LIMIT (1u << 24)
#define CONTEXT_LIMIT (1u << 28)
#define TENSORS_LIMIT (1u << 20)
#define SPLIT_FILES_LIMIT 1024u

void model_spec_free(ModelSpec *spec)
{
    if (spec == NULL) {
        return;
    }
    for (uint32_t i = 0; spec->tensors != NULL && i < spec->n_tensors; i++) {
        g_free(spec->tensors[i].name);
    }
    weft_free(spec->tensors);
    g_free(spec->name);
    g_free(spec);
}

static bool fail(const ModelSpec *spec, GError **error, const char *format, ...)
    G_GNUC_PRINTF(3, 4);

static bool fail(const ModelSpec *spec, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "model %s: %s; this model cannot be run",
                spec->name != NULL ? spec->name : "?", what);
    return false;
}

/* ---- dimensions -------------------------------------------------------------------------------
 */

static bool check_count(const ModelSpec *spec, const char *what, uint32_t value, uint32_t limit,
                        GError **error)
{
    return (value >= 1 && value <= limit) ||
           fail(spec, error, "%s is %u, not 1 to %u", what, value, limit);
}

static bool check_rope(const ModelSpec *spec, GError **error)
{
    const RopeSpec *rope = &spec->rope;
    if (spec->family == FAMILY_GPT2) {
        return (rope->dims == 0 && rope->scaling == ROPE_SCALING_NONE) ||
               fail(spec, error, "rope rotates %u elements, but a gpt2 model has none", rope->dims);
    }
    if ((uint32_t)rope->pairing > ROPE_HALVES || (uint32_t)rope->scaling > ROPE_SCALING_FACTORS) {
        return fail(spec, error, "rope pairing %u with scaling %u is unknown",
                    (unsigned)rope->pairing, (unsigned)rope->scaling);
    }
    if (rope->dims < 2 || rope->dims % 2 != 0 || rope->dims > spec->head_size) {
        return fail(spec, error, "rope rotates %u elements of heads of %u", rope->dims,
                    spec->head_size);
    }
    if (!(rope->freq_base >= 1.0 && rope->freq_base <= 1e12) ||
        !(rope->factor >= 1e-3 && rope->factor <= 1e6)) {
        return fail(spec, error, "rope has base %g and factor %g", rope->freq_base, rope->factor);
    }
    if (rope->scaling == ROPE_SCALING_YARN) {
        if (rope->original_context < 1 || rope->original_context > CONTEXT_LIMIT) {
            return fail(spec, error, "yarn rope has an original context of %u",
                        rope->original_context);
        }
        const double values[] = {rope->yarn_ext_factor, rope->yarn_attn_factor,
                                 rope->yarn_beta_fast, rope->yarn_beta_slow};
        for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
            if (!(values[i] >= 0.0 && values[i] <= 1e6)) {
                return fail(spec, error, "yarn rope has the setting %g", values[i]);
            }
        }
    }
    return true;
}

static bool check_dimensions(const ModelSpec *spec, GError **error)
{
    if (spec->family != FAMILY_LLAMA && spec->family != FAMILY_GPT2) {
        return fail(spec, error, "family %u is not supported, llama and gpt2 are",
                    (unsigned)spec->family);
    }
    if (spec->attention != ATTENTION_CAUSAL || spec->cache != CACHE_KV ||
        spec->output != OUTPUT_LOGITS) {
        return fail(spec, error, "attention %u, cache %u, output %u do not fit a language model",
                    (unsigned)spec->attention, (unsigned)spec->cache, (unsigned)spec->output);
    }
    if (spec->n_experts != 0 || spec->n_experts_used != 0) {
        return fail(spec, error, "it has %u experts, and expert models are not supported",
                    spec->n_experts);
    }
    if (!check_count(spec, "the number of layers", spec->n_layers, LAYERS_LIMIT, error) ||
        !check_count(spec, "the width", spec->width, WIDTH_LIMIT, error) ||
        !check_count(spec, "the number of heads", spec->n_heads, HEADS_LIMIT, error) ||
        !check_count(spec, "the number of KV heads", spec->n_kv_heads, spec->n_heads, error) ||
        !check_count(spec, "the head size", spec->head_size, HEAD_SIZE_LIMIT, error) ||
        !check_count(spec, "the FFN width", spec->ffn_width, FFN_LIMIT, error) ||
        !check_count(spec, "the vocabulary", spec->vocab_size, VOCAB_LIMIT, error) ||
        !check_count(spec, "the context", spec->context, CONTEXT_LIMIT, error)) {
        return false;
    }
    if (spec->n_heads % spec->n_kv_heads != 0) {
        return fail(spec, error, "%u heads do not share %u KV heads evenly", spec->n_heads,
                    spec->n_kv_heads);
    }
    if (!(spec->norm_eps > 0.0f && spec->norm_eps < 1.0f) ||
        !(spec->attention_scale > 0.0f && spec->attention_scale < 1e3f)) {
        return fail(spec, error, "norm eps is %g and attention scale %g", (double)spec->norm_eps,
                    (double)spec->attention_scale);
    }
    return check_rope(spec, error);
}

/* ---- units ------------------------------------------------------------------------------------
 */

static uint32_t greatest_divisor(uint32_t a, uint32_t b)
{
    while (b != 0) {
        uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static uint32_t ceil_div(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* NUMERICS 3, "block": over the tensors whose contraction is cut, in all layers. */
static uint32_t cut_block(const ModelSpec *spec)
{
    uint32_t block = 1;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (t->role == ROLE_ATTN_OUT || t->role == ROLE_FFN_DOWN) {
            block = MAX(block, dtype_info(t->type)->block);
        }
    }
    return block;
}

static bool fill_units(ModelSpec *spec, GError **error)
{
    uint32_t block = cut_block(spec);
    uint32_t heads = spec->n_heads, size = spec->head_size;
    uint32_t g = block / greatest_divisor(size, block); /* lcm(size, block) / size */
    while (g * size < 256 && heads % (2 * g) == 0 && heads / (2 * g) >= 8) {
        g *= 2;
    }
    uint32_t width = spec->ffn_width;
    uint32_t w = MAX(256u, block);
    while (width / w < 8 && w / 2 >= 32 && (w / 2) % block == 0) {
        w /= 2;
    }
    while (ceil_div(width, w) > TREE_LEAVES_LIMIT) {
        w *= 2;
    }
    spec->attn_unit_heads = g;
    spec->n_attn_units = ceil_div(heads, g);
    spec->ffn_unit_width = w;
    spec->n_ffn_units = ceil_div(width, w);
    spec->n_vocab_chunks = ceil_div(spec->vocab_size, VOCAB_CHUNK);
    if (spec->n_attn_units > TREE_LEAVES_LIMIT) {
        return fail(spec, error, "%u heads of %u make %u attention units, more than %u", heads,
                    size, spec->n_attn_units, TREE_LEAVES_LIMIT);
    }
    return true;
}

/* ---- tensors ----------------------------------------------------------------------------------
 */

typedef enum Need { NEVER, MAYBE, ALWAYS } Need;

typedef struct RoleRow {
    const char *name;
    TensorCut cut;
    bool is_vector, per_layer;
    Need llama, gpt2;
} RoleRow;

static const RoleRow role_table[ROLE_LIMIT] = {
    [ROLE_TOKEN_EMBD] = {"token embedding", CUT_VOCAB, false, false, ALWAYS, ALWAYS},
    [ROLE_POSITION_EMBD] = {"position embedding", CUT_WHOLE, false, false, NEVER, ALWAYS},
    [ROLE_ATTN_NORM] = {"attention norm", CUT_WHOLE, true, true, ALWAYS, ALWAYS},
    [ROLE_ATTN_NORM_BIAS] = {"attention norm bias", CUT_WHOLE, true, true, NEVER, ALWAYS},
    [ROLE_ATTN_Q] = {"query projection", CUT_Q_UNITS, false, true, ALWAYS, ALWAYS},
    [ROLE_ATTN_K] = {"key projection", CUT_KV_HEADS, false, true, ALWAYS, ALWAYS},
    [ROLE_ATTN_V] = {"value projection", CUT_KV_HEADS, false, true, ALWAYS, ALWAYS},
    [ROLE_ATTN_Q_BIAS] = {"query bias", CUT_Q_UNITS, true, true, MAYBE, ALWAYS},
    [ROLE_ATTN_K_BIAS] = {"key bias", CUT_KV_HEADS, true, true, MAYBE, ALWAYS},
    [ROLE_ATTN_V_BIAS] = {"value bias", CUT_KV_HEADS, true, true, MAYBE, ALWAYS},
    [ROLE_ATTN_OUT] = {"attention output", CUT_ATTN_UNITS, false, true, ALWAYS, ALWAYS},
    [ROLE_ATTN_OUT_BIAS] = {"attention output bias", CUT_WHOLE, true, true, NEVER, ALWAYS},
    [ROLE_FFN_NORM] = {"FFN norm", CUT_WHOLE, true, true, ALWAYS, ALWAYS},
    [ROLE_FFN_NORM_BIAS] = {"FFN norm bias", CUT_WHOLE, true, true, NEVER, ALWAYS},
    [ROLE_FFN_GATE] = {"FFN gate", CUT_FFN_ROWS, false, true, ALWAYS, NEVER},
    [ROLE_FFN_UP] = {"FFN up projection", CUT_FFN_ROWS, false, true, ALWAYS, ALWAYS},
    [ROLE_FFN_UP_BIAS] = {"FFN up bias", CUT_FFN_ROWS, true, true, NEVER, ALWAYS},
    [ROLE_FFN_DOWN] = {"FFN down projection", CUT_FFN_COLS, false, true, ALWAYS, ALWAYS},
    [ROLE_FFN_DOWN_BIAS] = {"FFN down bias", CUT_WHOLE, true, true, NEVER, ALWAYS},
    [ROLE_ROPE_FACTORS] = {"rope factors", CUT_WHOLE, true, false, MAYBE, NEVER},
    [ROLE_OUTPUT_NORM] = {"output norm", CUT_WHOLE, true, false, ALWAYS, ALWAYS},
    [ROLE_OUTPUT_NORM_BIAS] = {"output norm bias", CUT_WHOLE, true, false, NEVER, ALWAYS},
    [ROLE_OUTPUT] = {"output projection", CUT_VOCAB, false, false, MAYBE, MAYBE},
};

static Need role_need(const ModelSpec *spec, TensorRole role)
{
    return spec->family == FAMILY_GPT2 ? role_table[role].gpt2 : role_table[role].llama;
}

void model_spec_shape(const ModelSpec *spec, TensorRole role, uint32_t *rows, uint32_t *columns)
{
    uint32_t q = spec->n_heads * spec->head_size, kv = spec->n_kv_heads * spec->head_size;
    *rows = 1;
    *columns = spec->width;
    switch (role) {
    case ROLE_TOKEN_EMBD:
    case ROLE_OUTPUT:
        *rows = spec->vocab_size;
        break;
    case ROLE_ATTN_Q:
        *rows = q;
        break;
    case ROLE_ATTN_K:
    case ROLE_ATTN_V:
        *rows = kv;
        break;
    case ROLE_ATTN_Q_BIAS:
        *columns = q;
        break;
    case ROLE_ATTN_K_BIAS:
    case ROLE_ATTN_V_BIAS:
        *columns = kv;
        break;
    case ROLE_ATTN_OUT:
        *rows = spec->width;
        *columns = q;
        break;
    case ROLE_FFN_GATE:
    case ROLE_FFN_UP:
        *rows = spec->ffn_width;
        break;
    case ROLE_FFN_DOWN:
        *rows = spec->width;
        *columns = spec->ffn_width;
        break;
    case ROLE_ROPE_FACTORS:
        *columns = spec->rope.dims / 2;
        break;
    case ROLE_POSITION_EMBD:
        *rows = spec->context;
        break;
    case ROLE_FFN_UP_BIAS:
        *columns = spec->ffn_width;
        break;
    case ROLE_ATTN_NORM:
    case ROLE_ATTN_NORM_BIAS:
    case ROLE_ATTN_OUT_BIAS:
    case ROLE_FFN_NORM:
    case ROLE_FFN_NORM_BIAS:
    case ROLE_FFN_DOWN_BIAS:
    case ROLE_OUTPUT_NORM:
    case ROLE_OUTPUT_NORM_BIAS:
    case ROLE_LIMIT:
        break;
    }
}

/* Global tensors before the layers, layer tensors by layer, global tensors behind them. */
static uint64_t canonical_key(TensorRole role, int32_t layer)
{
    uint64_t place = layer >= 0                   ? (uint64_t)layer + 1
                     : role <= ROLE_POSITION_EMBD ? 0
                                                  : G_MAXINT32 + 1ull;
    return place << 8 | (uint64_t)role;
}

static int compare_canonical(const void *a, const void *b)
{
    const TensorSpec *x = a, *y = b;
    uint64_t p = canonical_key(x->role, x->layer), q = canonical_key(y->role, y->layer);
    return (p > q) - (p < q);
}

static uint32_t slices_of_cut(const ModelSpec *spec, TensorCut cut)
{
    switch (cut) {
    case CUT_Q_UNITS:
    case CUT_ATTN_UNITS:
        return spec->n_attn_units;
    case CUT_KV_HEADS:
        return spec->n_kv_heads;
    case CUT_FFN_ROWS:
    case CUT_FFN_COLS:
        return spec->n_ffn_units;
    case CUT_VOCAB:
        return spec->n_vocab_chunks;
    case CUT_WHOLE:
        break;
    }
    return 1;
}

static bool check_role(const ModelSpec *spec, const TensorSpec *t, GError **error)
{
    if (t->name == NULL || (uint32_t)t->role >= ROLE_LIMIT) {
        return fail(spec, error, "a tensor has the unknown role %u", (unsigned)t->role);
    }
    if (role_need(spec, t->role) == NEVER) {
        return fail(spec, error, "tensor %s is a %s, which this family has not", t->name,
                    role_table[t->role].name);
    }
    bool in_layer = role_table[t->role].per_layer;
    if (in_layer ? t->layer < 0 || t->layer >= (int32_t)spec->n_layers : t->layer != -1) {
        return fail(spec, error, "tensor %s (%s) belongs to layer %d of %u", t->name,
                    role_table[t->role].name, t->layer, spec->n_layers);
    }
    if (dtype_info(t->type)->name == NULL) {
        return fail(spec, error, "tensor %s has weights of the unknown type %u", t->name,
                    (unsigned)t->type);
    }
    return true;
}

static bool check_tensor(const ModelSpec *spec, const TensorSpec *t, GError **error)
{
    uint32_t rows, columns;
    model_spec_shape(spec, t->role, &rows, &columns);
    const char *type = dtype_info(t->type)->name;
    if (t->rows != rows || t->columns != columns) {
        return fail(spec, error, "tensor %s is %u x %u, not %u x %u", t->name, t->rows, t->columns,
                    rows, columns);
    }
    if (role_table[t->role].is_vector && t->type != DTYPE_F32) {
        return fail(spec, error, "tensor %s is stored as %s, not F32", t->name, type);
    }
    size_t row_bytes, size_bytes;
    uint64_t end;
    if (!dtype_row_bytes(t->type, columns, &row_bytes) || !sz_mul(row_bytes, rows, &size_bytes)) {
        return fail(spec, error,
                    "rows of tensor %s have %u elements, which %s blocks of %u cannot hold",
                    t->name, columns, type, dtype_info(t->type)->block);
    }
    if (t->size_bytes != size_bytes) {
        return fail(spec, error, "tensor %s has %" G_GUINT64_FORMAT " bytes, not %zu", t->name,
                    t->size_bytes, size_bytes);
    }
    if (t->file >= SPLIT_FILES_LIMIT || __builtin_add_overflow(t->offset, t->size_bytes, &end)) {
        return fail(spec, error, "tensor %s lies at %" G_GUINT64_FORMAT " in file %u", t->name,
                    t->offset, t->file);
    }
    return true;
}

static bool has_tensor(const ModelSpec *spec, TensorRole role, int32_t layer)
{
    return model_spec_tensor(spec, role, layer) != NULL;
}

static bool check_needed(const ModelSpec *spec, GError **error)
{
    for (uint32_t role = 0; role < ROLE_LIMIT; role++) {
        const RoleRow *row = &role_table[role];
        int32_t first = row->per_layer ? 0 : -1;
        int32_t last = row->per_layer ? (int32_t)spec->n_layers - 1 : -1;
        for (int32_t layer = first; layer <= last; layer++) {
            if (role_need(spec, (TensorRole)role) == ALWAYS &&
                !has_tensor(spec, (TensorRole)role, layer)) {
                return row->per_layer
                           ? fail(spec, error, "the %s of layer %d is missing", row->name, layer)
                           : fail(spec, error, "the %s is missing", row->name);
            }
        }
    }
    if (spec->tied_output == has_tensor(spec, ROLE_OUTPUT, -1)) {
        return fail(spec, error, "the output projection is %s",
                    spec->tied_output ? "there although it is tied" : "missing");
    }
    if ((spec->rope.scaling == ROPE_SCALING_FACTORS) != has_tensor(spec, ROLE_ROPE_FACTORS, -1)) {
        return fail(spec, error, "rope scaling %u and the tensor of rope factors do not fit",
                    (unsigned)spec->rope.scaling);
    }
    return true;
}

static int compare_places(const void *a, const void *b)
{
    const TensorSpec *const *x = a, *const *y = b;
    if ((*x)->file != (*y)->file) {
        return (*x)->file > (*y)->file ? 1 : -1;
    }
    return ((*x)->offset > (*y)->offset) - ((*x)->offset < (*y)->offset);
}

/* Two tensors never share a byte of a file: bytes that are counted as held once must exist once. */
static bool check_places(const ModelSpec *spec, GError **error)
{
    const TensorSpec **sorted =
        weft_alloc(spec->n_tensors, sizeof *sorted, "an order of tensors", error);
    if (sorted == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        sorted[i] = &spec->tensors[i];
    }
    qsort(sorted, spec->n_tensors, sizeof *sorted, compare_places);
    bool ok = true;
    for (uint32_t i = 1; ok && i < spec->n_tensors; i++) {
        const TensorSpec *a = sorted[i - 1], *b = sorted[i];
        if (a->file == b->file && a->offset + a->size_bytes > b->offset) {
            ok = fail(spec, error, "tensors %s and %s overlap", a->name, b->name);
        }
    }
    weft_free(sorted);
    return ok;
}

bool model_spec_finish(ModelSpec *spec, GError **error)
{
    if (!check_dimensions(spec, error)) {
        return false;
    }
    if (spec->n_tensors < 1 || spec->n_tensors > TENSORS_LIMIT || spec->tensors == NULL) {
        return fail(spec, error, "it has %u tensors", spec->n_tensors);
    }
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        if (!check_role(spec, &spec->tensors[i], error)) {
            return false;
        }
    }
    qsort(spec->tensors, spec->n_tensors, sizeof *spec->tensors, compare_canonical);
    if (!fill_units(spec, error)) {
        return false;
    }
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        TensorSpec *t = &spec->tensors[i];
        if (i > 0 && compare_canonical(t - 1, t) == 0) {
            return fail(spec, error, "the %s is there twice: %s and %s", role_table[t->role].name,
                        t[-1].name, t->name);
        }
        if (!check_tensor(spec, t, error)) {
            return false;
        }
        t->cut = role_table[t->role].cut;
        t->n_slices = slices_of_cut(spec, t->cut);
    }
    return check_needed(spec, error) && check_places(spec, error);
}

const TensorSpec *model_spec_tensor(const ModelSpec *spec, TensorRole role, int32_t layer)
{
    TensorSpec wanted = {.role = role, .layer = layer};
    return bsearch(&wanted, spec->tensors, spec->n_tensors, sizeof wanted, compare_canonical);
}

uint64_t model_spec_parameters(const ModelSpec *spec)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        n += (uint64_t)spec->tensors[i].rows * spec->tensors[i].columns;
    }
    return n;
}

/* ---- slices -----------------------------------------------------------------------------------
 */

static void clip_unit(uint32_t unit, uint32_t size, uint32_t total, uint32_t *first,
                      uint32_t *count)
{
    *first = MIN(unit * size, total);
    *count = MIN(size, total - *first);
}

void model_spec_attn_unit_heads(const ModelSpec *spec, uint32_t unit, uint32_t *first,
                                uint32_t *count)
{
    clip_unit(unit, spec->attn_unit_heads, spec->n_heads, first, count);
}

void model_spec_ffn_unit(const ModelSpec *spec, uint32_t unit, uint32_t *first, uint32_t *count)
{
    clip_unit(unit, spec->ffn_unit_width, spec->ffn_width, first, count);
}

void model_spec_kv_heads_of(const ModelSpec *spec, uint32_t first, uint32_t count,
                            uint32_t *kv_first, uint32_t *kv_count)
{
    uint32_t group = spec->n_heads / spec->n_kv_heads;
    *kv_first = first / group;
    *kv_count = count == 0 ? 0 : (first + count - 1) / group - *kv_first + 1;
}

SliceRect model_spec_slice(const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice)
{
    uint32_t first = 0, count = 0;
    g_assert(slice < tensor->n_slices);
    switch (tensor->cut) {
    case CUT_WHOLE:
        return (SliceRect){0, tensor->rows, 0, tensor->columns};
    case CUT_Q_UNITS:
    case CUT_ATTN_UNITS:
        model_spec_attn_unit_heads(spec, slice, &first, &count);
        first *= spec->head_size;
        count *= spec->head_size;
        break;
    case CUT_KV_HEADS:
        first = slice * spec->head_size;
        count = spec->head_size;
        break;
    case CUT_FFN_ROWS:
    case CUT_FFN_COLS:
        model_spec_ffn_unit(spec, slice, &first, &count);
        break;
    case CUT_VOCAB:
        clip_unit(slice, VOCAB_CHUNK, spec->vocab_size, &first, &count);
        break;
    }
    bool by_column = tensor->cut == CUT_ATTN_UNITS || tensor->cut == CUT_FFN_COLS ||
                     role_table[tensor->role].is_vector;
    return by_column ? (SliceRect){0, tensor->rows, first, count}
                     : (SliceRect){first, count, 0, tensor->columns};
}

size_t model_spec_slice_bytes(const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice)
{
    SliceRect rect = model_spec_slice(spec, tensor, slice);
    size_t row_bytes = 0;
    bool whole_blocks = dtype_row_bytes(tensor->type, rect.n_cols, &row_bytes);
    g_assert(whole_blocks);
    return row_bytes * rect.n_rows;
}
