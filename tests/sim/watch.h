/* Watch: looks over the shoulders of coordinator, agents and engines while they run (their
 * functions are passed through here by the linker, `--wrap`), and holds what they do against the
 * invariants. It changes nothing. One History at a time. */
#pragma once

#include "tests/sim/history.h"

SimEngineHooks watch_hooks(History *history);
void watch_begin(History *history);
void watch_end(History *history);
/* All requests are over and nothing happened for a while: nobody may hold anything for them. */
void watch_check_quiet(History *history);
