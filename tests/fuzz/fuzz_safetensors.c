/* Any bytes as a safetensors file: refused, or tensors whose every byte can be read. */
#include "proto/model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(Safetensors) s = safetensors_parse(data, size, &error);
    g_assert((s == NULL) == (error != NULL));
    if (s == NULL) {
        g_assert(g_utf8_validate(error->message, -1, NULL));
        return 0;
    }
    volatile uint64_t sum = 0;
    for (size_t i = 0; i < safetensors_n(s); i++) {
        const SafetensorsTensor *t = safetensors_at(s, i);
        for (uint64_t b = 0; b < t->size_bytes; b++) {
            sum += t->data[b];
        }
        g_assert(safetensors_find(s, t->name) == t);
    }
    return 0;
}
