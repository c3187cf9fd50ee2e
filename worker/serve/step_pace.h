/* StepPace: how many rows of prompts a step may carry while other sequences decode, from the time
 * that steps took. It chooses when rows are computed, never what they are: any chunk gives the same
 * bits (NUMERICS).
 *
 * The bound. While a sequence decodes, a step carries at most
 *
 *   chunk = PACE_ADDED_US / (row time x steps that pass between two tokens of a sequence)
 *
 * rows of prompts, at least PACE_LEAST_ROWS, so what prompts add to the time between two tokens is
 * at most the larger of PACE_ADDED_US and of PACE_LEAST_ROWS rows in each of these steps. The row
 * time is a moving average (a quarter of each new step) of a step's time over its rows, of steps
 * with at least PACE_LEAST_ROWS rows: it contains what a step costs in any case, so it is rather
 * too high. Before the first such step a chunk has PACE_FIRST_ROWS rows. */
#pragma once

#include <stdint.h>

#define PACE_ADDED_US 50000.0
#define PACE_LEAST_ROWS 32u
#define PACE_FIRST_ROWS 64u

typedef struct StepPace {
    double row_us;     /* 0 = not measured */
    int64_t result_us; /* when the last step came back */
} StepPace;

/* A step of n_rows rows that was built at built_us came back at now_us, after the one before it.
 * What it took is counted from the later of its building and the result before: with several steps
 * in flight that is the time of the slowest stage. */
void step_pace_note(StepPace *pace, uint32_t n_rows, int64_t built_us, int64_t now_us);
/* steps_per_token: that pass between two tokens of one sequence, at least 1. */
uint32_t step_pace_chunk(const StepPace *pace, uint32_t steps_per_token);
