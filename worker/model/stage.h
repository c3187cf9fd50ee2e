/* Stage: what one tensor rank of one pipeline stage needs to compute its layers: weights, KV pages,
 * buffers, units and the tensor group. A pass over a step is stage_forward.c; a layer of each model
 * family a file of its own (llama_serving.c, gpt2_serving.c). Owned and called by the engine
 * thread; the pool's other threads work inside.
 *
 * Shapes: rows are the Step's rows; x is the residual stream [rows][width] f32, complete on every
 * rank of the stage. */
#pragma once

#include "kernels/device/sample.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "transport/group/group.h"
#include "worker/model/stage_times.h"
#include "worker/model/stage_trace.h"
#include "worker/serve/kv_pages.h"
#include "worker/serve/step.h"
#include "worker/shard/shard.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/* Rows whose logits are computed at once (bounds the logits buffer). */
#define STAGE_LOGITS_ROWS 16u

typedef struct StageOptions {
    const ModelSpec *spec; /* borrowed, like all pointers here, for the stage's life */
    const Plan *plan;
    uint32_t replica, stage, rank;
    const Shard *shard;
    const Kernels *kernels;
    Pool *pool;
    void (*progress)(void *user); /* link progress, called by thread 0 between ops */
    void *progress_user;
    const atomic_bool *abort; /* the epoch is over: a wait for other ranks ends; or NULL */
} StageOptions;

/* How one cut tensor's contraction is folded on this rank. */
typedef struct StageUnits {
    MatmulUnit units[TREE_LEAVES_LIMIT];
    uint32_t n_units, n_subtrees;
    uint32_t n_leaves;                   /* of the whole tensor */
    uint32_t cuts[PLAN_RANKS_LIMIT + 1]; /* rank boundaries */
} StageUnits;

typedef struct Stage {
    StageOptions o;
    const PlanStage *plan_stage;
    Group *group; /* NULL until the links are open; NULL for ever when the stage has one rank */
    KvPages kv;
    StageUnits attn_units, ffn_units;
    MatmulUnit whole_width; /* the one unit of a matrix that is not cut: width elements */
    uint32_t max_rows;
    float *rope_cos, *rope_sin; /* [context][dims/2]; NULL without RoPE */
    /* buffers, row-major */
    float *x, *h;              /* [max_rows][width] */
    float *q, *attn;           /* [max_rows][own heads * head_size] */
    float *k, *v;              /* [max_rows][own KV heads * head_size] */
    float *gate, *up;          /* [max_rows][own FFN width] */
    float *partial;            /* [subtrees][max_rows][width] */
    float *logits;             /* [STAGE_LOGITS_ROWS][own vocabulary] */
    float *gathered;           /* [max_rows][width]: embedding rows of the other ranks */
    void *act[ACT_KIND_LIMIT]; /* quantised activations, where the weights want that kind */
    float **scratch;           /* per thread: attention */
    const uint8_t ***blocks;   /* per thread: 2 x page table length of block pointers */
    StageTimes times;
    GroupStatus status; /* of a pass: written by thread 0 before a barrier, read by all after it */
    void *arena;
    size_t arena_bytes;
    /* Where the shard is on a device: layers run there, KV pages lie there, and of the buffers
     * above only x, partial, logits, gathered and the RoPE tables are there, in pinned memory. */
    struct DeviceStage *device;
    GError *failure; /* of the device, once it has failed; the epoch is over */
} Stage;

/* Bytes of all buffers but weights and KV (RoPE tables included): the plan counts them. */
size_t stage_buffer_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                          uint32_t rank, unsigned threads);
Stage *stage_new(const StageOptions *options, GError **error);
void stage_free(Stage *stage);

/* The links are open; `group` is borrowed. */
void stage_set_group(Stage *stage, Group *group);

/* Rows of a step whose tokens a device draws: what it needs of the sampler, and what it gives. */
typedef struct StageDraws {
    const uint32_t *rows;    /* [n] of the step, ascending */
    const DeviceDraw *draws; /* [n] */
    uint32_t n;
    uint32_t keep;  /* candidates of each, <= DEVICE_KEEP_LIMIT */
    uint32_t n_top; /* most likely ids of each, <= SAMPLE_TOP_LIMIT */
} StageDraws;

typedef struct StageRun {
    const Step *step;
    const uint32_t *const *page_tables; /* by slot */
    int64_t deadline_us;                /* of each wait inside, relative to its start */
    const StageDraws *draws;            /* NULL = none; only where stage_draws() */
    StageTrace *trace;                  /* NULL = nothing is traced */
    /* On a device: x is there already (stage_take()), not in stage->x; nobody wants it in stage->x
     * after the pass; its checksum is wanted. */
    bool x_here, x_stays, x_sum;
    int64_t
        flip_layer; /* fail point "engine-flip": a bit of x is wrong after this layer; -1 = none */
} StageRun;

/* The step's copies of pages; before its rows. On a device that fails stage->failure says so. */
void stage_copy_pages(Stage *stage, const Step *step);
/* Embeds the step's tokens (first stage only) into stage->x. */
GroupStatus stage_embed(Stage *stage, const StageRun *run);
/* The stage's layers over stage->x, in place. */
GroupStatus stage_layers(Stage *stage, const StageRun *run);
/* Logits of n (<= STAGE_LOGITS_ROWS) rows of stage->x (last stage): this rank's vocabulary range,
 * into stage->logits [n][vocab_count]. On a device that fails they stay what they were, and
 * stage->failure says so. */
void stage_logits(Stage *stage, const uint32_t *rows, uint32_t n);
/* `mine`: the rows of the step's tokens that this rank owns, in order; all of them go to stage->x
 * on every rank. mine may be stage->x. */
GroupStatus stage_gather_embedding(Stage *stage, const StageRun *run, const float *mine);

/* Where x of a stage on a device leaves from and arrives without passing the host. */
typedef struct StageMemory {
    const char *kind; /* DeviceInfo.kind, borrowed */
    void *x;          /* whole when a pass is done, and until the next embeds, takes or runs */
    void *arriving;   /* place of the next x, free while none is to be taken; NULL: first stage */
    size_t bytes;     /* of each */
} StageMemory;
bool stage_memory(const Stage *stage, StageMemory *out); /* false: on the host */
/* The first `bytes` of what arrived become x; then their checksum is stage_checksum(), and another
 * may arrive. False: the device failed. */
bool stage_take(Stage *stage, size_t bytes, int64_t deadline_us);
/* CRC32C of x after a pass with x_sum, or of what was taken last. */
uint32_t stage_checksum(const Stage *stage);

/* Whether this rank can draw tokens (StageRun.draws): on a device whose vocabulary it can hash. */
bool stage_draws(const Stage *stage);
/* Draw i of the last pass over the layers, borrowed until the next; false: it had no such draw. */
bool stage_drawn(const Stage *stage, uint32_t i, SampleDrawn *out);
