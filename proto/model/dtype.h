/* Element and block types of stored tensors. Numbers are GGUF's of ggml types, but for those from
 * DTYPE_FIRST_OWN on, which no GGUF file has. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum Dtype {
    DTYPE_F32 = 0,
    DTYPE_F16 = 1,
    DTYPE_Q4_0 = 2,
    DTYPE_Q4_1 = 3,
    DTYPE_Q5_0 = 6,
    DTYPE_Q5_1 = 7,
    DTYPE_Q8_0 = 8,
    DTYPE_Q4_K = 12,
    DTYPE_Q5_K = 13,
    DTYPE_Q6_K = 14,
    DTYPE_BF16 = 30,
    DTYPE_FIRST_OWN = 63,
    /* Blocks of 128 along a row, {f32 scale, u8 q[128]}: values scale * e4m3(q) (E4M3FN: no
     * infinities, 0x7f and 0xff are NaN and in no weight). Made of a checkpoint's weights and
     * scales (hf_fp8.h); ggml counts its types from 0 and is far from here. */
    DTYPE_F8_E4M3 = 63,
    DTYPE_LIMIT = 64, /* array bound, not a type */
} Dtype;

typedef struct DtypeInfo {
    const char *name;     /* "Q4_1"; NULL for numbers that weft does not read */
    uint32_t block;       /* elements per block, 1 for float types */
    uint32_t block_bytes; /* bytes per block in the file */
} DtypeInfo;

/* Never NULL; info->name is NULL for unknown numbers. */
const DtypeInfo *dtype_info(uint32_t dtype);

/* Bytes of n elements along one row; false if n is no multiple of the block or on overflow. */
bool dtype_row_bytes(uint32_t dtype, uint64_t n_elements, size_t *bytes_out);
