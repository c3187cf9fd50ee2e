/* What tensor ranks on devices of one host share: the group in which their sums are taken without
 * the host (kernels/device/group.h). It is the device's way of what `stage->group` does over links,
 * which stays for all else, and for sums where a rank of the stage is elsewhere. Engine thread. */
#pragma once

#include "worker/model/device_stage.h"

/* Begins to join; device_stage_joined() is asked until it is OK. False + error: it cannot. */
bool device_stage_join(DeviceStage *d, const DeviceGroupId *id, uint32_t n_ranks, uint32_t rank,
                       GError **error);
/* OK: sums go over the group from now on; NOT_READY: ask again; else stage->failure is set. */
DeviceStatus device_stage_joined(DeviceStage *d);
/* x[i] = the sum over the ranks of x[i], i < n; enqueued, perhaps into a graph. False: the epoch is
 * over: stage->failure says why, or d->team.peers. */
bool device_stage_all_reduce(DeviceStage *d, float *x, size_t n, int64_t deadline_us,
                             const char *what);
/* Class exact: d->partial = the tree's sum of all ranks' subtrees, of which d->partial has this
 * rank's, n floats each; likewise. */
bool device_stage_fold(DeviceStage *d, const StageUnits *units, size_t n, int64_t deadline_us,
                       const char *what);
