/* Shard: the weights that one rank holds, packed for the kernels, and how they got there
 * (DESIGN 7.8): from the slice cache on disk, the worker's own copy of the file, a peer, or the
 * coordinator; every slice checked against the manifest's hash before it is packed. */
#pragma once

#include "kernels/device/device.h"
#include "kernels/ops/matmul.h"
#include "proto/base/hash.h"
#include "proto/model/model_spec.h"
#include "proto/plan/plan.h"

#include <glib.h>

/* Weights of one layer on this rank. NULL data = the model has none. */
typedef struct LayerWeights {
    float *attn_norm, *ffn_norm;           /* [width] */
    float *attn_norm_bias, *ffn_norm_bias; /* [width], or NULL */
    PackedMatrix q;                        /* rows: own query heads */
    PackedMatrix k, v;                     /* rows: KV heads that own query heads read */
    float *q_bias, *k_bias, *v_bias;       /* own rows, or NULL */
    PackedMatrix attn_out;                 /* rows: width; columns: own attention units */
    PackedMatrix gate, up;                 /* rows: own FFN units; no gate in GPT-2 */
    float *up_bias;                        /* own rows, or NULL */
    PackedMatrix down;                     /* rows: width; columns: own FFN units */
    float *attn_out_bias, *down_bias; /* [width], or NULL: added once, to the sum over all units */
} LayerWeights;

typedef struct Shard {
    const ModelSpec *spec; /* borrowed */
    uint32_t layer_first, n_layers;
    uint32_t head_first, n_heads;  /* query heads */
    uint32_t kv_first, n_kv_heads; /* KV heads computed here */
    uint32_t attn_unit_first, n_attn_units, ffn_unit_first, n_ffn_units;
    uint32_t vocab_first, vocab_count; /* ids (not chunks) held by embedding or head, 0 elsewhere */
    bool has_embedding, has_head;      /* first stage / last stage */
    PackedMatrix embedding;            /* has_embedding or a tied head: rows vocab_first ... */
    PackedMatrix positions;            /* GPT-2, first stage: [context][width] */
    PackedMatrix output;               /* untied head */
    float *output_norm;                /* [width], last stage */
    float *output_norm_bias;           /* the same, or NULL */
    float *rope_factors;               /* or NULL */
    LayerWeights *layers;
    void *arena; /* one mapping that holds all of the above but a device's rope_factors */
    size_t arena_bytes;
    /* On a device: the arena and every matrix and vector are addresses of its memory, but
     * rope_factors, which the host makes its tables of. */
    const Device *device;       /* or NULL: the host */
    struct ShardUpload *upload; /* until shard_finish() */
} Shard;

/* Lays out and maps an empty shard for a rank of a checked plan: every matrix sized and zeroed. On
 * a device, borrowed for the shard's life, or (NULL) on the host: the bytes of the arena are the
 * same. IMPOSSIBLE where the model cannot be cut for a device. */
Shard *shard_new(const Device *device, const ModelSpec *spec, const Plan *plan, uint32_t replica,
                 uint32_t stage, uint32_t rank, GError **error);
/* After the last shard_put(): every byte is where it belongs. */
bool shard_finish(Shard *shard, GError **error);
void shard_free(Shard *shard); /* NULL-safe */
/* Bytes of the arena without building it. */
size_t shard_bytes(const ModelSpec *spec, const Plan *plan, uint32_t replica, uint32_t stage,
                   uint32_t rank);
/* Packs the file bytes of one slice (model_spec_slice_bytes) to its place. Threads may put
 * different slices of different tensors. */
void shard_put(Shard *shard, uint32_t tensor_index, uint32_t slice, const void *bytes);
/* Of where everything lies in the arena and of how this build packs it: arenas of one part and one
 * hash have the same bytes. */
Hash128 shard_layout_hash(const Shard *shard);
/* The packed head: output, or the tied embedding. */
const PackedMatrix *shard_head(const Shard *shard);
