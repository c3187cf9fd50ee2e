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

/* A hello's payload from a rank on a device that others might join; both ends are of one machine
 * architecture (link.h). */
struct DeviceHello {
    DeviceSeat seat;
    DeviceGroupId id; /* of rank 0 */
};

static const Device *device_of(const Engine *e)
{
    return e->stage->o.shard->device;
}

static bool is_off(void)
{
    const char *said = g_getenv("WEFT_DEVICE_GROUP");
    return said != NULL && strcmp(said, "off") == 0;
}

static bool make_id(Engine *e, GError **error)
{
    const Device *device = device_of(e);
    return e->position.rank != 0 ||
           device_check(device, device->group->make_id(device->handle, &e->devices.id),
                        "an id for the stage's devices", error);
}

bool engine_group_hello(Engine *e, GByteArray **out, GError **error)
{
    const Device *device = device_of(e);
    struct DeviceHello hello;
    char why[256];
    *out = g_byte_array_new();
    if (e->position.tp < 2 || device == NULL || device->group == NULL || is_off() ||
        !device->group->usable(why)) {
        return true;
    }
    if (!make_id(e, error)) {
        g_clear_pointer(out, g_byte_array_unref);
        return false;
    }
    memset(&hello, 0, sizeof hello);
    device->group->seat(device->handle, &hello.seat);
    hello.id = e->devices.id;
    e->devices.seats[e->position.rank] = hello.seat;
    g_byte_array_append(*out, (const uint8_t *)&hello, sizeof hello);
    return true;
}

void engine_group_heard(Engine *e, uint32_t from, const void *payload, size_t size)
{
    const Position *p = &e->position;
    struct DeviceHello hello;
    if (from < p->base || from >= p->base + p->tp || size != sizeof hello) {
        return;
    }
    memcpy(&hello, payload, sizeof hello);
    hello.seat.fill[sizeof hello.seat.fill - 1] = '\0';
    hello.seat.domain[sizeof hello.seat.domain - 1] = '\0';
    hello.seat.place[sizeof hello.seat.place - 1] = '\0';
    e->devices.seats[from - p->base] = hello.seat;
    if (from == p->base) {
        e->devices.id = hello.id;
    }
}

/* Begins to join where the stage's devices fit; false: it failed. */
static bool begin(Engine *e)
{
    GError *error = NULL;
    e->devices.decided = true;
    e->devices.since_us = g_get_monotonic_time();
    if (e->position.tp < 2 || e->stage->device == NULL ||
        !device_seats_fit(e->devices.seats, e->position.tp)) {
        return true;
    }
    if (!device_stage_join(e->stage->device, &e->devices.id, e->position.tp, e->position.rank,
                           &error)) {
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
    if (d == NULL || d->group == NULL || d->grouped) {
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
    return d->grouped;
}
