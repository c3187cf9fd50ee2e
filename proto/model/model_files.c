#include "proto/model/model_files.h"

#include "proto/base/error.h"
#include "proto/model/gguf.h"
#include "proto/model/hf_model.h"
#include "proto/text/tokenizer_json.h"

#include <string.h>

/* Beside the weights of a directory; either may be missing. */
static const char *const text_names[] = {"tokenizer.json", "tokenizer_config.json"};

struct ModelFiles {
    Gguf *gguf; /* or hf */
    HfModel *hf;
    GPtrArray *texts; /* paths of the directory's text_names that are there */
    JsonVocab *vocab;
    GError *why_no_vocab; /* without vocab */
};

static void open_texts(ModelFiles *f, const char *directory)
{
    f->texts = g_ptr_array_new_with_free_func(g_free);
    for (size_t i = 0; i < G_N_ELEMENTS(text_names); i++) {
        g_autofree char *path = g_build_filename(directory, text_names[i], NULL);
        if (g_file_test(path, G_FILE_TEST_EXISTS)) {
            g_ptr_array_add(f->texts, g_steal_pointer(&path));
        }
    }
    f->vocab = json_vocab_load(directory, &f->why_no_vocab);
}

ModelFiles *model_files_open(const char *path, GError **error)
{
    g_autoptr(ModelFiles) f = g_new0(ModelFiles, 1);
    if (!g_file_test(path, G_FILE_TEST_IS_DIR)) {
        f->gguf = gguf_open(path, error);
        return f->gguf != NULL ? g_steal_pointer(&f) : NULL;
    }
    f->hf = hf_model_open(path, error);
    if (f->hf == NULL) {
        return NULL;
    }
    open_texts(f, path);
    return g_steal_pointer(&f);
}

void model_files_free(ModelFiles *f)
{
    if (f == NULL) {
        return;
    }
    gguf_free(f->gguf);
    hf_model_free(f->hf);
    json_vocab_free(f->vocab);
    g_clear_error(&f->why_no_vocab);
    g_clear_pointer(&f->texts, g_ptr_array_unref);
    g_free(f);
}

ModelSpec *model_files_spec(const ModelFiles *f, GError **error)
{
    return f->gguf != NULL ? gguf_model_spec(f->gguf, error) : hf_model_serving_spec(f->hf, error);
}

/* ---- files ---- */

uint32_t model_files_n(const ModelFiles *f)
{
    return f->gguf != NULL ? gguf_n_files(f->gguf) : hf_model_n_files(f->hf) + f->texts->len;
}

const char *model_files_path(const ModelFiles *f, uint32_t file)
{
    if (f->gguf != NULL) {
        return gguf_file_path(f->gguf, file);
    }
    const uint32_t n = hf_model_n_files(f->hf);
    return file < n ? hf_model_file_path(f->hf, file) : f->texts->pdata[file - n];
}

bool model_files_are_raw(const ModelFiles *f)
{
    return f->gguf != NULL;
}

bool model_files_hash(const ModelFiles *f, Hash128 *out, GError **error)
{
    if (f->gguf != NULL) {
        *out = gguf_hash(f->gguf);
        return true;
    }
    const Hash128 model = hf_model_hash(f->hf);
    Hasher *hasher = hasher_new();
    hasher_update(hasher, model.bytes, sizeof model.bytes);
    bool ok = true;
    for (guint i = 0; ok && i < f->texts->len; i++) {
        g_autoptr(GError) why = NULL;
        g_autoptr(GMappedFile) text = g_mapped_file_new(f->texts->pdata[i], FALSE, &why);
        ok = text != NULL;
        if (ok) {
            hasher_update(hasher, g_mapped_file_get_contents(text), g_mapped_file_get_length(text));
        } else {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "%s; get the files again",
                        why->message);
        }
    }
    *out = hasher_finish(hasher);
    hasher_free(hasher);
    return ok;
}

bool model_files_copy_slice(const ModelFiles *f, const ModelSpec *spec, uint32_t tensor,
                            uint32_t slice, void *out, GError **error)
{
    if (f->hf != NULL) {
        return hf_model_copy_slice(f->hf, spec, tensor, slice, out, error);
    }
    const TensorSpec *t = &spec->tensors[tensor];
    if (!gguf_copy_slice(f->gguf, spec, t, slice, out)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "tensor %s does not lie in its file; get the file again", t->name);
        return false;
    }
    return true;
}

/* ---- texts ---- */

Tokenizer *model_files_tokenizer(const ModelFiles *f, GError **error)
{
    if (f->gguf != NULL) {
        return tokenizer_from_gguf(f->gguf, error);
    }
    if (f->vocab == NULL) {
        g_propagate_error(error, g_error_copy(f->why_no_vocab));
        return NULL;
    }
    const TokenizerVocab *vocab = json_vocab_get(f->vocab);
    const uint32_t most = hf_model_spec(f->hf)->vocab_size;
    if (vocab->n_tokens > most) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the tokenizer has %" G_GUINT64_FORMAT
                    " ids and the model %u; get the files again",
                    vocab->n_tokens, most);
        return NULL;
    }
    return tokenizer_from_vocab(vocab, error);
}

bool model_files_chat_template(const ModelFiles *f, const char **text, size_t *length,
                               GError **error)
{
    if (f->gguf != NULL) {
        return gguf_get_string(f->gguf, "tokenizer.chat_template", text, length, error);
    }
    *text = f->vocab != NULL ? json_vocab_chat_template(f->vocab) : NULL;
    *length = *text != NULL ? strlen(*text) : 0;
    return *text != NULL;
}
