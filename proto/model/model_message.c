#include "proto/model/model_message.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <string.h>

#define TENSORS_LIMIT (1u << 20)
#define FILES_LIMIT 1024u
#define NAME_LIMIT 1024u /* of models, tensors and files, bytes */
#define HASH_BYTES sizeof(Hash128)

/* ---- to a message -----------------------------------------------------------------------------
 */

/* protobuf-c frees with free(), which is what GLib's allocator is since 2.46. */
static char *copy_text(const char *text)
{
    return text != NULL ? g_strdup(text) : (char *)protobuf_c_empty_string;
}

static Weft__V1__Rope *rope_to_message(const RopeSpec *rope)
{
    Weft__V1__Rope *m = g_new(Weft__V1__Rope, 1);
    weft__v1__rope__init(m);
    m->pairing = (uint32_t)rope->pairing;
    m->scaling = (uint32_t)rope->scaling;
    m->dims = rope->dims;
    m->freq_base = rope->freq_base;
    m->factor = rope->factor;
    m->original_context = rope->original_context;
    m->yarn_ext_factor = rope->yarn_ext_factor;
    m->yarn_attn_factor = rope->yarn_attn_factor;
    m->yarn_beta_fast = rope->yarn_beta_fast;
    m->yarn_beta_slow = rope->yarn_beta_slow;
    return m;
}

static Weft__V1__Tensor *tensor_to_message(const TensorSpec *t)
{
    Weft__V1__Tensor *m = g_new(Weft__V1__Tensor, 1);
    weft__v1__tensor__init(m);
    m->name = copy_text(t->name);
    m->role = (uint32_t)t->role;
    m->layer = t->layer;
    m->type = (uint32_t)t->type;
    m->rows = t->rows;
    m->columns = t->columns;
    m->offset = t->offset;
    m->size_bytes = t->size_bytes;
    m->file = t->file;
    return m;
}

Weft__V1__Model *model_to_message(const ModelSpec *spec, bool with_tensors)
{
    Weft__V1__Model *m = g_new(Weft__V1__Model, 1);
    weft__v1__model__init(m);
    m->family = (uint32_t)spec->family;
    m->attention = (uint32_t)spec->attention;
    m->cache = (uint32_t)spec->cache;
    m->output = (uint32_t)spec->output;
    m->name = copy_text(spec->name);
    m->n_layers = spec->n_layers;
    m->width = spec->width;
    m->n_heads = spec->n_heads;
    m->n_kv_heads = spec->n_kv_heads;
    m->head_size = spec->head_size;
    m->ffn_width = spec->ffn_width;
    m->vocab_size = spec->vocab_size;
    m->context = spec->context;
    m->window = spec->window;
    m->n_experts = spec->n_experts;
    m->n_experts_used = spec->n_experts_used;
    m->norm_eps = spec->norm_eps;
    m->attention_scale = spec->attention_scale;
    m->tied_output = spec->tied_output;
    m->rope = rope_to_message(&spec->rope);
    m->file_hash.len = HASH_BYTES;
    m->file_hash.data = g_memdup2(spec->file_hash.bytes, HASH_BYTES);
    if (with_tensors) {
        m->n_tensors = spec->n_tensors;
        m->tensors = g_new0(Weft__V1__Tensor *, spec->n_tensors);
        for (uint32_t i = 0; i < spec->n_tensors; i++) {
            m->tensors[i] = tensor_to_message(&spec->tensors[i]);
        }
    }
    return m;
}

static bool text_is_good(const char *text)
{
    size_t length = text != NULL ? strlen(text) : 0;
    if (length > NAME_LIMIT || (length > 0 && !g_utf8_validate(text, (gssize)length, NULL))) {
        return false;
    }
    for (size_t i = 0; i < length; i++) {
        if (g_ascii_iscntrl(text[i])) {
            return false;
        }
    }
    return true;
}

bool model_file_path_is_inner(const char *path)
{
    if (path == NULL || !text_is_good(path)) {
        return false;
    }
    g_auto(GStrv) parts = g_strsplit(path, "/", -1);
    bool good = parts[0] != NULL;
    for (char **part = parts; *part != NULL; part++) {
        good = good && **part != '\0' && strcmp(*part, ".") != 0 && strcmp(*part, "..") != 0;
    }
    return good;
}

void model_message_set_files(Weft__V1__Model *message, const char *const *names, uint32_t n_names)
{
    g_assert(message->n_file_names == 0);
    for (uint32_t i = 0; i < n_names; i++) {
        if (!model_file_path_is_inner(names[i])) {
            return;
        }
    }
    message->file_names = g_new0(char *, n_names);
    message->n_file_names = n_names;
    for (uint32_t i = 0; i < n_names; i++) {
        message->file_names[i] = g_strdup(names[i]);
    }
}

void model_message_set_hashes(Weft__V1__Model *message, uint32_t tensor, const Hash128 *hashes,
                              uint32_t n_slices)
{
    g_assert(tensor < message->n_tensors);
    ProtobufCBinaryData *field = &message->tensors[tensor]->slice_hashes;
    g_free(field->data);
    field->len = n_slices * HASH_BYTES;
    field->data = g_memdup2(hashes, field->len);
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
    g_set_error(
        error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
        "the model description that arrived is malformed: %s; run the same release everywhere",
        what);
    return false;
}

static bool check_files(const Weft__V1__Model *m, GError **error)
{
    if (m->n_file_names > FILES_LIMIT) {
        return malformed(error, "it names %zu files", m->n_file_names);
    }
    for (size_t i = 0; i < m->n_file_names; i++) {
        if (!model_file_path_is_inner(m->file_names[i])) {
            return malformed(error, "the name of file %zu is no path inside a directory", i);
        }
    }
    for (size_t i = 0; m->n_file_names > 0 && i < m->n_tensors; i++) {
        if (m->tensors[i]->file >= m->n_file_names) {
            return malformed(error, "tensor %zu lies in file %u of %zu", i, m->tensors[i]->file,
                             m->n_file_names);
        }
    }
    return true;
}

static bool rope_from_message(const Weft__V1__Rope *m, RopeSpec *rope, GError **error)
{
    if (m == NULL) {
        return malformed(error, "it has no rope settings");
    }
    rope->pairing = (RopePairing)m->pairing;
    rope->scaling = (RopeScaling)m->scaling;
    rope->dims = m->dims;
    rope->freq_base = m->freq_base;
    rope->factor = m->factor;
    rope->original_context = m->original_context;
    rope->yarn_ext_factor = m->yarn_ext_factor;
    rope->yarn_attn_factor = m->yarn_attn_factor;
    rope->yarn_beta_fast = m->yarn_beta_fast;
    rope->yarn_beta_slow = m->yarn_beta_slow;
    return true;
}

static bool tensors_from_message(const Weft__V1__Model *m, ModelSpec *spec, GError **error)
{
    if (m->n_tensors < 1 || m->n_tensors > TENSORS_LIMIT) {
        return malformed(error, "it has %zu tensors", m->n_tensors);
    }
    spec->tensors = weft_alloc(m->n_tensors, sizeof *spec->tensors, "a model's tensors", error);
    if (spec->tensors == NULL) {
        return false;
    }
    spec->n_tensors = (uint32_t)m->n_tensors;
    for (size_t i = 0; i < m->n_tensors; i++) {
        const Weft__V1__Tensor *from = m->tensors[i];
        TensorSpec *t = &spec->tensors[i];
        if (!text_is_good(from->name)) {
            return malformed(error, "the name of tensor %zu is no text", i);
        }
        t->name = g_strdup(from->name != NULL ? from->name : "");
        t->role = (TensorRole)from->role;
        t->layer = from->layer;
        t->type = (Dtype)from->type;
        t->rows = from->rows;
        t->columns = from->columns;
        t->offset = from->offset;
        t->size_bytes = from->size_bytes;
        t->file = from->file;
    }
    return true;
}

/* model_spec_finish() sorts; the message must have been sorted, and its hashes complete. */
static bool check_manifest(const Weft__V1__Model *m, const ModelSpec *spec, GError **error)
{
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        const Weft__V1__Tensor *from = m->tensors[i];
        if ((uint32_t)t->role != from->role || t->layer != from->layer) {
            return malformed(error, "tensor %u is not in canonical order", i);
        }
        if (from->slice_hashes.len != 0 &&
            from->slice_hashes.len != (size_t)t->n_slices * HASH_BYTES) {
            return malformed(error, "tensor %s has %zu bytes of hashes for %u slices", t->name,
                             from->slice_hashes.len, t->n_slices);
        }
    }
    return true;
}

ModelSpec *model_from_message(const Weft__V1__Model *message, GError **error)
{
    if (message == NULL) {
        malformed(error, "it is missing");
        return NULL;
    }
    if (!text_is_good(message->name)) {
        malformed(error, "its name is no text");
        return NULL;
    }
    if (message->file_hash.len != HASH_BYTES) {
        malformed(error, "the file hash has %zu bytes", message->file_hash.len);
        return NULL;
    }
    g_autoptr(ModelSpec) spec = g_new0(ModelSpec, 1);
    spec->name = g_strdup(message->name);
    spec->family = (ModelFamily)message->family;
    spec->attention = (AttentionKind)message->attention;
    spec->cache = (CacheKind)message->cache;
    spec->output = (OutputKind)message->output;
    spec->n_layers = message->n_layers;
    spec->width = message->width;
    spec->n_heads = message->n_heads;
    spec->n_kv_heads = message->n_kv_heads;
    spec->head_size = message->head_size;
    spec->ffn_width = message->ffn_width;
    spec->vocab_size = message->vocab_size;
    spec->context = message->context;
    spec->window = message->window;
    spec->n_experts = message->n_experts;
    spec->n_experts_used = message->n_experts_used;
    spec->norm_eps = message->norm_eps;
    spec->attention_scale = message->attention_scale;
    spec->tied_output = message->tied_output;
    memcpy(spec->file_hash.bytes, message->file_hash.data, HASH_BYTES);
    if (!rope_from_message(message->rope, &spec->rope, error) || !check_files(message, error) ||
        !tensors_from_message(message, spec, error) || !model_spec_finish(spec, error) ||
        !check_manifest(message, spec, error)) {
        return NULL;
    }
    return g_steal_pointer(&spec);
}

bool model_message_hash(const Weft__V1__Model *message, uint32_t tensor, uint32_t slice,
                        Hash128 *out)
{
    if (tensor >= message->n_tensors) {
        return false;
    }
    const ProtobufCBinaryData *field = &message->tensors[tensor]->slice_hashes;
    if (slice >= field->len / HASH_BYTES) {
        return false;
    }
    memcpy(out->bytes, field->data + (size_t)slice * HASH_BYTES, HASH_BYTES);
    return true;
}
