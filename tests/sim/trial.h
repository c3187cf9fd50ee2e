/* Trial: one seed, from an empty cluster to a verdict. */
#pragma once

#include "tests/sim/schedule.h"

typedef struct TrialResult {
    char *violation; /* NULL: none. Returned */
    unsigned n_tokens, n_attempts, n_done, n_cancelled, n_resumed;
    int64_t virtual_us, stall_us;
    uint64_t n_events, digest; /* of the world */
} TrialResult;

void trial_run(const Foundation *foundation, const Schedule *schedule, bool chatty,
               TrialResult *result);
void trial_result_clear(TrialResult *result);
