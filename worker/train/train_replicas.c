/* The replicas' gradients become one, and what each owner made of it becomes everybody's: over
 * links from host memory, or on devices in their team. */
#include "worker/train/train_buffers.h"
#include "worker/train/train_rank_state.h"

#include <string.h>

/* ---- subtrees in host memory ---- */

static bool reduce(TrainRank *t, GPtrArray *subtrees, Parameters *root, GError **error)
{
    if (t->stream != NULL && !gradient_stream_has_begun(t->stream)) {
        gradient_stream_begin(t->stream, (Parameters *const *)subtrees->pdata, subtrees->len, root);
    }
    return t->stream == NULL || gradient_stream_finish(t->stream, error);
}

/* ---- subtrees on a device: exchanged in a team, or through copies in host memory ---- */

/* The subtrees' copies go through the host's fold; what this rank owns of the root comes back. */
static bool fold_copies(TrainRank *t, GPtrArray *subtrees, Parameters *root, GError **error)
{
    Parameters *copies[TREE_SUBTREES_LIMIT];
    for (uint32_t i = 0; i < subtrees->len; i++) {
        copies[i] = rank_device_copy(t->device, i, subtrees->pdata[i], error);
        if (copies[i] == NULL) {
            return false;
        }
    }
    t->gradients = subtrees->len > 0 ? copies[0] : rank_device_copy(t->device, 0, root, error);
    if (t->gradients == NULL) {
        return false;
    }
    gradient_stream_begin(t->stream, copies, subtrees->len, t->gradients);
    const bool ok = gradient_stream_finish(t->stream, error) &&
                    rank_device_owned_up(t->device, t->reduced, root, t->gradients, error);
    t->gradients = NULL;
    return ok;
}

static bool reduce_on_device(TrainRank *t, GPtrArray *subtrees, Parameters *root, GError **error)
{
    RankDevice *d = t->device;
    if (t->stream != NULL && rank_team(&d->teams.data) == NULL) {
        return fold_copies(t, subtrees, root, error);
    }
    if (t->stream != NULL && !device_exchange_has_begun(d->exchange)) {
        device_exchange_begin(d->exchange, (Parameters *const *)subtrees->pdata, subtrees->len,
                              root);
    }
    if (t->stream != NULL) {
        device_exchange_finish(d->exchange);
    }
    return train_rank_check_device(t, error);
}

/* ---- a tied embedding on two stages ---- */

/* Whether the embedding of a tied model is here and at another stage. */
static bool is_tied_apart(const TrainRank *t)
{
    return train_tied_floats(t->reduced, t->o.spec) > 0;
}

/* n own floats of the embedding's gradient: head + lookup, in host memory. */
static bool join_tied_part(TrainRank *t, float *own, size_t n, GError **error)
{
    if (!exchange_tied(t->o.links, own, n, t->tied, error)) {
        return false;
    }
    if (t->position.stage == 0) {
        t->o.kernels->add(t->tied, own, n);
        memcpy(own, t->tied, n * sizeof *own);
    } else {
        t->o.kernels->add(own, t->tied, n);
    }
    return true;
}

static bool join_tied_on_device(TrainRank *t, float *own, size_t n, GError **error)
{
    DeviceWork *work = t->device->work;
    return (device_work_down(work, t->tied_own, own, n * sizeof *own) ||
            train_rank_check_device(t, error)) &&
           join_tied_part(t, t->tied_own, n, error) &&
           (device_work_up(work, own, t->tied_own, n * sizeof *own) ||
            train_rank_check_device(t, error));
}

/* The lookup part of a tied embedding lies on the first stage, the head part on the last: both get
 * head + lookup (NUMERICS 16). */
static bool join_tied(TrainRank *t, GError **error)
{
    const GArray *buckets = t->reduced->buckets;
    for (uint32_t b = 0; b < buckets->len; b++) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, b);
        const size_t first = bucket->first[t->position.replica],
                     n = bucket->first[t->position.replica + 1] - first;
        float *own = t->gradients->floats + first;
        if (bucket->is_embedding && n > 0 &&
            !(t->device != NULL ? join_tied_on_device : join_tied_part)(t, own, n, error)) {
            return false;
        }
    }
    return true;
}

/* ---- the fold ---- */

/* Vectors whose matrices are cut among tensor ranks become whole in every subtree. */
static bool gather_vectors(TrainRank *t, GPtrArray *subtrees, GError **error)
{
    const RankDevice *d = t->device;
    for (uint32_t i = 0; t->position.tp > 1 && i < subtrees->len; i++) {
        Parameters *set = subtrees->pdata[i];
        if (!(d != NULL ? device_exchange_vectors(d->work, t->o.links, set, d->vectors, error)
                        : exchange_vectors(t->o.links, set, error))) {
            return false;
        }
    }
    return true;
}

bool train_replicas_fold(TrainRank *t, GError **error)
{
    GPtrArray *subtrees = gradient_fold_subtrees(t->fold);
    if (!gather_vectors(t, subtrees, error)) {
        return false;
    }
    Parameters *root = subtrees->len > 0 ? subtrees->pdata[0] : gradient_fold_take(t->fold, error);
    if (root == NULL) {
        return false;
    }
    const bool ok = (t->device != NULL ? reduce_on_device : reduce)(t, subtrees, root, error);
    if (subtrees->len > 0) {
        g_ptr_array_remove_index_fast(subtrees, 0);
    }
    t->gradients = root;
    gradient_fold_reset(t->fold);
    return ok && (!is_tied_apart(t) || join_tied(t, error));
}

/* ---- the update ---- */

/* What the replicas own of `set` on the device becomes whole; host: a copy to go through. */
static bool share_on_device(TrainRank *t, Parameters *set, Parameters *host, GError **error)
{
    RankDevice *d = t->device;
    if (rank_team(&d->teams.data) != NULL) {
        device_exchange_share(d->exchange, set);
        return train_rank_check_device(t, error);
    }
    return host != NULL && rank_device_owned_down(d, t->reduced, host, set, error) &&
           exchange_share(t->o.links, t->reduced, host, error) &&
           rank_device_up(d, set, host, error);
}

static bool share_gradients_on_device(TrainRank *t, GError **error)
{
    Parameters *copy = rank_team(&t->device->teams.data) == NULL
                           ? rank_device_copy(t->device, 0, NULL, error)
                           : NULL;
    return share_on_device(t, t->gradients, copy, error);
}

static bool update_on_device(TrainRank *t, float norm, GError **error)
{
    RankDevice *d = t->device;
    const bool shares = t->position.dp > 1;
    if (shares && t->o.whole_optimizer && !share_gradients_on_device(t, error)) {
        return false;
    }
    optimizer_update(t->optimizer, t->at.updates, schedule_clip(&t->o.optimizer, norm),
                     t->gradients, d->weights);
    d->host_stale = true;
    return !shares || t->o.whole_optimizer ? train_rank_check_device(t, error)
                                           : share_on_device(t, d->weights, t->weights, error);
}

bool train_replicas_update(TrainRank *t, float norm, GError **error)
{
    const bool shares = t->position.dp > 1;
    if (t->device != NULL) {
        return update_on_device(t, norm, error);
    }
    if (shares && t->o.whole_optimizer &&
        !exchange_share(t->o.links, t->reduced, t->gradients, error)) {
        return false;
    }
    train_times_mark(t->o.times, TRAIN_OP_REST);
    optimizer_update(t->optimizer, t->at.updates, schedule_clip(&t->o.optimizer, norm),
                     t->gradients, t->weights);
    train_times_mark(t->o.times, TRAIN_OP_UPDATE);
    return !shares || t->o.whole_optimizer ||
           exchange_share(t->o.links, t->reduced, t->weights, error);
}
