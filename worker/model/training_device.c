/* The device's fill of a training pass. Thread 0 enqueues op after op on one stream; what a batch
 * says (ids, positions, documents) goes up as one block before each pass, its only copy besides
 * other stages' activations. The host waits where it must know: losses, a chunk's output and the
 * gradient of its input. */
#include "worker/model/training_device_state.h"

#include "proto/base/checked.h"

#include <string.h>

/* ---- sizes ---- */

static uint32_t most_documents(const Training *t)
{
    return t->o.documents ? t->max_rows : t->o.max_sequences;
}

static void *take(uint8_t *base, size_t *at, size_t bytes)
{
    void *place = base != NULL ? base + *at : NULL;
    *at += (bytes + 255) & ~(size_t)255;
    return place;
}

/* The numbers from base on, or with NULL only their size. */
static size_t place_numbers(const Training *t, uint8_t *base, Numbers *n)
{
    const size_t rows = t->max_rows, documents = most_documents(t),
                 pages_ld = (t->o.length + KV_BLOCK - 1) / KV_BLOCK;
    uint32_t **const arrays[] = {&n->tokens,   &n->targets,      &n->learnt,       &n->positions,
                                 &n->places,   &n->documents,    &n->ids,          &n->id_starts,
                                 &n->id_order, &n->place_ids,    &n->place_starts, &n->place_order,
                                 &n->owners,   &n->target_places};
    size_t at = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(arrays); i++) {
        *arrays[i] = take(base, &at, (rows + 1) * sizeof(uint32_t));
    }
    n->segments = take(base, &at, documents * sizeof(DeviceSegment));
    n->pages = take(base, &at, documents * pages_ld * sizeof(uint32_t));
    return at;
}

static Dtype operands_of(const Training *t)
{
    return precision_dtype(t->o.precision);
}

/* Of one own KV head. */
static uint32_t most_query_heads(const Training *t)
{
    uint32_t most = 0, n;
    for (uint32_t kv = 0; kv < t->h->n_kv_heads; kv++) {
        (void)training_query_heads(t, kv, &n);
        most = MAX(most, n);
    }
    return most;
}

static DeviceTrainLimits limits_of(const Training *t)
{
    const size_t rows = t->max_rows, width = t->width,
                 wide = MAX(MAX(t->q_width + 2 * t->kv_width, 2 * t->ffn_width),
                            MAX(t->h->is_last ? t->vocab : 0, t->width));
    return (DeviceTrainLimits){.operands = operands_of(t),
                               .exact = t->o.exact,
                               .operand_elements = MAX(wide * MAX(rows, width), rows * width),
                               .longest_side = (uint32_t)MAX(rows, wide),
                               .max_segments =
                                   MAX(MAX(3 * TREE_LEAVES_LIMIT, t->chunks.n), t->o.max_sequences),
                               .max_rows = t->max_rows,
                               .max_documents = most_documents(t),
                               .longest_document = t->o.length,
                               .n_heads = t->h->n_kv_heads * most_query_heads(t),
                               .n_kv_heads = t->h->n_kv_heads,
                               .head_size = t->spec->head_size};
}

size_t training_device_bytes(const Training *t, const DeviceTrainOps *ops)
{
    Numbers none;
    const DeviceTrainLimits limits = limits_of(t);
    return place_numbers(t, NULL, &none) + ops->workspace_bytes(&limits) +
           3 * (size_t)t->max_rows * sizeof(float);
}

/* ---- making ---- */

static bool allocate(Training *t, TrainingDevice *d, GError **error)
{
    const size_t wide = (size_t)t->max_rows * t->width * sizeof(float),
                 rows = t->max_rows * sizeof(float), numbers = place_numbers(t, NULL, &d->up);
    const DeviceTrainLimits limits = limits_of(t);
    const struct {
        void **to;
        size_t bytes;
        const char *what;
        bool pinned;
    } wanted[] = {
        {(void **)&d->numbers, numbers, "a micro-batch's numbers", false},
        {(void **)&d->host_numbers, numbers, "a micro-batch's numbers", true},
        {&d->workspace, d->workspace_bytes = d->work->ops->workspace_bytes(&limits),
         "the workspace of training", false},
        {(void **)&d->row_max, rows, "losses", false},
        {(void **)&d->row_sum, rows, "losses", false},
        {(void **)&d->losses, rows, "losses", false},
        {(void **)&d->host_losses, rows, "losses", true},
        {(void **)&d->host_x, wide, "activations of other stages", true},
        {(void **)&d->host_y, wide, "activations for other stages", true},
        {(void **)&d->host_dx, wide, "gradients of other stages", true},
        {(void **)&d->host_logits, MAX(t->h->is_last ? t->vocab : 0, 1) * sizeof(float),
         "a row of logits", true},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(wanted); i++) {
        *wanted[i].to = (wanted[i].pinned ? device_work_pinned : device_work_alloc)(
            d->work, wanted[i].bytes, wanted[i].what, error);
        if (*wanted[i].to == NULL) {
            return false;
        }
    }
    place_numbers(t, d->numbers, &d->up);
    place_numbers(t, d->host_numbers, &d->host);
    d->counts = weft_alloc(MAX(t->vocab, t->o.length), sizeof *d->counts, "an order", error);
    return d->counts != NULL &&
           device_check(d->work->device,
                        d->work->device->api->event_new(d->work->device->handle, &d->read),
                        "an event", error);
}

bool training_device_new(Training *t, GError **error)
{
    TrainingDevice *d = g_new0(TrainingDevice, 1);
    d->work = t->o.work;
    d->max_documents = most_documents(t);
    d->pages_ld = (t->o.length + KV_BLOCK - 1) / KV_BLOCK;
    d->n_pages = device_train_pages(t->max_rows, t->o.length);
    d->parts = g_array_new(FALSE, FALSE, sizeof(Part));
    t->device = d;
    return allocate(t, d, error) && (t->h->tp == 1 || device_exchange_new(t, error));
}

void training_device_free(TrainingDevice *d)
{
    if (d == NULL) {
        return;
    }
    void *const on_device[] = {d->numbers, d->workspace, d->row_max, d->row_sum, d->losses};
    void *const pinned[] = {d->host_numbers, d->host_losses, d->host_x,
                            d->host_y,       d->host_dx,     d->host_logits};
    for (size_t i = 0; i < G_N_ELEMENTS(on_device); i++) {
        device_work_release(d->work, on_device[i]);
    }
    for (size_t i = 0; i < G_N_ELEMENTS(pinned); i++) {
        device_work_unpin(d->work, pinned[i]);
    }
    if (d->read != NULL) {
        d->work->device->api->event_free(d->read);
    }
    device_exchange_free(d);
    weft_free(d->counts);
    g_array_unref(d->parts);
    g_free(d);
}

void training_device_tables(Training *t, const float *cos, const float *sin, size_t n)
{
    device_work_up(t->o.work, t->cos, cos, n * sizeof *cos);
    device_work_up(t->o.work, t->sin, sin, n * sizeof *sin);
}

/* ---- the numbers of a batch ---- */

/* Rows by key, each key's in order: distinct keys, where each one's rows begin, and the rows. Keys
 * below `n_keys` from `first` on; others are left out. Returns how many there are. */
static uint32_t order_rows(TrainingDevice *d, uint32_t rows, const uint32_t *keys, uint32_t first,
                           uint32_t n_keys, uint32_t *ids, uint32_t *starts, uint32_t *order)
{
    uint32_t n = 0, at = 0;
    for (uint32_t r = 0; r < rows; r++) {
        const uint32_t key = keys[r] - first; /* what is below is large */
        if (key < n_keys && d->counts[key]++ == 0) {
            ids[n++] = key;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t count = d->counts[ids[i]];
        starts[i] = at;
        d->counts[ids[i]] = at;
        at += count;
    }
    starts[n] = at;
    for (uint32_t r = 0; r < rows; r++) {
        const uint32_t key = keys[r] - first;
        if (key < n_keys) {
            order[d->counts[key]++] = r;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        d->counts[ids[i]] = 0;
    }
    return n;
}

/* One document more: its rows, its pages, and the part that it is in. */
static void add_document(TrainingDevice *d, Document document, uint32_t *n_pages)
{
    const uint32_t wanted = (document.length + KV_BLOCK - 1) / KV_BLOCK, index = d->n_documents++;
    if (d->parts->len == 0 || *n_pages + wanted > d->n_pages) {
        const Part part = {.first_document = index, .first_row = (uint32_t)document.row};
        g_array_append_val(d->parts, part);
        *n_pages = 0;
    }
    Part *part = &g_array_index(d->parts, Part, d->parts->len - 1);
    part->n_documents++;
    part->n_rows += document.length;
    part->longest = MAX(part->longest, document.length);
    d->longest = MAX(d->longest, document.length);
    d->host.segments[index] = (DeviceSegment){(uint32_t)document.row, document.length, 0, index};
    for (uint32_t b = 0; b < wanted; b++) {
        d->host.pages[(size_t)index * d->pages_ld + b] = (*n_pages)++;
    }
    for (uint32_t i = 0; i < document.length; i++) {
        d->host.places[document.row + i] = i;
        d->host.documents[document.row + i] = index;
    }
}

static void add_documents(const Pass *p, TrainingDevice *d)
{
    uint32_t n_pages = 0;
    g_array_set_size(d->parts, 0);
    d->n_documents = d->longest = 0;
    for (uint32_t s = 0; s < p->batch->n_sequences; s++) {
        for (uint32_t first = 0; first < p->batch->length;) {
            const Document document = pass_document_at(p->batch, s, first);
            add_document(d, document, &n_pages);
            first += document.length;
        }
    }
}

void training_device_begin(Pass *p, bool scatter)
{
    const Training *m = p->m;
    TrainingDevice *d = m->device;
    DeviceWork *w = d->work;
    const DeviceApi *api = w->device->api;
    d->has_rounded = false;
    if (!device_work_await(w, d->read, "a micro-batch's numbers")) {
        return;
    }
    for (uint32_t r = 0; r < p->rows; r++) {
        d->host.positions[r] = position_of(p, r);
        if (p->is_first) {
            d->host.tokens[r] = p->batch->tokens[r];
        }
        if (p->is_last) {
            d->host.targets[r] = pass_own_target(p, r);
            d->host.learnt[r] = p->batch->targets[r] != TARGET_NONE;
        }
    }
    add_documents(p, d);
    if (m->h->tp > 1) {
        device_exchange_numbers(p, &d->host);
    }
    if (scatter) {
        d->n_ids = order_rows(d, p->rows, d->host.tokens, m->h->vocab_first, m->h->vocab,
                              d->host.ids, d->host.id_starts, d->host.id_order);
        d->n_places = order_rows(d, p->rows, d->host.positions, 0, m->o.length, d->host.place_ids,
                                 d->host.place_starts, d->host.place_order);
    }
    Numbers none;
    device_work_note(w,
                     api->copy(w->stream, d->numbers, d->host_numbers,
                               place_numbers(m, NULL, &none), DEVICE_COPY_UP),
                     "a micro-batch's numbers");
    device_work_note(w, api->event_record(d->read, w->stream), "a micro-batch's numbers");
}

/* ---- other stages, and the caller ---- */

static size_t stream_bytes(const Pass *p)
{
    return (size_t)p->rows * p->m->width * sizeof(float);
}

float *training_device_input(Training *t)
{
    device_work_wait(t->device->work, "a pass that reads its input");
    return t->device->host_x;
}

float *training_device_gradient(Training *t)
{
    device_work_wait(t->device->work, "a backward pass");
    return t->device->host_dx;
}

void training_device_take_input(Pass *p)
{
    device_copy(p->m->device, p->slot->tape[0].x, p->m->device->host_x, stream_bytes(p),
                DEVICE_COPY_UP, "activations of the stage before");
}

void training_device_take_gradient(Pass *p)
{
    device_copy(p->m->device, p->m->dx, p->m->device->host_dx, stream_bytes(p), DEVICE_COPY_UP,
                "gradients of the next stage");
}

void training_device_give_gradient(Pass *p)
{
    device_copy(p->m->device, p->m->device->host_dx, p->m->dx, stream_bytes(p), DEVICE_COPY_DOWN,
                "gradients for the stage before");
}

const float *training_device_output(Training *t, uint32_t slot)
{
    TrainingDevice *d = t->device;
    device_copy(d, d->host_y, t->slots[slot].x, (size_t)t->max_rows * t->width * sizeof(float),
                DEVICE_COPY_DOWN, "activations for the next stage");
    device_work_wait(d->work, "a forward pass");
    return d->host_y;
}

const float *training_device_logits(Training *t, uint32_t row)
{
    TrainingDevice *d = t->device;
    device_copy(d, d->host_logits, t->logits + row * t->logits_ld, t->vocab * sizeof(float),
                DEVICE_COPY_DOWN, "a row of logits");
    device_work_wait(d->work, "a row of logits");
    return d->host_logits;
}

/* ---- ops ---- */

static bool same_operand(const Rounded *a, const Rounded *b)
{
    return a->x == b->x && a->outer == b->outer && a->step == b->step && a->n == b->n &&
           a->length == b->length;
}

/* Between two products of one segment each nothing writes what they read. */
static void device_multiply(Pass *p, GemmArgs *args)
{
    TrainingDevice *d = p->m->device;
    const GemmSegment *s = args->segments;
    const bool single = args->n_segments == 1;
    const Rounded a = {s->a, s->a_row, s->a_step, args->m, s->length},
                  b = {s->b, s->b_column, s->b_step, args->n, s->length};
    const DeviceProduct product = {.operands = operands_of(p->m),
                                   .exact = p->m->o.exact,
                                   .m = args->m,
                                   .n = args->n,
                                   .segments = args->segments,
                                   .n_segments = args->n_segments,
                                   .accumulate = args->accumulate,
                                   .c = args->c,
                                   .ld = args->ld,
                                   .subtree_stride = args->subtree_stride,
                                   .same_a = single && d->has_rounded && same_operand(&a, &d->a),
                                   .same_b = single && d->has_rounded && same_operand(&b, &d->b),
                                   .workspace = d->workspace,
                                   .workspace_bytes = d->workspace_bytes};
    device_did(p, device_ops(p)->product(device_stream(p), &product), "a product");
    d->has_rounded = single;
    d->a = a;
    d->b = b;
}

static void device_bias(Pass *p, float *y, const float *bias, uint32_t n)
{
    if (bias != NULL) {
        device_did(p, device_ops(p)->bias(device_stream(p), y, bias, p->rows, n), "a bias");
    }
}

static DeviceDropout dropout_of(const Pass *p, uint32_t site, const float *x, float *out)
{
    return (DeviceDropout){.dropout = p->batch->dropout,
                           .site = site,
                           .first_sample = p->batch->first_sample,
                           .length = p->batch->length,
                           .rows = p->rows,
                           .width = p->m->width,
                           .x = x,
                           .out = out};
}

static void device_residual(Pass *p, const float *x, const float *bias, uint32_t site, float *out)
{
    DeviceDropout args = dropout_of(p, site, p->m->sum, out);
    args.bias = bias;
    args.residual = x;
    device_did(p, device_ops(p)->dropout(device_stream(p), &args), "a residual");
}

static void device_dropout(Pass *p, uint32_t site, const float *x, float *out)
{
    const DeviceDropout args = dropout_of(p, site, x, out);
    device_did(p, device_ops(p)->dropout(device_stream(p), &args), "dropout");
}

static void device_norm(Pass *p, const float *x, const float *w, const float *bias, float *out)
{
    const DeviceTrainNorm args = {x, w, bias, p->m->spec->norm_eps, p->rows, p->m->width, out};
    device_did(p, device_ops(p)->norm(device_stream(p), &args), "a norm");
}

static void device_rope(Pass *p, float *q, float *k, bool back)
{
    const Training *m = p->m;
    DeviceTurn args = {.x = q,
                       .positions = m->device->up.positions,
                       .rows = p->rows,
                       .n_heads = m->h->n_heads,
                       .head_size = m->spec->head_size,
                       .dims = m->spec->rope.dims,
                       .pairing = m->spec->rope.pairing,
                       .cos = m->cos,
                       .sin = m->sin,
                       .inverse = back};
    device_did(p, device_ops(p)->turn(device_stream(p), &args), "rotary positions");
    args.x = k;
    args.n_heads = m->h->n_kv_heads;
    device_did(p, device_ops(p)->turn(device_stream(p), &args), "rotary positions");
}

static void device_gelu(Pass *p, const float *x, uint32_t n, float *out)
{
    device_did(p, device_ops(p)->gelu(device_stream(p), x, (size_t)p->rows * n, out),
               "an activation");
}

static void device_gelu_backward(Pass *p, const float *x, uint32_t n, float *dx)
{
    device_did(p, device_ops(p)->gelu_backward(device_stream(p), x, dx, (size_t)p->rows * n, dx),
               "an activation");
}

static void device_swiglu(Pass *p, const float *gate, const float *up, uint32_t n, float *out)
{
    device_did(p, device_ops(p)->swiglu(device_stream(p), gate, up, (size_t)p->rows * n, out),
               "an activation");
}

static void device_swiglu_backward(Pass *p, float *gate, float *up, uint32_t n, const float *dy)
{
    device_did(p,
               device_ops(p)->swiglu_backward(device_stream(p), gate, up, dy, (size_t)p->rows * n,
                                              gate, up),
               "an activation");
}

/* Own KV heads behind each other that have equally many own query heads: all of theirs, but for the
 * first and the last of a tensor rank. */
typedef struct HeadRun {
    uint32_t kv, n_kv, n_q;
    size_t q; /* the first query head's place among the own */
} HeadRun;

static HeadRun head_run(const Training *m, uint32_t kv)
{
    HeadRun run = {.kv = kv, .n_kv = 1};
    uint32_t n;
    run.q = training_query_heads(m, kv, &run.n_q);
    while (kv + run.n_kv < m->h->n_kv_heads &&
           (training_query_heads(m, kv + run.n_kv, &n), n == run.n_q)) {
        run.n_kv++;
    }
    return run;
}

/* The batch's documents. */
static DeviceTrainAttention attention_of(const Pass *p, const Tape *tape, const DeviceRows *rows,
                                         const HeadRun *run)
{
    const Training *m = p->m;
    const size_t q = run->q * m->spec->head_size, kv = (size_t)run->kv * m->spec->head_size;
    return (DeviceTrainAttention){.operands = m->o.exact ? DTYPE_F32 : operands_of(m),
                                  .q = tape->q + q,
                                  .k = tape->k + kv,
                                  .v = tape->v + kv,
                                  .q_ld = m->q_width,
                                  .kv_ld = m->kv_width,
                                  .n_kv_heads = run->n_kv,
                                  .n_q = run->n_q,
                                  .head_size = m->spec->head_size,
                                  .scale = m->spec->attention_scale,
                                  .rows = rows,
                                  .n_pages = m->device->n_pages,
                                  .out = tape->attn + q,
                                  .steps = m->head_steps[run->kv],
                                  .workspace = m->device->workspace,
                                  .workspace_bytes = m->device->workspace_bytes};
}

static void attend_part(Pass *p, Tape *tape, const Part *part)
{
    const TrainingDevice *d = p->m->device;
    const DeviceRows rows = {.n_rows = part->n_rows,
                             .n_segments = part->n_documents,
                             .longest_segment = part->longest,
                             .max_keys = part->longest,
                             .positions = d->up.places,
                             .tables = d->up.documents,
                             .segments = d->up.segments + part->first_document,
                             .pages = d->up.pages,
                             .pages_ld = d->pages_ld};
    for (uint32_t kv = 0; kv < p->m->h->n_kv_heads;) {
        const HeadRun run = head_run(p->m, kv);
        DeviceTrainAttention args = attention_of(p, tape, &rows, &run);
        args.first_row = part->first_row;
        device_did(p, device_ops(p)->attention(device_stream(p), &args), "attention");
        kv += run.n_kv;
    }
}

static void device_attention(Pass *p, Tape *tape)
{
    const TrainingDevice *d = p->m->device;
    for (guint i = 0; i < d->parts->len; i++) {
        attend_part(p, tape, &g_array_index(d->parts, Part, i));
    }
}

static void device_attention_backward(Pass *p, const Tape *tape)
{
    const Training *m = p->m;
    const TrainingDevice *d = m->device;
    const DeviceRows rows = {.n_rows = p->rows,
                             .n_segments = d->n_documents,
                             .longest_segment = d->longest,
                             .max_keys = d->longest,
                             .segments = d->up.segments};
    for (uint32_t kv = 0; kv < m->h->n_kv_heads;) {
        const HeadRun run = head_run(m, kv);
        const size_t at = (size_t)kv * m->spec->head_size;
        DeviceTrainAttention args = attention_of(p, tape, &rows, &run);
        args.dout = args.dq = p->d->dq + run.q * m->spec->head_size;
        args.dk = p->d->dk + at;
        args.dv = p->d->dv + at;
        args.subtree_stride = (size_t)m->max_rows * m->kv_width;
        device_did(p, device_ops(p)->attention_backward(device_stream(p), &args),
                   "attention's gradient");
        kv += run.n_kv;
    }
    meet(p);
    if (m->n_shared > 0) {
        device_exchange_shared_heads(p);
    }
}

static void device_bias_gradient(Pass *p, const float *dy, uint32_t n, float *dbias)
{
    if (dbias != NULL) {
        device_did(p, device_ops(p)->sum_rows(device_stream(p), dy, p->rows, n, dbias),
                   "a bias's gradient");
    }
}

static void device_norm_backward(Pass *p, const float *x, const float *w, float *dw, float *dbias)
{
    const Training *m = p->m;
    const DeviceNormBackward args = {.x = x,
                                     .weight = w,
                                     .dy = m->dh,
                                     .eps = m->spec->norm_eps,
                                     .rows = p->rows,
                                     .n = m->width,
                                     .dx = m->dx,
                                     .dweight = dw,
                                     .dbias = dbias,
                                     .stats = m->stats};
    device_did(p, device_ops(p)->norm_backward(device_stream(p), &args), "a norm's gradient");
}

static void device_embed(Pass *p, float *x)
{
    const Training *m = p->m;
    const float *positions = weight(p, ROLE_POSITION_EMBD, -1);
    DeviceGather args = {.table = weight(p, ROLE_TOKEN_EMBD, -1),
                         .index = m->device->up.tokens,
                         .first = m->h->vocab_first,
                         .n = m->h->vocab,
                         .rows = p->rows,
                         .width = m->width,
                         .out = x};
    device_did(p, device_ops(p)->gather(device_stream(p), &args), "the embedding");
    if (m->h->tp > 1) {
        device_exchange_embedding(p, x);
    }
    if (positions != NULL) {
        args.table = positions;
        args.index = m->device->up.positions;
        args.first = 0;
        args.n = m->o.length;
        args.accumulate = true;
        device_did(p, device_ops(p)->gather(device_stream(p), &args), "learnt positions");
    }
    if (p->batch->dropout.rate > 0.0f) {
        device_dropout(p, DROPOUT_SITE_EMBEDDING, x, x);
    }
}

static void device_embed_backward(Pass *p, const float *dy)
{
    const TrainingDevice *d = p->m->device;
    float *positions = gradient(p, ROLE_POSITION_EMBD, -1);
    DeviceScatter args = {.dy = dy,
                          .ids = d->up.ids,
                          .starts = d->up.id_starts,
                          .order = d->up.id_order,
                          .n_ids = d->n_ids,
                          .width = p->m->width,
                          .out = p->g->lookup != NULL ? p->g->lookup
                                                      : gradient(p, ROLE_TOKEN_EMBD, -1)};
    if (d->n_ids > 0) { /* a tensor rank may have none */
        device_did(p, device_ops(p)->scatter(device_stream(p), &args), "the embedding's gradient");
    }
    if (positions != NULL) {
        args.ids = d->up.place_ids;
        args.starts = d->up.place_starts;
        args.order = d->up.place_order;
        args.n_ids = d->n_places;
        args.out = positions;
        device_did(p, device_ops(p)->scatter(device_stream(p), &args),
                   "the gradient of learnt positions");
    }
}

static void device_losses(Pass *p)
{
    const Training *m = p->m;
    TrainingDevice *d = m->device;
    const uint32_t n = m->spec->n_vocab_chunks;
    const DeviceRowStats stats = {.logits = m->logits,
                                  .ld = m->logits_ld,
                                  .rows = p->rows,
                                  .n = m->vocab,
                                  .targets = d->up.targets,
                                  .first_chunk = m->h->vocab_cuts[m->h->rank],
                                  .n_chunks = n,
                                  .max = m->row_max,
                                  .sum = m->row_sum,
                                  .total = m->o.smoothing > 0.0f ? m->row_total : NULL,
                                  .target = m->row_target};
    const DeviceRowLosses losses = {.max = m->row_max,
                                    .sum = m->row_sum,
                                    .total = m->row_total,
                                    .target = m->row_target,
                                    .row_max = d->row_max,
                                    .row_sum = d->row_sum,
                                    .rows = p->rows,
                                    .n_chunks = n,
                                    .smoothing = m->o.smoothing,
                                    .vocabulary = m->spec->vocab_size,
                                    .learnt = d->up.learnt,
                                    .losses = d->losses};
    if (m->vocab > 0) { /* a tensor rank may have none */
        device_did(p, device_ops(p)->row_stats(device_stream(p), &stats), "statistics of logits");
    }
    if (m->h->tp > 1) {
        device_exchange_row_stats(p);
    }
    device_did(p, device_ops(p)->row_losses(device_stream(p), &losses), "losses");
    device_copy(d, d->host_losses, d->losses, p->rows * sizeof(float), DEVICE_COPY_DOWN, "losses");
    if (device_work_wait(d->work, "a forward pass")) {
        memcpy(p->losses, d->host_losses, p->rows * sizeof(float));
    }
}

static void device_loss_gradient(Pass *p)
{
    const Training *m = p->m;
    const TrainingDevice *d = m->device;
    const DeviceLossGradient args = {.logits = m->logits,
                                     .ld = m->logits_ld,
                                     .rows = p->rows,
                                     .n = m->vocab,
                                     .targets = d->up.targets,
                                     .learnt = d->up.learnt,
                                     .row_max = d->row_max,
                                     .row_sum = d->row_sum,
                                     .factor = p->factor,
                                     .smoothing = m->o.smoothing,
                                     .vocabulary = m->spec->vocab_size};
    if (m->vocab > 0) {
        device_did(p, device_ops(p)->loss_gradient(device_stream(p), &args), "the loss's gradient");
    }
    device_did(p, d->work->device->api->fill(device_stream(p), m->dx, 0, stream_bytes(p)),
               "a gradient");
}

const PassOps training_device_ops = {
    .multiply = device_multiply,
    .bias = device_bias,
    .residual = device_residual,
    .dropout = device_dropout,
    .norm = device_norm,
    .rope = device_rope,
    .gelu = device_gelu,
    .gelu_backward = device_gelu_backward,
    .swiglu = device_swiglu,
    .swiglu_backward = device_swiglu_backward,
    .attention = device_attention,
    .attention_backward = device_attention_backward,
    .bias_gradient = device_bias_gradient,
    .norm_backward = device_norm_backward,
    .embed = device_embed,
    .embed_backward = device_embed_backward,
    .losses = device_losses,
    .loss_gradient = device_loss_gradient,
};
