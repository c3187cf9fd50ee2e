/* The group of a stage's devices: who can be in it is told by the hellos, which every tensor rank
 * has from every other, so all of them decide alike. Rank 0 of the stage makes the group's id; it
 * travels sealed like all that a link carries and is worth nothing after the epoch. */
#include "worker/serve/engine_state.h"

#include "kernels/device/group.h"
#include "proto/base/error.h"
#include "worker/model/device_group.h"

#include <string.h>

enum {
    JOIN_DEADLINE_US = 12000000, /* less than the coordinator gives a start; NCCL takes seconds */
};

static const Device *device_of(const Engine *e)
{
    return e->stage->o.shard->device;
}

bool engine_group_hello(Engine *e, GByteArray **out, GError **error)
{
    DeviceTeamHello *mine = &e->devices.hellos[e->position.rank];
    *out = g_byte_array_new();
    if (e->position.tp < 2) {
        return true;
    }
    if (!device_team_hello(device_of(e), e->position.rank == 0, mine, error)) {
        g_clear_pointer(out, g_byte_array_unref);
        return false;
    }
    if (mine->seat.fill[0] != '\0') {
        g_byte_array_append(*out, (const uint8_t *)mine, sizeof *mine);
    }
    return true;
}

void engine_group_heard(Engine *e, uint32_t from, const void *payload, size_t size)
{
    const Position *p = &e->position;
    if (from >= p->base && from < p->base + p->tp && size == sizeof(DeviceTeamHello)) {
        memcpy(&e->devices.hellos[from - p->base], payload, size);
    }
}

/* Begins to join where the stage's devices fit; false: it failed. */
static bool begin(Engine *e)
{
    GError *error = NULL;
    e->devices.decided = true;
    e->devices.since_us = g_get_monotonic_time();
    if (e->position.tp < 2 || e->stage->device == NULL ||
        !device_team_fits(e->devices.hellos, e->position.tp)) {
        return true;
    }
    if (!device_stage_join(e->stage->device, &e->devices.hellos[0].id, e->position.tp,
                           e->position.rank, &error)) {
        engine_fail(e, error, true);
        return false;
    }
    return true;
}

bool engine_group_open(Engine *e)
{
    if (!e->devices.decided && !begin(e)) {
        return false;
    }
    DeviceStage *d = e->stage->device;
    if (d == NULL || d->team.group == NULL || d->team.joined) {
        return true;
    }
    const DeviceStatus status = device_stage_joined(d);
    if (e->stage->failure != NULL) {
        engine_fail(e, g_error_copy(e->stage->failure), true);
    } else if (status == DEVICE_NOT_READY &&
               g_get_monotonic_time() - e->devices.since_us > JOIN_DEADLINE_US) {
        engine_fail(e,
                    g_error_new(WEFT_ERROR, WEFT_ERROR_WORKER_LOST,
                                "the devices of stage %u did not form a group within %d s: set "
                                "WEFT_DEVICE_GROUP=off for its workers, and NCCL_DEBUG=INFO to see "
                                "why",
                                e->position.stage, JOIN_DEADLINE_US / 1000000),
                    true);
    }
    return d->team.joined;
}
