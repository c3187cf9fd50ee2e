/* Backward of attention: what its two ways share. Internal to this room:
 * weft_cuda_attention_backward() chooses. Included by .cu files only. */
#pragma once

#include "kernels/cuda/device.h"

enum { BACKWARD_HEADS_LIMIT = 64, BACKWARD_LEVELS = 8, BACKWARD_HEAD_SIZE_LIMIT = 256 };

struct BackwardArgs {
    CudaAttentionBackward c;
    uint32_t first; /* item of blockIdx.z 0: document * n_kv_heads + KV head */
    TreeStep steps[BACKWARD_HEADS_LIMIT];
};

/* One item: a document, a KV head. */
struct BackwardItem {
    const float *q, *dout, *k, *v;
    float *dq, *dk, *dv;
    uint32_t n_rows;
};
__device__ static inline BackwardItem backward_item(const BackwardArgs &a)
{
    const CudaAttentionBackward &c = a.c;
    const uint32_t item = a.first + blockIdx.z, head = item % c.n_kv_heads;
    const CudaSegment *segment = c.segments != nullptr ? &c.segments[item / c.n_kv_heads] : nullptr;
    const size_t row = segment != nullptr ? segment->row0 : 0;
    const size_t q = row * c.q_ld + (size_t)head * c.n_q * c.head_size;
    const size_t kv = row * c.kv_ld + (size_t)head * c.head_size;
    return {c.q + q,  c.dout + q, c.k + kv,  c.v + kv,
            c.dq + q, c.dk + kv,  c.dv + kv, segment != nullptr ? segment->n_rows : c.n_rows};
}
/* Its own part of the workspace, of `floats` an item. */
__device__ static inline float *backward_workspace(const BackwardArgs &a, size_t floats)
{
    return static_cast<float *>(a.c.workspace) + blockIdx.z * floats;
}

/* attention_backward_half.cu: 16-bit operands. Floats of workspace an item, and the launches for
 * items args.first and on. */
size_t attention_backward_half_floats(const CudaAttentionBackward *c);
int attention_backward_half(const BackwardArgs &args, uint32_t n_items, WeftCudaStream stream);
