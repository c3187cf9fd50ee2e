/* What is attended: an item is a (row, query head) pair of one segment; the items of a KV head
 * share its keys and values. Included by .cu files only. */
#pragma once

#include "kernels/cuda/device.h"

/* Query heads of this rank that read KV head `kv_head`: [first, first + n). */
struct HeadRange {
    uint32_t first, n;
};
__device__ static inline HeadRange heads_of(const CudaAttention &c, uint32_t kv_head)
{
    const uint32_t group = (c.kv_first + kv_head) * c.heads_per_kv; /* in the model's numbering */
    const uint32_t end = group + c.heads_per_kv - c.head_first;
    const uint32_t first = group > c.head_first ? group - c.head_first : 0;
    const uint32_t last = end < c.n_heads ? end : c.n_heads;
    return {first, last > first ? last - first : 0};
}

/* One item: where its query lies and which keys it sees, [first, last). row = UINT32_MAX: none. */
struct Item {
    uint32_t row, head, first, last;
};
__device__ static inline Item item_of(const CudaAttention &c, const CudaSegment &segment,
                                      HeadRange heads, uint32_t index)
{
    Item item = {UINT32_MAX, 0, 0, 0};
    if (heads.n == 0 || index >= segment.n_rows * heads.n) {
        return item;
    }
    const uint32_t in_segment = index / heads.n, position = segment.position + in_segment;
    item.row = segment.row0 + in_segment;
    item.head = heads.first + index % heads.n;
    item.last = position + 1;
    item.first = c.window != 0 && position >= c.window ? position - c.window + 1 : 0;
    return item;
}
