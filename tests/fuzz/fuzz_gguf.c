/* Any bytes as a model file: either an error, or a file whose every key, tensor and slice can be
 * read. */
#include "proto/model/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t touch(const uint8_t *bytes, size_t n)
{
    return n > 0 ? (uint64_t)bytes[0] + bytes[n - 1] : 0;
}

static uint64_t touch_values(const Gguf *g)
{
    static const char *const keys[] = {
        "tokenizer.ggml.tokens",       "tokenizer.ggml.merges", "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",   "general.name",          "llama.block_count",
        "tokenizer.ggml.add_bos_token"};
    uint64_t sum = 0;
    for (size_t k = 0; k < G_N_ELEMENTS(keys); k++) {
        uint64_t n = 0, whole = 0;
        double real = 0;
        int64_t number = 0;
        bool yes = false;
        const char *text = NULL;
        size_t length = 0;
        gguf_array_length(g, keys[k], &n);
        for (uint64_t i = 0; i <= MIN(n, 4096); i++) {
            if (gguf_array_string(g, keys[k], i, &text, &length)) {
                sum += touch((const uint8_t *)text, length);
            }
            sum += gguf_array_i64(g, keys[k], i, &number) + gguf_array_f64(g, keys[k], i, &real);
        }
        g_assert(!gguf_array_i64(g, keys[k], n, &number));
        sum += gguf_get_u64(g, keys[k], &whole, NULL) + gguf_get_f64(g, keys[k], &real, NULL) +
               gguf_get_bool(g, keys[k], &yes, NULL);
        if (gguf_get_string(g, keys[k], &text, &length, NULL)) {
            sum += touch((const uint8_t *)text, length);
        }
    }
    return sum;
}

static uint64_t touch_model(const Gguf *g, const ModelSpec *spec)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        size_t n_bytes = 0;
        for (uint32_t s = 0; s < t->n_slices; s++) {
            size_t n = model_spec_slice_bytes(spec, t, s);
            g_autofree uint8_t *slice = g_malloc(n);
            g_assert(gguf_copy_slice(g, spec, t, s, slice));
            sum += touch(slice, n);
            n_bytes += n;
        }
        g_assert(n_bytes == t->size_bytes); /* slices cover the tensor */
    }
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Gguf) g = gguf_parse(data, size, &error);
    g_assert((g == NULL) == (error != NULL));
    if (g == NULL) {
        return 0;
    }
    uint64_t sum = touch_values(g);
    for (uint64_t i = 0; i < gguf_n_tensors(g); i++) {
        const GgufTensor *t = gguf_tensor(g, i);
        sum += touch(gguf_file_data(g, t->file, NULL) + t->offset, t->size_bytes);
    }
    g_autoptr(ModelSpec) spec = gguf_model_spec(g, &error);
    g_assert((spec == NULL) == (error != NULL));
    if (spec != NULL) {
        sum += touch_model(g, spec);
    }
    volatile uint64_t sink = sum;
    (void)sink;
    return 0;
}
