#include "worker/train/rank_team.h"

#include "proto/base/error.h"

#include <sched.h>
#include <string.h>

enum {
    JOIN_DEADLINE_US = 60000000,  /* NCCL takes seconds; the last rank may still make its weights */
    ROLL_CALL_STEP = 0x40000000u, /* turns do not come so far: more than 2^44 collectives */
};

static bool note(void *user, DeviceStatus status, const char *what)
{
    return device_work_note(user, status, what);
}

static void progress(void *user)
{
    const TrainLinks *links = user;
    if (link_port_progress(links->o.port) == 0 && links->o.yield) {
        sched_yield();
    }
}

/* Everybody's hello to everybody of the group. */
static bool greet(const Device *device, TrainLinks *links, TrainGroup *g, DeviceTeamHello *hellos,
                  GError **error)
{
    size_t sizes[PLAN_RANKS_LIMIT];
    void *out[PLAN_RANKS_LIMIT];
    if (!device_team_hello(device, g->rank == 0, &hellos[g->rank], error)) {
        return false;
    }
    for (uint32_t r = 0; r < g->n; r++) {
        sizes[r] = sizeof *hellos;
        out[r] = &hellos[r];
    }
    const GroupWait wait = group_turn(&g->turns, "hellos of devices");
    return train_links_check(
        links, g, group_all_gather(g->turns.group, &wait, &hellos[g->rank], sizes, out), error);
}

static bool has_joined(DeviceTeam *team, DeviceWork *work, TrainLinks *links, GError **error)
{
    const int64_t end = g_get_monotonic_time() + JOIN_DEADLINE_US;
    while (device_team_joined(team) == DEVICE_NOT_READY) {
        if (links->o.abort != NULL && atomic_load(links->o.abort)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED,
                        "joining a group of devices was aborted");
            return false;
        }
        if (g_get_monotonic_time() > end) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                        "the devices of %u ranks did not form a group within %d s: set "
                        "WEFT_DEVICE_GROUP=off for their workers, and NCCL_DEBUG=INFO to see why",
                        team->o.n_ranks, JOIN_DEADLINE_US / 1000000);
            return false;
        }
        progress(links);
    }
    return device_work_check(work, error);
}

static bool join(DeviceTeam *team, const Device *device, DeviceWork *work, TrainLinks *links,
                 TrainGroup *g, GError **error)
{
    DeviceTeamHello hellos[PLAN_RANKS_LIMIT];
    if (g->turns.group == NULL) {
        return true;
    }
    if (!greet(device, links, g, hellos, error)) {
        return false;
    }
    if (!device_team_fits(hellos, g->n)) {
        return true;
    }
    const DeviceTeamOptions options = {.device = device,
                                       .n_ranks = g->n,
                                       .rank = g->rank,
                                       .host = g->turns.group,
                                       .roll_step = ROLL_CALL_STEP,
                                       .abort = links->o.abort,
                                       .progress = progress,
                                       .progress_user = links,
                                       .note = note,
                                       .note_user = work};
    if (!device_team_begin(team, &options, &hellos[0].id, error) ||
        !has_joined(team, work, links, error)) {
        return false;
    }
    work->deadline_us = links->o.deadline_us;
    device_work_add_team(work, team);
    return true;
}

bool rank_teams_join(RankTeams *t, const Device *device, DeviceWork *work, TrainLinks *links,
                     GError **error)
{
    return join(&t->tensor, device, work, links, &links->tensor, error) &&
           join(&t->data, device, work, links, &links->data, error);
}

void rank_teams_free(RankTeams *t)
{
    device_team_free(&t->tensor);
    device_team_free(&t->data);
}

bool rank_work_check(const DeviceWork *work, TrainLinks *links, GError **error)
{
    if (!device_work_check(work, error)) {
        return false;
    }
    if (work->ended == NULL) {
        return true;
    }
    const TrainGroup *g =
        work->ended->o.host == links->data.turns.group ? &links->data : &links->tensor;
    return train_links_check(links, g, work->ended->peers, error);
}
