/* The leases of a deployment: who waits for a replica, who is on which, and what becomes of them
 * when its epoch ends (deployment.c, invariant 7).
 *
 * What is called may release any lease, not its own alone: a client's request of several prompts
 * has one for each, and what ends one of them ends all. So nothing is held across a call but the
 * queues themselves and d->next_waiting, which lease_unqueue() moves on. */
#include "coordinator/jobs/deployment.h"

#define AFFINITY_SLACK 4u /* requests that a replica may have beside twice the least */

/* ---- what holders do ---- */

void lease_expect(Lease *lease, const uint32_t *ids, uint32_t n_ids, const char *cache_key)
{
    PromptPages pages;
    prompt_pages(&pages, ids, n_ids, cache_key);
    if (pages.n > 0 && lease->pages == NULL) {
        lease->pages = g_memdup2(&pages, sizeof pages);
    }
}

/* It waits no more. */
static void lease_unqueue(Lease *lease)
{
    Deployment *d = lease->deployment;
    GList *link = g_queue_find(&d->waiting, lease);
    if (link == d->next_waiting) {
        d->next_waiting = link->next;
    }
    g_queue_delete_link(&d->waiting, link);
}

static void lease_count(const Lease *lease, bool on)
{
    ReplicaState *replica = &lease->deployment->replicas[lease->replica];
    if (!lease->callbacks.stands) {
        replica->n_active += on ? 1 : -1u;
    }
}

void lease_release(Lease *lease)
{
    Deployment *d = lease->deployment;
    if (lease->state == LEASE_WAITING) {
        lease_unqueue(lease);
    } else if (lease->state == LEASE_ACTIVE) {
        g_queue_remove(&d->active, lease);
        lease_count(lease, false);
        d->used_us = loop_now_us(lease->jobs->options.loop);
        d->load_s = 0;
        deployment_kick(d);
    }
    g_free(lease->pages);
    g_free(lease);
}

const char *lease_job(const Lease *lease)
{
    return lease->deployment != NULL ? lease->deployment->id : NULL;
}

void lease_report(Lease *lease, const GError *error)
{
    if (lease->state == LEASE_ACTIVE) {
        deployment_suspect(lease->deployment, lease->replica, error);
    }
}

/* ---- what becomes of them ---- */

static void lease_fail(Lease *lease, const GError *error)
{
    lease_unqueue(lease);
    lease->deployment = NULL;
    lease->state = LEASE_FAILED;
    lease->callbacks.failed(error, lease->user);
}

void deployment_fail_waiting(Deployment *d, const GError *error)
{
    g_autoptr(GError) own = g_error_copy(error);
    Lease *lease;
    while ((lease = g_queue_peek_head(&d->waiting)) != NULL) {
        lease_fail(lease, own);
    }
}

/* The next that waits, of a walk that begins with d->next_waiting at the head; NULL at its end. */
static Lease *next_waiting(Deployment *d)
{
    GList *link = d->next_waiting;
    d->next_waiting = link != NULL ? link->next : NULL;
    return link != NULL ? link->data : NULL;
}

void deployment_interrupt_leases(Deployment *d, uint32_t replica, const GError *why)
{
    bool any = false;
    for (GList *l = d->active.tail; l != NULL;) {
        Lease *lease = l->data;
        l = l->prev;
        if (lease->replica == replica) {
            g_queue_remove(&d->active, lease);
            lease_count(lease, false);
            lease->state = LEASE_WAITING;
            lease->since_us = loop_now_us(d->jobs->options.loop);
            lease->resumes = true;
            lease->struck = true;
            lease->n_tokens = 0;
            g_queue_push_head(&d->waiting, lease);
            any = true;
        }
    }
    if (any) {
        recovery_begin(d, why);
    }
    Lease *lease;
    d->next_waiting = d->waiting.head;
    while ((lease = next_waiting(d)) != NULL && lease->struck) {
        uint64_t n_tokens = 0;
        lease->struck = false;
        bool stays = lease->callbacks.interrupted(why, lease->user, &n_tokens);
        if (stays) {
            lease->n_tokens = n_tokens;
        }
    }
    d->next_waiting = NULL;
}

void deployment_tell_waiting(Deployment *d, const char *text, double fraction, const char *worker)
{
    Lease *lease;
    d->next_waiting = d->waiting.head;
    while ((lease = next_waiting(d)) != NULL) {
        if (lease->callbacks.progress != NULL) {
            lease->callbacks.progress(text, fraction, worker, lease->user);
        }
    }
}

static ReplicaState *least_loaded(Deployment *d)
{
    ReplicaState *best = NULL;
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        ReplicaState *replica = &d->replicas[r];
        if (replica->ready && (best == NULL || replica->n_active < best->n_active)) {
            best = replica;
        }
    }
    return best;
}

/* The one that has most of the prompt's beginning, of those with a place free and not far more to
 * do than the others; else the one with the least to do. */
static ReplicaState *replica_for(Deployment *d, const Lease *lease)
{
    ReplicaState *least = least_loaded(d), *best = least;
    if (least == NULL || lease->pages == NULL || d->affinity == NULL) {
        return least;
    }
    const uint32_t most = MIN(2 * least->n_active + AFFINITY_SLACK, MAX(d->plan->streams, 1) - 1);
    uint32_t n_best = affinity_find(d->affinity, lease->pages, least->index, least->epoch);
    for (uint32_t r = 0; r < d->n_replicas; r++) {
        ReplicaState *replica = &d->replicas[r];
        const uint32_t n =
            replica->ready && replica->n_active <= most
                ? affinity_find(d->affinity, lease->pages, replica->index, replica->epoch)
                : 0;
        if (n > n_best) {
            best = replica;
            n_best = n;
        }
    }
    return best;
}

static void lease_grant(Deployment *d, Lease *lease, ReplicaState *replica)
{
    const RankState *leader = &replica->ranks[0];
    lease->state = LEASE_ACTIVE;
    lease->replica = replica->index;
    if (lease->pages != NULL && d->n_replicas > 1) {
        d->affinity = d->affinity != NULL ? d->affinity : affinity_new();
        affinity_enter(d->affinity, lease->pages, replica->index, replica->epoch);
    }
    lease_count(lease, true);
    g_queue_push_tail(&d->active, lease);
    d->used_us = loop_now_us(d->jobs->options.loop);
    lease->since_us = d->used_us;
    lease->info = (LeaseInfo){
        .job = d->id,
        .plan = d->plan,
        .replica = replica->index,
        .epoch = replica->epoch,
        .leader = leader->worker,
        .channel = member_channel(members_find(d->jobs->options.members, leader->worker)),
        .load_s = d->load_s,
        .recovery = recovery_of_lease(d, lease),
    };
    lease->resumes = false;
    lease->callbacks.ready(&lease->info, lease->user);
}

bool deployment_grant_next(Deployment *d)
{
    Lease *lease = g_queue_peek_head(&d->waiting);
    ReplicaState *replica = replica_for(d, lease);
    if (replica != NULL) {
        lease_unqueue(lease);
        lease_grant(d, lease, replica);
    }
    return replica != NULL;
}
