#include "worker/model/device_run.h"

#include "worker/model/device_group.h"

#include <string.h>

bool device_run_well(const DeviceRun *p)
{
    return p->status == GROUP_OK && p->d->stage->failure == NULL;
}

static DeviceRows rows_of(const DeviceRun *p)
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
                        .pages_ld = d->sizes.input.pages_ld};
}

bool device_run_copy(DeviceStage *d, void *to, const void *from, size_t bytes, DeviceCopy direction,
                     const char *what)
{
    return d->stage->failure == NULL &&
           device_stage_ok(d, d->device->api->copy(d->stream, to, from, bytes, direction), what);
}

/* ---- norms and products ---- */

void device_run_norm(DeviceStage *d, const uint32_t *index, const float *weight, const float *bias,
                     uint32_t rows)
{
    const ModelSpec *spec = d->stage->o.spec;
    const DeviceNorm args = {.x = d->x,
                             .index = index,
                             .weight = weight,
                             .bias = bias,
                             .eps = spec->norm_eps,
                             .width = spec->width,
                             .n_rows = rows,
                             .out = d->h};
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->norm(d->stream, &args), "norm");
    }
}

static DeviceMatmul matmul_of(const DeviceStage *d, const PackedMatrix *w, const float *x,
                              uint32_t rows)
{
    return (DeviceMatmul){.w = w,
                          .x = x,
                          .x_ld = w->n_in,
                          .rows = rows,
                          .out_ld = w->n_out,
                          .fast = d->fast,
                          .workspace = d->workspace,
                          .workspace_bytes = d->sizes.workspace};
}

static void multiply(DeviceStage *d, const DeviceMatmul *args, const char *what)
{
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->matmul(d->stream, args), what);
    }
}

void device_run_products(DeviceStage *d, const float *x, uint32_t rows, const DeviceProduct *list,
                         unsigned n, const char *what)
{
    for (unsigned i = 0; i < n; i++) {
        DeviceMatmul args = matmul_of(d, list[i].w, x, rows);
        args.out = list[i].out;
        args.bias = list[i].bias;
        args.same_x = i > 0 && list[i - 1].w->type == list[i].w->type;
        multiply(d, &args, what);
    }
}

void device_run_gelu_product(DeviceStage *d, const float *x, uint32_t rows, const PackedMatrix *w,
                             const float *bias, float *out, const char *what)
{
    DeviceMatmul args = matmul_of(d, w, x, rows);
    args.out = out;
    args.bias = bias;
    args.gelu = true;
    multiply(d, &args, what);
}

/* ---- attention ---- */

void device_run_store_keys(DeviceRun *p, uint32_t layer)
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

void device_run_attend(DeviceRun *p, uint32_t layer)
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
                                  .fast = d->fast,
                                  .kv = d->kv,
                                  .layer = layer,
                                  .workspace = d->workspace,
                                  .workspace_bytes = d->sizes.workspace};
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->attention(d->stream, &rows, &args), "attention");
    }
}

/* ---- sums over the tensor ranks ---- */

/* This rank's subtrees down to pinned memory. Class fast has its whole sum as the first one, the
 * others zero: it has no bits to keep, and the wire's format stays one. */
static bool subtrees_down(DeviceRun *p, uint32_t n_subtrees, size_t n, const char *operation)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t own = n * (d->fast ? 1 : n_subtrees);
    if (!device_run_copy(d, s->partial, d->partial, sizeof(float) * own, DEVICE_COPY_DOWN,
                         operation) ||
        !device_stage_wait(d, p->run->deadline_us, operation)) {
        return false;
    }
    memset(s->partial + own, 0, sizeof(float) * (n * n_subtrees - own));
    return true;
}

/* The sum of a cut product over the tensor ranks into d->partial, through pinned host memory. */
static bool reduce(DeviceRun *p, const StageUnits *units, uint16_t site, const char *operation)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t n = (size_t)p->shape.n_rows * s->o.spec->width;
    const GroupWait wait = {.step = p->run->step->number,
                            .site = site,
                            .deadline_us = g_get_monotonic_time() + p->run->deadline_us,
                            .operation = operation};
    if (!subtrees_down(p, units->n_subtrees, n, operation)) {
        return false;
    }
    p->status = group_all_reduce(s->group, &wait, units->n_leaves, units->cuts, s->partial, n, n,
                                 s->partial);
    return p->status == GROUP_OK &&
           device_run_copy(d, d->partial, s->partial, sizeof(float) * n, DEVICE_COPY_UP, operation);
}

/* The same among devices of one host, without it. */
static bool reduce_on_devices(DeviceRun *p, const StageUnits *units, const char *operation)
{
    DeviceStage *d = p->d;
    const size_t n = (size_t)p->shape.n_rows * d->stage->o.spec->width;
    const bool done =
        d->fast ? device_stage_all_reduce(d, d->partial, n, p->run->deadline_us, operation)
                : device_stage_fold(d, units, n, p->run->deadline_us, operation);
    p->status = d->team.peers;
    return done;
}

static void add_sum(DeviceRun *p, const float *bias, const char *operation)
{
    DeviceStage *d = p->d;
    const uint32_t rows = p->shape.n_rows, width = d->stage->o.spec->width;
    if (bias != NULL) {
        device_stage_ok(d, d->device->ops->add_bias(d->stream, d->partial, bias, rows, width),
                        operation);
    }
    if (d->stage->failure == NULL) {
        device_stage_ok(d, d->device->ops->add(d->stream, d->x, d->partial, rows, width),
                        operation);
    }
}

void device_run_add_product(DeviceRun *p, const PackedMatrix *w, const float *in,
                            const StageUnits *units, const float *bias, uint16_t site,
                            const char *what)
{
    DeviceStage *d = p->d;
    const bool alone = d->stage->group == NULL;
    DeviceMatmul args = matmul_of(d, w, in, p->shape.n_rows);
    args.out = alone ? d->x : d->partial;
    args.accumulate = alone;
    args.bias = alone ? bias : NULL;
    if (!d->fast) {
        args.units = units->units;
        args.n_units = units->n_units;
        args.subtree_stride = (size_t)p->shape.n_rows * d->stage->o.spec->width;
    }
    multiply(d, &args, what);
    if (!alone && device_run_well(p) &&
        (d->team.joined ? reduce_on_devices(p, units, what) : reduce(p, units, site, what))) {
        add_sum(p, bias, what);
    }
}

/* ---- what is looked at, or spoilt, between sub-layers ---- */

void device_run_trace(DeviceRun *p, uint32_t site)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const uint32_t width = s->o.spec->width, rows = p->shape.n_rows;
    if (p->run->trace != NULL &&
        device_run_copy(d, s->x, d->x, sizeof(float) * rows * width, DEVICE_COPY_DOWN, "trace") &&
        device_stage_wait(d, p->run->deadline_us, "trace")) {
        stage_trace_rows(p->run->trace, site, s->x, width, 0, rows);
    }
}

/* The lowest bit of the last row's first element. */
void device_run_flip_bit(DeviceRun *p, uint32_t layer)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t at = (size_t)(p->shape.n_rows - 1) * s->o.spec->width;
    uint32_t bits;
    if (p->run->flip_layer == (int64_t)layer &&
        device_run_copy(d, s->x, d->x + at, sizeof bits, DEVICE_COPY_DOWN, "flipping a bit") &&
        device_stage_wait(d, p->run->deadline_us, "flipping a bit")) {
        memcpy(&bits, s->x, sizeof bits);
        bits ^= 1;
        memcpy(s->x, &bits, sizeof bits);
        device_run_copy(d, d->x + at, s->x, sizeof bits, DEVICE_COPY_UP, "flipping a bit");
    }
}
