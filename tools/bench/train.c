/* bench-train: training steps of a GPT-2 shape with random weights and tokens, in one process, as a
 * rank alone runs them. Reads lines on stdin, answers each with one on stdout:
 *   step      one step: "SECONDS LOSS"
 *   limits    the f32 FMA peak of its threads: "OPERATIONS_PER_S"
 *   memory    bytes held where it computes: "BYTES"
 *   flops     multiply-adds x 2 of a token's forward and backward pass, 6 parameters of matrices +
 *             12 layers x length x width (Chowdhery et al. 2022, appendix B): "FLOPS"
 *   bf16      the instruction that multiplies bf16, and why: text
 *   profile   ms of each op since the last step: "NAME MS" ... on one line
 * With --device the rank computes there, by class fast or, with --numerics exact, with the host's
 * bits. With --loose 1 products are whole chains,
 * without units: the fastest variant that we found without the bit contract (give it --leaves 1,
 * too). */
#include "tools/bench/peaks.h"

#include "kernels/ops/sample.h"
#include "proto/model/model_config.h"
#include "worker/train/train_memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Settings {
    int threads, leaves, sequences, length, layers, width, heads, micro, loose;
    const char *precision, *isa, *device, *numerics;
} Settings;

static uint32_t vocabulary;
static double flops_per_token;

static TrainTimes times; /* of the last step */
static const char *const op_names[TRAIN_OP_LIMIT] = {
    [TRAIN_OP_FORWARD] = "forward",
    [TRAIN_OP_DX] = "dx",
    [TRAIN_OP_DW] = "dw",
    [TRAIN_OP_HEAD_FORWARD] = "head-forward",
    [TRAIN_OP_HEAD_DX] = "head-dx",
    [TRAIN_OP_HEAD_DW] = "head-dw",
    [TRAIN_OP_ATTENTION] = "attention",
    [TRAIN_OP_ATTENTION_BACKWARD] = "attention-backward",
    [TRAIN_OP_NORM] = "norm",
    [TRAIN_OP_NORM_BACKWARD] = "norm-backward",
    [TRAIN_OP_BIAS_BACKWARD] = "bias-backward",
    [TRAIN_OP_ACTIVATION] = "activation",
    [TRAIN_OP_ACTIVATION_BACKWARD] = "activation-backward",
    [TRAIN_OP_LOSS] = "loss",
    [TRAIN_OP_LOSS_BACKWARD] = "loss-backward",
    [TRAIN_OP_EMBEDDING] = "embedding",
    [TRAIN_OP_EMBEDDING_BACKWARD] = "embedding-backward",
    [TRAIN_OP_EXCHANGE] = "exchange",
    [TRAIN_OP_WAIT] = "wait",
    [TRAIN_OP_FINISH] = "finish",
    [TRAIN_OP_UPDATE] = "update",
    [TRAIN_OP_REST] = "rest",
};

/* Tokens are a function of the sample and the position. */
static void read_sample(void *user, uint64_t sample, uint32_t *tokens, uint32_t *targets)
{
    const int length = *(const int *)user;
    const uint32_t key[2] = {7, 0};
    for (int i = 0; i < length; i++) {
        const uint32_t counter[4] = {(uint32_t)sample, (uint32_t)(sample >> 32), (uint32_t)i, 0};
        uint32_t words[4];
        philox4x32(counter, key, words);
        tokens[i] = words[0] % vocabulary;
        targets[i] = words[1] % vocabulary;
    }
}

static void fail(const char *what, const GError *error)
{
    fprintf(stderr, "bench-train: %s%s%s\n", what, error != NULL ? ": " : "",
            error != NULL ? error->message : "");
    exit(1);
}

static TrainRank *make_rank(const Settings *s, const ModelSpec *spec, const Kernels *kernels,
                            Pool *pool, const SampleSource *source, const Device *device)
{
    GError *error = NULL;
    TrainRankOptions o = {.spec = spec,
                          .kernels = kernels,
                          .pool = pool,
                          .device = device,
                          .fast = device != NULL && strcmp(s->numerics, "fast") == 0,
                          .devices = device != NULL,
                          .source = source,
                          .sequences = (uint32_t)s->sequences,
                          .leaves = (uint32_t)s->leaves,
                          .micro_sequences = (uint32_t)s->micro,
                          .times = &times,
                          .optimizer = {.kind = OPTIMIZER_ADAMW,
                                        .rate = 1e-4,
                                        .beta1 = 0.9,
                                        .beta2 = 0.999,
                                        .eps = 1e-8,
                                        .decay = 0.01,
                                        .schedule = RATE_CONSTANT,
                                        .steps = 1000}};
    if (!precision_parse(s->precision, &o.precision, &error)) {
        fail("--precision", error);
    }
    Parameters *weights = parameters_new(spec, false, &error);
    if (weights == NULL) {
        fail("weights", error);
    }
    parameters_initialise(weights, 1, pool);
    TrainRank *rank = train_rank_new(&o, weights, &error);
    if (rank == NULL) {
        fail("no rank", error);
    }
    return rank;
}

/* ---- without the contract ---- */

enum { LOOSE_SEGMENTS = 4096 };
static GemmFn exact_gemm;

/* All units as one chain. */
static void loose_gemm(const GemmArgs *args)
{
    static _Thread_local GemmSegment segments[LOOSE_SEGMENTS];
    GemmArgs whole = *args;
    g_assert(args->n_segments <= LOOSE_SEGMENTS);
    for (uint32_t i = 0; i < args->n_segments; i++) {
        segments[i] = args->segments[i];
        segments[i].continues = i + 1 < args->n_segments;
        segments[i].step = (TreeStep){.emit = 1};
    }
    whole.segments = segments;
    exact_gemm(&whole);
}

/* ---- lines ---- */

static void answer(const char *line, TrainRank *rank, Pool *pool, KernelIsa isa)
{
    GError *error = NULL;
    if (strcmp(line, "step") == 0) {
        TrainStep step;
        const double start = peaks_now_s();
        train_times_mark(&times, TRAIN_OP_REST);
        memset(times.ns, 0, sizeof times.ns);
        if (!train_rank_step(rank, &step, &error)) {
            fail("a step", error);
        }
        train_times_mark(&times, TRAIN_OP_REST);
        printf("%.6f %.6f\n", peaks_now_s() - start, (double)step.loss);
    } else if (strcmp(line, "limits") == 0) {
        Peaks peaks;
        if (!peaks_measure(pool, isa, &peaks)) {
            fail("no memory for the limits", NULL);
        }
        printf("%.0f\n", peaks.f32_ops_per_s);
    } else if (strcmp(line, "flops") == 0) {
        printf("%.0f\n", flops_per_token);
    } else if (strcmp(line, "memory") == 0) {
        const TrainMemory memory = train_rank_memory(rank);
        printf("%" PRIu64 "\n", train_memory_total(&memory));
    } else if (strcmp(line, "bf16") == 0) {
        printf("%s\n", kernels_bf16(isa));
    } else if (strcmp(line, "profile") == 0) {
        for (int i = 0; i < TRAIN_OP_LIMIT; i++) {
            printf("%s %.3f%c", op_names[i], 1e-6 * (double)times.ns[i],
                   i + 1 < TRAIN_OP_LIMIT ? ' ' : '\n');
        }
    } else {
        fail("lines are step, limits, memory, bf16, profile or flops", NULL);
    }
    fflush(stdout);
}

static Settings parse(int argc, char **argv)
{
    Settings s = {2, 8, 4, 64, 12, 768, 12, 0, 0, "f32", "auto", NULL, "fast"};
    const struct {
        const char *name;
        int *number;
        const char **text;
    } options[] = {{"--threads", &s.threads, NULL},     {"--leaves", &s.leaves, NULL},
                   {"--sequences", &s.sequences, NULL}, {"--length", &s.length, NULL},
                   {"--layers", &s.layers, NULL},       {"--width", &s.width, NULL},
                   {"--heads", &s.heads, NULL},         {"--micro", &s.micro, NULL},
                   {"--loose", &s.loose, NULL},         {"--precision", NULL, &s.precision},
                   {"--device", NULL, &s.device},       {"--isa", NULL, &s.isa},
                   {"--numerics", NULL, &s.numerics}};
    for (int i = 1; i < argc; i += 2) {
        bool known = false;
        for (size_t k = 0; i + 1 < argc && k < sizeof options / sizeof *options; k++) {
            if (strcmp(argv[i], options[k].name) == 0) {
                known = true;
                if (options[k].number != NULL) {
                    *options[k].number = atoi(argv[i + 1]);
                } else {
                    *options[k].text = argv[i + 1];
                }
            }
        }
        if (!known) {
            fprintf(stderr,
                    "usage: bench-train [--threads N] [--leaves N] [--sequences N] "
                    "[--length N] [--layers N] [--width N] [--heads N] [--micro N] [--loose 0|1] "
                    "[--precision f32|bf16|f16] [--isa auto|generic|avx2|avx512] [--device "
                    "cuda[:N] [--numerics exact|fast]]\n");
            exit(2);
        }
    }
    s.micro = s.micro > 0 ? s.micro : s.sequences;
    return s;
}

int main(int argc, char **argv)
{
    Settings s = parse(argc, argv);
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = (uint32_t)s.layers,
                                .width = (uint32_t)s.width,
                                .heads = (uint32_t)s.heads,
                                .ffn_width = 4 * (uint32_t)s.width,
                                .vocabulary = vocabulary = 50257,
                                .context = (uint32_t)MAX(1024, s.length)};
    GError *error = NULL;
    KernelIsa isa;
    if (strcmp(s.numerics, "fast") != 0 && strcmp(s.numerics, "exact") != 0) {
        fail("--numerics is exact or fast", NULL);
    }
    if (s.threads < 1 || s.threads > 64 || !kernels_parse_isa(s.isa, &isa)) {
        fail("--threads is 1 to 64, --isa one that this CPU has", NULL);
    }
    isa = strcmp(s.isa, "auto") == 0 ? kernels_best_isa() : isa;
    g_autoptr(ModelSpec) spec = model_spec_from_config(&config, &error);
    int cpus[64];
    for (int i = 0; i < s.threads; i++) {
        cpus[i] = i;
    }
    Pool *pool = pool_new((unsigned)s.threads, cpus, true, 200);
    if (spec == NULL || pool == NULL) {
        fail("no model or no threads", error);
    }
    DeviceChoice choice;
    g_autoptr(Device) device = NULL;
    if (s.device != NULL && (!device_choice_parse(s.device, &choice, &error) ||
                             (device = device_open(&choice, &error)) == NULL)) {
        fail("--device", error);
    }
    Kernels kernels = *kernels_get(isa);
    if (s.loose != 0) {
        exact_gemm = kernels.train.gemm;
        kernels.train.gemm = loose_gemm;
    }
    const SampleSource source = {
        .user = &s.length, .read = read_sample, .length = (uint32_t)s.length};
    for (uint32_t i = 0; i < spec->n_tensors; i++) {
        const TensorSpec *t = &spec->tensors[i];
        if (t->rows > 1 && t->role != ROLE_POSITION_EMBD) {
            flops_per_token += 6.0 * (double)t->rows * t->columns;
        }
    }
    flops_per_token += 12.0 * s.layers * s.length * s.width;
    TrainRank *rank = make_rank(&s, spec, &kernels, pool, &source, device);
    char line[64];
    while (fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        answer(line, rank, pool, isa);
    }
    train_rank_free(rank);
    pool_free(pool);
    return 0;
}
