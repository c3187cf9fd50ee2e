/* Who is to blame when ranks wait for each other on their devices: a device does not tell which
 * rank has not come. So at its deadline a rank asks the others over the links, in one small
 * collective of their host group: whoever does not answer within another deadline did not come, and
 * group_waits_for() names it as for any collective. When all answer, all wait: then it is the
 * devices' own fault.
 *
 * A rank whose device fails tells its peers why (LINK_OP_ABORT). Its group may end before that
 * message is here: a short grace lets the cause arrive before the consequence is reported. */
#include "worker/model/device_team.h"

#include "kernels/device/use.h"
#include "proto/plan/plan.h"

#include <stdio.h>
#include <string.h>

enum {
    GRACE_US = 1000000,
    ROLL_CALL_SITE = GROUP_SITE_LIMIT - 2, /* behind all collectives of a step */
};

/* ---- who can be in it ---- */

static bool is_off(void)
{
    const char *said = g_getenv("WEFT_DEVICE_GROUP");
    return said != NULL && strcmp(said, "off") == 0;
}

bool device_team_hello(const Device *device, bool makes_id, DeviceTeamHello *out, GError **error)
{
    char why[256];
    memset(out, 0, sizeof *out);
    if (device == NULL || device->group == NULL || is_off() || !device->group->usable(why)) {
        return true;
    }
    device->group->seat(device->handle, &out->seat);
    return !makes_id || device_check(device, device->group->make_id(device->handle, &out->id),
                                     "an id for a group of devices", error);
}

bool device_team_fits(DeviceTeamHello *hellos, uint32_t n)
{
    DeviceSeat seats[DEVICE_GROUP_RANKS];
    if (n > DEVICE_GROUP_RANKS) {
        return false;
    }
    for (uint32_t r = 0; r < n; r++) {
        DeviceSeat *seat = &hellos[r].seat;
        seat->fill[sizeof seat->fill - 1] = '\0';
        seat->domain[sizeof seat->domain - 1] = '\0';
        seat->place[sizeof seat->place - 1] = '\0';
        seats[r] = *seat;
    }
    return device_seats_fit(seats, n);
}

/* ---- joining ---- */

bool device_team_begin(DeviceTeam *team, const DeviceTeamOptions *options, const DeviceGroupId *id,
                       GError **error)
{
    const Device *device = options->device;
    *team = (DeviceTeam){.o = *options, .free_before = device_use_group_begins(device)};
    return device_check(
        device,
        device->group->begin(device->handle, id, options->n_ranks, options->rank, &team->group),
        "joining a group of devices", error);
}

DeviceStatus device_team_joined(DeviceTeam *team)
{
    const DeviceStatus status = team->o.device->group->poll(team->group);
    if (status != DEVICE_NOT_READY && !team->joined) {
        team->joined = team->o.note(team->o.note_user, status, "joining a group of devices");
        if (team->joined) {
            team->bytes = device_use_group_joined(team->o.device, team->free_before);
        }
    }
    return status;
}

bool device_team_register(DeviceTeam *team, void *memory, size_t bytes)
{
    DeviceStatus status = team->o.device->group->register_buffer(team->group, memory, bytes);
    while (status == DEVICE_NOT_READY) { /* of this rank alone: nobody is waited for */
        status = team->o.device->group->poll(team->group);
    }
    return team->o.note(team->o.note_user, status, "memory of a group of devices");
}

/* ---- waiting ---- */

static void progress(const DeviceTeam *team)
{
    if (team->o.progress != NULL) {
        team->o.progress(team->o.progress_user);
    }
}

static bool is_aborted(const DeviceTeam *team)
{
    return team->o.abort != NULL && atomic_load_explicit(team->o.abort, memory_order_acquire);
}

/* Everybody who waits answers. */
static GroupStatus roll_call(DeviceTeam *team, int64_t deadline_us, const char *what)
{
    uint8_t mine = 1, all[PLAN_RANKS_LIMIT];
    size_t sizes[PLAN_RANKS_LIMIT];
    void *out[PLAN_RANKS_LIMIT];
    const GroupWait wait = {.step = team->o.roll_step,
                            .site = ROLL_CALL_SITE,
                            .deadline_us = g_get_monotonic_time() + deadline_us,
                            .operation = what};
    for (uint32_t r = 0; r < team->o.n_ranks; r++) {
        sizes[r] = sizeof mine;
        out[r] = &all[r];
    }
    return group_all_gather(team->o.host, &wait, &mine, sizes, out);
}

static void blame(DeviceTeam *team, int64_t deadline_us, const char *what)
{
    team->peers = roll_call(team, deadline_us, what);
    if (team->peers == GROUP_OK) {
        snprintf(team->stuck, sizeof team->stuck, "%s, which every rank of the group waits in",
                 what);
        team->o.note(team->o.note_user, DEVICE_STUCK, team->stuck);
    }
}

/* The group has ended by itself. */
static void hear_why(DeviceTeam *team, const char *what)
{
    const int64_t end = g_get_monotonic_time() + GRACE_US;
    while (!is_aborted(team) && g_get_monotonic_time() < end) {
        progress(team);
    }
    if (is_aborted(team)) {
        team->peers = GROUP_ABORTED;
    } else {
        (void)team->o.device->group->poll(team->group); /* its text is the last failure's again */
        team->o.note(team->o.note_user, DEVICE_GROUP_FAILED, what);
    }
}

bool device_team_gives_up(DeviceTeam *team, int64_t end_us, int64_t deadline_us, const char *what)
{
    if (team->group == NULL || team->left) {
        return false;
    }
    if (is_aborted(team)) {
        team->peers = GROUP_ABORTED;
    } else if (team->o.device->group->poll(team->group) == DEVICE_GROUP_FAILED) {
        hear_why(team, what);
    } else if (end_us != 0 && g_get_monotonic_time() >= end_us) {
        blame(team, deadline_us, what);
    } else {
        return false;
    }
    device_team_leave(team);
    return true;
}

bool device_team_enqueued(DeviceTeam *team, DeviceStatus status, int64_t deadline_us,
                          const char *what)
{
    const int64_t end = deadline_us > 0 ? g_get_monotonic_time() + deadline_us : 0;
    while (status == DEVICE_NOT_READY) {
        if (device_team_gives_up(team, end, deadline_us, what)) {
            return false;
        }
        progress(team);
        status = team->o.device->group->poll(team->group);
    }
    if (status == DEVICE_GROUP_FAILED) {
        return !device_team_gives_up(team, end, deadline_us, what);
    }
    return team->o.note(team->o.note_user, status, what);
}

/* ---- the end ---- */

void device_team_leave(DeviceTeam *team)
{
    if (team->group == NULL || team->left) {
        return;
    }
    team->left = true;
    if (team->o.leaving != NULL) {
        team->o.leaving(team->o.leaving_user);
    }
    team->o.device->group->abort(team->group);
}

void device_team_free(DeviceTeam *team)
{
    if (team->group != NULL) {
        device_team_leave(team);
        team->o.device->group->free(team->group);
        device_use_group_ended(team->o.device, team->bytes);
        *team = (DeviceTeam){.peers = team->peers};
    }
}
