/* What a request waits for (weft.v1.Reason): its own state, then what its lease knows. Read only;
 * no prompt, text or token is in it. */
#include "coordinator/gateway/requests/run.h"

#include "coordinator/reason.h"

#include <string.h>

#define CHOICES_TOLD 4u

static uint64_t ms_since(const Run *run, int64_t then_us)
{
    return (uint64_t)MAX(loop_now_us(run->owner->options.loop) - then_us, 0) / 1000;
}

static void explain_early(const Run *run, Weft__V1__Reason *reason, const char *state,
                          const char *text, const char *what)
{
    reason_set(&reason->state, g_strdup(state));
    reason_set(&reason->text, g_strdup(text));
    reason_wait(reason, run->id, "coordinator", g_strdup(what), ms_since(run, run->begun_us));
}

/* Since it was given to its leader, or since its newest token. */
static int64_t choice_since(const Choice *c)
{
    return MAX(c->submitted_us, c->last_us);
}

static void explain_choice(const Run *run, const Choice *c, Weft__V1__Reason *reason)
{
    unsigned next = c->ids != NULL ? c->ids->len + 1 : 1;
    char *what = run->encoded.n_choices > 1
                     ? g_strdup_printf("token %u of choice %u", next, c->index)
                     : g_strdup_printf("token %u", next);
    reason_wait(reason, run->id, run->info.leader, what, ms_since(run, choice_since(c)));
}

static void explain_running(const Run *run, Weft__V1__Reason *reason)
{
    unsigned n_open = 0;
    int64_t newest_us = 0;
    reason_set(&reason->state, g_strdup(run->resume.stalled ? "resuming" : "running"));
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        const Choice *c = &run->encoded.choices[i];
        if (!choice_has_begun(c)) {
            continue;
        }
        newest_us = MAX(newest_us, choice_since(c));
        if (!c->done && n_open++ < CHOICES_TOLD) {
            explain_choice(run, c, reason);
        }
    }
    reason->state_ms = ms_since(run, newest_us);
    reason_set(&reason->text,
               g_strdup_printf("worker %s leads it: %u of %u sequences are open", run->info.leader,
                               run->encoded.n_choices - run->n_done, run->encoded.n_choices));
}

static void explain_resume(const Run *run, Weft__V1__Reason *reason)
{
    const RunResume *r = &run->resume;
    reason_set(&reason->state, g_strdup("resuming"));
    reason->state_ms = ms_since(run, r->interrupted_us);
    reason->stalled_ms = ms_since(run, r->last_us);
    if (reason->predicted_s > 0 || run->state == RUN_RUNNING) {
        reason->predicted_s += (double)(r->interrupted_us - r->last_us) / 1e6;
    }
}

static void explain_state(const Run *run, Weft__V1__Reason *reason)
{
    switch (run->state) {
    case RUN_OPENING:
        explain_early(run, reason, "opening", "its model's file is looked at", "the model's file");
        break;
    case RUN_ENCODING:
        explain_early(run, reason, "encoding", "its text becomes tokens", "the text as tokens");
        break;
    case RUN_WAITING:
        reason_set(&reason->state, g_strdup("waiting"));
        break;
    case RUN_RUNNING:
        explain_running(run, reason);
        break;
    case RUN_ENDED:
        break;
    }
    if (run->lease != NULL) {
        lease_explain(run->lease, reason);
    }
    if (run->resume.stalled) {
        explain_resume(run, reason);
    } else {
        reason_set(&reason->cause, g_strdup(""));
        reason->predicted_s = 0;
        reason->tokens_again = 0;
    }
}

static uint32_t tokens_told(const Run *run)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < run->encoded.n_choices; i++) {
        n += choice_has_begun(&run->encoded.choices[i]) ? run->encoded.choices[i].ids->len : 0;
    }
    return n;
}

static bool is_known_as(const Run *run, const char *id)
{
    return strcmp(run->id, id) == 0 || (run->client_id != NULL && strcmp(run->client_id, id) == 0);
}

void requests_explain(const Requests *requests, const char *id, GPtrArray *reasons)
{
    for (GList *l = requests->runs.head; l != NULL; l = l->next) {
        const Run *run = l->data;
        if (run->state == RUN_ENDED || (id != NULL && !is_known_as(run, id))) {
            continue;
        }
        Weft__V1__Reason *reason = reason_new("request", run->id);
        reason->age_ms = reason->state_ms = ms_since(run, run->begun_us);
        reason->tokens = tokens_told(run);
        reason_set(&reason->client_id, g_strdup(run->client_id != NULL ? run->client_id : ""));
        reason_set(&reason->model, g_strdup(run->request->model));
        explain_state(run, reason);
        g_ptr_array_add(reasons, reason);
    }
}
