/* DeviceStage: what a stage has on a device: KV pages, buffers, RoPE tables, one stream, and the
 * graphs of its decode steps. device_forward.c runs a pass on it; the rest of the engine sees the
 * Stage alone, whose x, logits and partial are pinned host memory then. Engine thread.
 *
 * A step's numbers (ids, positions, page tables) go up as one block of pinned memory, the input:
 * the only thing that differs between two launches of a graph. */
#pragma once

#include "kernels/device/ops.h"
#include "worker/model/device_team.h"
#include "worker/model/stage.h"

/* What a pass over the layers does besides them; with the rows' shape it names a graph. */
typedef struct DevicePass {
    uint32_t n_rows, n_segments, longest_segment;
    uint32_t max_keys;    /* rounded up: device_stage_keys() */
    uint32_t n_draws;     /* rows sampled here; 0 = none */
    uint32_t keep, n_top; /* of these; keep rounded up: device_stage_keep() */
    uint32_t n_outputs;   /* rows whose logits the pass ends with; 0 = none */
    bool embed;           /* else x comes up */
    bool here;            /* x is there already: neither embedded nor brought up */
    bool give;            /* x goes down at the end */
    bool sum;             /* its checksum does */
} DevicePass;

typedef struct DeviceStepGraph {
    DevicePass pass;
    bool ran;           /* once, op by op: what a device makes at an op's first use is made */
    DeviceGraph *graph; /* or NULL */
    uint64_t used;
} DeviceStepGraph;

#define DEVICE_GRAPHS 48u

/* Results of a pass's draws, one layout on both sides. */
typedef struct DeviceDrawn {
    DeviceChunk *chunks; /* [n_draws][n_chunks] */
    uint32_t n_chunks;
    DeviceCandidate *best; /* [n_draws][keep] */
    DeviceCandidate *top;  /* [n_draws][n_top] */
    size_t bytes;          /* of all of them */
} DeviceDrawn;

typedef struct DeviceStage {
    Stage *stage;
    const Device *device;
    DeviceStream *stream;
    DeviceEvent *done;
    DeviceSizes sizes;
    uint8_t *arena;
    size_t arena_bytes;
    DeviceKv kv;
    bool fast; /* the plan's numerics class */
    float *x, *h, *q, *k, *v, *attn, *gate, *up, *logits, *cos, *sin;
    float *arriving; /* [rows][width]: the next x, while this one is worked on; NULL: first stage */
    float *partial;  /* [subtrees][rows][width] of this rank, the sum in the first after it */
    float *gathered; /* class exact: those of all ranks */
    void *workspace;
    uint8_t *drawn, *host_drawn; /* device; pinned */
    /* input: one layout on both sides */
    uint8_t *input, *host_input; /* device; pinned */
    bool embed_pending;
    DeviceTeam team;     /* device_group.h; until it joined sums go over the host */
    int64_t deadline_us; /* of the last pass */
    DevicePass last;     /* whose draws host_drawn holds */
    /* rows whose logits stage->logits holds */
    uint32_t ready[STAGE_LOGITS_ROWS], n_ready;
    DeviceStepGraph graphs[DEVICE_GRAPHS];
    uint64_t clock; /* of graphs' use */
    uint64_t n_captures, n_launches;
    uint64_t n_steps; /* done */
} DeviceStage;

/* Allocates and fills; checks that the device serves the model's types. */
DeviceStage *device_stage_new(Stage *stage, GError **error);
void device_stage_free(DeviceStage *d); /* NULL-safe; waits for the stream */

/* Parts of the input by name, on the host (side = host_input) or the device (side = input). */
uint32_t *device_stage_tokens(const DeviceStage *d, uint8_t *side);
uint32_t *device_stage_positions(const DeviceStage *d, uint8_t *side);
uint32_t *device_stage_tables(const DeviceStage *d, uint8_t *side);
uint32_t *device_stage_outputs(const DeviceStage *d, uint8_t *side);
DeviceDraw *device_stage_draws(const DeviceStage *d, uint8_t *side);
DeviceSegment *device_stage_segments(const DeviceStage *d, uint8_t *side);
uint32_t *device_stage_pages(const DeviceStage *d, uint8_t *side);
/* The bound under which n keys share a graph: the next power of two from 256 on, at most the
 * context. */
uint32_t device_stage_keys(const DeviceStage *d, uint32_t n);

/* The parts of `memory` (drawn or host_drawn) for a pass of this shape. */
DeviceDrawn device_stage_drawn(const DeviceStage *d, uint8_t *memory, const DevicePass *pass);
/* The bound under which n candidates share a graph: a power of two, at most DEVICE_KEEP_LIMIT. */
uint32_t device_stage_keep(uint32_t n);

/* Takes note of a failure: stage->failure, once. True if the status is OK. */
bool device_stage_ok(DeviceStage *d, DeviceStatus status, const char *what);
/* Waits for all that was enqueued, progressing the links, at most deadline_us. */
bool device_stage_wait(DeviceStage *d, int64_t deadline_us, const char *what);
/* Enqueues the checksum of `bytes` of x or arriving: stage_checksum() when it was waited for. */
bool device_stage_sum(DeviceStage *d, const float *x, size_t bytes);
/* The graph of this pass, or a place for it (the least recently used one's is emptied). */
DeviceStepGraph *device_stage_graph(DeviceStage *d, const DevicePass *pass);
