/* What tensor ranks on devices exchange inside a training pass. A team (device_team.h) does it on
 * the stream, without the host: whole sums in class fast, subtrees gathered and folded in class
 * exact, where each value is the one that the host's exchange gives (training_exchange.c). Without
 * a team, what is exchanged goes through pinned memory and the host's exchange itself.
 *
 * After a failure nothing more is exchanged in the pass, which goes on with what is there and is
 * then discarded. */
#include "worker/model/training_device_state.h"

#include "proto/base/error.h"

#include <string.h>

static DeviceTeam *team_of(const Pass *p)
{
    return p->m->o.team;
}

static DeviceWork *work_of(const Pass *p)
{
    return p->m->device->work;
}

/* ---- sizes ---- */

static uint32_t most_of(const Training *t, const Units *units)
{
    uint32_t most = 0;
    for (uint32_t r = 0; r < t->h->tp; r++) {
        most = MAX(most, tree_subtrees(units->n_leaves, units->cuts[r], units->cuts[r + 1]));
    }
    return most;
}

uint32_t training_device_subtrees(const Training *t)
{
    return MAX(MAX(most_of(t, &t->attn_units), most_of(t, &t->ffn_units)),
               t->h->is_last ? most_of(t, &t->chunks) : 0);
}

size_t training_device_gathered_floats(const Training *t)
{
    return t->o.exact ? (size_t)t->h->tp * training_device_subtrees(t) * t->max_rows * t->width : 0;
}

/* A rank's message of statistics: arrays of [rows][most] (most chunks of any rank), then the
 * targets' logits [rows]. */
static uint32_t stats_arrays(const Training *t)
{
    return t->o.smoothing > 0.0f ? 3 : 2;
}

static uint32_t most_chunks(const Training *t)
{
    uint32_t most = 0;
    for (uint32_t r = 0; r < t->h->tp; r++) {
        most = MAX(most, t->h->vocab_cuts[r + 1] - t->h->vocab_cuts[r]);
    }
    return most;
}

static size_t stats_floats(const Training *t, uint32_t rows)
{
    return (size_t)rows * ((size_t)stats_arrays(t) * most_chunks(t) + 1);
}

/* A rank's message of shared KV heads: a slot for each head that it has a part of, in each `most`
 * subtrees, of each [2][rows][head size]: dk, then dv. */
typedef struct SharedLayout {
    uint32_t slots, most;
    size_t vector; /* floats of a subtree */
} SharedLayout;

static uint32_t slot_of(const Training *t, uint32_t r, uint32_t shared)
{
    uint32_t slot = 0;
    for (uint32_t i = 0; i < shared; i++) {
        slot += shared_has_part(&t->shared[i], r);
    }
    return slot;
}

static SharedLayout shared_layout(const Training *t, uint32_t rows)
{
    SharedLayout l = {.vector = 2 * (size_t)rows * t->spec->head_size};
    for (uint32_t r = 0; r < t->h->tp; r++) {
        l.slots = MAX(l.slots, slot_of(t, r, t->n_shared));
        for (uint32_t i = 0; i < t->n_shared; i++) {
            l.most = MAX(l.most, shared_subtrees(t, &t->shared[i], r));
        }
    }
    return l;
}

static size_t shared_floats(const SharedLayout *l)
{
    return l->slots * l->most * l->vector;
}

size_t training_device_exchange_floats(const Training *t)
{
    const SharedLayout shared = shared_layout(t, t->max_rows);
    const size_t messages = 1 + (size_t)t->h->tp, stats = t->h->is_last ? messages : 0;
    return MAX(stats * stats_floats(t, t->max_rows),
               messages * shared_floats(&shared) + (t->n_shared > 0 ? shared.vector : 0));
}

/* ---- without a team: pinned memory ---- */

static float *carve(float *base, size_t *used, size_t n)
{
    float *at = base != NULL ? base + *used : NULL;
    *used += (n + 15) / 16 * 16;
    return at;
}

/* Lays the pinned buffers out in `base`, or with NULL counts them. */
static size_t lay_out_staged(const Training *t, Training *staged, float *base)
{
    const size_t rows = t->max_rows, wide = rows * t->width,
                 chunks = t->h->is_last ? rows * t->spec->n_vocab_chunks : 0,
                 kv = t->n_shared > 0 ? rows * t->kv_width * t->kv_subtrees : 0;
    size_t used = 0;
    staged->partial = carve(base, &used, training_device_subtrees(t) * wide);
    staged->sum = carve(base, &used, wide);
    staged->exchange = carve(base, &used, exchange_floats(t));
    staged->row_max = carve(base, &used, chunks);
    staged->row_sum = carve(base, &used, chunks);
    staged->row_total = carve(base, &used, chunks);
    staged->row_target = carve(base, &used, rows);
    staged->d.dk = carve(base, &used, kv);
    staged->d.dv = carve(base, &used, kv);
    return used;
}

static bool make_staged(Training *t, GError **error)
{
    TrainingDevice *d = t->device;
    Training *staged = d->staged = g_memdup2(t, sizeof *t);
    staged->device = NULL;
    const size_t bytes = lay_out_staged(t, staged, NULL) * sizeof(float);
    d->pinned = device_work_pinned(d->work, bytes, "what tensor ranks exchange", error);
    if (d->pinned != NULL) {
        lay_out_staged(t, staged, d->pinned);
    }
    return d->pinned != NULL;
}

/* ---- making ---- */

static bool make_trees(Training *t, GError **error)
{
    const Units *const units[] = {&t->attn_units, &t->ffn_units, &t->chunks};
    for (size_t i = 0; i < G_N_ELEMENTS(units); i++) {
        if (!device_tree_init_missing(&t->device->trees[i], units[i]->n_leaves, 0, units[i]->cuts,
                                      t->h->tp)) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "%u tensor ranks have more than %u subtrees of a sum: choose a smaller tp",
                        t->h->tp, TREE_LEAVES_LIMIT);
            return false;
        }
        t->device->trees[i].flushes = t->o.precision == PRECISION_BF16;
    }
    return true;
}

bool device_exchange_new(Training *t, GError **error)
{
    if (t->o.team == NULL) {
        return make_staged(t, error);
    }
    return (!t->o.exact || make_trees(t, error)) &&
           (device_team_register(t->o.team, t->arena, t->arena_bytes) ||
            device_work_check(t->o.work, error));
}

void device_exchange_free(TrainingDevice *d)
{
    device_work_unpin(d->work, d->pinned);
    g_free(d->staged);
}

/* ---- helpers ---- */

/* Whether anything may still be exchanged; what was rounded for a product may change. */
static bool talks(Pass *p)
{
    p->m->device->has_rounded = false;
    return p->m->status == GROUP_OK && device_work_well(work_of(p));
}

/* The pass on pinned memory, by the host's exchange. */
static Pass staged_pass(const Pass *p)
{
    Pass q = *p;
    q.m = p->m->device->staged;
    q.m->status = GROUP_OK;
    q.d = &q.m->d;
    return q;
}

static void down(Pass *p, void *to, const void *from, size_t floats, const char *what)
{
    device_copy(p->m->device, to, from, floats * sizeof(float), DEVICE_COPY_DOWN, what);
}

static void up(Pass *p, void *to, const void *from, size_t floats, const char *what)
{
    device_copy(p->m->device, to, from, floats * sizeof(float), DEVICE_COPY_UP, what);
}

/* `rows` runs of n floats, pitches in floats. */
static void copy_rows(Pass *p, float *to, size_t to_ld, const float *from, size_t from_ld, size_t n,
                      uint32_t rows, const char *what)
{
    if (n > 0) {
        device_work_note(work_of(p),
                         work_of(p)->device->api->copy_rows(
                             device_stream(p), to, to_ld * sizeof(float), from,
                             from_ld * sizeof(float), n * sizeof(float), rows, DEVICE_COPY_WITHIN),
                         what);
    }
}

/* ---- partial sums ---- */

static void staged_sum(Pass *p, const Units *units, float *out, const char *operation)
{
    Training *m = p->m;
    const Pass q = staged_pass(p);
    const size_t stride = (size_t)m->max_rows * m->width, n = (size_t)p->rows * m->width;
    const uint32_t subtrees =
        tree_subtrees(units->n_leaves, units->cuts[m->h->rank], units->cuts[m->h->rank + 1]);
    for (uint32_t k = 0; k < subtrees; k++) {
        down(p, q.m->partial + k * stride, m->partial + k * stride, n, operation);
    }
    if (device_work_wait(work_of(p), operation)) {
        exchange_sum(&q, units, q.m->partial, operation);
        m->status = q.m->status;
        up(p, out, q.m->partial, n, operation);
    }
}

static const DeviceTree *tree_of(const Training *m, const Units *units)
{
    return &m->device->trees[units == &m->attn_units ? 0 : units == &m->ffn_units ? 1 : 2];
}

void training_device_sum(Pass *p, const Units *units, float *out, const char *operation)
{
    const Training *m = p->m;
    DeviceWork *w = work_of(p);
    const size_t n = (size_t)p->rows * m->width;
    if (!talks(p)) {
        return;
    }
    if (team_of(p) == NULL) {
        staged_sum(p, units, out, operation);
    } else if (m->o.exact) {
        const DeviceTree *tree = tree_of(m, units);
        device_work_all_gather(w, team_of(p), device_stream(p), m->partial, m->gathered,
                               tree->most * n * sizeof *out, operation);
        device_work_fold(w, team_of(p), device_stream(p), tree, m->gathered, n, out, operation);
    } else {
        if (units->n == 0) { /* of the vocabulary this rank may have nothing */
            device_work_note(w, w->device->api->fill(w->stream, out, 0, n * sizeof *out),
                             operation);
        }
        device_work_all_reduce(w, team_of(p), out, n, operation);
    }
}

/* ---- the embedding ---- */

static const char EMBEDDING[] = "gather of the embedding";

void device_exchange_numbers(const Pass *p, Numbers *host)
{
    const Training *m = p->m;
    const Holding *h = m->h;
    const size_t message = stats_floats(m, p->rows),
                 targets = (size_t)stats_arrays(m) * most_chunks(m) * p->rows;
    for (uint32_t r = 0; r < p->rows; r++) {
        if (p->is_first) {
            host->owners[r] = exchange_owner(h, p->batch->tokens[r]) * p->rows + r;
        }
        if (p->is_last) {
            const uint32_t target = p->batch->targets[r];
            host->target_places[r] =
                target == TARGET_NONE
                    ? UINT32_MAX
                    : (uint32_t)(exchange_owner(h, target) * message + targets + r);
        }
    }
}

static void staged_embedding(Pass *p, float *x)
{
    Pass q = staged_pass(p);
    const size_t n = (size_t)p->rows * p->m->width;
    down(p, q.m->sum, x, n, EMBEDDING);
    if (device_work_wait(work_of(p), EMBEDDING)) {
        exchange_embedding(&q, q.m->sum, q.m->sum);
        p->m->status = q.m->status;
        up(p, x, q.m->sum, n, EMBEDDING);
    }
}

void device_exchange_embedding(Pass *p, float *x)
{
    const Training *m = p->m;
    DeviceWork *w = work_of(p);
    const size_t n = (size_t)p->rows * m->width;
    if (!talks(p)) {
        return;
    }
    if (team_of(p) == NULL) {
        staged_embedding(p, x);
    } else if (!m->o.exact) {
        device_work_all_reduce(w, team_of(p), x, n, EMBEDDING); /* all others have zeros */
    } else if (device_work_all_gather(w, team_of(p), device_stream(p), x, m->gathered,
                                      n * sizeof *x, EMBEDDING)) {
        const DeviceGather args = {.table = m->gathered,
                                   .index = m->device->up.owners,
                                   .n = m->h->tp * p->rows,
                                   .rows = p->rows,
                                   .width = m->width,
                                   .out = x};
        device_did(p, device_ops(p)->gather(device_stream(p), &args), EMBEDDING);
    }
}

/* ---- (m, l) of the logits ---- */

static const char STATS[] = "maxima and sums of logits";

static void staged_row_stats(Pass *p)
{
    const Training *m = p->m;
    Pass q = staged_pass(p);
    const size_t n = (size_t)p->rows * m->spec->n_vocab_chunks;
    const struct {
        float *device, *host;
        size_t n;
    } arrays[] = {{m->row_max, q.m->row_max, n},
                  {m->row_sum, q.m->row_sum, n},
                  {m->row_total, q.m->row_total, m->o.smoothing > 0.0f ? n : 0},
                  {m->row_target, q.m->row_target, p->rows}};
    for (size_t i = 0; i < G_N_ELEMENTS(arrays); i++) {
        down(p, arrays[i].host, arrays[i].device, arrays[i].n, STATS);
    }
    if (!device_work_wait(work_of(p), STATS)) {
        return;
    }
    exchange_row_stats(&q);
    p->m->status = q.m->status;
    for (size_t i = 0; i < G_N_ELEMENTS(arrays); i++) {
        up(p, arrays[i].device, arrays[i].host, arrays[i].n, STATS);
    }
}

/* Rank r's chunks between the arrays and a message. */
static void move_stats(Pass *p, uint32_t r, float *message, bool pack)
{
    const Training *m = p->m;
    const uint32_t *cuts = m->h->vocab_cuts, most = most_chunks(m), all = m->spec->n_vocab_chunks;
    float *const arrays[] = {m->row_max, m->row_sum, m->row_total};
    for (uint32_t i = 0; i < stats_arrays(m); i++) {
        float *packed = message + (size_t)i * p->rows * most, *at = arrays[i] + cuts[r];
        copy_rows(p, pack ? packed : at, pack ? most : all, pack ? at : packed, pack ? all : most,
                  cuts[r + 1] - cuts[r], p->rows, STATS);
    }
}

void device_exchange_row_stats(Pass *p)
{
    const Training *m = p->m;
    const size_t message = stats_floats(m, p->rows);
    float *mine = m->exchange, *all = m->exchange + message;
    if (!talks(p)) {
        return;
    }
    if (team_of(p) == NULL) {
        staged_row_stats(p);
        return;
    }
    move_stats(p, m->h->rank, mine, true);
    copy_rows(p, mine + message - p->rows, p->rows, m->row_target, p->rows, p->rows, 1, STATS);
    if (!device_work_all_gather(work_of(p), team_of(p), device_stream(p), mine, all,
                                message * sizeof *all, STATS)) {
        return;
    }
    for (uint32_t r = 0; r < m->h->tp; r++) {
        if (r != m->h->rank) {
            move_stats(p, r, all + r * message, false);
        }
    }
    const DeviceGather targets = {.table = all,
                                  .index = m->device->up.target_places,
                                  .n = (uint32_t)(m->h->tp * message),
                                  .rows = p->rows,
                                  .width = 1,
                                  .out = m->row_target};
    device_did(p, device_ops(p)->gather(device_stream(p), &targets), STATS);
}

/* ---- KV heads whose query heads are on several ranks ---- */

static const char SHARED[] = "gradients of shared KV heads";

static void staged_shared_heads(Pass *p)
{
    const Training *m = p->m;
    Pass q = staged_pass(p);
    const size_t n = (size_t)m->max_rows * m->kv_width * m->kv_subtrees;
    down(p, q.d->dk, p->d->dk, n, SHARED);
    down(p, q.d->dv, p->d->dv, n, SHARED);
    if (device_work_wait(work_of(p), SHARED)) {
        exchange_shared_heads(&q);
        p->m->status = q.m->status;
        up(p, p->d->dk, q.d->dk, n, SHARED);
        up(p, p->d->dv, q.d->dv, n, SHARED);
    }
}

/* One subtree of a shared head between dk, dv and a vector. */
static void move_head(Pass *p, const SharedHead *s, uint32_t subtree, float *vector, bool pack)
{
    const Training *m = p->m;
    const uint32_t hd = m->spec->head_size;
    const size_t at =
        subtree * (size_t)m->max_rows * m->kv_width + (size_t)(s->kv - m->h->kv_first) * hd;
    float *const parts[] = {p->d->dk + at, p->d->dv + at};
    for (size_t i = 0; i < G_N_ELEMENTS(parts); i++) {
        float *packed = vector + i * p->rows * hd;
        copy_rows(p, pack ? packed : parts[i], pack ? hd : m->kv_width, pack ? parts[i] : packed,
                  pack ? m->kv_width : hd, hd, p->rows, SHARED);
    }
}

/* The tree over a head's query heads, operands by their places in what was gathered. */
static DeviceTree head_tree(const Training *m, uint32_t shared, const SharedLayout *l)
{
    const SharedHead *s = &m->shared[shared];
    DeviceTree tree;
    device_tree_init(&tree, m->spec->n_heads / m->spec->n_kv_heads, s->cuts, m->h->tp);
    for (uint32_t i = 0; i < tree.n_operands; i++) {
        const uint32_t r = tree.operand[i] / tree.most, k = tree.operand[i] % tree.most;
        tree.operand[i] = (uint16_t)((r * l->slots + slot_of(m, r, shared)) * l->most + k);
    }
    return tree;
}

void device_exchange_shared_heads(Pass *p)
{
    const Training *m = p->m;
    const uint32_t rank = m->h->rank;
    const SharedLayout l = shared_layout(m, p->rows);
    const size_t message = shared_floats(&l);
    float *mine = m->exchange, *all = mine + message, *sum = all + m->h->tp * message;
    if (!talks(p)) {
        return;
    }
    if (team_of(p) == NULL) {
        staged_shared_heads(p);
        return;
    }
    for (uint32_t i = 0; i < m->n_shared; i++) {
        const uint32_t n = shared_subtrees(m, &m->shared[i], rank);
        for (uint32_t k = 0; k < n; k++) {
            move_head(p, &m->shared[i], k,
                      mine + (slot_of(m, rank, i) * (size_t)l.most + k) * l.vector, true);
        }
    }
    device_work_all_gather(work_of(p), team_of(p), device_stream(p), mine, all,
                           message * sizeof *all, SHARED);
    for (uint32_t i = 0; i < m->n_shared; i++) {
        if (shared_has_part(&m->shared[i], rank)) {
            const DeviceTree tree = head_tree(m, i, &l);
            device_work_fold(work_of(p), team_of(p), device_stream(p), &tree, all, l.vector, sum,
                             SHARED);
            move_head(p, &m->shared[i], 0, sum, false);
        }
    }
}
