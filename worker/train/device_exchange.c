#include "worker/train/device_exchange.h"

struct DeviceExchange {
    DeviceExchangeOptions o;
    uint32_t dp, replica;
    size_t most_owned;  /* floats of any bucket that one replica owns */
    size_t most_bucket; /* floats of any bucket */
    DeviceTree tree;    /* class exact */
    float *parts;       /* [dp][most_owned], or class exact [1 + dp][subtrees][most_bucket] */
    DeviceStream *aside;
    DeviceEvent *ready, *done;
    /* of the running step */
    Parameters *subtrees[TREE_SUBTREES_LIMIT], *root;
    uint32_t n;
    uint32_t next; /* buckets [0, next) are yet to be exchanged, from the last on */
    bool begun;
    uint32_t early;
};

static void measure(DeviceExchange *x)
{
    const GArray *buckets = x->o.reduced->buckets;
    x->dp = x->o.reduced->position.dp;
    x->replica = x->o.reduced->position.replica;
    for (uint32_t b = 0; b < buckets->len; b++) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, b);
        x->most_bucket = MAX(x->most_bucket, bucket->first[x->dp] - bucket->first[0]);
        for (uint32_t d = 0; d < x->dp; d++) {
            x->most_owned = MAX(x->most_owned, bucket->first[d + 1] - bucket->first[d]);
        }
    }
    if (x->o.exact) {
        const LeafCuts *l = x->o.leaves;
        device_tree_init_missing(&x->tree, l->n_leaves, l->missing, l->cuts, x->dp);
    }
}

static size_t floats(const DeviceExchange *x)
{
    const size_t exact = x->o.exact ? (1 + (size_t)x->dp) * x->tree.most * x->most_bucket : 0;
    return MAX(x->dp * x->most_owned, exact);
}

size_t device_exchange_bytes(const DeviceExchangeOptions *options)
{
    DeviceExchange x = {.o = *options};
    measure(&x);
    return floats(&x) * sizeof(float);
}

static bool open_stream(DeviceExchange *x, GError **error)
{
    const Device *device = x->o.work->device;
    const DeviceApi *api = device->api;
    DeviceStatus status = api->stream_new(device->handle, &x->aside);
    if (status == DEVICE_OK) {
        status = api->event_new(device->handle, &x->ready);
    }
    if (status == DEVICE_OK) {
        status = api->event_new(device->handle, &x->done);
    }
    return device_check(device, status, "a stream for gradients", error);
}

static bool allocate(DeviceExchange *x, GError **error)
{
    const size_t bytes = floats(x) * sizeof(float);
    x->parts = device_work_alloc(x->o.work, bytes, "gradients of other replicas", error);
    return x->parts != NULL &&
           (x->o.team == NULL || device_team_register(x->o.team, x->parts, bytes) ||
            device_work_check(x->o.work, error));
}

DeviceExchange *device_exchange_open(const DeviceExchangeOptions *options, GError **error)
{
    DeviceExchange *x = g_new0(DeviceExchange, 1);
    x->o = *options;
    measure(x);
    if (!open_stream(x, error) || !allocate(x, error)) {
        device_exchange_close(x);
        return NULL;
    }
    return x;
}

void device_exchange_close(DeviceExchange *x)
{
    if (x == NULL) {
        return;
    }
    const DeviceApi *api = x->o.work->device->api;
    if (x->aside != NULL) {
        api->stream_free(x->aside);
    }
    DeviceEvent *const events[] = {x->ready, x->done};
    for (size_t i = 0; i < G_N_ELEMENTS(events); i++) {
        if (events[i] != NULL) {
            api->event_free(events[i]);
        }
    }
    device_work_release(x->o.work, x->parts);
    g_free(x);
}

static void copy(DeviceExchange *x, DeviceStream *stream, float *to, const float *from, size_t n,
                 const char *what)
{
    DeviceWork *w = x->o.work;
    if (n > 0) {
        device_work_note(
            w, w->device->api->copy(stream, to, from, n * sizeof *to, DEVICE_COPY_WITHIN), what);
    }
}

static size_t owned_by(const Bucket *bucket, uint32_t d)
{
    return bucket->first[d + 1] - bucket->first[d];
}

/* ---- gradients to their owners ---- */

static const char REDUCE[] = "folding gradients";

/* `shift`: from the arena to what is exchanged of it. */
static void reduce_whole(DeviceExchange *x, const Bucket *bucket, size_t shift)
{
    float *arena = x->root->floats + shift;
    for (uint32_t d = 0; d < x->dp; d++) {
        copy(x, x->aside, x->parts + d * x->most_owned, arena + bucket->first[d],
             owned_by(bucket, d), REDUCE);
    }
    device_work_reduce_scatter(x->o.work, x->o.team, x->aside, x->parts, x->most_owned, REDUCE);
    copy(x, x->aside, arena + bucket->first[x->replica], x->parts + x->replica * x->most_owned,
         owned_by(bucket, x->replica), REDUCE);
}

static void reduce_exact(DeviceExchange *x, const Bucket *bucket, size_t shift)
{
    const size_t first = bucket->first[0] + shift, length = bucket->first[x->dp] - bucket->first[0];
    float *gathered = x->parts + x->tree.most * x->most_bucket;
    for (uint32_t i = 0; i < x->n; i++) {
        copy(x, x->aside, x->parts + i * length, x->subtrees[i]->floats + first, length, REDUCE);
    }
    device_work_all_gather(x->o.work, x->o.team, x->aside, x->parts, gathered,
                           x->tree.most * length * sizeof(float), REDUCE);
    device_work_fold(x->o.work, x->o.team, x->aside, &x->tree, gathered, length,
                     x->root->floats + first, REDUCE);
}

/* The rank's own sum of a stretch, where the order is free: on the work's stream. */
static void sum_own(DeviceExchange *x, const Bucket *bucket, size_t shift)
{
    DeviceWork *w = x->o.work;
    const size_t first = bucket->first[0] + shift, length = bucket->first[x->dp] - bucket->first[0];
    for (uint32_t i = 1; i < x->n; i++) {
        device_work_note(
            w,
            w->ops->add(w->stream, x->root->floats + first, x->subtrees[i]->floats + first, length),
            REDUCE);
    }
}

/* What comes next on stream `later` does so when all is done that is on stream `first` by now. */
static void order(DeviceExchange *x, DeviceEvent *event, DeviceStream *first, DeviceStream *later)
{
    DeviceWork *w = x->o.work;
    device_work_note(w, w->device->api->event_record(event, first), REDUCE);
    device_work_note(w, w->device->api->event_before(event, later), REDUCE);
}

static void reduce_bucket(DeviceExchange *x, const Bucket *bucket, size_t shift)
{
    if (!x->o.exact) {
        sum_own(x, bucket, shift);
    }
    order(x, x->ready, x->o.work->stream, x->aside);
    if (x->o.exact) {
        reduce_exact(x, bucket, shift);
    } else {
        reduce_whole(x, bucket, shift);
    }
}

void device_exchange_begin(DeviceExchange *x, Parameters *const *subtrees, uint32_t n,
                           Parameters *root)
{
    for (uint32_t i = 0; i < n; i++) {
        x->subtrees[i] = subtrees[i];
    }
    x->n = n;
    x->root = root;
    x->next = x->o.reduced->buckets->len;
    x->early = 0;
    x->begun = true;
}

bool device_exchange_has_begun(const DeviceExchange *x)
{
    return x->begun;
}

/* A lookup part is behind the arena and final with its end. */
static void exchange_from(DeviceExchange *x, size_t from, bool ends)
{
    const GArray *buckets = x->o.reduced->buckets;
    const size_t embedding = g_array_index(buckets, Bucket, 0).first[0];
    while (x->next > 0) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, x->next - 1);
        const bool has_lookup = x->root->lookup != NULL && bucket->is_embedding;
        if (bucket->first[0] < from || (has_lookup && !ends)) {
            return;
        }
        x->next--;
        reduce_bucket(x, bucket, 0);
        if (has_lookup) {
            reduce_bucket(x, bucket, (size_t)(x->root->lookup - x->root->floats) - embedding);
        }
    }
}

void device_exchange_final(DeviceExchange *x, size_t from)
{
    exchange_from(x, from, false);
    x->early = x->o.reduced->buckets->len - x->next;
}

void device_exchange_finish(DeviceExchange *x)
{
    exchange_from(x, 0, true);
    order(x, x->done, x->aside, x->o.work->stream);
    x->begun = false;
}

uint32_t device_exchange_early(const DeviceExchange *x)
{
    return x->early;
}

/* ---- what owners have, to everybody ---- */

static const char SHARE[] = "sharing what the owners updated";

void device_exchange_share(DeviceExchange *x, Parameters *set)
{
    DeviceWork *w = x->o.work;
    const GArray *buckets = x->o.reduced->buckets;
    for (uint32_t b = 0; b < buckets->len; b++) {
        const Bucket *bucket = &g_array_index(buckets, Bucket, b);
        float *mine = x->parts + x->replica * x->most_owned;
        copy(x, w->stream, mine, set->floats + bucket->first[x->replica],
             owned_by(bucket, x->replica), SHARE);
        device_work_all_gather(w, x->o.team, w->stream, mine, x->parts,
                               x->most_owned * sizeof *mine, SHARE);
        for (uint32_t d = 0; d < x->dp; d++) {
            if (d != x->replica) {
                copy(x, w->stream, set->floats + bucket->first[d], x->parts + d * x->most_owned,
                     owned_by(bucket, d), SHARE);
            }
        }
    }
}

/* ---- vectors of cut matrices ---- */

static const char VECTORS[] = "gradients of biases";

/* Rank r's parts of all such vectors, between the set and pinned memory. */
static void move_vectors(DeviceWork *w, const Parameters *g, uint32_t r, float *packed, bool down)
{
    const Holding *h = g->holding;
    size_t used = 0;
    for (uint32_t i = 0; i < h->spec->n_tensors; i++) {
        uint32_t first, last;
        if (!exchange_has_vector(h, i, r, &first, &last)) {
            continue;
        }
        float *at = g->tensors[i] + first, *to = packed + used;
        device_work_note(w,
                         w->device->api->copy(w->stream, down ? to : at, down ? at : to,
                                              (last - first) * sizeof *at,
                                              down ? DEVICE_COPY_DOWN : DEVICE_COPY_UP),
                         VECTORS);
        used += last - first;
    }
}

size_t device_exchange_vector_bytes(const Holding *h)
{
    size_t n = 0;
    for (uint32_t r = 0; r < h->tp; r++) {
        n += exchange_vector_floats(h, r);
    }
    return MAX(n, 1) * sizeof(float);
}

bool device_exchange_vectors(DeviceWork *work, TrainLinks *links, Parameters *gradients,
                             float *pinned, GError **error)
{
    TrainGroup *g = &links->tensor;
    size_t sizes[PLAN_RANKS_LIMIT];
    float *parts[PLAN_RANKS_LIMIT];
    for (size_t r = 0, at = 0; r < g->n; at += sizes[r++] / sizeof(float)) {
        sizes[r] = exchange_vector_floats(gradients->holding, (uint32_t)r) * sizeof(float);
        parts[r] = pinned + at;
    }
    move_vectors(work, gradients, g->rank, parts[g->rank], true);
    if (!device_work_wait(work, VECTORS)) {
        return rank_work_check(work, links, error);
    }
    const GroupWait wait = group_turn(&g->turns, VECTORS);
    if (!train_links_check(
            links, g,
            group_all_gather(g->turns.group, &wait, parts[g->rank], sizes, (void *const *)parts),
            error)) {
        return false;
    }
    for (uint32_t r = 0; r < g->n; r++) {
        if (r != g->rank) {
            move_vectors(work, gradients, r, parts[r], false);
        }
    }
    return device_work_wait(work, VECTORS) || rank_work_check(work, links, error);
}
