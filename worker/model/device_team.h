/* DeviceTeam: ranks whose devices are on one host and form a group (kernels/device/group.h), and
 * how one of them waits for the others: with a deadline, for as long as the epoch lasts, and so
 * that somebody is named in the end. Tensor ranks that serve (device_group.h) and ranks that train
 * (worker/train/rank_team.h) have one. The rank's thread. */
#pragma once

#include "kernels/device/group.h"
#include "transport/group/group.h"

typedef struct DeviceTeamOptions {
    const Device *device; /* borrowed, like all here */
    uint32_t n_ranks, rank;
    Group *host;                  /* the same ranks over links: for the roll call */
    uint32_t roll_step;           /* GroupWait.step of it: behind every other collective */
    const atomic_bool *abort;     /* the epoch's end; NULL: none */
    void (*progress)(void *user); /* of links, while it waits; NULL: none */
    void *progress_user;
    /* Takes note of a status of the device; true: it is OK. what lives as long as the team. */
    bool (*note)(void *user, DeviceStatus status, const char *what);
    void *note_user;
    void (*leaving)(void *user); /* frees graphs that hold collectives; NULL: none */
    void *leaving_user;
} DeviceTeamOptions;

typedef struct DeviceTeam {
    DeviceTeamOptions o;
    DeviceGroup *group;          /* NULL: none was begun */
    bool joined;                 /* all have */
    bool left;                   /* since then nobody is waited for */
    uint64_t free_before, bytes; /* on the device, when it was begun; that it took (use.h) */
    GroupStatus peers;           /* why a wait for them ended; OK: none did */
    char stuck[160];
} DeviceTeam;

/* What a rank tells the others of its device; both ends are of one machine architecture. */
typedef struct DeviceTeamHello {
    DeviceSeat seat;  /* its fill is empty: no group can be made there */
    DeviceGroupId id; /* of the rank that makes it */
} DeviceTeamHello;
/* device NULL, no group in its tables, or WEFT_DEVICE_GROUP=off: an empty seat. makes_id: the id of
 * a new group, too. False + error: the device cannot make one. */
bool device_team_hello(const Device *device, bool makes_id, DeviceTeamHello *out, GError **error);
/* Hellos came over a wire: whether those of n ranks fit one group. Ends their texts. */
bool device_team_fits(DeviceTeamHello *hellos, uint32_t n);

/* Begins to join; device_team_joined() is asked until it is OK. False + error: it cannot. */
bool device_team_begin(DeviceTeam *team, const DeviceTeamOptions *options, const DeviceGroupId *id,
                       GError **error);
/* OK: joined; NOT_READY: ask again; else the failure was noted. */
DeviceStatus device_team_joined(DeviceTeam *team);
/* After it joined: memory for its collectives. */
bool device_team_register(DeviceTeam *team, void *memory, size_t bytes);

/* What an enqueuing call on the group came to, asked until it is known. False: the epoch is over:
 * the failure was noted, or `peers` says so. deadline_us 0: none. */
bool device_team_enqueued(DeviceTeam *team, DeviceStatus status, int64_t deadline_us,
                          const char *what);
/* Whether a wait for a stream is to be given up, which `end_us` (CLOCK_MONOTONIC, 0: never) does,
 * and the epoch's end, and the group's; notes why, and leaves the team, so that the stream goes on.
 * deadline_us: of the roll call. */
bool device_team_gives_up(DeviceTeam *team, int64_t end_us, int64_t deadline_us, const char *what);
/* The end of all waits for others; the group's memory stays until its stream is gone. */
void device_team_leave(DeviceTeam *team);
void device_team_free(DeviceTeam *team); /* behind the streams */
