/* A pass on a device. Reads top to bottom: input, embedding, layers of the family, draws, logits,
 * the pass, its graph.
 *
 * A pass of decoding rows is one graph: input up, embedding (or x up), layers, head, what the
 * sampler needs (or logits, or x) down; the host waits once, behind it. Passes of other shapes,
 * passes whose sums go through the host's group, and traced ones are enqueued op by op.
 *
 * Tensor ranks: on devices of one host that are a group (device_group.h) the sums are collectives
 * on the stream, a part of the graph; elsewhere they go over the host's group.
 *
 * Rows with an output are of two kinds: those of run->draws are sampled here, so that per row a few
 * candidates and 32 bytes a vocabulary chunk come down; of the others (penalised, biased, scored,
 * dumped) the first STAGE_LOGITS_ROWS rows' logits come down with the pass, more when
 * stage_logits() asks. */
#include "worker/model/device_forward.h"

#include "kernels/device/use.h"
#include "worker/model/device_group.h"
#include "worker/model/device_run.h"

#include <string.h>

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
        memcpy(pages + (size_t)i * d->sizes.input.pages_ld, run->page_tables[g->slot],
               sizeof(uint32_t) * n_pages);
        for (uint32_t r = 0; r < g->n_rows; r++) {
            tokens[g->row0 + r] = step->rows[g->row0 + r].token;
            positions[g->row0 + r] = g->position + r;
            tables[g->row0 + r] = i;
        }
    }
}

/* Rows with an output: first those that are drawn here, then the first ones of the others, in the
 * order in which sampling asks for them. Returns the number of these. */
static uint32_t fill_outputs(DeviceStage *d, const StageRun *run, uint32_t n_draws)
{
    const Step *step = run->step;
    uint32_t *outputs = device_stage_outputs(d, d->host_input), drawn = 0, n = 0;
    for (uint32_t i = 0; i < n_draws; i++) {
        outputs[i] = run->draws->rows[i];
        device_stage_draws(d, d->host_input)[i] = run->draws->draws[i];
    }
    for (uint32_t r = 0; r < step->n_rows && n < STAGE_LOGITS_ROWS; r++) {
        const bool here = drawn < n_draws && outputs[drawn] == r;
        drawn += here;
        if (step->rows[r].output != STEP_OUTPUT_NONE && !here) {
            outputs[n_draws + n++] = r;
        }
    }
    return n;
}

/* ---- embedding ---- */

static bool embed_on_device(DeviceStage *d, uint32_t n)
{
    const Shard *shard = d->stage->o.shard;
    return d->stage->failure == NULL &&
           device_stage_ok(d,
                           d->device->ops->embed(d->stream, &shard->embedding,
                                                 device_stage_tokens(d, d->input),
                                                 shard->vocab_first, n, false, d->x),
                           "embedding");
}

/* GPT-2: each row adds what was learnt for its position. */
static bool add_positions(DeviceStage *d, uint32_t n)
{
    const PackedMatrix *positions = &d->stage->o.shard->positions;
    return positions->data == NULL ||
           (d->stage->failure == NULL &&
            device_stage_ok(d,
                            d->device->ops->embed(d->stream, positions,
                                                  device_stage_positions(d, d->input), 0, n, true,
                                                  d->x),
                            "embedding of positions"));
}

/* All rows with their positions, on a stage alone or one whose devices are a group: each rank has
 * those that it owns, and zeros. */
static void embed_all(DeviceRun *p)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const size_t n = (size_t)p->shape.n_rows * s->o.spec->width;
    if (s->o.shard->vocab_count > 0) {
        embed_on_device(d, p->shape.n_rows);
    } else if (s->failure == NULL) {
        device_stage_ok(d, d->device->api->fill(d->stream, d->x, 0, sizeof(float) * n),
                        "embedding");
    }
    if (d->team.joined) {
        device_stage_all_reduce(d, d->x, n, p->run->deadline_us, "all-reduce of the embedding");
        p->status = d->team.peers;
    }
    if (p->status == GROUP_OK) {
        add_positions(d, p->shape.n_rows);
    }
}

/* The rows that this rank owns, in order, to the front of stage->x. */
static bool embed_owned(DeviceStage *d, const StageRun *run)
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
    return n == 0 || (device_run_copy(d, d->input, d->host_input, sizeof(uint32_t) * n,
                                      DEVICE_COPY_UP, "ids") &&
                      embed_on_device(d, n) &&
                      device_run_copy(d, s->x, d->x, sizeof(float) * n * (size_t)s->o.spec->width,
                                      DEVICE_COPY_DOWN, "embedding") &&
                      device_stage_wait(d, run->deadline_us, "embedding"));
}

/* stage->x with its positions. */
static bool place_rows(DeviceStage *d, const StageRun *run)
{
    Stage *s = d->stage;
    const size_t bytes = sizeof(float) * run->step->n_rows * (size_t)s->o.spec->width;
    if (s->o.shard->positions.data == NULL) {
        return true;
    }
    fill_input(d, run);
    return device_run_copy(d, d->input, d->host_input, d->sizes.input.pages, DEVICE_COPY_UP,
                           "positions") &&
           device_run_copy(d, d->x, s->x, bytes, DEVICE_COPY_UP, "embedding") &&
           add_positions(d, run->step->n_rows) &&
           device_run_copy(d, s->x, d->x, bytes, DEVICE_COPY_DOWN, "embedding") &&
           device_stage_wait(d, run->deadline_us, "embedding");
}

GroupStatus device_forward_embed(Stage *s, const StageRun *run)
{
    DeviceStage *d = s->device;
    GroupStatus status = GROUP_OK;
    d->embed_pending = (s->group == NULL || d->team.joined) && run->trace == NULL;
    if (d->embed_pending) {
        return GROUP_OK; /* a part of the pass over the layers */
    }
    if (!embed_owned(d, run)) {
        return GROUP_ABORTED;
    }
    if (s->group != NULL) {
        status = stage_gather_embedding(s, run, s->x);
    }
    return status != GROUP_OK || place_rows(d, run) ? status : GROUP_ABORTED;
}

/* ---- vocabulary projection ---- */

/* Logits of the n rows that the input's outputs name from `first` on, into d->logits. */
static void project(DeviceStage *d, uint32_t first, uint32_t n)
{
    const Shard *shard = d->stage->o.shard;
    device_run_norm(d, device_stage_outputs(d, d->input) + first, shard->output_norm,
                    shard->output_norm_bias, n);
    device_run_products(d, d->h, n, &(const DeviceProduct){shard_head(shard), d->logits, NULL}, 1,
                        "vocabulary projection");
}

/* n rows of outputs from `first` on, as logits into stage->logits. */
static void logits_down(DeviceStage *d, uint32_t first, uint32_t n)
{
    Stage *s = d->stage;
    if (n > 0 && s->o.shard->vocab_count > 0) {
        project(d, first, n);
        device_run_copy(d, s->logits, d->logits,
                        sizeof(float) * n * (size_t)s->o.shard->vocab_count, DEVICE_COPY_DOWN,
                        "logits");
    }
}

/* The rows of the draws, as many at once as there is room for their logits. */
static void draw(DeviceStage *d, const DevicePass *shape)
{
    const DeviceDrawn all = device_stage_drawn(d, d->drawn, shape);
    for (uint32_t at = 0; at < shape->n_draws; at += d->sizes.logits_rows) {
        const uint32_t n = MIN(d->sizes.logits_rows, shape->n_draws - at);
        const DeviceSample args = {.logits = d->logits,
                                   .n_rows = n,
                                   .n = d->stage->o.shard->vocab_count,
                                   .first_id = d->stage->o.shard->vocab_first,
                                   .draws = device_stage_draws(d, d->input) + at,
                                   .keep = shape->keep,
                                   .n_top = shape->n_top,
                                   .chunks = all.chunks + (size_t)at * all.n_chunks,
                                   .best = all.best + (size_t)at * shape->keep,
                                   .top = all.top + (size_t)at * shape->n_top,
                                   .workspace = d->workspace,
                                   .workspace_bytes = d->sizes.workspace};
        project(d, at, n);
        if (d->stage->failure == NULL) {
            device_stage_ok(d, d->device->ops->sample(d->stream, &args), "sampling");
        }
    }
    if (shape->n_draws > 0) {
        device_run_copy(d, d->host_drawn, d->drawn, all.bytes, DEVICE_COPY_DOWN, "drawn tokens");
    }
}

/* ---- the pass ---- */

static const DeviceLayerFn layer_of_family[] = {
    [FAMILY_LLAMA] = llama_device_layer,
    [FAMILY_GPT2] = gpt2_device_layer,
};

static void enqueue(DeviceRun *p)
{
    DeviceStage *d = p->d;
    Stage *s = d->stage;
    const DeviceLayerFn layer = layer_of_family[s->o.spec->family];
    const size_t x_bytes = sizeof(float) * p->shape.n_rows * (size_t)s->o.spec->width;
    const size_t input = d->sizes.input.pages +
                         sizeof(uint32_t) * (size_t)p->shape.n_segments * d->sizes.input.pages_ld;
    device_run_copy(d, d->input, d->host_input, input, DEVICE_COPY_UP, "a step's numbers");
    if (p->shape.embed) {
        embed_all(p);
    } else if (!p->shape.here) {
        device_run_copy(d, d->x, s->x, x_bytes, DEVICE_COPY_UP, "activations");
    }
    for (uint32_t l = 0; l < s->o.shard->n_layers && p->status == GROUP_OK && layer(p, l); l++) {
    }
    if (!device_run_well(p)) {
        return;
    }
    draw(d, &p->shape);
    logits_down(d, p->shape.n_draws, p->shape.n_outputs);
    if (p->shape.give) {
        device_run_copy(d, s->x, d->x, x_bytes, DEVICE_COPY_DOWN, "activations");
    }
    if (p->shape.sum) {
        device_stage_sum(d, d->x, x_bytes);
    }
}

/* By its graph; made at the second pass of its shape. */
static void launch(DeviceRun *p)
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
    if (device_run_well(p)) {
        device_stage_ok(d, api->graph_launch(g->graph, d->stream), "launching a graph");
        d->n_launches++;
    }
}

static DevicePass shape_of(DeviceStage *d, const StageRun *run)
{
    const Step *step = run->step;
    const Shard *shard = d->stage->o.shard;
    DevicePass shape = {.n_rows = step->n_rows,
                        .n_segments = step->n_segments,
                        .embed = d->embed_pending,
                        .here = run->x_here,
                        .give = !shard->has_head && !run->x_stays,
                        .sum = run->x_sum};
    for (uint32_t i = 0; i < step->n_segments; i++) {
        const StepSegment *g = &step->segments[i];
        shape.longest_segment = MAX(shape.longest_segment, g->n_rows);
        shape.max_keys = MAX(shape.max_keys, g->position + g->n_rows);
    }
    shape.max_keys = device_stage_keys(d, shape.max_keys);
    if (run->draws != NULL && run->draws->n > 0) {
        shape.n_draws = run->draws->n;
        shape.keep = device_stage_keep(run->draws->keep);
        shape.n_top = run->draws->n_top > 0 ? SAMPLE_TOP_LIMIT : 0;
    }
    if (shard->has_head) {
        shape.n_outputs = fill_outputs(d, run, shape.n_draws);
    }
    return shape;
}

/* Can be one graph: nothing in it happens on the host. */
static bool self_contained(const DeviceRun *p)
{
    return p->shape.longest_segment == 1 && (p->d->stage->group == NULL || p->d->team.joined) &&
           p->run->trace == NULL && p->run->flip_layer < 0;
}

GroupStatus device_forward_layers(Stage *s, const StageRun *run)
{
    DeviceStage *d = s->device;
    stage_times_begin(&s->times);
    fill_input(d, run);
    DeviceRun p = {.d = d, .run = run, .shape = shape_of(d, run), .status = GROUP_OK};
    d->n_ready = 0;
    d->last = (DevicePass){0};
    d->deadline_us = run->deadline_us;
    d->team.o.roll_step = run->step->number;
    if (self_contained(&p)) {
        launch(&p);
    } else {
        enqueue(&p);
    }
    d->embed_pending = false;
    const bool done =
        p.status == GROUP_OK && device_stage_wait(d, run->deadline_us, "a step on the device");
    stage_times_mark(&s->times, STAGE_OP_DEVICE);
    if (!done) {
        return p.status != GROUP_OK        ? p.status
               : d->team.peers != GROUP_OK ? d->team.peers
                                           : GROUP_ABORTED;
    }
    device_use_step(d->device, ++d->n_steps);
    d->last = p.shape;
    d->n_ready = p.shape.n_outputs;
    memcpy(d->ready, device_stage_outputs(d, d->host_input) + p.shape.n_draws,
           sizeof(uint32_t) * d->n_ready);
    return GROUP_OK;
}

void device_forward_logits(Stage *s, const uint32_t *rows, uint32_t n)
{
    DeviceStage *d = s->device;
    if (s->o.shard->vocab_count == 0 || s->failure != NULL ||
        (n == d->n_ready && memcmp(rows, d->ready, sizeof *rows * n) == 0)) {
        return;
    }
    stage_times_begin(&s->times);
    memcpy(device_stage_outputs(d, d->host_input), rows, sizeof *rows * n);
    device_run_copy(d, device_stage_outputs(d, d->input), device_stage_outputs(d, d->host_input),
                    sizeof *rows * n, DEVICE_COPY_UP, "rows of logits");
    logits_down(d, 0, n);
    d->n_ready = 0;
    if (device_stage_wait(d, d->deadline_us, "logits")) {
        d->n_ready = n;
        memcpy(d->ready, rows, sizeof *rows * n);
    }
    stage_times_mark(&s->times, STAGE_OP_HEAD);
}

bool stage_drawn(const Stage *s, uint32_t i, SampleDrawn *out)
{
    const DeviceStage *d = s->device;
    if (d == NULL || i >= d->last.n_draws) {
        return false;
    }
    const DeviceDrawn all = device_stage_drawn(d, d->host_drawn, &d->last);
    *out = (SampleDrawn){.chunks = all.chunks + (size_t)i * all.n_chunks,
                         .n_chunks = all.n_chunks,
                         .best = all.best + (size_t)i * d->last.keep,
                         .keep = MIN(d->last.keep, s->o.shard->vocab_count),
                         .top = all.top + (size_t)i * d->last.n_top,
                         .n_top = MIN(d->last.n_top, s->o.shard->vocab_count)};
    return true;
}
