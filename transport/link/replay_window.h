/* The sliding window against replays (RFC 4303, 3.4.3): numbers up to `highest`, of the last 64
 * which were seen. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef struct ReplayWindow {
    uint64_t highest;
    uint64_t seen; /* bit i: highest - i */
} ReplayWindow;

/* Accepts seq (from 1) once; false when it was seen or is older than the window. To be asked only
 * for authentic messages. */
static inline bool replay_window_accept(ReplayWindow *window, uint64_t seq)
{
    if (seq > window->highest) {
        uint64_t ahead = seq - window->highest;
        window->seen = (ahead < 64 ? window->seen << ahead : 0) | 1;
        window->highest = seq;
        return true;
    }
    uint64_t behind = window->highest - seq;
    if (seq == 0 || behind >= 64 || (window->seen >> behind & 1) != 0) {
        return false;
    }
    window->seen |= UINT64_C(1) << behind;
    return true;
}
