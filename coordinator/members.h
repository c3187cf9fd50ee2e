/* Members: the registry of workers and the failure detector (DESIGN 7.6). Loop thread only. */
#pragma once

#include "coordinator/store/store.h"
#include "proto/base/log.h"
#include "proto/base/loop.h"
#include "transport/rpc/rpc.h"
#include "weft/v1/admin.pb-c.h"
#include "weft/v1/cluster.pb-c.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#define HEARTBEAT_MS 500
#define MEMBER_LOST_US (INT64_C(4500) * 1000)    /* after the last heartbeat received */
#define MEMBER_RESET_US (INT64_C(500) * 1000)    /* after its stream broke and did not come back */
#define MEMBER_SUSPECT_US (INT64_C(1500) * 1000) /* silent for so long: gets no new work */
#define MEMBER_AGAIN_US (INT64_C(1000) * 1000)   /* a verdict that was put off is looked at again */
#define MEMBERS_QUORUM 3u                        /* of so many on, half of them say something */

typedef enum MemberState {
    MEMBER_JOINED,  /* has a certificate, was never attached or not since the coordinator started */
    MEMBER_READY,   /* attached */
    MEMBER_SERVING, /* attached, and a rank of a deployment that is ready */
    MEMBER_DRAINING, /* attached, gets no new work */
    MEMBER_LOST,
    MEMBER_REVOKED, /* final */
} MemberState;

typedef struct Members Members;
typedef struct Member Member;

/* What the rest of the coordinator hears. Every slot may be NULL. */
typedef struct MembersListener {
    /* fresh: an attachment has begun (hello and first heartbeat); else the same process is back
     * within one (and may have dropped what it held). */
    void (*attached)(Member *member, bool fresh, void *user);
    /* Left the cluster's live part: why names it. Once per attachment. */
    void (*lost)(Member *member, const GError *why, void *user);
    void (*reported)(Member *member, void *user); /* a heartbeat was taken */
    void (*drained)(Member *member, void *user);  /* draining began or ended */
    /* Appends weft.v1.Keep * (malloc'ed, protobuf-c allocator) for each deployment that this member
     * should hold. */
    void (*keep)(const Member *member, GPtrArray *keep, void *user);
    void *user;
} MembersListener;

typedef struct MembersOptions {
    Loop *loop;
    RpcTransport *transport;
    Store *store;
    Log *log;
    RpcCredentials credentials; /* for calls to workers; texts are copied */
    const char *cluster;
    uint64_t generation;
    uint8_t generation_id[16];
    /* serials to tell workers, of char *; borrowed */
    const GPtrArray *(*revoked)(void *user);
    void *revoked_user;
} MembersOptions;

Members *members_new(const MembersOptions *options);
void members_free(Members *members); /* NULL-safe */
/* The coordinator is about to stop: from here on nobody is declared lost, whatever happens to the
 * streams. NULL-safe. */
void members_quiesce(Members *members);
/* The coordinator's certificate was renewed: new channels and connections use it; texts copied.
 * What is open on the old channels goes on until the next renewal. */
void members_set_credentials(Members *members, const RpcCredentials *credentials);
void members_listen(Members *members, const MembersListener *listener); /* copied; one */
bool members_restore(Members *members, const StoreRow *row, GError **error);
/* A node id like the wish that nobody has or had; "" or unusable characters give "worker-N".
 * Returned. */
char *members_free_name(const Members *members, const char *wish);
/* A worker got its certificate. */
void members_add(Members *members, const char *name);

/* Cluster.Attach: each message of a worker's stream, NULL at its end. */
void members_on_report(Members *members, RpcCall *call, const Weft__V1__WorkerReport *report);

bool members_drain(Members *members, const char *name, const char *reason, bool undrain,
                   StoreDone done, void *user, GError **error);
/* Its stream ends, it is lost and stays revoked. False if no such member. */
bool members_revoke(Members *members, const char *name);
void members_set_serving(Member *member, bool serving);
/* Others wait for it in vain: it gets no new work before it is heard of. No such member: nothing.
 */
void members_accuse(Members *members, const char *name);

Member *members_find(const Members *members, const char *name);
/* Calls fn for each, by name. */
void members_each(const Members *members, void (*fn)(Member *member, void *user), void *user);
/* Members that were attached when the last coordinator died and have not come back yet. */
unsigned members_n_missing(const Members *members);

/* More than half of the attached members are silent and none of them broke its connection: it is
 * more likely that this process is cut off than that they all died (DESIGN 7.6). Says so with the
 * numbers, returned; NULL otherwise, and with fewer than MEMBERS_QUORUM members. */
char *members_cut_off(const Members *members);

const char *member_name(const Member *member);
MemberState member_state(const Member *member);
const char *member_state_text(MemberState state);
bool member_attached(const Member *member);
uint64_t member_silent_ms(const Member *member); /* since it was heard; 0 before its hello */
/* Attached, not draining, heard of lately and since it was accused. */
bool member_usable(const Member *member);
const Weft__V1__Hello *member_hello(const Member *member); /* NULL before its first */
const Weft__V1__Heartbeat *
member_heartbeat(const Member *member);           /* latest, NULL before its first */
RpcChannel *member_channel(const Member *member); /* to its own listener; NULL unless attached */
/* What it says it holds, from the latest heartbeat or the hello. NULL if nothing. */
const Weft__V1__Held *member_held(const Member *member, const char *job, uint32_t replica,
                                  uint32_t stage, uint32_t rank);
/* "job j epoch 3: its engine stands still in step 17 of 2 rows for 3100 ms"; NULL = none that it
 * knows of. Borrowed until its next heartbeat. */
const char *member_problem(const Member *member);
void member_describe(const Member *member,
                     Weft__V1__Member *out); /* strings borrowed from the member */
/* "worker b lost: no heartbeat for 4500 ms" */
GError *member_lost_error(const Member *member, const char *what);
