#include "worker/serve/step_pace.h"

#include <glib.h>

void step_pace_note(StepPace *pace, uint32_t n_rows, int64_t built_us, int64_t now_us)
{
    const int64_t took_us = now_us - MAX(built_us, pace->result_us);
    pace->result_us = now_us;
    if (n_rows < PACE_LEAST_ROWS || took_us <= 0) {
        return;
    }
    const double row_us = (double)took_us / n_rows;
    pace->row_us = pace->row_us == 0.0 ? row_us : pace->row_us + (row_us - pace->row_us) / 4.0;
}

uint32_t step_pace_chunk(const StepPace *pace, uint32_t steps_per_token)
{
    if (pace->row_us == 0.0) {
        return PACE_FIRST_ROWS;
    }
    const double rows = PACE_ADDED_US / (pace->row_us * steps_per_token);
    return rows < PACE_LEAST_ROWS ? PACE_LEAST_ROWS : rows > 1e6 ? 1000000u : (uint32_t)rows;
}
