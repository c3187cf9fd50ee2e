/* Block shapes: ggml's block definitions (ggml-common.h), which GGUF stores as they lie in memory;
 * F8_E4M3 is weft's own. */
#include "proto/model/dtype.h"

#include "proto/base/checked.h"

static const DtypeInfo dtype_table[DTYPE_LIMIT] = {
    [DTYPE_F32] = {"F32", 1, 4},
    [DTYPE_F16] = {"F16", 1, 2},
    [DTYPE_Q4_0] = {"Q4_0", 32, 2 + 16},
    [DTYPE_Q4_1] = {"Q4_1", 32, 2 + 2 + 16},
    [DTYPE_Q5_0] = {"Q5_0", 32, 2 + 4 + 16},
    [DTYPE_Q5_1] = {"Q5_1", 32, 2 + 2 + 4 + 16},
    [DTYPE_Q8_0] = {"Q8_0", 32, 2 + 32},
    [DTYPE_Q4_K] = {"Q4_K", 256, 2 + 2 + 12 + 128},
    [DTYPE_Q5_K] = {"Q5_K", 256, 2 + 2 + 12 + 32 + 128},
    [DTYPE_Q6_K] = {"Q6_K", 256, 128 + 64 + 16 + 2},
    [DTYPE_BF16] = {"BF16", 1, 2},
    [DTYPE_F8_E4M3] = {"F8_E4M3", 128, 4 + 128},
};

const DtypeInfo *dtype_info(uint32_t dtype)
{
    static const DtypeInfo unknown = {0};
    return dtype < DTYPE_LIMIT ? &dtype_table[dtype] : &unknown;
}

bool dtype_row_bytes(uint32_t dtype, uint64_t n_elements, size_t *bytes_out)
{
    const DtypeInfo *info = dtype_info(dtype);
    if (info->name == NULL || n_elements % info->block != 0) {
        return false;
    }
    return sz_mul((size_t)(n_elements / info->block), info->block_bytes, bytes_out);
}
