/* Who is to blame when ranks wait for each other on their devices: a device does not tell which
 * rank has not come. So at its deadline a rank asks the others over the links, in one small
 * collective of the stage's host group: whoever does not answer within another deadline did not
 * come, and group_waits_for() names it as for any collective. When all answer, all wait: then it is
 * the devices' own fault.
 *
 * A rank whose device fails tells its peers why (LINK_OP_ABORT). Its group may end before that
 * message is here: a short grace lets the cause arrive before the consequence is reported. */
#include "worker/model/device_group.h"

#include <string.h>

enum {
    GRACE_US = 500000,
    ROLL_CALL_SITE = GROUP_SITE_LIMIT - 2, /* behind all collectives of a step */
};

bool device_stage_join(DeviceStage *d, const DeviceGroupId *id, uint32_t n_ranks, uint32_t rank,
                       GError **error)
{
    const Device *device = d->device;
    return device_check(device, device->group->begin(device->handle, id, n_ranks, rank, &d->group),
                        "joining the stage's devices", error);
}

DeviceStatus device_stage_joined(DeviceStage *d)
{
    static const char what[] = "joining the stage's devices";
    DeviceStatus status = d->device->group->poll(d->group);
    if (status == DEVICE_OK) {
        status = d->device->group->register_buffer(d->group, d->arena, d->arena_bytes);
    }
    if (status == DEVICE_NOT_READY) {
        return status;
    }
    d->grouped = device_stage_ok(d, status, what);
    return status;
}

void device_stage_leave(DeviceStage *d)
{
    if (d->group == NULL) {
        return;
    }
    for (unsigned i = 0; i < DEVICE_GRAPHS; i++) {
        d->device->api->graph_free(d->graphs[i].graph);
        d->graphs[i].graph = NULL;
    }
    d->device->group->abort(d->group);
}

static bool is_aborted(const Stage *s)
{
    return s->o.abort != NULL && atomic_load_explicit(s->o.abort, memory_order_acquire);
}

/* Everybody who waits answers. */
static GroupStatus roll_call(DeviceStage *d, int64_t deadline_us, const char *what)
{
    Stage *s = d->stage;
    uint8_t mine = 1, all[PLAN_RANKS_LIMIT];
    size_t sizes[PLAN_RANKS_LIMIT];
    void *out[PLAN_RANKS_LIMIT];
    const GroupWait wait = {.step = d->step,
                            .site = ROLL_CALL_SITE,
                            .deadline_us = g_get_monotonic_time() + deadline_us,
                            .operation = what};
    for (uint32_t r = 0; r < s->plan_stage->n_ranks; r++) {
        sizes[r] = sizeof mine;
        out[r] = &all[r];
    }
    return group_all_gather(s->group, &wait, &mine, sizes, out);
}

static void blame(DeviceStage *d, int64_t deadline_us, const char *what)
{
    d->peers = roll_call(d, deadline_us, what);
    if (d->peers == GROUP_OK) {
        g_autofree char *all = g_strdup_printf("%s, which every rank of the stage waits in", what);
        device_stage_ok(d, DEVICE_STUCK, all);
    }
}

/* The group has ended by itself. */
static void hear_why(DeviceStage *d, const char *what)
{
    Stage *s = d->stage;
    const int64_t end = g_get_monotonic_time() + GRACE_US;
    while (!is_aborted(s) && g_get_monotonic_time() < end) {
        if (s->o.progress != NULL) {
            s->o.progress(s->o.progress_user);
        }
    }
    if (is_aborted(s)) {
        d->peers = GROUP_ABORTED;
    } else {
        device_stage_ok(d, DEVICE_GROUP_FAILED, what);
    }
}

bool device_stage_gives_up(DeviceStage *d, int64_t end_us, int64_t deadline_us, const char *what)
{
    if (is_aborted(d->stage)) {
        d->peers = GROUP_ABORTED;
    } else if (d->device->group->poll(d->group) == DEVICE_GROUP_FAILED) {
        hear_why(d, what);
    } else if (g_get_monotonic_time() >= end_us) {
        blame(d, deadline_us, what);
    } else {
        return false;
    }
    device_stage_leave(d);
    return true;
}

/* What an enqueuing call on the group came to, asked until it is known. */
static bool enqueued(DeviceStage *d, DeviceStatus status, int64_t deadline_us, const char *what)
{
    Stage *s = d->stage;
    const int64_t end = g_get_monotonic_time() + deadline_us;
    while (status == DEVICE_NOT_READY) {
        if (device_stage_gives_up(d, end, deadline_us, what)) {
            return false;
        }
        if (s->o.progress != NULL) {
            s->o.progress(s->o.progress_user);
        }
        status = d->device->group->poll(d->group);
    }
    if (status == DEVICE_GROUP_FAILED) {
        return !device_stage_gives_up(d, end, deadline_us, what);
    }
    return device_stage_ok(d, status, what);
}

bool device_stage_all_reduce(DeviceStage *d, float *x, size_t n, int64_t deadline_us,
                             const char *what)
{
    return d->stage->failure == NULL && d->peers == GROUP_OK &&
           enqueued(d, d->device->group->all_reduce(d->group, d->stream, x, x, n), deadline_us,
                    what);
}

bool device_stage_fold(DeviceStage *d, const StageUnits *units, size_t n, int64_t deadline_us,
                       const char *what)
{
    const DeviceGroupApi *group = d->device->group;
    DeviceTree tree;
    device_tree_init(&tree, units->n_leaves, units->cuts, d->stage->plan_stage->n_ranks);
    return d->stage->failure == NULL && d->peers == GROUP_OK &&
           enqueued(d,
                    group->all_gather(d->group, d->stream, d->partial, d->gathered,
                                      sizeof(float) * n * tree.most),
                    deadline_us, what) &&
           enqueued(d, group->fold(d->group, d->stream, &tree, d->gathered, n, d->partial),
                    deadline_us, what);
}
