/* Members, as their files see them. Not for others.
 *
 *   members.c        who is there: the state machine, the registry, the administrator's side
 *   member_stream.c  Attach: hello and heartbeats of a worker's stream
 *   member_view.c    looking at one */
#pragma once

#include "coordinator/members.h"

struct Member {
    Members *members;
    char *name;
    MemberState state;
    bool attached, draining, revoked, serving;
    bool leaving;   /* its process said that it was asked to stop */
    bool confirmed; /* a heartbeat came after its hello: it has read the welcome, and with it this
                       generation */
    bool accused;   /* since its last heartbeat */
    bool was_attached;  /* when the last coordinator died */
    char *reason;       /* why it was lost, NULL */
    char *drain_reason; /* why it drains, NULL */
    int64_t joined_wall_us;
    int64_t heard_us; /* loop time of the last message */
    RpcCall *stream;  /* referenced; NULL after a reset */
    LoopTimer *deadline;
    int64_t deadline_us; /* when it is due */
    bool silent_reset;   /* its stream broke after it was silent for long */
    RpcChannel *channel;
    RpcChannel *old_channel; /* from before the last renewal, for what was open on it; NULL */
    Weft__V1__Hello *hello;
    Weft__V1__Heartbeat *heartbeat;
};

struct Members {
    MembersOptions options;
    char *cluster, *ca_pem, *certificate_pem, *key_pem;
    MembersListener listener;
    GTree *by_name; /* name -> Member, owned */
    bool quiet;     /* stopping: invariant 7 */
    bool told_cut_off;
};

/* ---- members.c: the state machine at its head ---- */

void member_settle(Member *m, bool was_attached);
void member_save(Member *m, StoreDone done, void *user);
void member_drop_stream(Member *m);
/* The one way out of an attachment (invariant 2). */
void member_detach(Member *m, const char *reason);
/* The deadline is due after so long. */
void member_arm(Member *m, int64_t delay_us);
/* Its stream ended. user: Member. */
void member_on_reset(void *user);

/* ---- member_stream.c ---- */

/* What is called from now on is called with the present credentials. For members_each(). */
void member_renew_channel(Member *m, void *user);

/* ---- member_view.c ---- */

/* By an administrator's word or its own. */
bool member_drains(const Member *m);
/* Why it is in its state; NULL: it has no reason. */
const char *member_reason(const Member *m);
