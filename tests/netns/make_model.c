/* make-model FILE [large]: a small random model that splits over several hosts and can talk for
 * long; or one whose weights, some 200 MB, are most of what a worker holds. */
#include "tests/golden/gguf_builder.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    GgufBuilderConfig config;
    g_autoptr(GError) error = NULL;
    gguf_builder_defaults(&config);
    config.name = "tiny";
    config.n_layers = 6;
    config.width = 288;
    config.n_heads = 9; /* on 3 KV heads: uneven over 2 workers */
    config.n_kv_heads = 3;
    config.ffn_width = 768;
    config.vocab_size = 4000;
    config.context = 65536;
    if (argc == 3 && strcmp(argv[2], "large") == 0) {
        config.n_layers = 12;
        config.width = 1024;
        config.n_heads = 16;
        config.n_kv_heads = 4;
        config.ffn_width = 4096;
        config.vocab_size = 8000;
        config.context = 2048;
    }
    if (argc < 2 || !gguf_builder_write(&config, argv[1], &error)) {
        fprintf(stderr, "make-model: %s\n", error ? error->message : "one file name");
        return 1;
    }
    return 0;
}
