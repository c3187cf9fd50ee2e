/* FairQueue: the sequences that wait for a slot, and which of them is next, so that a client who
 * asks for much delays itself and not the others (the virtual token counter of Sheng et al. 2024,
 * "Fairness in Serving Large Language Models").
 *
 * Invariants
 *   1. A sequence that has begun (it ran before, or has generated tokens) goes before any that has
 * not, the oldest first: a stream is not left standing for a new one.
 *   2. Of the others the next is of the key that was served least, the oldest of it first. What a
 * key was served is counted in positions computed: a prompt's at its admission, then each token.
 *   3. A key that has nothing open and comes (back) has at least what the least served of those
 * that have: nobody saves up by being away, and nobody is forgiven by going.
 *   4. So between two keys that both wait throughout, what they are served differs by at most one
 * prompt and what the sequences draw that run already: the others never starve one.
 *   5. A count that would decide nothing any more is forgotten; of keys with nothing open at
 * most FAIR_KEYS_KEPT are remembered.
 *
 * Engine thread. */
#pragma once

#include "worker/serve/leader_request.h"

#define FAIR_KEYS_KEPT 1024u

typedef struct FairQueue FairQueue;

FairQueue *fair_queue_new(void);
/* Empty: every request that joined has left. NULL-safe. */
void fair_queue_free(FairQueue *queue);

/* The request is open from now on, until it leaves. */
void fair_queue_join(FairQueue *queue, LeaderRequest *request);
void fair_queue_leave(FairQueue *queue, LeaderRequest *request);
/* n positions were computed for it. It has joined. */
void fair_queue_charge(LeaderRequest *request, uint32_t n);

/* It waits in its place, which is that of its submission; it has joined. */
void fair_queue_push(FairQueue *queue, LeaderRequest *request);
void fair_queue_remove(FairQueue *queue, LeaderRequest *request);
LeaderRequest *fair_queue_next(const FairQueue *queue); /* NULL: nobody waits */
/* Those that wait, by submission: GList of LeaderRequest. Borrowed, until the next change. */
const GList *fair_queue_all(const FairQueue *queue);
uint32_t fair_queue_length(const FairQueue *queue);
uint32_t fair_queue_n_keys(const FairQueue *queue); /* that are remembered */
