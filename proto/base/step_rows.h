/* Bounds of the histogram of rows of a step, as leaders count them and /metrics shows them (those
 * of vLLM's iteration_tokens_total). */
#pragma once

#define STEP_ROWS_BOUNDS 13u
static const double step_rows_bounds[STEP_ROWS_BOUNDS] = {
    1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
