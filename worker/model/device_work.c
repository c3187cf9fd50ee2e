#include "worker/model/device_work.h"

#include "proto/base/error.h"
#include "proto/base/units.h"

#include <string.h>

#define STAGING_BYTES ((size_t)8 << 20)

/* The device's failure to give memory as an error of this worker. */
static bool given(DeviceWork *w, DeviceStatus status, size_t bytes, const char *what,
                  GError **error)
{
    if (status == DEVICE_OUT_OF_MEMORY) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_MEMORY,
                    "%s:%u has no %zu bytes for %s: choose smaller micro-batches, recomputation, "
                    "or more ranks",
                    w->device->info.kind, w->device->info.index, bytes, what);
        return false;
    }
    return device_check(w->device, status, what, error);
}

DeviceWork *device_work_new(const Device *device, GError **error)
{
    const DeviceApi *api = device->api;
    g_autoptr(DeviceWork) w = g_new0(DeviceWork, 1);
    w->device = device;
    w->ops = device->train_ops;
    DeviceStatus status = api->stream_new(device->handle, &w->stream);
    for (int i = 0; i < 2 && status == DEVICE_OK; i++) {
        status = api->alloc_pinned(device->handle, STAGING_BYTES, (void **)&w->staging[i]);
        if (status == DEVICE_OK) {
            status = api->event_new(device->handle, &w->staged[i]);
        }
    }
    if (status == DEVICE_OK) {
        status = api->event_new(device->handle, &w->done);
    }
    return given(w, status, 2 * STAGING_BYTES, "copies", error) ? g_steal_pointer(&w) : NULL;
}

void device_work_free(DeviceWork *w)
{
    if (w == NULL) {
        return;
    }
    const DeviceApi *api = w->device->api;
    device_work_leave(w);
    if (w->stream != NULL) {
        (void)api->stream_wait(w->stream);
    }
    if (w->done != NULL) {
        api->event_free(w->done);
    }
    for (int i = 0; i < 2; i++) {
        if (w->staged[i] != NULL) {
            api->event_free(w->staged[i]);
        }
        api->free_pinned(w->device->handle, w->staging[i]);
    }
    if (w->stream != NULL) {
        api->stream_free(w->stream);
    }
    g_free(w);
}

bool device_work_note(DeviceWork *w, DeviceStatus status, const char *what)
{
    if (w->status == DEVICE_OK && status != DEVICE_OK) {
        w->status = status;
        w->what = what;
    }
    return w->status == DEVICE_OK;
}

bool device_work_check(const DeviceWork *w, GError **error)
{
    return device_check(w->device, w->status, w->what, error);
}

/* ---- waiting ---- */

/* Whether the stream may stand for others. */
static bool has_company(const DeviceWork *w)
{
    bool has = false;
    for (unsigned i = 0; i < w->n_teams; i++) {
        has = has || !w->teams[i]->left;
    }
    return has;
}

/* Takes note of a team whose wait has ended. */
static void hear_team(DeviceWork *w, const DeviceTeam *team)
{
    if (w->ended == NULL && team->peers != GROUP_OK) {
        w->ended = team;
    }
}

/* With one team all are left: the epoch is over. */
static bool gives_up(DeviceWork *w, int64_t end_us, const char *what)
{
    bool gives = false;
    for (unsigned i = 0; i < w->n_teams && !gives; i++) {
        gives = device_team_gives_up(w->teams[i], end_us, w->deadline_us, what);
        hear_team(w, w->teams[i]);
    }
    for (unsigned i = 0; i < w->n_teams && gives; i++) {
        device_team_leave(w->teams[i]);
    }
    return gives;
}

static void progress(const DeviceWork *w)
{
    const DeviceTeamOptions *o = &w->teams[0]->o;
    if (o->progress != NULL) {
        o->progress(o->progress_user);
    }
}

bool device_work_await(DeviceWork *w, DeviceEvent *event, const char *what)
{
    const DeviceApi *api = w->device->api;
    const int64_t end = w->deadline_us > 0 ? g_get_monotonic_time() + w->deadline_us : 0;
    DeviceStatus status = DEVICE_NOT_READY;
    while (has_company(w) && (status = api->event_query(event)) == DEVICE_NOT_READY) {
        if (!gives_up(w, end, what)) {
            progress(w);
        }
    }
    if (status == DEVICE_NOT_READY) { /* alone: nothing stands */
        status = api->event_wait(event);
    }
    if (!device_work_note(w, status, what)) {
        return false;
    }
    gives_up(w, 0, what); /* a group that ended by itself let its collectives pass */
    return device_work_well(w);
}

bool device_work_wait(DeviceWork *w, const char *what)
{
    return device_work_note(w, w->device->api->event_record(w->done, w->stream), what) &&
           device_work_await(w, w->done, what);
}

/* ---- collectives ---- */

void device_work_add_team(DeviceWork *w, DeviceTeam *team)
{
    g_assert(w->n_teams < DEVICE_WORK_TEAMS && team->joined);
    w->teams[w->n_teams++] = team;
}

void device_work_leave(DeviceWork *w)
{
    for (unsigned i = 0; i < w->n_teams; i++) {
        device_team_leave(w->teams[i]);
    }
}

static bool enqueued(DeviceWork *w, DeviceTeam *team, DeviceStatus status, const char *what)
{
    const bool done = device_team_enqueued(team, status, w->deadline_us, what);
    hear_team(w, team);
    return done && device_work_well(w);
}

bool device_work_all_reduce(DeviceWork *w, DeviceTeam *team, float *x, size_t n, const char *what)
{
    return device_work_well(w) &&
           enqueued(w, team, w->device->group->all_reduce(team->group, w->stream, x, x, n), what);
}

bool device_work_all_gather(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, const void *mine,
                            void *out, size_t bytes, const char *what)
{
    return device_work_well(w) &&
           enqueued(w, team, w->device->group->all_gather(team->group, stream, mine, out, bytes),
                    what);
}

bool device_work_reduce_scatter(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, float *x,
                                size_t n, const char *what)
{
    return device_work_well(w) && enqueued(w, team,
                                           w->device->group->reduce_scatter(
                                               team->group, stream, x, x + team->o.rank * n, n),
                                           what);
}

bool device_work_fold(DeviceWork *w, DeviceTeam *team, DeviceStream *stream, const DeviceTree *tree,
                      const float *gathered, size_t n, float *out, const char *what)
{
    return device_work_well(w) &&
           enqueued(w, team, w->device->group->fold(team->group, stream, tree, gathered, n, out),
                    what);
}

/* ---- memory ---- */

void *device_work_alloc(DeviceWork *w, size_t bytes, const char *what, GError **error)
{
    void *memory = NULL;
    if (!given(w, w->device->api->alloc(w->device->handle, bytes, &memory), bytes, what, error)) {
        return NULL;
    }
    device_work_note(w, w->device->api->fill(w->stream, memory, 0, bytes), what);
    return memory;
}

void device_work_release(DeviceWork *w, void *memory)
{
    if (w != NULL && memory != NULL) {
        (void)w->device->api->stream_wait(w->stream); /* what is enqueued may read it */
        w->device->api->free(w->device->handle, memory);
    }
}

void *device_work_pinned(DeviceWork *w, size_t bytes, const char *what, GError **error)
{
    void *memory = NULL;
    return given(w, w->device->api->alloc_pinned(w->device->handle, bytes, &memory), bytes, what,
                 error)
               ? memory
               : NULL;
}

void device_work_unpin(DeviceWork *w, void *memory)
{
    if (w != NULL && memory != NULL) {
        (void)w->device->api->stream_wait(w->stream);
        w->device->api->free_pinned(w->device->handle, memory);
    }
}

/* ---- copies: one buffer is filled or emptied while the other one is under way ---- */

bool device_work_up(DeviceWork *w, void *device, const void *host, size_t bytes)
{
    const DeviceApi *api = w->device->api;
    uint8_t *to = device;
    const uint8_t *from = host;
    for (size_t at = 0, i = 0; at < bytes && device_work_well(w); at += STAGING_BYTES, i ^= 1) {
        const size_t n = MIN(STAGING_BYTES, bytes - at);
        if (device_work_await(w, w->staged[i], "a copy to the device")) {
            memcpy(w->staging[i], from + at, n);
            device_work_note(w, api->copy(w->stream, to + at, w->staging[i], n, DEVICE_COPY_UP),
                             "a copy to the device");
            device_work_note(w, api->event_record(w->staged[i], w->stream), "a copy to the device");
        }
    }
    return device_work_wait(w, "a copy to the device");
}

bool device_work_down(DeviceWork *w, void *host, const void *device, size_t bytes)
{
    const DeviceApi *api = w->device->api;
    const uint8_t *from = device;
    uint8_t *to = host;
    const size_t n_pieces = (bytes + STAGING_BYTES - 1) / STAGING_BYTES;
    for (size_t p = 0; p <= n_pieces && device_work_well(w); p++) {
        if (p < n_pieces) {
            const size_t at = p * STAGING_BYTES, n = MIN(STAGING_BYTES, bytes - at);
            device_work_note(
                w, api->copy(w->stream, w->staging[p % 2], from + at, n, DEVICE_COPY_DOWN),
                "a copy from the device");
            device_work_note(w, api->event_record(w->staged[p % 2], w->stream),
                             "a copy from the device");
        }
        if (p > 0) {
            const size_t at = (p - 1) * STAGING_BYTES, n = MIN(STAGING_BYTES, bytes - at);
            if (device_work_await(w, w->staged[(p - 1) % 2], "a copy from the device")) {
                memcpy(to + at, w->staging[(p - 1) % 2], n);
            }
        }
    }
    return device_work_well(w);
}
