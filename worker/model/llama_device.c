/* The Llama family's forward pass on a device: the order of llama_serving.c, each op enqueued on
 * the stage's stream. Reads top to bottom: input, embedding, layer(), head, the pass, the graph.
 *
 * A pass of decoding rows is one graph: input up, embedding (or x up), layers, head, logits (or x)
 * down; the host waits once, behind it. Passes of other shapes, passes whose sums go through the
 * host's group, and traced ones are enqueued op by op.
 *
 * Tensor ranks: on devices of one host that are a group (device_group.h) the sums are collectives
 * on the stream, a part of the graph. Elsewhere a rank's whole sum goes down as its first subtree,
 * the others are zero, and the host's group folds them: class fast has no bits to keep (NUMERICS),
 * and the wire's format stays one. */
#include "worker/model/device_group.h"
#include "worker/model/device_stage.h"
#include "worker/model/llama_device.h"

#include <string.h>

typedef struct Pass {
    DeviceStage *d;
    const StageRun *run;
    DevicePass shape;
    GroupStatus status;
} Pass;

/* ---- the input block ---- */

/* The step's numbers for the device; nothing of an earlier pass is under way. */
static void fill_input(DeviceStage *d, const StageRun *run)
{
    const Step *step = run->step;
    uint32_t *tokens = device_stage_tokens(d, d->host_input),
             *positions = device_stage_positions(d, d->host_input),
             *tables = device_stage_tables(d, d->host_input),
             *pages = device_stage_pages(d, d->host_input);
    DeviceSegment *segments = device_stage_segments(d, d->host_input);
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        const uint32_t n_pages = (g->position + g->n_rows + KV_BLOCK - 1) / KV_BLOCK;
        segments[i] = (DeviceSegment){g->row0, g->n_rows, g->position, i};
        memcpy(pages + (size_t)i * d->pages_ld, run->page_tables[g->slot],
               sizeof(uint32_t) * n_pages);
        for (uint32_t r = 0; r < g->n_rows; r++) {
            tokens[g->row0 + r] = step->rows[g->row0 + r].token;
            positions[g->row0 + r] = g->position + r;
            tables[g->row0 + r] = i;
        }
    }
}

/* The first rows with an output, in the order in which sampling asks for them. */
static uint32_t fill_outputs(DeviceStage *d, const Step *step)
{
    uint32_t *outputs = device_stage_outputs(d, d->host_input), n = 0;
    for (uint32_t r = 0; r < step->n_rows && n < STAGE_LOGITS_ROWS; r++) {
        if (step->rows[r].output != STEP_OUTPUT_NONE) {
            outputs[n++] = r;
        }
    }
    return n;
}

static bool decoding(const DevicePass *shape)
{
    return shape->longest_segment == 1;
}

/* ---- one op after another; after a failure the rest enqueues nothing ---- */

static DeviceRows rows_of(const Pass *p)
{
    const DeviceStage *d = p->d;
    return (DeviceRows){.n_rows = p->shape.n_rows,
                        .n_segments = p->shape.n_segments,
                        .longest_segment = p->shape.longest_segment,
                        .max_keys = p->shape.max_keys,
                        .tokens = device_stage_tokens(d, d->input),
                        .positions = device_stage_positions(d, d->input),
                        .tables = device_stage_tables(d, d->input),
                        .segments = device_stage_segments(d, d->input),
                        .pages = device_stage_pages(d, d->input),
                        .pages_ld = d->pages_ld};
}

static bool copy(DeviceStage *d, void *to, const void *from, size_t bytes, DeviceCopy direction,
                 const char *what)
{
    return d->stage->failure == NULL &&
           device_stage_ok(d, d->device->api->copy(d->stream, to, from, bytes, direction), what);
}

/* One matrix of several that read the same x. */
typedef struct Product {
    const PackedMatrix *w;
    float *out;
    const float *bias; /* or NULL */
} Product;

static void products(DeviceStage *d, const float *x, uint32_t rows, const Product *list, unsigned n,
                     bool accumulate, const char *what)
{
    for (unsigned i = 0; i < n && d->stage->failure == NULL; i++) {
        const PackedMatrix *w = list[i].w;
        const DeviceMatmul args = {.w = w,
                                   .x = x,
                                   .x_ld = w->n_in,
                                   .rows = rows,
                                   .out = list[i].out,
                                   .out_ld = w->n_out,
                                   .accumulate = accumulate,
                                   .bias = list[i].bias,
                                   .same_x = i > 0 && list[i - 1].w->type == w->type,
                                   .workspace = d->workspace,
                                   .workspace_bytes = d->workspace_bytes};
        device_stage_ok(d, d->device->ops->matmul(d->stream, &args), what);
    }
}

static void norm(DeviceStage *d, const float *weight, uint32_t rows)
{
    const ModelSpec *spec = d->stage->o.spec;
    if (d->stage->failure == NULL) {
        device_stage_ok(d,
                        d->device->ops->rms_norm(d->stream, d->x, weight, spec->norm_eps,
                                                 spec->width, rows, d->h),
                        "norm");
    }
}

static void rotate_and_store(Pass *p, uint32_t layer)
{
    DeviceStage *d = p->d;
    const ModelSpec *spec = d->stage->o.spec;
    const DeviceRows rows = rows_of(p);
    const DeviceRope args = {.q = d->q,
                             .k = d->k,
                             .v = d->v,
                             .cos = d->cos,
                             .sin = d->sin,
                             .n_heads = d->stage->o.shard->n_heads,
                             .head_size = spec->head_size,
                             .dims = spec->rope.dims,
                             .pairing = spec->rope.pairing,
                             .kv = d->kv,
                             .layer = layer};
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->rope_store(d->stream, &rows, &args), "keys and values");
    }
}

static void attend(Pass *p, uint32_t layer)
{
    DeviceStage *d = p->d;
    const ModelSpec *spec = d->stage->o.spec;
    const Shard *shard = d->stage->o.shard;
    const DeviceRows rows = rows_of(p);
    const DeviceAttention args = {.q = d->q,
                                  .out = d->attn,
                                  .n_heads = shard->n_heads,
                                  .head_size = spec->head_size,
                                  .head_first = shard->head_first,
                                  .kv_first = shard->kv_first,
                                  .heads_per_kv = spec->n_heads / spec->n_kv_heads,
                                  .scale = spec->attention_scale,
                                  .window = spec->window,
                                  .kv = d->kv,
                                  .layer = layer,
                                  .workspace = d->workspace,
                                  .workspace_bytes = d->workspace_bytes};
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->attention(d->stream, &rows, &args), "attention");
    }
}

/* The sum of a cut product over the tensor ranks, through pinned host memory. */
static void reduce(Pass *p, const StageUnits *units, uint16_t site, const char *operation)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t n = (size_t)p->shape.n_rows * s->o.spec->width,
                 stride = (size_t)s->max_rows * s->o.spec->width;
    const GroupWait wait = {.step = p->run->step->number,
                            .site = site,
                            .deadline_us = g_get_monotonic_time() + p->run->deadline_us,
                            .operation = operation};
    if (!copy(d, s->partial, d->partial, sizeof(float) * n, DEVICE_COPY_DOWN, operation) ||
        !device_stage_wait(d, p->run->deadline_us, operation)) {
        return;
    }
    for (uint32_t i = 1; i < units->n_subtrees; i++) {
        memset(s->partial + i * stride, 0, sizeof(float) * n);
    }
    p->status = group_all_reduce(s->group, &wait, units->n_leaves, units->cuts, s->partial, stride,
                                 n, s->partial);
    if (p->status == GROUP_OK &&
        copy(d, d->partial, s->partial, sizeof(float) * n, DEVICE_COPY_UP, operation)) {
        device_stage_ok(
            d, d->device->ops->add(d->stream, d->x, d->partial, p->shape.n_rows, s->o.spec->width),
            operation);
    }
}

/* The same among devices of one host, without it. */
static void reduce_on_devices(Pass *p, const char *operation)
{
    DeviceStage *d = p->d;
    const uint32_t rows = p->shape.n_rows, width = d->stage->o.spec->width;
    if (device_stage_all_reduce(d, d->partial, (size_t)rows * width, p->run->deadline_us,
                                operation)) {
        device_stage_ok(d, d->device->ops->add(d->stream, d->x, d->partial, rows, width),
                        operation);
    }
    p->status = d->peers;
}

/* x += W in, over all tensor ranks. */
static void add_product(Pass *p, const PackedMatrix *w, const float *in, const StageUnits *units,
                        uint16_t site, const char *what)
{
    DeviceStage *d = p->d;
    const bool alone = d->stage->group == NULL;
    products(d, in, p->shape.n_rows, &(const Product){w, alone ? d->x : d->partial, NULL}, 1, alone,
             what);
    if (d->grouped) {
        reduce_on_devices(p, what);
    } else if (!alone) {
        reduce(p, units, site, what);
    }
}

/* x is complete after a sub-layer: traced rows come down to be hashed. */
static void trace_rows(Pass *p, uint32_t site)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const uint32_t width = s->o.spec->width, rows = p->shape.n_rows;
    if (p->run->trace != NULL &&
        copy(d, s->x, d->x, sizeof(float) * rows * width, DEVICE_COPY_DOWN, "trace") &&
        device_stage_wait(d, p->run->deadline_us, "trace")) {
        stage_trace_rows(p->run->trace, site, s->x, width, 0, rows);
    }
}

/* ---- a layer, top to bottom ---- */

static bool layer(Pass *p, uint32_t l)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const LayerWeights *w = &s->o.shard->layers[l];
    const uint32_t rows = p->shape.n_rows, number = s->o.shard->layer_first + l;
    const uint16_t site = (uint16_t)(2 * number);

    norm(d, w->attn_norm, rows);
    products(d, d->h, rows,
             (const Product[]){
                 {&w->q, d->q, w->q_bias}, {&w->k, d->k, w->k_bias}, {&w->v, d->v, w->v_bias}},
             3, false, "projections of attention");
    rotate_and_store(p, l);
    attend(p, l);
    add_product(p, &w->attn_out, d->attn, &s->attn_units, (uint16_t)(site + 1),
                "all-reduce of attention");
    if (p->status != GROUP_OK || s->failure != NULL) {
        return false;
    }
    trace_rows(p, trace_site_attention(number));
    norm(d, w->ffn_norm, rows);
    products(d, d->h, rows, (const Product[]){{&w->gate, d->gate, NULL}, {&w->up, d->up, NULL}}, 2,
             false, "projections of feed-forward");
    if (s->failure == NULL) {
        device_stage_ok(
            d, d->device->ops->swiglu(d->stream, d->gate, d->up, rows, w->gate.n_out, d->gate),
            "activation");
    }
    add_product(p, &w->down, d->gate, &s->ffn_units, (uint16_t)(site + 2),
                "all-reduce of feed-forward");
    trace_rows(p, trace_site_ffn(number));
    return p->status == GROUP_OK && s->failure == NULL;
}

/* ---- vocabulary projection ---- */

/* Logits of the n rows that the input's outputs name, into stage->logits. */
static void head(DeviceStage *d, uint32_t n)
{
    Stage *s = d->stage;
    const Shard *shard = s->o.shard;
    if (n == 0 || shard->vocab_count == 0 || s->failure != NULL) {
        return;
    }
    if (device_stage_ok(d,
                        d->device->ops->rms_norm_rows(
                            d->stream, d->x, device_stage_outputs(d, d->input), shard->output_norm,
                            s->o.spec->norm_eps, s->o.spec->width, n, d->h),
                        "last norm")) {
        products(d, d->h, n, &(const Product){shard_head(shard), d->logits, NULL}, 1, false,
                 "vocabulary projection");
    }
    copy(d, s->logits, d->logits, sizeof(float) * n * (size_t)shard->vocab_count, DEVICE_COPY_DOWN,
         "logits");
}

/* ---- embedding ---- */

static bool embed_on_device(DeviceStage *d, const uint32_t *tokens, uint32_t n)
{
    const Shard *shard = d->stage->o.shard;
    return d->stage->failure == NULL &&
           device_stage_ok(d,
                           d->device->ops->embed(d->stream, &shard->embedding, tokens,
                                                 shard->vocab_first, n, d->x),
                           "embedding");
}

/* All rows, on a stage alone or one whose devices are a group: each rank has those that it owns,
 * and zeros. */
static void embed_all(Pass *p)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t n = (size_t)p->shape.n_rows * s->o.spec->width;
    if (s->o.shard->vocab_count > 0) {
        embed_on_device(d, device_stage_tokens(d, d->input), p->shape.n_rows);
    } else if (s->failure == NULL) {
        device_stage_ok(d, d->device->api->fill(d->stream, d->x, 0, sizeof(float) * n),
                        "embedding");
    }
    if (d->grouped) {
        device_stage_all_reduce(d, d->x, n, p->run->deadline_us, "all-reduce of the embedding");
        p->status = d->peers;
    }
}

/* The rows that this rank owns, in order, to the front of stage->x. */
static bool embed_owned(DeviceStage *d, const StageRun *run, uint32_t *n_out)
{
    Stage *s = d->stage;
    const Shard *shard = s->o.shard;
    uint32_t *tokens = device_stage_tokens(d, d->host_input), n = 0;
    for (uint32_t r = 0; r < run->step->n_rows; r++) {
        const uint32_t token = run->step->rows[r].token;
        if (token >= shard->vocab_first && token - shard->vocab_first < shard->vocab_count) {
            tokens[n++] = token;
        }
    }
    *n_out = n;
    return n == 0 ||
           (copy(d, d->input, d->host_input, sizeof(uint32_t) * n, DEVICE_COPY_UP, "ids") &&
            embed_on_device(d, device_stage_tokens(d, d->input), n) &&
            copy(d, s->x, d->x, sizeof(float) * n * (size_t)s->o.spec->width, DEVICE_COPY_DOWN,
                 "embedding") &&
            device_stage_wait(d, run->deadline_us, "embedding"));
}

GroupStatus llama_device_embed(Stage *s, const StageRun *run)
{
    DeviceStage *d = s->device;
    uint32_t n;
    if ((s->group == NULL || d->grouped) && run->trace == NULL) {
        d->embed_pending = true; /* a part of the pass over the layers */
        return GROUP_OK;
    }
    d->embed_pending = false;
    if (!embed_owned(d, run, &n)) {
        return GROUP_ABORTED;
    }
    return s->group != NULL ? stage_gather_embedding(s, run, s->x) : GROUP_OK;
}

/* ---- the pass ---- */

static void enqueue(Pass *p)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t x_bytes = sizeof(float) * p->shape.n_rows * (size_t)s->o.spec->width;
    const size_t input =
        d->pages_offset + sizeof(uint32_t) * (size_t)p->shape.n_segments * d->pages_ld;
    copy(d, d->input, d->host_input, input, DEVICE_COPY_UP, "a step's numbers");
    if (p->shape.embed) {
        embed_all(p);
    } else {
        copy(d, d->x, s->x, x_bytes, DEVICE_COPY_UP, "activations");
    }
    for (uint32_t l = 0; l < s->o.shard->n_layers && p->status == GROUP_OK && layer(p, l); l++) {
    }
    if (p->status != GROUP_OK) {
        return;
    }
    head(d, p->shape.n_outputs);
    if (p->shape.give) {
        copy(d, s->x, d->x, x_bytes, DEVICE_COPY_DOWN, "activations");
    }
}

/* By its graph; made at the second pass of its shape. */
static void launch(Pass *p)
{
    DeviceStage *d = p->d;
    const DeviceApi *api = d->device->api;
    DeviceStepGraph *g = device_stage_graph(d, &p->shape);
    if (!g->ran) {
        g->ran = true;
        enqueue(p);
        return;
    }
    if (g->graph == NULL) {
        if (!device_stage_ok(d, api->graph_begin(d->stream), "making a graph")) {
            return;
        }
        enqueue(p);
        if (!device_stage_ok(d, api->graph_end(d->stream, &g->graph), "making a graph")) {
            return;
        }
        d->n_captures++;
    }
    if (d->stage->failure == NULL && p->status == GROUP_OK) {
        device_stage_ok(d, api->graph_launch(g->graph, d->stream), "launching a graph");
        d->n_launches++;
    }
}

static DevicePass shape_of(DeviceStage *d, const Step *step)
{
    const Shard *shard = d->stage->o.shard;
    DevicePass shape = {.n_rows = step->n_rows,
                        .n_segments = step->n_segments,
                        .embed = d->embed_pending,
                        .give = !shard->has_head};
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        shape.longest_segment = MAX(shape.longest_segment, g->n_rows);
        shape.max_keys = MAX(shape.max_keys, g->position + g->n_rows);
    }
    shape.max_keys = device_stage_keys(d, shape.max_keys);
    if (shard->has_head) {
        shape.n_outputs = fill_outputs(d, step);
    }
    return shape;
}

GroupStatus llama_device_layers(Stage *s, const StageRun *run)
{
    DeviceStage *d = s->device;
    stage_times_begin(&s->times);
    fill_input(d, run);
    Pass p = {.d = d, .run = run, .shape = shape_of(d, run->step), .status = GROUP_OK};
    d->n_ready = 0;
    d->deadline_us = run->deadline_us;
    d->step = run->step->number;
    if (decoding(&p.shape) && (s->group == NULL || d->grouped) && run->trace == NULL) {
        launch(&p);
    } else {
        enqueue(&p);
    }
    d->embed_pending = false;
    const bool done = p.status == GROUP_OK &&
                      device_stage_wait(d, run->deadline_us, "a step on the device");
    stage_times_mark(&s->times, STAGE_OP_DEVICE);
    if (!done) {
        return p.status != GROUP_OK  ? p.status
               : d->peers != GROUP_OK ? d->peers
                                      : GROUP_ABORTED;
    }
    d->n_ready = p.shape.n_outputs;
    memcpy(d->ready, device_stage_outputs(d, d->host_input), sizeof(uint32_t) * d->n_ready);
    return GROUP_OK;
}

void llama_device_logits(Stage *s, const uint32_t *rows, uint32_t n)
{
    DeviceStage *d = s->device;
    if (s->o.shard->vocab_count == 0 || s->failure != NULL ||
        (n == d->n_ready && memcmp(rows, d->ready, sizeof *rows * n) == 0)) {
        return;
    }
    stage_times_begin(&s->times);
    memcpy(device_stage_outputs(d, d->host_input), rows, sizeof *rows * n);
    copy(d, device_stage_outputs(d, d->input), device_stage_outputs(d, d->host_input),
         sizeof *rows * n, DEVICE_COPY_UP, "rows of logits");
    head(d, n);
    d->n_ready = 0;
    if (device_stage_wait(d, d->deadline_us, "logits")) {
        d->n_ready = n;
        memcpy(d->ready, rows, sizeof *rows * n);
    }
    stage_times_mark(&s->times, STAGE_OP_HEAD);
}
