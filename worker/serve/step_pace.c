#include "worker/serve/step_pace.h"

#include <glib.h>

/* Of a step's decoding rows alone, rather too little: then what prompts add is rather too much. */
static double decoding_us(const StepPace *pace, uint32_t n_decoding)
{
    return n_decoding == 0 || pace->n_decoding == 0
               ? 0
               : pace->decoding_us * MIN(1.0, (double)n_decoding / pace->n_decoding);
}

void step_pace_note(StepPace *pace, uint32_t n_decoding, uint32_t n_prompt, int64_t built_us,
                    int64_t now_us)
{
    const double took_us = (double)(now_us - MAX(built_us, pace->result_us));
    pace->result_us = now_us;
    if (took_us <= 0) {
        return;
    }
    if (n_prompt == 0 && n_decoding > 0) {
        pace->decoding_us = took_us;
        pace->n_decoding = n_decoding;
    } else if (n_prompt >= PACE_LEAST_ROWS / 2) {
        const double beside_us = (took_us - decoding_us(pace, n_decoding)) / n_prompt,
                     mean_us = took_us / (n_decoding + n_prompt), row_us = MAX(beside_us, mean_us);
        pace->row_us = MAX(row_us, pace->row_us + (row_us - pace->row_us) / 4.0);
    }
}

uint32_t step_pace_chunk(const StepPace *pace, uint32_t steps_per_token)
{
    if (pace->row_us == 0.0) {
        return PACE_LEAST_ROWS;
    }
    const double rows = PACE_TARGET * PACE_ADDED_US / (pace->row_us * steps_per_token);
    return rows < PACE_LEAST_ROWS ? PACE_LEAST_ROWS : rows > 1e6 ? 1000000u : (uint32_t)rows;
}
