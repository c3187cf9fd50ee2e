/* Seeds of the targets of the data plane (fuzz_step, _sample, _link, _group, _engine): what honest
 * ranks send, and a few that are almost so.
 *
 * usage: make-fuzz-link-seeds CORPUS_DIR */
#include "kernels/kernels.h"
#include "tests/fuzz/calls.h"
#include "transport/link/link.h"
#include "worker/serve/sample.h"
#include "worker/serve/step.h"

#include <glib/gstdio.h>
#include <string.h>

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

static const char *corpus;

static void write_seed(const char *target, const char *name, GByteArray *bytes)
{
    g_autofree char *folder = g_build_filename(corpus, target, NULL);
    g_autofree char *path = g_build_filename(folder, name, NULL);
    g_autoptr(GError) error = NULL;
    g_mkdir_with_parents(folder, 0755);
    if (!g_file_set_contents(path, (const char *)bytes->data, bytes->len, &error)) {
        g_error("%s", error->message);
    }
    g_byte_array_set_size(bytes, 0);
}

static void add_u32(GByteArray *out, uint32_t value)
{
    g_byte_array_append(out, (const uint8_t *)&value, sizeof value);
}

/* ---- steps ---- */

/* Capacities for both targets; what is encoded lies within the smaller limits of each. */
static const StepLimits room = {
    .max_rows = 16, .max_slots = 3, .max_pages = 12, .context = 128, .vocab_size = 600};

/* Two sequences begin: a prompt of five rows, the last drawn, and one row that is scored. */
static void fill_first(Step *step)
{
    step_clear(step);
    step->n_admits = 2;
    step->admits[0] = (StepAdmit){.slot = 0,
                                  .uid = 1,
                                  .n_prompt = 5,
                                  .temperature = 0.8f,
                                  .top_p = 0.9f,
                                  .min_p = 0.01f,
                                  .repeat_penalty = 1.1f,
                                  .presence_penalty = 0.5f,
                                  .frequency_penalty = 0.5f,
                                  .top_k = 10,
                                  .penalty_window = 16,
                                  .top_logprobs = 2,
                                  .seed = 3,
                                  .n_bias = 1,
                                  .want_logits = 1,
                                  .trace = 1};
    step->admits[1] = (StepAdmit){.slot = 2, .uid = 2, .n_prompt = 2};
    step->n_biases = 1;
    step->biases[0] = (SampleBias){.id = 7, .bias = 2};
    step->n_segments = 2;
    step->segments[0] = (StepSegment){.slot = 0, .n_rows = 5, .n_pages = 1};
    step->segments[1] = (StepSegment){.slot = 2, .row0 = 5, .n_rows = 1, .n_pages = 1, .page0 = 1};
    step->n_rows = 6;
    for (uint32_t i = 0; i < 6; i++) {
        step->rows[i] = (StepRow){.token = i + 1};
    }
    step->rows[4].output = STEP_OUTPUT_SAMPLE;
    step->rows[5].output = STEP_OUTPUT_SCORE;
    step->rows[5].target = 9;
    step->n_pages = 2;
    step->pages[0] = 3;
    step->pages[1] = 4;
}

/* One goes on, another is released, a third begins behind a page that it reuses and the beginning
 * of one that it copies. */
static void fill_second(Step *step)
{
    step_clear(step);
    step->n_releases = 1;
    step->releases[0] = 2;
    step->n_admits = 1;
    step->admits[0] = (StepAdmit){.slot = 1, .uid = 3, .n_prompt = 34};
    step->n_reuses = 1;
    step->reuses[0] = (StepReuse){.slot = 1, .n_pages = 1};
    step->n_copies = 1;
    step->copies[0] =
        (StepCopy){.slot = 1, .page_index = 1, .n_positions = 3, .from = 4, .to = 5, .token0 = 32};
    step->n_tokens = 35;
    for (uint32_t i = 0; i < 35; i++) {
        step->tokens[i] = i;
    }
    step->n_segments = 2;
    step->segments[0] = (StepSegment){.slot = 0, .position = 5, .n_rows = 1};
    step->segments[1] = (StepSegment){.slot = 1, .position = 35, .row0 = 1, .n_rows = 2};
    step->n_rows = 3;
    step->rows[0] = (StepRow){.token = 11, .output = STEP_OUTPUT_SAMPLE};
    step->rows[1] = (StepRow){.token = 12};
    step->rows[2] = (StepRow){.token = 13, .output = STEP_OUTPUT_SAMPLE};
    step->n_pages = 1;
    step->pages[0] = 3;
}

static void append_step(GByteArray *out, const Step *step)
{
    g_autofree uint8_t *wire = g_malloc(step_wire_limit(&room));
    g_byte_array_append(out, wire, (guint)step_encode(step, wire));
}

static void add_step(GByteArray *out, uint8_t kind, uint32_t number, const Step *step)
{
    g_autoptr(GByteArray) bytes = g_byte_array_new();
    add_u32(bytes, number);
    append_step(bytes, step);
    records_append(out, kind, bytes->data, bytes->len);
}

static void steps(void)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    Step *step = step_new(&room);
    fill_first(step);
    append_step(out, step);
    write_seed("step", "two-begin", out);
    fill_second(step);
    append_step(out, step);
    write_seed("step", "goes-on-reuses", out);
    step->segments[1].row0 = 0; /* a row in two segments */
    append_step(out, step);
    write_seed("step", "row-twice", out);
    step->segments[1].row0 = 1;
    step->n_segments = 1; /* rows in none */
    append_step(out, step);
    write_seed("step", "row-of-no-segment", out);
    step_clear(step);
    append_step(out, step);
    write_seed("step", "empty", out);
    step_free(step);
}

/* ---- engines ---- */

enum { WITH_ACTIVATIONS = 16, SUBMIT = 32, CANCEL = 64, APART = 128 }; /* fuzz_engine.c */

static void start_engine_seed(GByteArray *out, uint8_t how)
{
    g_byte_array_append(out, &how, 1);
}

/* A row's result as the last stage sends it. */
static void append_result(GByteArray *out, uint32_t slot, uint64_t uid, uint32_t position,
                          uint32_t id, uint32_t n_top)
{
    static const uint8_t hash[16] = {1};
    const uint32_t fields[2] = {position, id};
    const float logprob = -1;
    add_u32(out, slot);
    g_byte_array_append(out, (const uint8_t *)&uid, 8);
    g_byte_array_append(out, (const uint8_t *)fields, sizeof fields);
    g_byte_array_append(out, (const uint8_t *)&logprob, 4);
    g_byte_array_append(out, hash, sizeof hash);
    add_u32(out, 0); /* failed */
    add_u32(out, n_top);
    add_u32(out, 0); /* logits */
    for (uint32_t i = 0; i < 2 * n_top; i++) {
        add_u32(out, i);
    }
}

static void engines(void)
{
    g_autoptr(GByteArray) out = g_byte_array_new(), bytes = g_byte_array_new();
    Step *step = step_new(&room);
    start_engine_seed(out, 1);
    fill_first(step);
    step->admits[0].trace = 0;
    add_step(out, LINK_OP_STEP | WITH_ACTIVATIONS, 1, step);
    fill_second(step);
    add_step(out, LINK_OP_STEP | WITH_ACTIVATIONS, 2, step);
    write_seed("engine", "last-stage-steps", out);

    start_engine_seed(out, 1); /* traced: the hashes of stage 0 come ahead of the step */
    fill_first(step);
    add_u32(bytes, 1);
    add_u32(bytes, 5); /* rows */
    add_u32(bytes, 3); /* sites: embedding, attention, FFN of one layer */
    for (uint32_t i = 0; i < 5; i++) {
        static const uint8_t sites[4 + 8 + 4 + 3 * 16] = {0};
        g_byte_array_append(bytes, sites, sizeof sites);
    }
    records_append(out, LINK_OP_TRACE, bytes->data, bytes->len);
    add_step(out, LINK_OP_STEP | WITH_ACTIVATIONS, 1, step);
    write_seed("engine", "last-stage-trace", out);

    start_engine_seed(out, 1);
    step->n_segments = 0;
    add_step(out, LINK_OP_STEP | WITH_ACTIVATIONS, 1, step);
    write_seed("engine", "last-stage-bad-step", out);

    start_engine_seed(out, 1);
    fill_first(step);
    add_step(out, LINK_OP_STEP | APART, 1, step);
    write_seed("engine", "last-stage-apart", out);

    start_engine_seed(out, 0); /* the leader: its first step has both prompts */
    g_byte_array_set_size(bytes, 0);
    add_u32(bytes, 1);
    add_u32(bytes, 5);
    append_result(bytes, 0, 1, 4, 17, 2);
    for (uint32_t i = 0; i < 4; i++) {
        append_result(bytes, 1, 2, i, i + 2, 2);
    }
    records_append(out, SUBMIT, NULL, 0);
    records_append(out, LINK_OP_TOKEN, bytes->data, bytes->len);
    records_append(out, LINK_OP_TOKEN | CANCEL, bytes->data, bytes->len);
    write_seed("engine", "leader-tokens", out);

    start_engine_seed(out, 0);
    records_append(out, SUBMIT | LINK_OP_ABORT, "\0\0\0\0peer is gone", 16);
    records_append(out, LINK_OP_TOKEN, bytes->data, bytes->len);
    write_seed("engine", "leader-abort", out);

    start_engine_seed(out, 2); /* before hello */
    for (uint8_t op = 1; op < 10; op++) {
        records_append(out, op, bytes->data, bytes->len);
    }
    write_seed("engine", "every-op-before-hello", out);
    step_free(step);
}

/* ---- links and groups ---- */

static void links(void)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    for (uint8_t sealed = 0; sealed < 2; sealed++) {
        uint8_t datagram[LINK_HEADER_BYTES + 5 + LINK_TAG_BYTES] = {0};
        const size_t size = sizeof datagram - (sealed ? 0 : LINK_TAG_BYTES);
        datagram[12] = LINK_OP_PARTIAL;
        memcpy(datagram + LINK_HEADER_BYTES, "hello", 5);
        g_byte_array_append(out, &sealed, 1);
        records_append(out, 15, datagram, size);
        records_append(out, 15, datagram, size);
        records_append(out, 11, datagram, size); /* sequence 0 */
        records_append(out, 7, datagram, size);  /* check missing */
        records_append(out, 14, datagram, size); /* another handle */
        records_append(out, 0, datagram, 20);
        records_append(out, 0, NULL, 0);
        records_append(out, 15, datagram, LINK_HEADER_BYTES + (sealed ? LINK_TAG_BYTES : 0));
        write_seed("link", sealed ? "sealed" : "plain", out);
    }
}

static void add_group(GByteArray *out, uint8_t kind, uint16_t site, unsigned phase, uint32_t step,
                      size_t size)
{
    uint8_t bytes[6 + 256] = {0};
    const uint16_t flags = (uint16_t)(site | phase << 14);
    memcpy(bytes, &flags, 2);
    memcpy(bytes + 2, &step, 4);
    records_append(out, kind, bytes, 6 + size);
}

static void groups(void)
{
    g_autoptr(GByteArray) out = g_byte_array_new();
    add_group(out, 0, 1, 0, 1, 32);
    add_group(out, 1, 1, 0, 1, 64); /* rank 2 has two leaves: one subtree */
    add_group(out, 6, 1, 0, 1, 0);  /* all-reduce, one shot */
    write_seed("group", "all-reduce", out);
    for (unsigned phase = 1; phase < 3; phase++) {
        add_group(out, 0, 1, phase, 1, 64);
        add_group(out, 1, 1, phase, 1, 64);
    }
    add_group(out, 7, 1, 0, 1, 0); /* two shots */
    add_group(out, 4, 2, 0, 1, 0); /* reduce-scatter */
    write_seed("group", "two-shots", out);
    add_group(out, 0, 3, 0, 2, 8);
    add_group(out, 1, 3, 0, 2, 20);
    add_group(out, 2, 3, 0, 2, 0); /* all-gather */
    add_group(out, 0, 4, 0, 2, 40);
    add_group(out, 3, 4, 0, 2, 0); /* broadcast */
    add_group(out, 0, 5, 0, 2, 12);
    add_group(out, 5, 5, 0, 2, 0); /* all-to-all */
    add_group(out, 0, 1, 0, 1, 8); /* late */
    add_group(out, 1, 9, 0, 9, 8); /* early */
    write_seed("group", "gather-broadcast-exchange", out);
    add_group(out, 0, 3, 0, 2, 200); /* more than is expected */
    add_group(out, 2, 3, 0, 2, 0);
    write_seed("group", "too-much", out);
}

/* ---- parts of a drawn row ---- */

typedef struct Settings { /* fuzz_sample.c */
    float temperature, top_p, min_p, repeat_penalty;
    uint32_t top_k, choice, top_logprobs, position, target;
    uint8_t score;
} Settings;

static void sample(const char *name, Settings s, uint32_t n_candidates)
{
    enum { VOCAB = 2 * VOCAB_CHUNK + 100 };
    static float logits[VOCAB];
    g_autoptr(GByteArray) out = g_byte_array_new();
    const SampleRow row = {.settings = {.temperature = s.temperature,
                                        .top_p = s.top_p,
                                        .min_p = s.min_p,
                                        .repeat_penalty = s.repeat_penalty,
                                        .top_k = s.top_k,
                                        .top_logprobs = s.top_logprobs,
                                        .seed = 7},
                           .position = s.position,
                           .score = s.score != 0,
                           .target = s.target};
    for (uint32_t i = 0; i < VOCAB; i++) {
        logits[i] = (float)(i * 7919 % 1000) / 100.0f;
    }
    records_append(out, 0, &s, sizeof s);
    for (uint32_t first = 0; first < VOCAB; first += 2 * VOCAB_CHUNK) {
        g_autoptr(GByteArray) part = g_byte_array_new();
        sample_part(kernels_get(ISA_GENERIC), &row, logits + first, first,
                    MIN(2 * VOCAB_CHUNK, VOCAB - first), n_candidates, part);
        records_append(out, 0, part->data, part->len);
    }
    write_seed("sample", name, out);
}

static void samples(void)
{
    sample("greedy", (Settings){.top_logprobs = 3, .position = 4}, 1);
    sample("top-k", (Settings){.temperature = 0.8f, .top_k = 5, .top_p = 0.9f, .position = 4}, 5);
    sample("open-ended", (Settings){.temperature = 1, .top_p = 0.5f, .min_p = 0.1f}, 8);
    sample("score", (Settings){.score = 1, .target = 3}, 1);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        g_printerr("usage: %s CORPUS_DIR\n", argv[0]);
        return 2;
    }
    corpus = argv[1];
    steps();
    engines();
    links();
    groups();
    samples();
    return 0;
}
