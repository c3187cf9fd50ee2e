/* The sampler: its result is a function of the logits and the settings alone, whatever the cut of
 * the vocabulary, the number of candidates and the instruction set; it agrees with the definition
 * written out plainly, and draws from the distribution that softmax says. */
#include "kernels/ops/act.h"
#include "proto/base/hash.h"
#include "proto/model/model_spec.h"
#include "tests/unit/kernels/numbers.h"
#include "worker/serve/sample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { VOCAB = 5 * 1024 + 37, N_CHUNKS = 6, RANKS = 4 };

static SampleMerger *merger(void)
{
    static SampleMerger *one; /* the program's, as a rank has one */
    if (one == NULL) {
        one = sample_merger_new();
    }
    return one;
}

static float logits[VOCAB];

/* Draws with the vocabulary cut at chunks cuts[0..n_ranks]; *rounds counts the tries, each with
 * twice the candidates. */
static SampleOutcome draw(const Kernels *kernels, const SampleRow *row, uint32_t vocab,
                          const uint32_t *cuts, uint32_t n_ranks, uint32_t n_candidates,
                          SampleResult *result, unsigned *rounds)
{
    for (*rounds = 1;; (*rounds)++, n_candidates *= 2) {
        GByteArray *parts[RANKS];
        SampleReader readers[RANKS];
        for (uint32_t r = 0; r < n_ranks; r++) {
            const uint32_t first = MIN(cuts[r] * VOCAB_CHUNK, vocab),
                           end = MIN(cuts[r + 1] * VOCAB_CHUNK, vocab);
            parts[r] = g_byte_array_new();
            sample_part(kernels, row, logits + first, first, end - first, n_candidates, parts[r]);
            readers[r] = (SampleReader){.data = parts[r]->data, .size = parts[r]->len};
        }
        memset(result, 0, sizeof *result);
        const SampleOutcome outcome =
            sample_merge(merger(), kernels, row, readers, n_ranks, result);
        for (uint32_t r = 0; r < n_ranks; r++) {
            assert_true(outcome != SAMPLE_DRAWN || readers[r].offset == readers[r].size);
            g_byte_array_unref(parts[r]);
        }
        if (outcome != SAMPLE_MORE) {
            return outcome;
        }
        assert_true(n_candidates < 2 * vocab);
    }
}

static const uint32_t one_rank[] = {0, N_CHUNKS};

static SampleOutcome draw_whole(const SampleRow *row, uint32_t vocab, SampleResult *result)
{
    unsigned rounds;
    return draw(kernels_get(kernels_best_isa()), row, vocab, one_rank, 1,
                sample_candidates(&row->settings), result, &rounds);
}

static const SampleSettings varieties[] = {
    {.temperature = 0.0f},
    {.temperature = 0.0f, .repeat_penalty = 1.7f, .top_logprobs = 20},
    {.temperature = 1.0f, .top_logprobs = 3},
    {.temperature = 0.3f, .repeat_penalty = 1.2f},
    {.temperature = 0.8f, .top_k = 40},
    {.temperature = 1.3f, .top_k = 1, .repeat_penalty = 0.8f},
    {.temperature = 0.9f, .top_p = 0.95f},
    {.temperature = 2.5f, .top_p = 0.5f, .top_logprobs = 5},
    {.temperature = 1.1f, .min_p = 0.05f},
    {.temperature = 1.0f, .top_k = 50, .top_p = 0.9f, .min_p = 0.02f, .repeat_penalty = 1.1f},
    {.temperature = 1.5f, .top_p = 0.999f, .min_p = 0.0001f},
    {.temperature = 1.0f, .top_k = 100000},
    {.temperature = 0.0f, .presence_penalty = 4.0f, .frequency_penalty = 1.5f},
    {.temperature = 0.0f, .presence_penalty = -2.0f, .repeat_penalty = 1.3f},
    {.temperature = 0.7f, .frequency_penalty = -0.7f, .top_k = 30, .repeat_penalty = 1.1f},
    {.temperature = 1.0f, .presence_penalty = 1.0f, .frequency_penalty = 0.1f, .top_p = 0.9f},
};
#define N_VARIETIES (sizeof varieties / sizeof varieties[0])

/* On both sides of chunk edges, one id above the others and one banned. */
static const SampleBias biases[] = {{0, -1.5f},    {1023, 2.25f},    {1024, -100.0f},
                                    {1025, 0.5f},  {2047, 4.0f},     {3000, 0.0f},
                                    {4096, -0.1f}, {VOCAB - 1, 3.0f}};

static SampleRow row_of(unsigned variety, uint32_t position, const uint32_t *window,
                        uint32_t n_window)
{
    SampleRow row = {.settings = varieties[variety],
                     .position = position,
                     .window = window,
                     .n_window = n_window};
    if (variety % 3 != 1) { /* all of the window but its first third was generated */
        row.generated = window + n_window / 3;
        row.n_generated = n_window - n_window / 3;
    }
    if (variety % 2 == 0) {
        row.bias = biases;
        row.n_bias = G_N_ELEMENTS(biases);
    }
    row.settings.seed = 0x5eed000000000000u + variety;
    row.settings.choice = variety % 3;
    return row;
}

static void fill(Numbers *numbers, uint32_t n, double spread)
{
    for (uint32_t i = 0; i < n; i++) {
        double sum = 0.0;
        for (unsigned j = 0; j < 6; j++) {
            sum += numbers_uniform(numbers, -spread, spread);
        }
        logits[i] = (float)sum;
    }
}

static void test_cut_candidates_and_isa_change_nothing(void **state)
{
    static const uint32_t cuts[][RANKS + 1] = {
        {0, 1, 2, 3, 6}, {0, 0, 5, 5, 6}, {0, 2, 4, 6, 6}, {0, 3, 3, 3, 6}};
    uint32_t window[64];
    Numbers numbers = {1};
    unsigned repeated = 0;
    for (uint32_t round = 0; round < 6; round++) {
        fill(&numbers, VOCAB, 0.5 + round);
        for (unsigned i = 0; i < 64; i++) {
            window[i] = (uint32_t)(numbers_u64(&numbers) % VOCAB);
        }
        for (unsigned v = 0; v < N_VARIETIES; v++) {
            const SampleRow row = row_of(v, round, window, 64);
            SampleResult want, got;
            unsigned rounds;
            assert_int_equal(draw_whole(&row, VOCAB, &want), SAMPLE_DRAWN);
            assert_int_equal(want.n_top, row.settings.top_logprobs);
            for (unsigned c = 0; c < 4; c++) {
                const Kernels *kernels = kernels_get(c == 0 ? ISA_GENERIC : kernels_best_isa());
                const uint32_t n_candidates = c == 3 ? 1 : sample_candidates(&row.settings) + c;
                assert_int_equal(
                    draw(kernels, &row, VOCAB, cuts[c], RANKS, n_candidates, &got, &rounds),
                    SAMPLE_DRAWN);
                assert_memory_equal(&got, &want, sizeof got);
                repeated += rounds > 1;
            }
        }
    }
    assert_true(repeated > 10); /* the path with too few candidates was walked */
}

/* ---- the definition, plainly ---- */

typedef struct Entry {
    float value, noise;
    uint32_t id;
} Entry;

static int by_value(const void *a, const void *b)
{
    const Entry *x = a, *y = b;
    return x->value != y->value ? (x->value > y->value ? -1 : 1)
                                : (x->id > y->id) - (x->id < y->id);
}

static bool in_window(const SampleRow *row, uint32_t id)
{
    for (uint32_t i = 0; i < row->n_window; i++) {
        if (row->window[i] == id) {
            return true;
        }
    }
    return false;
}

static uint32_t count_of(const SampleRow *row, uint32_t id)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < row->n_generated; i++) {
        n += row->generated[i] == id;
    }
    return n;
}

static uint32_t plain_draw(const SampleRow *row, uint32_t vocab)
{
    static Entry e[VOCAB];
    static float noise[VOCAB];
    const SampleSettings *s = &row->settings;
    const GumbelKey key = {.seed = s->seed, .choice = s->choice, .position = row->position};
    kernels_get(ISA_GENERIC)->gumbel(&key, 0, vocab, noise);
    for (uint32_t i = 0; i < vocab; i++) {
        float v = logits[i];
        if (s->repeat_penalty != 0.0f && in_window(row, i)) {
            v = v > 0.0f ? v / s->repeat_penalty : v * s->repeat_penalty;
        }
        const uint32_t times = count_of(row, i);
        if (times > 0) {
            v = v - (float)times * s->frequency_penalty;
            v = v - s->presence_penalty;
        }
        for (uint32_t b = 0; b < row->n_bias; b++) {
            v = row->bias[b].id == i ? v + row->bias[b].bias : v;
        }
        e[i] = (Entry){
            .value = s->temperature > 0.0f ? v / s->temperature : v, .noise = noise[i], .id = i};
    }
    qsort(e, vocab, sizeof e[0], by_value);
    if (s->temperature == 0.0f) {
        return e[0].id;
    }
    uint32_t n = s->top_k > 0 ? MIN(s->top_k, vocab) : vocab;
    if (s->top_p > 0.0f && s->top_p < 1.0f) {
        double total = 0.0, sum = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            total += exp((double)e[i].value - e[0].value);
        }
        uint32_t kept = 0;
        while (kept < n && sum < (double)s->top_p * total) {
            sum += exp((double)e[kept++].value - e[0].value);
        }
        n = kept;
    }
    while (s->min_p > 0.0f && n > 1 &&
           exp((double)e[n - 1].value - e[0].value) < (double)s->min_p) {
        n--;
    }
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++) {
        const float a = e[i].value + e[i].noise, b = e[best].value + e[best].noise;
        if (a > b || (a == b && e[i].id < e[best].id)) {
            best = i;
        }
    }
    return e[best].id;
}

static void test_agrees_with_the_plain_definition(void **state)
{
    uint32_t window[64];
    Numbers numbers = {2};
    for (uint32_t round = 0; round < 25; round++) {
        fill(&numbers, VOCAB, 0.2 + 0.2 * round);
        for (unsigned i = 0; i < 64; i++) { /* the likely ones, some twice */
            window[i] = (uint32_t)(numbers_u64(&numbers) % VOCAB);
            logits[window[i]] += i % 2 ? 6.0f : 0.0f;
            window[i] = i % 9 == 8 ? window[i - 1] : window[i];
        }
        for (unsigned v = 0; v < N_VARIETIES; v++) {
            const SampleRow row = row_of(v, round * 100, window, round % 5 == 0 ? 0 : 64);
            SampleResult got;
            assert_int_equal(draw_whole(&row, VOCAB, &got), SAMPLE_DRAWN);
            assert_int_equal(got.id, plain_draw(&row, VOCAB));
        }
    }
}

/* OpenAI's formula in double: logits far enough apart that rounding decides nothing, the largest of
 * z - times x frequency - [times > 0] x presence + bias wins. */
static void test_penalties_against_double(void **state)
{
    Numbers numbers = {7};
    unsigned moved = 0;
    for (uint32_t round = 0; round < 60; round++) {
        uint32_t generated[40], best = 0, plain = 0;
        fill(&numbers, VOCAB, 3.0);
        SampleRow row = {.settings = {.presence_penalty = (float)numbers_uniform(&numbers, -2, 2),
                                      .frequency_penalty = (float)numbers_uniform(&numbers, -2, 2)},
                         .generated = generated,
                         .n_generated = 40,
                         .bias = biases,
                         .n_bias = G_N_ELEMENTS(biases)};
        for (uint32_t i = 0; i < VOCAB; i++) {
            plain = logits[i] > logits[plain] ? i : plain;
        }
        for (unsigned i = 0; i < 40; i++) {
            generated[i] = i % 4 == 0 ? plain : (uint32_t)(numbers_u64(&numbers) % VOCAB);
        }
        double best_value = -1e300;
        for (uint32_t i = 0; i < VOCAB; i++) {
            const uint32_t times = count_of(&row, i);
            double v = logits[i] - times * (double)row.settings.frequency_penalty -
                       (times > 0) * (double)row.settings.presence_penalty;
            for (unsigned b = 0; b < row.n_bias; b++) {
                v += biases[b].id == i ? (double)biases[b].bias : 0.0;
            }
            best = v > best_value ? i : best;
            best_value = MAX(v, best_value);
        }
        SampleResult r;
        assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_DRAWN);
        assert_int_equal(r.id, best);
        moved += best != plain;
    }
    assert_true(moved > 10);
}

static void test_logprobs_and_hash(void **state)
{
    Numbers numbers = {3};
    fill(&numbers, VOCAB, 2.0);
    double sum = 0.0;
    for (uint32_t i = 0; i < VOCAB; i++) {
        sum += exp((double)logits[i]);
    }
    uint8_t hashes[N_CHUNKS * 16];
    for (uint32_t c = 0; c < N_CHUNKS; c++) {
        const Hash128 h = hash128(logits + c * VOCAB_CHUNK,
                                  sizeof(float) * MIN(VOCAB_CHUNK, VOCAB - c * VOCAB_CHUNK));
        memcpy(hashes + 16 * c, h.bytes, 16);
    }
    const Hash128 want = hash128(hashes, sizeof hashes);
    uint32_t window[] = {0, 1, 2, 3};
    SampleRow row = {
        .settings = {.temperature = 0.5f, .repeat_penalty = 3.0f, .top_k = 7, .top_logprobs = 20},
        .window = window,
        .n_window = 4};
    SampleResult r;
    assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_DRAWN);
    assert_memory_equal(r.row_hash, want.bytes, 16);
    assert_true(fabs(r.logprob - (logits[r.id] - log(sum))) <
                1e-5); /* temperature 1, before penalties and filters */
    assert_int_equal(r.n_top, 20);
    for (uint32_t i = 0; i < 20; i++) {
        assert_true(fabs(r.top_logprobs[i] - (logits[r.top_ids[i]] - log(sum))) < 1e-5);
        assert_true(i == 0 || r.top_logprobs[i] <= r.top_logprobs[i - 1]);
    }
    uint32_t above = 0;
    for (uint32_t i = 0; i < VOCAB; i++) {
        above += logits[i] > logits[r.top_ids[19]];
    }
    assert_int_equal(above, 19);
    row.score = true;
    for (row.target = 0; row.target < VOCAB; row.target += 511) {
        static const uint32_t cuts[] = {0, 1, 4, 4, 6};
        SampleResult cut;
        unsigned rounds;
        assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_DRAWN);
        assert_int_equal(r.id, row.target);
        assert_true(fabs(r.logprob - (logits[row.target] - log(sum))) < 1e-5);
        assert_memory_equal(r.row_hash, want.bytes, 16);
        assert_int_equal(draw(kernels_get(ISA_GENERIC), &row, VOCAB, cuts, RANKS, 1, &cut, &rounds),
                         SAMPLE_DRAWN);
        assert_memory_equal(&cut, &r, sizeof r);
    }
    row.target = VOCAB; /* no such id */
    assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_MALFORMED);
}

static void test_ties_go_to_the_lowest_id(void **state)
{
    static const uint32_t cuts[] = {0, 1, 3, 5, 6};
    SampleResult r;
    unsigned rounds;
    memset(logits, 0, sizeof logits);
    SampleRow row = {.settings = {.temperature = 0.0f, .top_logprobs = 3}};
    for (uint32_t i = 0; i < VOCAB; i++) {
        logits[i] = i % 2 == 0 ? -0.0f : 0.0f;
    }
    assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_DRAWN);
    assert_int_equal(r.id, 0);
    logits[4000] = logits[2500] = logits[5150] = 1.0f;
    assert_int_equal(draw(kernels_get(ISA_GENERIC), &row, VOCAB, cuts, RANKS, 1, &r, &rounds),
                     SAMPLE_DRAWN);
    assert_int_equal(r.id, 2500);
    assert_int_equal(r.top_ids[1], 4000);
    assert_int_equal(r.top_ids[2], 5150);
    row.settings = (SampleSettings){.temperature = 1.0f, .top_k = 1};
    assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_DRAWN);
    assert_int_equal(r.id, 2500);
}

static void test_not_finite(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const uint32_t at[] = {0, 1023, 1024, 3000, VOCAB - 1};
    Numbers numbers = {4};
    for (unsigned v = 0; v < N_VARIETIES; v++) {
        for (unsigned i = 0; i < 15; i++) {
            fill(&numbers, VOCAB, 1.0);
            logits[at[i / 3]] = bad[i % 3];
            const SampleRow row = row_of(v, 1, NULL, 0);
            SampleResult r;
            assert_int_equal(draw_whole(&row, VOCAB, &r), SAMPLE_NOT_FINITE);
        }
    }
}

/* Chi-square of 20,000 draws over `n` ids against p; the limit is the 99.99 % quantile for up to 40
 * degrees of freedom. */
static void check_distribution(SampleSettings settings, uint32_t n, const double *p)
{
    enum { DRAWS = 20000 };
    unsigned count[64] = {0};
    double chi = 0.0;
    for (uint32_t position = 0; position < DRAWS; position++) {
        SampleRow row = {.settings = settings, .position = position};
        SampleResult r;
        row.settings.seed = 99 + position % 7;
        assert_int_equal(draw_whole(&row, n, &r), SAMPLE_DRAWN);
        count[r.id]++;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (p[i] == 0.0) {
            assert_int_equal(count[i], 0);
        } else {
            chi += (count[i] - DRAWS * p[i]) * (count[i] - DRAWS * p[i]) / (DRAWS * p[i]);
        }
    }
    assert_true(chi < 82.0);
}

static void test_draws_follow_softmax(void **state)
{
    enum { N = 40 };
    double p[N], sum = 0.0;
    Numbers numbers = {5};
    numbers_fill(&numbers, logits, N, -1.5, 1.5);
    for (unsigned i = 0; i < N; i++) {
        sum += p[i] = exp(logits[i] / 0.7);
    }
    for (unsigned i = 0; i < N; i++) {
        p[i] /= sum;
    }
    check_distribution((SampleSettings){.temperature = 0.7f}, N, p);
    /* the five most likely alone */
    double top = 0.0;
    for (unsigned i = 0; i < N; i++) {
        unsigned above = 0;
        for (unsigned j = 0; j < N; j++) {
            above += logits[j] > logits[i];
        }
        p[i] = above < 5 ? p[i] : 0.0;
        top += p[i];
    }
    for (unsigned i = 0; i < N; i++) {
        p[i] /= top;
    }
    check_distribution((SampleSettings){.temperature = 0.7f, .top_k = 5}, N, p);
}

/* Whatever a peer's bytes lack or claim, the merge says so and reads nothing beyond them. */
static void test_malformed_parts(void **state)
{
    Numbers numbers = {6};
    fill(&numbers, VOCAB, 1.0);
    const SampleRow row = row_of(9, 3, NULL, 0);
    GByteArray *part = g_byte_array_new();
    SampleResult r;
    sample_part(kernels_get(ISA_GENERIC), &row, logits, 0, VOCAB, 50, part);
    for (guint size = 0; size < part->len; size++) {
        g_autofree uint8_t *exact =
            g_memdup2(part->data, size); /* so that a read beyond is caught by the sanitizer */
        SampleReader reader = {.data = exact, .size = size};
        assert_int_equal(sample_merge(merger(), kernels_get(ISA_GENERIC), &row, &reader, 1, &r),
                         SAMPLE_MALFORMED);
    }
    for (unsigned i = 0; i < 3000; i++) { /* any bytes: any outcome, no crash */
        g_autofree uint8_t *damaged = g_memdup2(part->data, part->len);
        for (unsigned j = 0; j < 1 + i % 4; j++) {
            damaged[numbers_u64(&numbers) % (i % 2 ? 28 : part->len)] =
                (uint8_t)numbers_u64(&numbers);
        }
        SampleReader reader = {.data = damaged, .size = part->len};
        sample_merge(merger(), kernels_get(ISA_GENERIC), &row, &reader, 1, &r);
    }
    g_byte_array_unref(part);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cut_candidates_and_isa_change_nothing),
        cmocka_unit_test(test_agrees_with_the_plain_definition),
        cmocka_unit_test(test_penalties_against_double),
        cmocka_unit_test(test_logprobs_and_hash),
        cmocka_unit_test(test_ties_go_to_the_lowest_id),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_draws_follow_softmax),
        cmocka_unit_test(test_malformed_parts),
    };
    return cmocka_run_group_tests_name("sample", tests, NULL, NULL);
}
