/* Any bytes as a model description from a peer: refused, or a spec that holds together and survives
 * the way back. */
#include "proto/model/model_message.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_spec(const ModelSpec *spec)
{
    g_assert(spec->n_attn_units >= 1 && spec->n_attn_units <= 64 && spec->n_ffn_units >= 1 &&
             spec->n_ffn_units <= 64);
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        uint64_t n_bytes = 0;
        for (uint32_t s = 0; s < t->n_slices; s++) {
            n_bytes += model_spec_slice_bytes(spec, t, s);
        }
        g_assert(n_bytes == t->size_bytes);
        g_assert(model_spec_tensor(spec, t->role, t->layer) == t);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autoptr(GError) error = NULL;
    Weft__V1__Model *m = weft__v1__model__unpack(NULL, size, data);
    if (m == NULL) {
        return 0;
    }
    g_autoptr(ModelSpec) spec = model_from_message(m, &error);
    g_assert((spec == NULL) == (error != NULL));
    if (spec != NULL) {
        check_spec(spec);
        Weft__V1__Model *back = model_to_message(spec, true);
        g_autoptr(ModelSpec) again = model_from_message(back, &error);
        g_assert(again != NULL && again->n_tensors == spec->n_tensors);
        weft__v1__model__free_unpacked(back, NULL);
    }
    weft__v1__model__free_unpacked(m, NULL);
    return 0;
}
