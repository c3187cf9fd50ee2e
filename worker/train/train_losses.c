/* The last stage of each replica knows the losses of its samples, the first replica's those of
 * validation; all ranks are to know all of them. */
#include "proto/base/error.h"
#include "worker/train/train_rank_state.h"

#include <math.h>
#include <string.h>

/* ---- of a step ---- */

/* Bytes that rank r reports: the last stage's first tensor rank of each replica its valid tokens
 * and its samples' losses. */
static size_t report_bytes(const TrainRank *t, uint32_t r, uint32_t *first, uint32_t *n)
{
    const TrainPosition *p = &t->position;
    const uint32_t replica = r / (p->pp * p->tp);
    const bool reports = r == train_global(p, replica, p->pp - 1, 0);
    *first = leaf_begin(t->leaves.cuts[replica], t->o.leaves, t->o.sequences);
    *n = leaf_begin(t->leaves.cuts[replica + 1], t->o.leaves, t->o.sequences) - *first;
    return reports ? sizeof t->valid + *n * sizeof(float) : 0;
}

static void pack_report(const TrainRank *t, uint8_t *to)
{
    const TrainPosition *p = &t->position;
    uint32_t first, n;
    if (report_bytes(t, train_global(p, p->replica, p->stage, p->rank), &first, &n) > 0) {
        memcpy(to, &t->valid, sizeof t->valid);
        memcpy(to + sizeof t->valid, t->sample_losses + first, n * sizeof(float));
    }
}

static void unpack_reports(TrainRank *t, uint8_t *const *parts)
{
    t->valid = 0;
    for (uint32_t r = 0; r < train_world(&t->position); r++) {
        uint32_t first, n;
        if (report_bytes(t, r, &first, &n) > 0) {
            uint64_t valid;
            memcpy(&valid, parts[r], sizeof valid);
            memcpy(t->sample_losses + first, parts[r] + sizeof valid, n * sizeof(float));
            t->valid += valid;
        }
    }
}

bool train_losses_gather(TrainRank *t, GError **error)
{
    TrainGroup *g = t->o.links != NULL ? &t->o.links->world : NULL;
    size_t sizes[PLAN_RANKS_LIMIT], total = 0;
    uint8_t *parts[PLAN_RANKS_LIMIT];
    uint32_t first, n;
    if (g == NULL || g->turns.group == NULL) {
        return true;
    }
    for (uint32_t r = 0; r < g->n; r++) {
        sizes[r] = report_bytes(t, r, &first, &n);
        total += sizes[r];
    }
    g_autofree uint8_t *reports = g_malloc0(total);
    for (size_t r = 0, at = 0; r < g->n; at += sizes[r++]) {
        parts[r] = reports + at;
    }
    pack_report(t, parts[g->rank]);
    const GroupWait wait = group_turn(&g->turns, "gathering losses");
    if (!train_links_check(
            t->o.links, g,
            group_all_gather(g->turns.group, &wait, parts[g->rank], sizes, (void *const *)parts),
            error)) {
        return false;
    }
    unpack_reports(t, parts);
    return true;
}

bool train_losses_check(const TrainRank *t, bool *skipped, GError **error)
{
    *skipped = false;
    for (uint32_t i = 0; i < t->o.sequences && !*skipped; i++) {
        *skipped = !isfinite(t->sample_losses[i]);
        if (*skipped && !t->o.skip_nonfinite) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "step %" G_GUINT64_FORMAT ": the loss of sample %u of the batch is not "
                        "finite; lower optimizer.lr, set optimizer.clip, or leave such steps out "
                        "(nonfinite: skip)",
                        t->at.step + 1, i);
            return false;
        }
    }
    return true;
}

/* ---- validation ---- */

/* The first replica's last stage knows. */
static bool share_validation(TrainRank *t, double sums[2], GError **error)
{
    TrainGroup *g = t->o.links != NULL ? &t->o.links->world : NULL;
    if (g == NULL || g->turns.group == NULL) {
        return true;
    }
    const GroupWait wait = group_turn(&g->turns, "sharing a validation loss");
    return train_links_check(t->o.links, g,
                             group_broadcast(g->turns.group, &wait,
                                             train_global(&t->position, 0, t->position.pp - 1, 0),
                                             sums, 2 * sizeof *sums),
                             error);
}

bool train_rank_validate(TrainRank *t, const SampleSource *source, uint64_t samples, float *out,
                         GError **error)
{
    double sums[2] = {0.0, 0.0}; /* of losses, of tokens */
    if (!train_rank_take_up(t, error)) {
        return false;
    }
    for (uint64_t i = 0; i < samples; i++) {
        float loss;
        uint64_t valid;
        if (!micro_runner_validate(t->runner, source, i, &loss, &valid, error)) {
            return false;
        }
        sums[0] += (double)loss;
        sums[1] += (double)valid;
    }
    if (!share_validation(t, sums, error)) {
        return false;
    }
    *out = (float)(sums[0] / MAX(sums[1], 1.0));
    return true;
}
