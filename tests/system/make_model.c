/* make-model FILE [key=value...]: a tiny model for the system tests. Keys: layers width heads kv
 * head ffn vocab context seed type (F32, Q8_0, ...). */
#include "tests/golden/gguf_builder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t *number_field(GgufBuilderConfig *c, const char *key)
{
    const struct {
        const char *key;
        uint32_t *field;
    } fields[] = {{"layers", &c->n_layers},  {"width", &c->width},    {"heads", &c->n_heads},
                  {"kv", &c->n_kv_heads},    {"head", &c->head_size}, {"ffn", &c->ffn_width},
                  {"vocab", &c->vocab_size}, {"context", &c->context}};
    for (size_t i = 0; i < G_N_ELEMENTS(fields); i++) {
        if (strcmp(fields[i].key, key) == 0) {
            return fields[i].field;
        }
    }
    return NULL;
}

static bool set(GgufBuilderConfig *c, const char *word)
{
    g_auto(GStrv) parts = g_strsplit(word, "=", 2);
    if (g_strv_length(parts) != 2) {
        return false;
    }
    uint32_t *field = number_field(c, parts[0]);
    if (field != NULL) {
        *field = (uint32_t)strtoul(parts[1], NULL, 10);
        return true;
    }
    if (strcmp(parts[0], "seed") == 0) {
        c->seed = strtoull(parts[1], NULL, 10);
        return true;
    }
    for (int t = 0; strcmp(parts[0], "type") == 0 && t < DTYPE_LIMIT; t++) {
        if (g_strcmp0(dtype_info((uint32_t)t)->name, parts[1]) == 0) {
            gguf_builder_set_type(c, (Dtype)t);
            return true;
        }
    }
    return false;
}

int main(int argc, char **argv)
{
    GgufBuilderConfig config;
    g_autoptr(GError) error = NULL;
    gguf_builder_defaults(&config);
    config.name = "tiny";
    config.n_layers = 4;
    config.width = 192;
    config.n_heads = 6;
    config.n_kv_heads = 3;
    config.ffn_width = 512;
    config.vocab_size = 3000;
    for (int i = 2; i < argc; i++) {
        if (!set(&config, argv[i])) {
            fprintf(stderr, "make-model: '%s' is not understood\n", argv[i]);
            return 2;
        }
    }
    if (argc < 2 || !gguf_builder_write(&config, argv[1], &error)) {
        fprintf(stderr, "make-model: %s\n",
                error != NULL ? error->message : "a file name is needed");
        return 1;
    }
    return 0;
}
