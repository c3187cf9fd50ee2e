/* Any bytes as a Step from another rank: refused, or a Step that comes back byte by byte when it is
 * encoded, and that the sequence table and the trace can take as it stands. The same bytes as a
 * message of traced rows. */
#include "worker/serve/step.h"
#include "worker/serve/trace.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const StepLimits limits = {
    .max_rows = 8, .max_slots = 3, .max_pages = 12, .context = 96, .vocab_size = 40};

static void check_rows(const Step *step)
{
    uint32_t row = 0;
    for (uint32_t i = 0; i < step->n_segments; i++) {
        g_assert(step->segments[i].row0 == row && step->segments[i].n_rows > 0);
        row += step->segments[i].n_rows;
    }
    g_assert(row == step->n_rows);
}

static void take_row(uint32_t slot, uint64_t uid, uint32_t position, const uint8_t *sites,
                     uint32_t n_sites, void *user)
{
    uint32_t *sum = user;
    for (size_t i = 0; i < 16 * (size_t)n_sites; i++) {
        *sum += sites[i];
    }
}

static void run_step(const Step *step, const uint8_t *data, size_t size)
{
    Sequences sequences;
    sequences_init(&sequences, &limits);
    sequences_apply(&sequences, step);
    for (int second = 0; second < 2; second++) { /* of a first stage, of a second */
        Trace *trace = trace_new(second ? 1 : 0, 1, second == 0, 1);
        trace_receive(trace, step->number, data, size);
        StageTrace *stage = trace_begin(trace, step, &sequences);
        if (stage != NULL) {
            memset(stage->hashes, 0, sizeof(Hash128) * stage->n_rows * stage->n_sites);
            const GByteArray *message = trace_message(trace, step, &sequences);
            uint32_t sum = 0;
            g_assert(message == NULL ||
                     trace_each_row(message->data, message->len, take_row, &sum));
        }
        trace_free(trace);
    }
    sequences_clear(&sequences);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t used = 0;
    uint32_t sum = 0;
    g_autoptr(GError) error = NULL;
    Step *step = step_new(&limits);
    const bool good = step_decode(step, &limits, data, size, &used, &error);
    g_assert(good == (error == NULL));
    if (good) {
        g_autofree uint8_t *again = g_malloc(step_wire_limit(&limits));
        check_rows(step);
        g_assert(step_encode(step, again) == used && memcmp(again, data, used) == 0);
        run_step(step, data + used, size - used);
    }
    trace_each_row(data, size, take_row, &sum);
    step_free(step);
    return 0;
}
