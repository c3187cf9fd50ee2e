/* RankTeams: the teams (worker/model/device_team.h) of a rank that trains on a device: of the
 * tensor ranks of its stage, and of the replicas of its part. Who is in one is decided alike by
 * all, from hellos over the links; where devices do not fit, the links' groups do the work. The
 * rank's thread.
 */
#pragma once

#include "worker/model/device_work.h"
#include "worker/train/train_links.h"

typedef struct RankTeams {
    DeviceTeam tensor, data;
} RankTeams;

/* Collective over the ranks of both groups, those on hosts included (device and work NULL). Adds
 * the teams that joined to the work. */
bool rank_teams_join(RankTeams *t, const Device *device, DeviceWork *work, TrainLinks *links,
                     GError **error);
/* A team that joined, or NULL. */
static inline DeviceTeam *rank_team(DeviceTeam *team)
{
    return team->joined ? team : NULL;
}
/* After the work's stream is gone. */
void rank_teams_free(RankTeams *t);
/* Whether the work is well; else its failure, or whom of the links' groups it waited for. */
bool rank_work_check(const DeviceWork *work, TrainLinks *links, GError **error);
