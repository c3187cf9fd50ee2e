#include "worker/agent/pulse.h"

#define AWAY_US 1000000  /* between two looks */
#define QUIET_US 1000000 /* an idle engine turns at least twice a second (engine.c: 4) */

static void note_moves(Pulse *p, const EngineStatus *status, int64_t now_us)
{
    const bool first = p->looked_us == 0 || now_us - p->looked_us > AWAY_US;
    if (first || status->progress != p->progress) {
        p->progress = status->progress;
        p->progress_us = now_us;
    }
    if (first || status->steps != p->steps || status->in_step) {
        p->steps = status->steps;
        p->steps_us = now_us;
    }
    p->looked_us = now_us;
}

static void ask_for_canary(Pulse *p, Engine *engine, const EngineStatus *status, int64_t now_us)
{
    if (status->leads && now_us - MAX(p->steps_us, p->asked_us) >= PULSE_CANARY_US) {
        p->asked_us = now_us;
        engine_canary(engine);
    }
}

static void describe(Pulse *p, const EngineStatus *status, int64_t thread_us, int64_t steps_us)
{
    if (!p->still) {
        p->problem[0] = '\0';
    } else if (thread_us >= QUIET_US) {
        g_snprintf(p->problem, sizeof p->problem,
                   "its engine stands still in %s for %" G_GINT64_FORMAT " ms", status->operation,
                   thread_us / 1000);
    } else if (status->waiting) {
        g_snprintf(p->problem, sizeof p->problem,
                   "its engine waits for stage %u rank %u in %s for %" G_GINT64_FORMAT " ms",
                   status->waits_stage, status->waits_rank, status->waits_operation,
                   steps_us / 1000);
    } else {
        g_snprintf(p->problem, sizeof p->problem,
                   "its engine has run no step for %" G_GINT64_FORMAT " ms", steps_us / 1000);
    }
}

void pulse_look(Pulse *p, Engine *engine, const EngineStatus *status, int64_t now_us)
{
    note_moves(p, status, now_us);
    ask_for_canary(p, engine, status, now_us);
    const int64_t thread_us = now_us - p->progress_us, steps_us = now_us - p->steps_us;
    const bool no_steps = steps_us >= PULSE_CANARY_US + status->flight_deadline_us;
    p->still = thread_us >= PULSE_STILL_US || no_steps;
    p->to_blame = thread_us >= MAX(PULSE_STILL_US, status->step_deadline_us) ||
                  (no_steps && (!status->waiting || thread_us >= QUIET_US));
    describe(p, status, thread_us, steps_us);
}
