/* run-local MODEL LAYOUT THREADS PROMPT [N]: a real model on engines in this process, without
 * daemons. LAYOUT: tp per stage, "1", "2", "1,3". Prints the text, the digest and the speeds: the
 * shortest path from a kernel change to its effect. */
#include "kernels/kernels.h"
#include "proto/text/tokenizer.h"
#include "tests/sim/local_replica.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    g_autoptr(GError) error = NULL;
    if (argc < 5) {
        fprintf(stderr, "usage: run-local MODEL LAYOUT THREADS PROMPT [N]\n");
        return 2;
    }
    g_autoptr(Gguf) gguf = gguf_open(argv[1], &error);
    g_autoptr(Tokenizer) tokenizer = gguf != NULL ? tokenizer_from_gguf(gguf, &error) : NULL;
    if (tokenizer == NULL) {
        fprintf(stderr, "%s\n", error->message);
        return 1;
    }
    LocalLayout layout = {.threads = (unsigned)atoi(argv[3]),
                          .isa = kernels_best_isa(),
                          .max_rows = 512,
                          .context = 2048,
                          .streams = 1};
    const char *isa = g_getenv("WEFT_ISA");
    KernelIsa parsed;
    if (isa != NULL && kernels_parse_isa(isa, &parsed)) {
        layout.isa = (int)parsed;
    }
    g_auto(GStrv) stages = g_strsplit(argv[2], ",", -1);
    for (; stages[layout.pp] != NULL; layout.pp++) {
        layout.tp[layout.pp] = (uint32_t)atoi(stages[layout.pp]);
    }
    g_autoptr(GArray) ids =
        tokenizer_encode(tokenizer, argv[4], strlen(argv[4]), true, true, &error);
    LocalReplica *r = local_replica_new(gguf, &layout, NULL, &error);
    if (r == NULL) {
        fprintf(stderr, "%s\n", error->message);
        return 1;
    }
    const uint32_t n = argc > 5 ? (uint32_t)atoi(argv[5]) : 32;
    LocalResult result;
    const gint64 start = g_get_monotonic_time();
    local_replica_greedy(r, (const uint32_t *)(void *)ids->data, ids->len, 1, &result);
    const gint64 first = g_get_monotonic_time();
    local_result_clear(&result);
    local_replica_greedy(r, (const uint32_t *)(void *)ids->data, ids->len, n, &result);
    const double prefill = (double)(first - start) / 1e6,
                 all = (double)(g_get_monotonic_time() - first) / 1e6;
    if (result.error != NULL) {
        fprintf(stderr, "%s\n", result.error);
        return 1;
    }
    Detokenizer *d = detokenizer_new(tokenizer, true);
    g_autoptr(GString) text = g_string_new(NULL);
    for (uint32_t i = 0; i < result.n; i++) {
        detokenizer_push(d, result.ids[i], text);
    }
    detokenizer_free(d);
    printf("%s\n%s prefill %u tokens %.1f/s, decode %u tokens %.1f/s\n", text->str, result.digest,
           ids->len, ids->len / prefill, result.n, (result.n - 1) / (all - prefill));
    local_result_clear(&result);
    local_replica_free(r);
    return 0;
}
