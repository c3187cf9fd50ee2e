/* make-tiny-model DIR: writes DIR/NAME.gguf for every golden case and prints "NAME KVTYPE" for
 * each. */
#include "tests/golden/logits/golden_cases.h"

#include <stdio.h>

int main(int argc, char **argv)
{
    static const char *const kv_names[] = {[KV_F16] = "f16", [KV_BF16] = "bf16", [KV_F32] = "f32"};
    if (argc != 2) {
        fprintf(stderr, "usage: make-tiny-model DIR\n");
        return 2;
    }
    for (unsigned i = 0; i < golden_case_count(); i++) {
        g_autoptr(GError) error = NULL;
        GoldenCase c;
        golden_case(i, &c);
        g_autofree char *path = g_strdup_printf("%s/%s.gguf", argv[1], c.name);
        if (!gguf_builder_write(&c.config, path, &error)) {
            fprintf(stderr, "%s\n", error->message);
            return 1;
        }
        printf("%s %s\n", c.name, kv_names[c.kv_type]);
    }
    return 0;
}
