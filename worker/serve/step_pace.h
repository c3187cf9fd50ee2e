/* StepPace: how many rows of prompts a step may carry while other sequences decode, from the time
 * that steps took. It chooses when rows are computed, never what they are: any chunk gives the same
 * bits (NUMERICS).
 *
 * The bound. What prompts add to a step is its time less that of the decoding rows alone. While a
 * sequence decodes, the prompts of a step are at most
 *
 *   chunk = PACE_TARGET x PACE_ADDED_US / (row time x steps that pass between two tokens)
 *
 * rows, at least PACE_LEAST_ROWS. The row time is the larger of what prompts added to the last such
 * step over their rows, which rises with a prompt's length, and of that step's time over all of its
 * rows, for the decoding rows alone read all weights too, and more rows hide behind that. It falls
 * by a quarter of the difference only, so it is never less than what the last step showed. The
 * decoding rows alone are taken from the last step that had nothing else, and in proportion where
 * fewer decode now.
 *
 * So what prompts add to the time between two tokens of a sequence stays within the larger of
 * PACE_ADDED_US and of PACE_LEAST_ROWS rows in each of these steps, as long as a row grows dearer
 * by less than 1 / PACE_TARGET from one step to the next (tests/unit/worker/test_leader_pace.c has
 * models of machines). Before the first measurement a chunk has PACE_LEAST_ROWS rows.
 *
 * It bounds what prompts add, by the time that their rows were seen to take: not the decoding rows'
 * own time, nor what the system takes from the engine's processor during a step. */
#pragma once

#include <stdint.h>

#define PACE_ADDED_US 50000.0
#define PACE_TARGET 0.75
#define PACE_LEAST_ROWS 16u

typedef struct StepPace {
    double row_us;       /* that a row of a prompt adds; 0 = not measured */
    double decoding_us;  /* of the last step that had decoding rows alone; 0 = none yet */
    uint32_t n_decoding; /* its rows */
    int64_t result_us;   /* when the last step came back */
} StepPace;

/* A step of n_decoding rows that draw and n_prompt rows of prompts, built at built_us, came back at
 * now_us, after the one before it. What it took is counted from the later of its building and the
 * result before: with several steps in flight that is the time of the slowest stage. */
void step_pace_note(StepPace *pace, uint32_t n_decoding, uint32_t n_prompt, int64_t built_us,
                    int64_t now_us);
/* steps_per_token: that pass between two tokens of one sequence, at least 1. */
uint32_t step_pace_chunk(const StepPace *pace, uint32_t steps_per_token);
