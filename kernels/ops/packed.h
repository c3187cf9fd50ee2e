/* The bytes of packed panels and activation buffers (kernels/README.md has the table). Internal to
 * kernels/: others use matmul.h.
 *
 * A panel is 16 outputs; a record is one block of all 16, and a panel is its records in k order.
 * Lane l of a record is output l. A "group" is 4 consecutive elements of k: quants of one group and
 * one lane are 4 adjacent bytes, so a 64-byte row of a record is one group of 16 lanes, and one
 * dot-product instruction consumes it. All values are little-endian. */
#pragma once

#include "kernels/ops/matmul.h"
#include "proto/model/blocks.h"

/* ---- weight records
 * -------------------------------------------------------------------------------------------------
 * Quants are unsigned: Q8_0 is stored + 128, the others as in the file. Two groups share a nibble
 * row: row j holds group 2j in its low nibbles and group 2j+1 in its high ones. The fifth bit of
 * group g is bit g of qh; bits 4 and 5 of a Q6_K quant of group g are bits 2(g%4), 2(g%4)+1 of qh
 * row g/4. */
typedef struct RecordQ40 {
    uint16_t d[16];
    uint8_t q[4][64];
} RecordQ40;
typedef struct RecordQ41 {
    uint16_t d[16], m[16];
    uint8_t q[4][64];
} RecordQ41;
typedef struct RecordQ50 {
    uint16_t d[16];
    uint8_t qh[64];
    uint8_t q[4][64];
} RecordQ50;
typedef struct RecordQ51 {
    uint16_t d[16], m[16];
    uint8_t qh[64];
    uint8_t q[4][64];
} RecordQ51;
typedef struct RecordQ80 {
    uint16_t d[16];
    uint8_t q[8][64];
} RecordQ80;
/* Scales and minima as bytes; minima in pairs of 32-blocks, as a pairwise dot product wants them.
 */
typedef struct RecordQ4K {
    uint16_t d[16], dmin[16];
    uint8_t sc[8][16];
    uint8_t m[4][16][2];
    uint8_t q[8][4][64];
} RecordQ4K;
typedef struct RecordQ5K {
    uint16_t d[16], dmin[16];
    uint8_t sc[8][16];
    uint8_t m[4][16][2];
    uint8_t qh[8][64];
    uint8_t q[8][4][64];
} RecordQ5K;
/* Scales of 16-blocks in pairs: sc[b][l] are those of the two halves of 32-block b. */
typedef struct RecordQ6K {
    uint16_t d[16];
    uint8_t pad[32]; /* zero; keeps q on a cache line */
    int8_t sc[8][16][2];
    uint8_t qh[8][2][64];
    uint8_t q[8][4][64];
} RecordQ6K;
/* Float types: F32 and F16 one k a record, BF16 one pair (k even, k odd). */
typedef struct RecordF32 {
    float w[16];
} RecordF32;
typedef struct RecordF16 {
    uint16_t w[16];
} RecordF16;
typedef struct RecordBF16 {
    uint16_t w[16][2];
} RecordBF16;
/* F8_E4M3: scale of each lane, then rows of 32 bytes: row p holds k = 2p and 2p + 1 of lane l at
 * bytes 2l and 2l + 1, as the file has them. 33 cache lines; q begins on the second. */
typedef struct RecordF8 {
    float scale[16];
    uint8_t q[64][16][2];
} RecordF8;

_Static_assert(sizeof(RecordQ40) == 288 && sizeof(RecordQ41) == 320 && sizeof(RecordQ50) == 352 &&
                   sizeof(RecordQ51) == 384 && sizeof(RecordQ80) == 544 &&
                   sizeof(RecordQ4K) == 2368 && sizeof(RecordQ5K) == 2880 &&
                   sizeof(RecordQ6K) == 3392 && sizeof(RecordF8) == 2112,
               "records have no padding of the compiler's");

/* Elements of k and bytes of a record; {0, 0} for a type that is not supported. */
typedef struct RecordShape {
    uint16_t k;
    uint16_t bytes;
} RecordShape;
RecordShape record_shape(Dtype type);

void record_get(Dtype type, const uint8_t *record, unsigned lane, BlockValues *out);

/* ---- activation tiles
 * -----------------------------------------------------------------------------------------------
 * Rows are taken in groups of R: R = 4, the rows missing in the last group being zero; but a last
 * group of one row has R = 1. Row groups follow one another, each a sequence of tiles over k.
 * Macros, because R is a constant in each kernel. Q8_32, per 32 k:   {i8 q[8][R][4]; f32 d[R]; f32
 * ds[R]; i32 start8[R], start16[R], start128[R]} Q8_256, per 256 k: {i8 q[64][R][4]; i16
 * sum32[4][R][2]; i16 sum16[8][R][2]; f32 d[R]} BF16, per 2 k:     {u16 x[R][2]} F32, per k: {f32
 * x[R]} ds = d * (float)sum of the block's quants; start_c = -c * that sum: where an integer
 * accumulator starts so that unsigned weights act as signed ones. */
#define ACT_Q8_32_TILE(R) (52u * (R))
#define ACT_Q8_32_D(R) (32u * (R))
#define ACT_Q8_32_DS(R) (36u * (R))
#define ACT_Q8_32_START8(R) (40u * (R))
#define ACT_Q8_32_START16(R) (44u * (R))
#define ACT_Q8_32_START128(R) (48u * (R))
#define ACT_Q8_256_TILE(R) (308u * (R))
#define ACT_Q8_256_SUM32(R) (256u * (R))
#define ACT_Q8_256_SUM16(R) (272u * (R))
#define ACT_Q8_256_D(R) (304u * (R))

/* Below this, 127 / amax may not be finite: such a block is quantised to zeros. */
#define ACT_AMAX_MIN 0x1p-100f

static inline uint32_t act_groups(uint32_t rows)
{
    return (rows + ACT_ROW_GROUP - 1) / ACT_ROW_GROUP;
}
static inline uint32_t act_group_rows(uint32_t rows, uint32_t group)
{
    return rows - group * ACT_ROW_GROUP == 1 ? 1 : ACT_ROW_GROUP;
}
/* Elements of k in a tile, and bytes of a tile per row of its group. */
static inline uint32_t act_tile_k(ActKind kind)
{
    return kind == ACT_Q8_256 ? 256 : kind == ACT_Q8_32 ? 32 : kind == ACT_BF16 ? 2 : 1;
}
static inline size_t act_tile_row_bytes(ActKind kind)
{
    return kind == ACT_Q8_256 ? ACT_Q8_256_TILE(1) : kind == ACT_Q8_32 ? ACT_Q8_32_TILE(1) : 4;
}
static inline size_t act_row_bytes(ActKind kind, uint32_t n_in)
{
    uint32_t k = act_tile_k(kind);
    return (size_t)((n_in + k - 1) / k) * act_tile_row_bytes(kind);
}
