#include "proto/model/hf_fp8.h"

#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/hf_config.h"

#include <math.h>
#include <string.h>

#define BLOCK_ROWS 128u
#define WHAT_TO_DO "take the model in fp8 (E4M3), BF16 or F16, or a GGUF file of it"

/* ---- quantization_config ---- */

static const char *text(const json_t *object, const char *key)
{
    const char *value = json_string_value(json_object_get(object, key));
    return value != NULL ? value : "";
}

/* Absent, null or [128, 128]. */
static bool is_block_128(const json_t *size)
{
    return size == NULL || json_is_null(size) ||
           (json_array_size(size) == 2 &&
            json_integer_value(json_array_get(size, 0)) == BLOCK_ROWS &&
            json_integer_value(json_array_get(size, 1)) == F8_BLOCK_COLUMNS);
}

static bool check_block(const char *directory, const json_t *size, GError **error)
{
    g_autofree char *shown = is_block_128(size) ? NULL : json_dumps(size, JSON_COMPACT);
    return is_block_128(size) ||
           hf_fail(directory, error,
                   "fp8 weights with scales of blocks %.40s are not supported, "
                   "[128,128] is; " WHAT_TO_DO,
                   shown != NULL ? shown : "");
}

/* quant_method fp8: Transformers' and DeepSeek's form. */
static bool check_fp8(const char *directory, const json_t *q, GError **error)
{
    static const char *const formats[] = {"", "e4m3", "float8_e4m3fn", NULL};
    return (g_strv_contains(formats, text(q, "fmt")) ||
            hf_fail(directory, error,
                    "fp8 weights of format '%.40s' are not supported; " WHAT_TO_DO,
                    text(q, "fmt"))) &&
           check_block(directory, json_object_get(q, "weight_block_size"), error);
}

/* Weights of one group of compressed-tensors. */
static bool check_group(const char *directory, const char *name, const json_t *weights,
                        GError **error)
{
    static const char *const strategies[] = {"", "tensor", "channel", "block", NULL};
    const json_int_t bits = json_integer_value(json_object_get(weights, "num_bits"));
    if (bits != 8 || strcmp(text(weights, "type"), "float") != 0 ||
        !g_strv_contains(strategies, text(weights, "strategy"))) {
        return hf_fail(
            directory, error,
            "compressed-tensors %.40s has weights of %d bits, type '%.20s' and strategy "
            "'%.20s'; 8-bit floats by tensor, channel or block are supported; " WHAT_TO_DO,
            name, (int)bits, text(weights, "type"), text(weights, "strategy"));
    }
    return check_block(directory, json_object_get(weights, "block_structure"), error);
}

static bool check_compressed_tensors(const char *directory, const json_t *q, GError **error)
{
    static const char *const formats[] = {"float-quantized", "naive-quantized", "dense", NULL};
    if (!g_strv_contains(formats, text(q, "format"))) {
        return hf_fail(directory, error,
                       "compressed-tensors of format '%.40s' is not supported, 'float-quantized' "
                       "is; " WHAT_TO_DO,
                       text(q, "format"));
    }
    const char *name;
    json_t *group;
    bool ok = true;
    json_object_foreach(json_object_get(q, "config_groups"), name, group)
    {
        const json_t *weights = json_object_get(group, "weights");
        ok = ok && (!json_is_object(weights) || check_group(directory, name, weights, error));
    }
    return ok;
}

bool hf_quantization_check(const char *directory, const json_t *config, GError **error)
{
    const json_t *q = json_object_get(config, "quantization_config");
    q = q != NULL ? q : json_object_get(config, "compression_config");
    if (q == NULL || json_is_null(q)) {
        return true;
    }
    const char *method = text(q, "quant_method");
    if (strcmp(method, "fp8") == 0) {
        return check_fp8(directory, q, error);
    }
    if (strcmp(method, "compressed-tensors") == 0) {
        return check_compressed_tensors(directory, q, error);
    }
    if (strcmp(method, "fbgemm_fp8") == 0 ||
        (strcmp(method, "modelopt") == 0 && strcmp(text(q, "quant_algo"), "FP8") == 0)) {
        return true;
    }
    const char *algorithm = text(q, "quant_algo");
    return hf_fail(
        directory, error,
        "its weights are quantised by '%.40s'%s%.40s, which is not supported; " WHAT_TO_DO, method,
        algorithm[0] != '\0' ? " " : "", algorithm);
}

/* ---- scales ---- */

bool hf_is_fp8(const SafetensorsTensor *t)
{
    return strcmp(t->kind, "F8_E4M3") == 0;
}

bool hf_scales_check(const char *directory, const Safetensors *file, HfFind find, const void *user,
                     GError **error)
{
    static const char *const ends[] = {".weight_scale", ".weight_scale_inv"};
    for (size_t i = 0; i < safetensors_n(file); i++) {
        const char *name = safetensors_at(file, i)->name;
        for (size_t e = 0; e < G_N_ELEMENTS(ends); e++) {
            if (!g_str_has_suffix(name, ends[e])) {
                continue;
            }
            g_autofree char *base = g_strndup(name, strlen(name) - strlen(ends[e]));
            g_autofree char *weight = g_strconcat(base, ".weight", NULL);
            const SafetensorsTensor *t = find(user, weight);
            if (t == NULL) {
                return hf_fail(directory, error, "scale %s has no weight %s; get the files again",
                               name, weight);
            }
            if (!hf_is_fp8(t)) {
                return hf_fail(
                    directory, error,
                    "scale %s belongs to a weight of type %s, F8_E4M3 is supported; " WHAT_TO_DO,
                    name, t->kind);
            }
        }
    }
    return true;
}

static float number(const SafetensorsTensor *scale, size_t i)
{
    float value;
    dequantise_row(scale->type, scale->data + i * dtype_info(scale->type)->block_bytes, 1, &value);
    return value;
}

static uint32_t blocks_of(uint64_t n, uint32_t block)
{
    return (uint32_t)((n + block - 1) / block);
}

/* What a scale of this shape is for. False: nothing. */
static bool scale_shape(const SafetensorsTensor *weight, const SafetensorsTensor *s, bool blocks,
                        HfScale *out)
{
    const uint32_t rows = (uint32_t)weight->dims[0], columns = (uint32_t)weight->dims[1];
    *out = (HfScale){s, rows, columns, 1};
    if (!blocks && (s->n_dims == 0 || (s->n_dims == 1 && s->dims[0] == 1))) {
        return true;
    }
    if (!blocks && s->dims[0] == rows && (s->n_dims == 1 || (s->n_dims == 2 && s->dims[1] == 1))) {
        out->row_step = 1;
        return true;
    }
    *out = (HfScale){s, BLOCK_ROWS, F8_BLOCK_COLUMNS, blocks_of(columns, F8_BLOCK_COLUMNS)};
    return s->n_dims == 2 && s->dims[0] == blocks_of(rows, BLOCK_ROWS) &&
           s->dims[1] == out->columns;
}

static char *shape_text(const SafetensorsTensor *t)
{
    GString *shape = g_string_new("[");
    for (uint32_t d = 0; d < t->n_dims; d++) {
        g_string_append_printf(shape, "%s%" G_GUINT64_FORMAT, d > 0 ? ", " : "", t->dims[d]);
    }
    return g_string_free(g_string_append_c(shape, ']'), FALSE);
}

static bool check_numbers(const char *directory, const SafetensorsTensor *s, GError **error)
{
    const size_t n = (size_t)(s->size_bytes / dtype_info(s->type)->block_bytes);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(number(s, i))) {
            return hf_fail(directory, error, "number %zu of %s is not finite; get the files again",
                           i, s->name);
        }
    }
    return true;
}

bool hf_scale_bind(const char *directory, const SafetensorsTensor *weight, HfFind find,
                   const void *user, HfScale *out, GError **error)
{
    g_autofree char *plain = g_strconcat(weight->name, "_scale", NULL);
    g_autofree char *inverse = g_strconcat(weight->name, "_scale_inv", NULL);
    const SafetensorsTensor *blocks = find(user, inverse), *s = find(user, plain);
    if ((s == NULL) == (blocks == NULL)) {
        return hf_fail(directory, error, "weight %s of type F8_E4M3 has %s; get the files again",
                       weight->name,
                       s == NULL ? "no scale (.weight_scale or .weight_scale_inv)"
                                 : "both .weight_scale and .weight_scale_inv");
    }
    s = s != NULL ? s : blocks;
    if (s->type == DTYPE_LIMIT) {
        return hf_fail(directory, error,
                       "scale %s is stored as %s; F32, F16 and BF16 are supported", s->name,
                       s->kind);
    }
    if (!scale_shape(weight, s, blocks != NULL, out)) {
        g_autofree char *have = shape_text(s), *wanted = shape_text(weight);
        return hf_fail(
            directory, error,
            "scale %s has shape %s, which does not fit a weight of shape %s by tensor, by "
            "output or by blocks of 128 x 128; " WHAT_TO_DO,
            s->name, have, wanted);
    }
    return check_numbers(directory, s, error);
}

static float scale_at(const HfScale *s, uint32_t row, uint32_t column)
{
    return number(s->tensor, (size_t)(row / s->row_step) * s->columns + column / s->column_step);
}

/* ---- weights ---- */

float hf_fp8_element(const SafetensorsTensor *weight, const HfScale *scale, uint32_t row,
                     uint32_t column)
{
    return scale_at(scale, row, column) *
           e4m3_to_f32(weight->data[(size_t)row * weight->dims[1] + column]);
}

static bool is_nan(uint8_t q)
{
    return (q & 0x7f) == 0x7f;
}

bool hf_fp8_copy(const SafetensorsTensor *weight, const HfScale *scale, uint32_t row,
                 uint32_t column0, uint32_t n_columns, uint8_t *out, GError **error)
{
    const uint8_t *from = weight->data + (size_t)row * weight->dims[1] + column0;
    for (uint32_t c = 0; c < n_columns; c += F8_BLOCK_COLUMNS, from += F8_BLOCK_COLUMNS) {
        const float factor = scale_at(scale, row, column0 + c);
        unsigned wrong = 0;
        for (uint32_t i = 0; i < F8_BLOCK_COLUMNS; i++) {
            wrong += is_nan(from[i]);
        }
        if (wrong > 0) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "weight %s has %u values in row %u, columns %u to %u, that are no numbers "
                        "(NaN); get the files again",
                        weight->name, wrong, row, column0 + c, column0 + c + F8_BLOCK_COLUMNS - 1);
            return false;
        }
        memcpy(out, &factor, sizeof factor);
        memcpy(out + sizeof factor, from, F8_BLOCK_COLUMNS);
        out += sizeof factor + F8_BLOCK_COLUMNS;
    }
    return true;
}
