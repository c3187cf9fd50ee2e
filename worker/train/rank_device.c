#include "worker/train/rank_device.h"

RankDevice *rank_device_new(const Device *device, const Parameters *host, TrainLinks *links,
                            GError **error)
{
    RankDevice *d = g_new0(RankDevice, 1);
    d->links = links;
    d->sets = g_ptr_array_new_with_free_func((GDestroyNotify)parameters_free);
    d->weights_stale = true;
    d->work = device_work_new(device, error);
    d->weights =
        d->work != NULL ? parameters_new_part_on(host->holding, false, d->work, error) : NULL;
    if (d->weights == NULL) {
        rank_device_free(d);
        return NULL;
    }
    return d;
}

void rank_device_leave(RankDevice *d)
{
    if (d != NULL && d->work != NULL) {
        device_work_leave(d->work);
    }
}

void rank_device_free(RankDevice *d)
{
    if (d != NULL) {
        rank_device_leave(d);
        g_ptr_array_unref(d->sets);
        parameters_free(d->shown);
        parameters_free(d->weights);
        device_exchange_close(d->exchange);
        device_work_unpin(d->work, d->vectors);
        device_work_free(d->work);
        rank_teams_free(&d->teams);
        g_free(d);
    }
}

bool rank_device_open_exchange(RankDevice *d, const DeviceExchangeOptions *options, GError **error)
{
    const Holding *h = d->weights->holding;
    DeviceExchangeOptions own = *options;
    own.work = d->work;
    if (h->tp > 1) {
        d->vectors = device_work_pinned(d->work, device_exchange_vector_bytes(h),
                                        "gradients of biases", error);
        if (d->vectors == NULL) {
            return false;
        }
    }
    if (options->reduced->position.dp > 1) {
        d->exchange = device_exchange_open(&own, error);
    }
    return options->reduced->position.dp == 1 || d->exchange != NULL;
}

bool rank_device_settle(RankDevice *d, Parameters *weights, Optimizer *optimizer, GError **error)
{
    if (d->host_stale) {
        device_work_down(d->work, weights->floats, d->weights->floats,
                         weights->n_floats * sizeof(float));
        optimizer_copy_down(optimizer);
        d->host_stale = false;
    }
    return rank_work_check(d->work, d->links, error);
}

bool rank_device_take_up(RankDevice *d, const Parameters *weights, Optimizer *optimizer,
                         GError **error)
{
    if (d->weights_stale) {
        device_work_up(d->work, d->weights->floats, weights->floats,
                       weights->n_floats * sizeof(float));
        d->weights_stale = false;
    }
    if (d->moments_stale) {
        optimizer_copy_up(optimizer);
        d->moments_stale = false;
    }
    return rank_work_check(d->work, d->links, error);
}

Parameters *rank_device_copy(RankDevice *d, uint32_t index, const Parameters *set, GError **error)
{
    while (d->sets->len <= index) {
        Parameters *fresh = parameters_new_part(d->weights->holding, true, error);
        if (fresh == NULL) {
            return NULL;
        }
        g_ptr_array_add(d->sets, fresh);
    }
    Parameters *copy = d->sets->pdata[index];
    if (set != NULL) {
        device_work_down(d->work, copy->floats, set->floats, copy->n_floats * sizeof(float));
    }
    return rank_work_check(d->work, d->links, error) ? copy : NULL;
}

const Parameters *rank_device_show(RankDevice *d, const Parameters *set)
{
    if (d->shown == NULL) {
        d->shown = parameters_new_part(d->weights->holding, true, NULL);
    }
    return d->shown != NULL && device_work_down(d->work, d->shown->floats, set->floats,
                                                set->n_floats * sizeof(float))
               ? d->shown
               : NULL;
}

static size_t lookup_bytes(const Parameters *p)
{
    return p->lookup != NULL ? (size_t)p->holding->vocab * p->spec->width * sizeof(float) : 0;
}

bool rank_device_owned_down(RankDevice *d, const Ownership *owned, Parameters *host,
                            const Parameters *device, GError **error)
{
    for (guint i = 0; i < owned->pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(owned->pieces, OwnedPiece, i);
        device_work_down(d->work, host->floats + piece->at, device->floats + piece->at,
                         piece->n * sizeof(float));
    }
    device_work_down(d->work, host->lookup, device->lookup, lookup_bytes(host));
    return rank_work_check(d->work, d->links, error);
}

bool rank_device_owned_up(RankDevice *d, const Ownership *owned, Parameters *device,
                          const Parameters *host, GError **error)
{
    for (guint i = 0; i < owned->pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(owned->pieces, OwnedPiece, i);
        device_work_up(d->work, device->floats + piece->at, host->floats + piece->at,
                       piece->n * sizeof(float));
    }
    device_work_up(d->work, device->lookup, host->lookup, lookup_bytes(host));
    return rank_work_check(d->work, d->links, error);
}

bool rank_device_up(RankDevice *d, Parameters *device, const Parameters *host, GError **error)
{
    device_work_up(d->work, device->floats, host->floats, host->n_floats * sizeof(float));
    return rank_work_check(d->work, d->links, error);
}
