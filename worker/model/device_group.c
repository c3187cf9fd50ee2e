#include "worker/model/device_group.h"

static bool note(void *user, DeviceStatus status, const char *what)
{
    return device_stage_ok(user, status, what);
}

static void free_graphs(void *user)
{
    DeviceStage *d = user;
    for (unsigned i = 0; i < DEVICE_GRAPHS; i++) {
        d->device->api->graph_free(d->graphs[i].graph);
        d->graphs[i].graph = NULL;
    }
}

bool device_stage_join(DeviceStage *d, const DeviceGroupId *id, uint32_t n_ranks, uint32_t rank,
                       GError **error)
{
    const Stage *s = d->stage;
    const DeviceTeamOptions options = {.device = d->device,
                                       .n_ranks = n_ranks,
                                       .rank = rank,
                                       .host = s->group,
                                       .abort = s->o.abort,
                                       .progress = s->o.progress,
                                       .progress_user = s->o.progress_user,
                                       .note = note,
                                       .note_user = d,
                                       .leaving = free_graphs,
                                       .leaving_user = d};
    return device_team_begin(&d->team, &options, id, error);
}

DeviceStatus device_stage_joined(DeviceStage *d)
{
    const DeviceStatus status = device_team_joined(&d->team);
    if (d->team.joined) {
        d->team.joined = device_team_register(&d->team, d->arena, d->arena_bytes);
    }
    return status;
}

/* Nothing failed, and nobody left. */
static bool is_well(const DeviceStage *d)
{
    return d->stage->failure == NULL && d->team.peers == GROUP_OK;
}

bool device_stage_all_reduce(DeviceStage *d, float *x, size_t n, int64_t deadline_us,
                             const char *what)
{
    DeviceGroup *group = d->team.group;
    return is_well(d) &&
           device_team_enqueued(&d->team, d->device->group->all_reduce(group, d->stream, x, x, n),
                                deadline_us, what);
}

bool device_stage_fold(DeviceStage *d, const StageUnits *units, size_t n, int64_t deadline_us,
                       const char *what)
{
    const DeviceGroupApi *api = d->device->group;
    DeviceGroup *group = d->team.group;
    DeviceTree tree;
    device_tree_init(&tree, units->n_leaves, units->cuts, d->stage->plan_stage->n_ranks);
    return is_well(d) &&
           device_team_enqueued(&d->team,
                                api->all_gather(group, d->stream, d->partial, d->gathered,
                                                sizeof(float) * n * tree.most),
                                deadline_us, what) &&
           device_team_enqueued(&d->team,
                                api->fold(group, d->stream, &tree, d->gathered, n, d->partial),
                                deadline_us, what);
}
