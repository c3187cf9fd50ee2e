#include "tools/weft/training_shown.h"

#include "proto/base/units.h"

#include <math.h>
#include <stdio.h>

typedef Weft__V1__TrainingStatus Job;

/* ---- JSON ---- */

static json_t *known(double value, bool is_known)
{
    return is_known && isfinite(value) ? json_real(value) : json_null();
}

static json_t *ranks_json(const Job *j)
{
    json_t *ranks = json_array();
    for (size_t i = 0; i < j->n_ranks; i++) {
        const Weft__V1__TrainingRank *r = j->ranks[i];
        json_t *memory =
            r->memory_bytes > 0 ? json_integer((json_int_t)r->memory_bytes) : json_null();
        json_array_append_new(
            ranks, json_pack("{s:s,s:I,s:I,s:I,s:I,s:s,s:o,s:o,s:I}", "worker", r->worker, "device",
                             (json_int_t)r->device, "replica", (json_int_t)r->replica, "stage",
                             (json_int_t)r->stage, "rank", (json_int_t)r->rank, "state", r->state,
                             "wait_share", known(r->wait_share, r->wait_share >= 0), "memory_bytes",
                             memory, "silent_ms", (json_int_t)r->silent_ms));
    }
    return ranks;
}

json_t *training_json(const Weft__V1__StatusResponse *status)
{
    json_t *jobs = json_array();
    for (size_t i = 0; i < status->n_training; i++) {
        const Job *j = status->training[i];
        const bool fast = j->tokens_per_s > 0;
        json_t *object = json_pack("{s:s,s:s,s:s,s:s,s:I,s:I,s:I,s:s,s:I,s:s}", "name", j->name,
                                   "state", j->state, "layout", j->layout, "numerics", j->numerics,
                                   "epoch", (json_int_t)j->epoch, "step", (json_int_t)j->step,
                                   "steps", (json_int_t)j->steps, "reason", j->reason, "state_ms",
                                   (json_int_t)j->state_ms, "checkpoint", j->checkpoint);
        json_object_set_new(object, "loss", known(j->loss, true));
        json_object_set_new(object, "validation_loss", known(j->validation_loss, true));
        json_object_set_new(object, "tokens_per_s", known(j->tokens_per_s, fast));
        json_object_set_new(object, "mfu", known(j->mfu, j->mfu > 0));
        json_object_set_new(object, "eta_s", known(j->eta_s, fast && j->n_ranks > 0));
        json_object_set_new(object, "ranks", ranks_json(j));
        json_array_append_new(jobs, object);
    }
    return jobs;
}

/* ---- text ---- */

static char *number(const char *unit, int decimals, double value, bool is_known)
{
    return is_known && isfinite(value) ? g_strdup_printf("%.*f%s", decimals, value, unit)
                                       : g_strdup("-");
}

/* A run that diverges has losses of any size. */
static char *loss_text(double loss)
{
    return fabs(loss) >= 1e6 && isfinite(loss) ? g_strdup_printf("%.3e", loss)
                                               : number("", 4, loss, true);
}

static void print_jobs(const Weft__V1__StatusResponse *status)
{
    TextTable *t =
        text_table_new((const char *const[]){"TRAINING", "STATE", "LAYOUT", "EPOCH", "STEP", "LOSS",
                                             "VALID", "TOK/S", "MFU", "LEFT", NULL});
    for (size_t i = 0; i < status->n_training; i++) {
        const Job *j = status->training[i];
        const bool fast = j->tokens_per_s > 0;
        g_autofree char *epoch = g_strdup_printf("%" G_GUINT64_FORMAT, j->epoch),
                        *step = g_strdup_printf("%" G_GUINT64_FORMAT "/%" G_GUINT64_FORMAT, j->step,
                                                j->steps),
                        *loss = loss_text(j->loss), *valid = loss_text(j->validation_loss),
                        *speed = number("", 0, j->tokens_per_s, fast),
                        *mfu = number("%", 0, j->mfu * 100, j->mfu > 0),
                        *left = fast && j->n_ranks > 0
                                    ? units_format_duration((int64_t)j->eta_s * 1000000)
                                    : g_strdup("-");
        text_table_row(t, j->name, j->state, j->layout[0] != '\0' ? j->layout : "-", epoch, step,
                       loss, valid, speed, mfu, left, NULL);
    }
    text_table_print(t);
}

static void print_ranks(const Weft__V1__StatusResponse *status)
{
    size_t n = 0;
    for (size_t i = 0; i < status->n_training; i++) {
        n += status->training[i]->n_ranks;
    }
    if (n == 0) {
        return;
    }
    TextTable *t = text_table_new(
        (const char *const[]){"TRAINING", "WORKER", "DP/PP/TP", "STATE", "WAITS", "MEMORY", NULL});
    for (size_t i = 0; i < status->n_training; i++) {
        for (size_t k = 0; k < status->training[i]->n_ranks; k++) {
            const Weft__V1__TrainingRank *r = status->training[i]->ranks[k];
            g_autofree char *place = g_strdup_printf("%u/%u/%u", r->replica, r->stage, r->rank),
                            *waits = number("%", 0, r->wait_share * 100, r->wait_share >= 0),
                            *memory = r->memory_bytes > 0 ? units_format_size(r->memory_bytes)
                                                          : g_strdup("-");
            text_table_row(t, status->training[i]->name, r->worker, place, r->state, waits, memory,
                           NULL);
        }
    }
    printf("\n");
    text_table_print(t);
}

void training_print(const Weft__V1__StatusResponse *status, bool ranks)
{
    if (status->n_training == 0) {
        return;
    }
    printf("\n");
    print_jobs(status);
    if (ranks) {
        print_ranks(status);
    }
}
