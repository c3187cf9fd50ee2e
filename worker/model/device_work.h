/* DeviceWork: a rank's stream on a device in training, and what it has enqueued there: the first
 * failure stays, so that callers enqueue a whole pass and ask once. Copies of any host memory go
 * through two pinned buffers. Where collectives of a DeviceTeam are on the stream, every wait for
 * it ends by the team's rules. One thread. */
#pragma once

#include "kernels/device/train_ops.h"
#include "worker/model/device_team.h"

enum { DEVICE_WORK_TEAMS = 2 };

typedef struct DeviceWork {
    const Device *device; /* borrowed */
    const DeviceTrainOps *ops;
    DeviceStream *stream;
    uint8_t *staging[2]; /* pinned */
    DeviceEvent *staged[2];
    DeviceEvent *done;
    DeviceTeam *teams[DEVICE_WORK_TEAMS]; /* borrowed: whom the stream may stand for */
    unsigned n_teams;
    int64_t deadline_us;     /* of each wait for them; 0: none */
    DeviceStatus status;     /* the first that was not OK */
    const char *what;        /* was being done then */
    const DeviceTeam *ended; /* the first whose wait for others ended (its peers say why); NULL:
                                none. What was computed since is to be discarded */
} DeviceWork;

/* Returned. */
DeviceWork *device_work_new(const Device *device, GError **error);
void device_work_free(DeviceWork *w); /* NULL-safe; waits for the stream */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(DeviceWork, device_work_free)

/* Takes note of a status; true while nothing has failed. what: static. */
bool device_work_note(DeviceWork *w, DeviceStatus status, const char *what);
/* The failure as an error; true: none. */
bool device_work_check(const DeviceWork *w, GError **error);
/* Until all that was enqueued is done, or what is before `event`. False: it failed, or others did
 * not come. */
bool device_work_wait(DeviceWork *w, const char *what);
bool device_work_await(DeviceWork *w, DeviceEvent *event, const char *what);
/* Nothing failed, and nobody left. */
static inline bool device_work_well(const DeviceWork *w)
{
    return w->status == DEVICE_OK && w->ended == NULL;
}

/* ---- collectives of a team, in order with all that is enqueued on the stream; false as above ----
 */

/* The team's waits, from now on; it has joined. */
void device_work_add_team(DeviceWork *w, DeviceTeam *team);
/* Every team is left: what stands goes on. */
void device_work_leave(DeviceWork *w);
/* x[i] = the sum over the ranks, in the fill's order; on the work's stream. */
bool device_work_all_reduce(DeviceWork *w, DeviceTeam *team, float *x, size_t n, const char *what);
/* out + r * bytes = rank r's mine; mine may be its part of out. */
bool device_work_all_gather(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, const void *mine,
                            void *out, size_t bytes, const char *what);
/* x + rank * n = the sum over the ranks of that part of x. */
bool device_work_reduce_scatter(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, float *x,
                                size_t n, const char *what);
/* The tree's sum of what was gathered. */
bool device_work_fold(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, const DeviceTree *tree,
                      const float *gathered, size_t n, float *out, const char *what);

/* Memory of the device, all its bytes zero once what is enqueued here is done; freed by the other
 * one, which waits first. */
void *device_work_alloc(DeviceWork *w, size_t bytes, const char *what, GError **error);
void device_work_release(DeviceWork *w, void *memory); /* NULL-safe, also for w */
void *device_work_pinned(DeviceWork *w, size_t bytes, const char *what, GError **error);
void device_work_unpin(DeviceWork *w, void *memory); /* likewise */

/* Copies between any host memory and the device; done when they return. */
bool device_work_up(DeviceWork *w, void *device, const void *host, size_t bytes);
bool device_work_down(DeviceWork *w, void *host, const void *device, size_t bytes);
