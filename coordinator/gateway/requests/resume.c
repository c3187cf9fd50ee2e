/* A run goes on after a loss. Problem: the client must see exactly the tokens of an undisturbed
 * run, each once, whichever replica drew them.
 *
 *   RUNNING ──its epoch ended──▶ WAITING ──lease had again──▶ RUNNING, each open choice submitted
 *      ▲                            │ │                          again from its last token
 *      │                            │ └─ FRUITLESS_LIMIT times without a token: ENDED
 *      │                            └─── the definition is another: ENDED
 *      └──────── the first new token: the pause is over, and its length is told
 *
 * 1. Ids, hashes, detokenizer and stop matcher of a choice know nothing of the loss: what comes is
 * appended where it left off.
 * 2. No call of the old epoch is attached to a choice once run_on_interrupted() returned.
 * 3. A request that takes its workers down each time it is submitted ends by itself. */
#include "coordinator/gateway/requests/run.h"

#include "proto/base/error.h"

#define FRUITLESS_LIMIT 8u

static void notice(Run *run, const char *text, double stall_s, double predicted_s)
{
    Weft__V1__RunProgress progress = WEFT__V1__RUN_PROGRESS__INIT;
    progress.text = (char *)text;
    progress.notice = true;
    progress.stall_s = stall_s;
    progress.predicted_stall_s = predicted_s;
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_PROGRESS;
    event.progress = &progress;
    run_send(run, &event);
}

static void keep_counters(Run *run)
{
    uint64_t now[N_COUNTERS] = {0};
    run_add_counters(run, now);
    for (uint32_t i = 0; i < N_COUNTERS; i++) {
        run->spent[i] += now[i] > run->counters[i] ? now[i] - run->counters[i] : 0;
    }
}

/* Invariant 3. */
static bool goes_in_circles(Run *run, const GError *why)
{
    run->resume.n_fruitless++;
    if (run->resume.n_fruitless < FRUITLESS_LIMIT) {
        return false;
    }
    g_autoptr(GError) error =
        g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                    "request %s was interrupted %u times without a token in between, last by: %s: "
                    "it is not tried again",
                    run->id, run->resume.n_fruitless, why->message);
    run_fail(run, error);
    return true;
}

bool run_on_interrupted(const GError *why, void *user, uint64_t *n_tokens)
{
    Run *run = user;
    RunResume *r = &run->resume;
    if (goes_in_circles(run, why)) {
        return false;
    }
    keep_counters(run);
    run->state = RUN_WAITING;
    r->stalled = true;
    r->interrupted_us = loop_now_us(run->owner->options.loop);
    *n_tokens = 0;
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        choice_detach(&run->encoded.choices[i]);
        *n_tokens += choice_tokens(&run->encoded.choices[i]);
    }
    g_autofree char *text = g_strdup_printf("%s: the request goes on elsewhere", why->message);
    notice(run, text, 0, 0);
    return run->state == RUN_WAITING;
}

bool run_resume(Run *run)
{
    Hash128 definition = definition_hash(&run->info.plan->definition);
    if (!hash128_equal(&definition, &run->resume.definition)) {
        g_autoptr(GError) error = g_error_new(
            WEFT_ERROR, WEFT_ERROR_FAILED,
            "request %s cannot go on: job %s was planned with another definition (numerics, KV "
            "type or context), its tokens would differ: start the request again",
            run->id, run->info.job);
        run_fail(run, error);
        return false;
    }
    run->resume.n_recoveries++;
    return true;
}

static void run_recovered(Run *run, int64_t now_us)
{
    RunResume *r = &run->resume;
    const LeaseRecovery *lease = &run->info.recovery;
    double noticed_s = (double)(r->interrupted_us - r->last_us) / 1e6;
    double stall_s = (double)(now_us - r->last_us) / 1e6;
    double predicted_s = noticed_s + lease->predicted_load_s + lease->predicted_prefill_s;
    r->stall_s = MAX(r->stall_s, stall_s);
    histogram_add(&run->stats->recovery_s, stall_s);
    g_autofree char *text = g_strdup_printf(
        "goes on in epoch %" G_GUINT64_FORMAT " after %.2f s (predicted %.2f s: %.2f s until the "
        "loss was known, %.2f s to load, %.2f s for %" G_GUINT64_FORMAT " tokens again)",
        run->info.epoch, stall_s, predicted_s, noticed_s, lease->predicted_load_s,
        lease->predicted_prefill_s, lease->n_tokens);
    log_info(run->owner->options.log, "request %s job %s %s", run->id, run->info.job, text);
    notice(run, text, stall_s, predicted_s);
}

void run_advanced(Run *run, int64_t now_us)
{
    RunResume *r = &run->resume;
    if (r->stalled) {
        r->stalled = false;
        run_recovered(run, now_us);
    }
    r->n_fruitless = 0;
    r->last_us = now_us;
}
