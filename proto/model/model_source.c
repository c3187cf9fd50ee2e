#include "proto/model/model_source.h"

#include "proto/base/error.h"
#include "proto/model/blocks.h"
#include "proto/model/checkpoint.h"
#include "proto/model/gguf.h"
#include "proto/model/hf_model.h"
#include "proto/text/tokenizer_json.h"

#include <string.h>

struct ModelSource {
    const ModelSpec *spec; /* of whichever is there */
    ModelSpec *gguf_spec;
    Gguf *gguf;
    HfModel *hf;
    Checkpoint *checkpoint;
    GgufVocab gguf_vocab;
    JsonVocab *json_vocab;
    const TokenizerVocab *vocab;
    char *chat_template;
};

/* ---- opening ---- */

static bool open_gguf(ModelSource *s, const char *path, GError **error)
{
    const char *text;
    size_t length;
    uint64_t n;
    s->gguf = gguf_open(path, error);
    s->spec = s->gguf_spec = s->gguf != NULL ? gguf_model_spec(s->gguf, error) : NULL;
    if (s->spec == NULL) {
        return false;
    }
    if (gguf_array_length(s->gguf, "tokenizer.ggml.tokens", &n)) {
        if (!gguf_vocab_read(s->gguf, &s->gguf_vocab, error)) {
            return false;
        }
        s->vocab = &s->gguf_vocab.vocab;
    }
    if (gguf_get_string(s->gguf, "tokenizer.chat_template", &text, &length, NULL) &&
        g_utf8_validate_len(text, length, NULL)) {
        s->chat_template = g_strndup(text, length);
    }
    return true;
}

/* tokenizer.json beside the weights, where there is one. */
static bool open_json_vocab(ModelSource *s, const char *directory, GError **error)
{
    g_autofree char *path = g_build_filename(directory, "tokenizer.json", NULL);
    if (!g_file_test(path, G_FILE_TEST_EXISTS)) {
        return true;
    }
    s->json_vocab = json_vocab_load(path, error);
    if (s->json_vocab == NULL) {
        return false;
    }
    s->vocab = json_vocab_get(s->json_vocab);
    s->chat_template = g_strdup(json_vocab_chat_template(s->json_vocab));
    return true;
}

static bool is_checkpoint(const char *path)
{
    g_autofree char *manifest = g_build_filename(path, CHECKPOINT_MANIFEST, NULL);
    return g_file_test(manifest, G_FILE_TEST_EXISTS);
}

static bool open_directory(ModelSource *s, const char *path, GError **error)
{
    g_autoptr(GArray) steps = checkpoint_steps(path);
    if (is_checkpoint(path) || steps->len > 0) {
        s->checkpoint = is_checkpoint(path) ? checkpoint_open(path, error)
                                            : checkpoint_open_newest(path, NULL, NULL, error);
        s->spec = s->checkpoint != NULL ? checkpoint_model(s->checkpoint) : NULL;
        return s->spec != NULL && open_json_vocab(s, checkpoint_path(s->checkpoint), error);
    }
    s->hf = hf_model_open(path, error);
    s->spec = s->hf != NULL ? hf_model_spec(s->hf) : NULL;
    return s->spec != NULL && open_json_vocab(s, path, error);
}

ModelSource *model_source_open(const char *path, GError **error)
{
    g_autoptr(ModelSource) s = g_new0(ModelSource, 1);
    const bool ok = g_file_test(path, G_FILE_TEST_IS_DIR) ? open_directory(s, path, error)
                                                          : open_gguf(s, path, error);
    if (ok && s->vocab != NULL && s->vocab->n_tokens > s->spec->vocab_size) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: its tokenizer has %" G_GUINT64_FORMAT
                    " ids and its model %u; get the files again",
                    path, s->vocab->n_tokens, s->spec->vocab_size);
        return NULL;
    }
    return ok ? g_steal_pointer(&s) : NULL;
}

void model_source_free(ModelSource *s)
{
    if (s != NULL) {
        gguf_vocab_clear(&s->gguf_vocab);
        json_vocab_free(s->json_vocab);
        model_spec_free(s->gguf_spec);
        gguf_free(s->gguf);
        hf_model_free(s->hf);
        checkpoint_free(s->checkpoint);
        g_free(s->chat_template);
        g_free(s);
    }
}

const ModelSpec *model_source_spec(const ModelSource *s)
{
    return s->spec;
}

const TokenizerVocab *model_source_vocab(const ModelSource *s)
{
    return s->vocab;
}

const char *model_source_digest(const ModelSource *s)
{
    return s->checkpoint != NULL ? checkpoint_state(s->checkpoint)->weights_digest : NULL;
}

/* ---- reading ---- */

static bool read_gguf(const ModelSource *s, const TensorSpec *t, uint32_t row0, uint32_t n_rows,
                      float *out, GError **error)
{
    size_t size = 0, row_bytes = 0;
    const uint8_t *data =
        t->file < gguf_n_files(s->gguf) ? gguf_file_data(s->gguf, t->file, &size) : NULL;
    if (data == NULL || t->offset > size || t->size_bytes > size - t->offset ||
        !dtype_row_bytes(t->type, t->columns, &row_bytes)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tensor %s does not lie in its file; get the file again", t->name);
        return false;
    }
    for (uint32_t r = 0; r < n_rows; r++) {
        dequantise_row(t->type, data + t->offset + (size_t)(row0 + r) * row_bytes, t->columns,
                       out + (size_t)r * t->columns);
    }
    return true;
}

bool model_source_read(const ModelSource *s, uint32_t tensor, uint32_t row0, uint32_t n_rows,
                       float *out, GError **error)
{
    const TensorSpec *t = tensor < s->spec->n_tensors ? &s->spec->tensors[tensor] : NULL;
    if (t == NULL || row0 > t->rows || n_rows > t->rows - row0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tensor %u of model %s has no rows %u + %u", tensor, s->spec->name, row0,
                    n_rows);
        return false;
    }
    if (s->gguf != NULL) {
        return read_gguf(s, t, row0, n_rows, out, error);
    }
    if (s->hf != NULL) {
        return hf_model_read(s->hf, tensor, row0, n_rows, out, error);
    }
    g_autofree char *name = g_strconcat("weights/", t->name, NULL);
    return n_rows == 0 ||
           checkpoint_read(s->checkpoint, name, (SliceRect){row0, n_rows, 0, t->columns}, out,
                           t->columns, error);
}

static bool read_contents(const void *user, uint32_t tensor, uint32_t row0, uint32_t n_rows,
                          float *out, GError **error)
{
    return model_source_read(user, tensor, row0, n_rows, out, error);
}

ModelContents model_source_contents(const ModelSource *s)
{
    return (ModelContents){s->spec, read_contents, s, s->vocab, s->chat_template};
}
