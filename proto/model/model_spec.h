/* ModelSpec: what a model is, independent of the file format it came from: dimensions, the units
 * that tensor parallelism cuts it into (NUMERICS 3) and the list of its tensors with where their
 * bytes lie. A ModelSpec is immutable once built and may be shared between threads. */
#pragma once

#include "proto/base/hash.h"
#include "proto/model/dtype.h"
#include "proto/model/fixed_shapes.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef enum ModelFamily { FAMILY_LLAMA = 1, FAMILY_GPT2 = 2, FAMILY_BERT = 3 } ModelFamily;
typedef enum AttentionKind { ATTENTION_CAUSAL = 0, ATTENTION_BIDIRECTIONAL = 1 } AttentionKind;
typedef enum CacheKind { CACHE_KV = 0, CACHE_NONE = 1 } CacheKind;
typedef enum OutputKind { OUTPUT_LOGITS = 0, OUTPUT_POOLED = 1 } OutputKind;
typedef enum RopeScaling {
    ROPE_SCALING_NONE = 0,
    ROPE_SCALING_LINEAR = 1, /* positions divided by factor */
    ROPE_SCALING_YARN = 2,
    ROPE_SCALING_FACTORS = 3, /* per-dimension divisors from the tensor rope_freqs (Llama 3) */
} RopeScaling;

typedef struct RopeSpec {
    RopePairing pairing;
    RopeScaling scaling;
    uint32_t dims;             /* rotated elements of each head, even, <= head_size */
    double freq_base;          /* 10000, 100000, ... */
    double factor;             /* linear and yarn; 1 otherwise */
    uint32_t original_context; /* yarn; 0 if absent */
    double yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
} RopeSpec;

/* Roles of tensors; layer roles repeat per layer. Order of this enum within a layer, layers
 * ascending, globals *_EMBD first and OUTPUT_* last, is the canonical tensor order (NUMERICS
 * 17). */
typedef enum TensorRole {
    ROLE_TOKEN_EMBD = 0,
    ROLE_POSITION_EMBD, /* GPT-2: [context][width] */
    ROLE_ATTN_NORM,
    ROLE_ATTN_NORM_BIAS,
    ROLE_ATTN_Q,
    ROLE_ATTN_K,
    ROLE_ATTN_V,
    ROLE_ATTN_Q_BIAS,
    ROLE_ATTN_K_BIAS,
    ROLE_ATTN_V_BIAS,
    ROLE_ATTN_OUT,
    ROLE_ATTN_OUT_BIAS,
    ROLE_FFN_NORM,
    ROLE_FFN_NORM_BIAS,
    ROLE_FFN_GATE,
    ROLE_FFN_UP,
    ROLE_FFN_UP_BIAS,
    ROLE_FFN_DOWN,
    ROLE_FFN_DOWN_BIAS,
    ROLE_ROPE_FACTORS, /* f32 [dims/2] */
    ROLE_OUTPUT_NORM,
    ROLE_OUTPUT_NORM_BIAS,
    ROLE_OUTPUT, /* absent when the head is tied to TOKEN_EMBD */
    ROLE_LIMIT,
} TensorRole;

/* How a tensor is cut into slices, and the number of its slices:
 *   WHOLE      1 slice, every rank of the stage holds it
 *   Q_UNITS    rows, by attention unit: unit u = query heads [u*g, (u+1)*g) ∩ heads; also 1-D
 * biases KV_HEADS   rows, one slice per KV head ATTN_UNITS columns, by attention unit (attention
 * output) FFN_ROWS / FFN_COLS   rows (gate, up) / columns (down), by FFN unit VOCAB      rows, by
 * chunk of VOCAB_CHUNK ids */
typedef enum TensorCut {
    CUT_WHOLE,
    CUT_Q_UNITS,
    CUT_KV_HEADS,
    CUT_ATTN_UNITS,
    CUT_FFN_ROWS,
    CUT_FFN_COLS,
    CUT_VOCAB
} TensorCut;

typedef struct TensorSpec {
    char *name; /* as in the file */
    TensorRole role;
    int32_t layer; /* -1 for globals */
    Dtype type;
    uint32_t rows;    /* outputs; 1 for 1-D tensors */
    uint32_t columns; /* contraction length, or the length of a 1-D tensor */
    uint64_t offset;  /* of the first byte, in the file named by `file` */
    uint64_t size_bytes;
    uint32_t file; /* index of the split file, 0 for a single one */
    TensorCut cut;
    uint32_t n_slices;
} TensorSpec;

typedef struct ModelSpec {
    ModelFamily family;
    AttentionKind attention;
    CacheKind cache;
    OutputKind output;
    char *name; /* general.name or the file's base name */
    uint32_t n_layers, width, n_heads, n_kv_heads, head_size, ffn_width, vocab_size;
    uint32_t context;                   /* the model's own limit, positions */
    uint32_t n_experts, n_experts_used; /* 0 for dense models */
    uint32_t window;                    /* sliding window, 0 = none */
    float norm_eps;
    float attention_scale; /* 1/sqrt(head_size) */
    RopeSpec rope;         /* all 0 for GPT-2, which learns its positions */
    bool tied_output;
    /* NUMERICS 3 */
    uint32_t attn_unit_heads; /* g */
    uint32_t n_attn_units;    /* U attention = ceil(n_heads / g) */
    uint32_t ffn_unit_width;  /* w */
    uint32_t n_ffn_units;     /* U FFN */
    uint32_t n_vocab_chunks;
    Hash128 file_hash; /* of the whole file(s); all zero until somebody needed it */
    uint32_t n_tensors;
    TensorSpec *tensors; /* canonical order */
} ModelSpec;

void model_spec_free(ModelSpec *spec); /* NULL-safe, half-built allowed */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ModelSpec, model_spec_free)

/* Fills the units and each tensor's cut and n_slices from the dimensions and types; checks that
 * every tensor that the family needs is there with the right shape, nothing twice. Errors name
 * tensor, value and expectation. */
bool model_spec_finish(ModelSpec *spec, GError **error);

/* The shape that the dimensions give a role: rows = 1 for vectors. */
void model_spec_shape(const ModelSpec *spec, TensorRole role, uint32_t *rows, uint32_t *columns);

/* The tensor with this role (layer -1 for globals), or NULL. */
const TensorSpec *model_spec_tensor(const ModelSpec *spec, TensorRole role, int32_t layer);

/* The numbers in all tensors together. */
uint64_t model_spec_parameters(const ModelSpec *spec);

/* The rectangle of slice `slice` of a tensor: rows [row0, row0+n_rows), columns [col0,
 * col0+n_cols). */
typedef struct SliceRect {
    uint32_t row0, n_rows, col0, n_cols;
} SliceRect;
SliceRect model_spec_slice(const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice);
/* File bytes of that rectangle, rows packed one after another. */
size_t model_spec_slice_bytes(const ModelSpec *spec, const TensorSpec *tensor, uint32_t slice);
/* Query heads [*first, *first+*count) of attention unit u. */
void model_spec_attn_unit_heads(const ModelSpec *spec, uint32_t unit, uint32_t *first,
                                uint32_t *count);
/* KV heads that query heads [first, first+count) read. */
void model_spec_kv_heads_of(const ModelSpec *spec, uint32_t first, uint32_t count,
                            uint32_t *kv_first, uint32_t *kv_count);
/* FFN columns of unit u. */
void model_spec_ffn_unit(const ModelSpec *spec, uint32_t unit, uint32_t *first, uint32_t *count);
