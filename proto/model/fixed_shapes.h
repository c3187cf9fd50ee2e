/* Shapes and element types that the numbers' contract fixes and that kernels of every device share.
 * No other header is needed to read this one. */
#pragma once

#include <stdint.h>

#define VOCAB_CHUNK 1024u /* NUMERICS 6: shards of the vocabulary are whole chunks */
#define KV_BLOCK 32u      /* NUMERICS 5: keys per attention block = positions per KV page */

/* What K and V are rounded to in the cache (kernels/ops/attention.h): part of the definition. */
typedef enum KvType { KV_F16 = 0, KV_BF16 = 1, KV_F32 = 2, KV_Q8 = 3 } KvType;
#define KV_TYPE_LIMIT 4u
/* Bytes of one position of K (or of V) of one head. */
static inline uint32_t kv_row_bytes(KvType type, uint32_t head_size)
{
    return type == KV_F32 ? 4u * head_size : type == KV_Q8 ? head_size + 4u : 2u * head_size;
}

/* Which elements of a head form a RoPE pair: (2i, 2i+1) or (i, i + dims/2). */
typedef enum RopePairing { ROPE_ADJACENT = 0, ROPE_HALVES = 1 } RopePairing;
