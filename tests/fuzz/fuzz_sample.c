/* Any bytes as the vocabulary parts that ranks send to the one that draws. Records: the first is
 * the row's settings, each other one the parts of a rank. */
#include "tests/fuzz/calls.h"
#include "worker/serve/sample.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { READERS_LIMIT = 4 };

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return NULL;
}

typedef struct Settings {
    float temperature, top_p, min_p, repeat_penalty;
    uint32_t top_k, choice, top_logprobs, position, target;
    uint8_t score;
} Settings;

static SampleRow row_of(const Record *record)
{
    Settings s = {0};
    memcpy(&s, record->bytes, MIN(record->size, sizeof s));
    return (SampleRow){.settings = {.temperature = s.temperature,
                                    .top_p = s.top_p,
                                    .min_p = s.min_p,
                                    .repeat_penalty = s.repeat_penalty,
                                    .top_k = s.top_k,
                                    .choice = s.choice,
                                    .top_logprobs = s.top_logprobs,
                                    .seed = 7},
                       .position = s.position,
                       .score = s.score != 0,
                       .target = s.target};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Records r = {data, size, 0};
    Record record;
    SampleReader readers[READERS_LIMIT];
    uint32_t n = 0;
    if (!records_next(&r, &record)) {
        return 0;
    }
    const SampleRow row = row_of(&record);
    while (n < READERS_LIMIT && records_next(&r, &record)) {
        readers[n++] = (SampleReader){.data = record.bytes, .size = record.size};
    }
    if (n == 0) {
        return 0;
    }
    SampleMerger *merger = sample_merger_new();
    SampleResult result = {0};
    SampleOutcome outcome;
    do { /* parts of further rows follow */
        outcome = sample_merge(merger, kernels_get(ISA_GENERIC), &row, readers, n, &result);
        for (uint32_t i = 0; i < n; i++) {
            g_assert(readers[i].offset <= readers[i].size);
        }
        g_assert(outcome != SAMPLE_DRAWN || result.n_top <= SAMPLE_TOP_LIMIT);
        g_assert(outcome != SAMPLE_DRAWN || !row.score || result.id == row.target);
    } while (outcome == SAMPLE_DRAWN && readers[0].offset < readers[0].size);
    sample_merger_free(merger);
    return 0;
}
