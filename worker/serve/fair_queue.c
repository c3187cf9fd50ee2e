#include "worker/serve/fair_queue.h"

#include "proto/base/hash.h"

typedef struct FairKey {
    Hash128 key;
    uint64_t served;
    uint32_t n_open;
} FairKey;

struct FairQueue {
    GQueue waiting;  /* LeaderRequest *, by order */
    GPtrArray *keys; /* FairKey * */
};

FairQueue *fair_queue_new(void)
{
    FairQueue *f = g_new0(FairQueue, 1);
    g_queue_init(&f->waiting);
    f->keys = g_ptr_array_new_with_free_func(g_free);
    return f;
}

void fair_queue_free(FairQueue *f)
{
    if (f != NULL) {
        g_assert(f->keys->len == 0 && g_queue_is_empty(&f->waiting));
        g_ptr_array_unref(f->keys);
        g_free(f);
    }
}

/* ---- keys ---- */

static FairKey *find_key(const FairQueue *f, const Hash128 *key)
{
    for (guint i = 0; i < f->keys->len; i++) {
        FairKey *k = g_ptr_array_index(f->keys, i);
        if (hash128_equal(&k->key, key)) {
            return k;
        }
    }
    return NULL;
}

/* Of the keys that have something open; UINT64_MAX: none has. */
static uint64_t least_served(const FairQueue *f)
{
    uint64_t least = UINT64_MAX;
    for (guint i = 0; i < f->keys->len; i++) {
        const FairKey *k = g_ptr_array_index(f->keys, i);
        least = k->n_open > 0 ? MIN(least, k->served) : least;
    }
    return least;
}

/* Invariant 5. */
static void forget_keys(FairQueue *f)
{
    const uint64_t least = least_served(f);
    guint n_away = 0, first = 0;
    for (guint i = f->keys->len; i-- > 0;) {
        const FairKey *k = g_ptr_array_index(f->keys, i);
        if (k->n_open == 0 && k->served <= least) {
            g_ptr_array_remove_index(f->keys, i);
        }
    }
    for (guint i = f->keys->len; i-- > 0;) {
        if (((const FairKey *)g_ptr_array_index(f->keys, i))->n_open == 0) {
            n_away++;
            first = i;
        }
    }
    if (n_away > FAIR_KEYS_KEPT) {
        g_ptr_array_remove_index(f->keys, first);
    }
}

void fair_queue_join(FairQueue *f, LeaderRequest *q)
{
    const uint64_t least = least_served(f);
    FairKey *k = find_key(f, &q->share_key);
    if (k == NULL) {
        k = g_new0(FairKey, 1);
        k->key = q->share_key;
        g_ptr_array_add(f->keys, k);
    }
    if (k->n_open == 0 && least != UINT64_MAX) { /* invariant 3 */
        k->served = MAX(k->served, least);
    }
    k->n_open++;
    q->fair_key = k;
}

void fair_queue_leave(FairQueue *f, LeaderRequest *q)
{
    FairKey *k = g_steal_pointer(&q->fair_key);
    if (--k->n_open == 0) {
        forget_keys(f);
    }
}

void fair_queue_charge(LeaderRequest *q, uint32_t n)
{
    q->fair_key->served += n;
}

/* ---- the queue ---- */

static gint by_order(gconstpointer a, gconstpointer b, gpointer user)
{
    const LeaderRequest *x = a, *y = b;
    (void)user;
    return (x->order > y->order) - (x->order < y->order);
}

void fair_queue_push(FairQueue *f, LeaderRequest *q)
{
    const LeaderRequest *last = g_queue_peek_tail(&f->waiting);
    if (last == NULL || last->order < q->order) {
        g_queue_push_tail(&f->waiting, q);
    } else {
        g_queue_insert_sorted(&f->waiting, q, by_order, NULL);
    }
}

void fair_queue_remove(FairQueue *f, LeaderRequest *q)
{
    g_queue_remove(&f->waiting, q);
}

static bool has_begun(const LeaderRequest *q)
{
    return q->was_admitted || q->n_known > q->n_prompt;
}

LeaderRequest *fair_queue_next(const FairQueue *f)
{
    LeaderRequest *next = NULL;
    for (const GList *l = f->waiting.head; l != NULL; l = l->next) {
        LeaderRequest *q = l->data;
        if (has_begun(q)) { /* invariant 1 */
            return q;
        }
        if (next == NULL || q->fair_key->served < next->fair_key->served) {
            next = q;
        }
    }
    return next;
}

const GList *fair_queue_all(const FairQueue *f)
{
    return f->waiting.head;
}

uint32_t fair_queue_length(const FairQueue *f)
{
    return f->waiting.length;
}

uint32_t fair_queue_n_keys(const FairQueue *f)
{
    return f->keys->len;
}
