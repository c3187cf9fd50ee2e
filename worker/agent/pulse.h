/* Pulse: whether an engine would serve, from a look at it every 250 ms (DESIGN 7.6). Loop thread,
 * the Loop's clock.
 *
 *   - Its thread lives: the counter of ops and turns moves within PULSE_STILL_US, in a step as well
 *     as between steps.
 *   - Steps come through: none is run and none has ended for PULSE_CANARY_US and the time after
 *     which a leader gives up its steps in flight, and it is still. A leader without one for
 *     PULSE_CANARY_US is asked for a canary, so this holds without requests, too.
 *
 * An engine that waits for another one is not to blame; the wait is reported by itself. While this
 * process was stopped its engines had no turn: nothing is held against them then. */
#pragma once

#include "worker/serve/engine.h"

#define PULSE_STILL_US 3000000
#define PULSE_CANARY_US 1000000

typedef struct Pulse { /* zeroed: never looked */
    uint64_t progress, steps;
    int64_t progress_us, steps_us; /* when they were seen to move */
    int64_t looked_us, asked_us;
    bool still, to_blame;
    char problem[128]; /* while still: what in, for how long */
} Pulse;

/* Looks; `still`, `to_blame` and `problem` are those of now. */
void pulse_look(Pulse *pulse, Engine *engine, const EngineStatus *status, int64_t now_us);
