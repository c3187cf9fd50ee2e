/* What tools/bench/peers runs for ik_llama.cpp: answers lines on stdin with seconds on stdout.
 * Compiled by that script against the peer's own headers and libraries; no part of weft's build.
 *
 *   peer_ik MODEL THREADS CONTEXT STREAMS REPACK
 *   pp N                  a prompt of N random tokens, N at once
 *   tg N DEPTH STREAMS    N steps of one token for each stream, behind DEPTH tokens of each */
#include <llama.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct llama_context *context;
static struct llama_batch batch;
static int n_vocab, n_batch = 512, prefix_depth, prefix_streams;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void quiet(enum ggml_log_level level, const char *text, void *user)
{
    (void)level;
    (void)text;
    (void)user;
}

static void put(int position, int sequence, int wants_logits)
{
    const int i = batch.n_tokens++;
    batch.token[i] = rand() % n_vocab;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = (int8_t)wants_logits;
}

static void decode(void)
{
    if (llama_decode(context, batch) != 0) {
        fprintf(stderr, "llama_decode failed\n");
        exit(1);
    }
    llama_synchronize(context);
    batch.n_tokens = 0;
}

/* n tokens of one sequence from `from` on. */
static void prompt(int n, int from, int sequence)
{
    for (int i = 0; i < n; i++) {
        put(from + i, sequence, i + 1 == n);
        if (batch.n_tokens == n_batch || i + 1 == n) {
            decode();
        }
    }
}

static double prefill(int n)
{
    llama_kv_cache_clear(context);
    prefix_depth = prefix_streams = 0;
    const double start = now_s();
    prompt(n, 0, 0);
    return now_s() - start;
}

/* The prefix stays from run to run: only what was decoded behind it is dropped. */
static double generate(int n, int depth, int streams)
{
    if (prefix_depth != depth || prefix_streams != streams) {
        llama_kv_cache_clear(context);
        for (int s = 0; s < streams && depth > 0; s++) {
            prompt(depth, 0, s);
        }
        prefix_depth = depth;
        prefix_streams = streams;
    } else {
        for (int s = 0; s < streams; s++) {
            llama_kv_cache_seq_rm(context, s, depth, -1);
        }
    }
    double start = 0;
    for (int i = 0; i <= n; i++) { /* the first step warms up */
        if (i == 1) {
            start = now_s();
        }
        for (int s = 0; s < streams; s++) {
            put(depth + i, s, 1);
        }
        decode();
    }
    return now_s() - start;
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: peer_ik MODEL THREADS CONTEXT STREAMS REPACK\n");
        return 2;
    }
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params model_params = llama_model_default_params();
    model_params.repack_tensors = atoi(argv[5]) != 0;
    model_params.use_mmap = !model_params.repack_tensors;
    struct llama_model *model = llama_model_load_from_file(argv[1], model_params);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t)atoi(argv[3]);
    params.n_batch = params.n_ubatch = (uint32_t)n_batch;
    params.n_seq_max = (uint32_t)atoi(argv[4]);
    params.n_threads = params.n_threads_batch = (uint32_t)atoi(argv[2]);
    context = model != NULL ? llama_init_from_model(model, params) : NULL;
    if (context == NULL) {
        fprintf(stderr, "the model did not load\n");
        return 1;
    }
    n_vocab = llama_n_vocab(model);
    batch = llama_batch_init(n_batch, 0, 1);
    char line[256];
    while (fgets(line, sizeof line, stdin) != NULL) {
        int n = 0, depth = 0, streams = 1;
        double seconds;
        if (sscanf(line, "pp %d", &n) == 1) {
            seconds = prefill(n);
        } else if (sscanf(line, "tg %d %d %d", &n, &depth, &streams) == 3) {
            seconds = generate(n, depth, streams);
        } else {
            return 2;
        }
        printf("%.9f\n", seconds);
        fflush(stdout);
    }
    return 0;
}
