/* What tools/bench/train runs for llm.c: answers each line "step" on stdin with "SECONDS LOSS" on
 * stdout. Compiled by that script together with the peer's train_gpt2.c, whose main TESTING leaves
 * out; no part of weft's build.
 *
 *   peer_llmc CHECKPOINT BATCH LENGTH
 * CHECKPOINT: a new file for random weights, removed when they are read. */
#define TESTING
#include <train_gpt2.c>

enum { LAYERS = 12, HEADS = 12, WIDTH = 768, VOCABULARY = 50257, PADDED = 50304, CONTEXT = 1024 };

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float next_weight(unsigned *state)
{
    *state = *state * 1664525u + 1013904223u;
    return ((float)(*state >> 8) / 8388608.0f - 1.0f) * 0.035f;
}

/* The header that gpt2_build_from_checkpoint() reads, then the weights: norms about 1, biases near
 * 0. */
static void write_checkpoint(const char *path, size_t n_weights)
{
    int header[256] = {20240326, 3, CONTEXT, VOCABULARY, LAYERS, HEADS, WIDTH, PADDED};
    FILE *f = fopen(path, "wb");
    unsigned state = 1;
    if (f == NULL || fwrite(header, sizeof header, 1, f) != 1) {
        fprintf(stderr, "%s cannot be written\n", path);
        exit(1);
    }
    for (size_t i = 0; i < n_weights; i++) {
        const float w = next_weight(&state);
        if (fwrite(&w, sizeof w, 1, f) != 1) {
            fprintf(stderr, "%s cannot be written\n", path);
            exit(1);
        }
    }
    fclose(f);
}

static size_t weights_of_shape(void)
{
    GPT2Config config = {CONTEXT, VOCABULARY, PADDED, LAYERS, HEADS, WIDTH};
    size_t sizes[NUM_PARAMETER_TENSORS], n = 0;
    fill_in_parameter_sizes(sizes, config);
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        n += sizes[i];
    }
    return n;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: peer_llmc CHECKPOINT BATCH LENGTH\n");
        return 2;
    }
    const size_t batch = (size_t)atoi(argv[2]), length = (size_t)atoi(argv[3]);
    FILE *answers = fdopen(dup(1), "w");
    GPT2 model;
    char line[16];
    int *tokens = malloc(2 * batch * length * sizeof *tokens), *targets = tokens + batch * length;
    unsigned state = 2;
    if (freopen("/dev/null", "w", stdout) == NULL) {
        return 1;
    }
    write_checkpoint(argv[1], weights_of_shape());
    gpt2_build_from_checkpoint(&model, argv[1]);
    remove(argv[1]);
    for (int step = 1; fgets(line, sizeof line, stdin) != NULL; step++) {
        for (size_t i = 0; i < 2 * batch * length; i++) {
            state = state * 1664525u + 1013904223u;
            tokens[i] = (int)((state >> 8) % VOCABULARY);
        }
        const double start = now_s();
        gpt2_forward(&model, tokens, targets, batch, length);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.01f, step);
        fprintf(answers, "%.6f %.6f\n", now_s() - start, (double)model.mean_loss);
        fflush(answers);
    }
    gpt2_free(&model);
    free(tokens);
    fclose(answers);
    return 0;
}
