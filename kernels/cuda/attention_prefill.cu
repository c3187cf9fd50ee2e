/* Attention of long runs of rows by matrix instructions: class fast. Flash attention (Dao 2023,
 * arXiv 2307.08691): a block has a tile of items of one KV head and goes through the keys that they
 * see, its rows' maxima, sums and outputs in registers.
 *
 * Each of the 4 warps has MT x 16 items against PAGES x 32 keys a turn. Scores: items x keys over
 * the head's dimensions; a K block lies as [d][key], a V block as [key][d], so that both are the
 * transposed operand of a load of matrices. The scores' fragments, exponentials now, are the next
 * product's left operand as they lie. The keys of the next turn are copied meanwhile.
 *
 * Numbers: q, k, v and the exponentials are f16 (bf16 where the cache is bf16), products exact,
 * sums f32; a key that no item of the tile may see is zeros, one that some do not see has the
 * exponential 0 for these, so that finite values are needed. A row's bits depend on the tile that
 * it lies in, that is, on how rows were cut into segments. */
#include "kernels/cuda/attention_fragments.h"
#include "kernels/cuda/attention_items.h"
#include "kernels/cuda/attention_prefill.h"

enum { THREADS = 128, WARPS = 4, K_PITCH = KV_BLOCK + 8 /* elements: 8 rows meet all banks */ };

struct PrefillArgs {
    CudaAttention c;
    uint32_t rows_from; /* segments of fewer rows are not done here */
    float scale;        /* times log2(e) */
};

/* ---- one turn's keys and values in shared memory ---- */

/* [PAGES][DIMS][K_PITCH], then [PAGES * 32][DIMS + 8]; 16-bit elements. */
template <int DIMS, int PAGES> struct Turn {
    static constexpr unsigned V_PITCH = DIMS + 8, KEYS = PAGES * KV_BLOCK;
    static constexpr unsigned K_ELEMENTS = PAGES * DIMS * K_PITCH;
    static constexpr unsigned BYTES = 2 * (K_ELEMENTS + KEYS * V_PITCH);
    uint16_t *k, *v;

    __device__ __forceinline__ explicit Turn(uint8_t *at)
        : k(reinterpret_cast<uint16_t *>(at)), v(k + K_ELEMENTS)
    {
    }
};

/* Eight int8 times their scales as f16. */
__device__ __forceinline__ uint4 eight_of_q8(const uint8_t *from, const float scale[8])
{
    const uint2 bits = load_vector<uint2>(from);
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        f[i] = (float)(int8_t)((i < 4 ? bits.x : bits.y) >> 8 * (i % 4)) * scale[i];
    }
    return make_uint4(pack_f16(f[0], f[1]), pack_f16(f[2], f[3]), pack_f16(f[4], f[5]),
                      pack_f16(f[6], f[7]));
}

__device__ __forceinline__ const float *scales_of(const uint8_t *block, uint32_t head_size)
{
    return reinterpret_cast<const float *>(block + (size_t)KV_BLOCK * head_size);
}

/* Starts copying the keys and values of one page; those from `last` on do not exist. */
template <KvType T, int DIMS, int PAGES>
__device__ __forceinline__ void copy_page(const CudaAttention &c, const Turn<DIMS, PAGES> &turn,
                                          unsigned page, const uint8_t *block, uint32_t first_key,
                                          uint32_t last)
{
    constexpr unsigned V_PITCH = Turn<DIMS, PAGES>::V_PITCH;
    const uint32_t n = c.head_size, chunks = n / 8;
    const uint8_t *v_block = block + c.kv.v_offset;
    for (uint32_t e = threadIdx.x; e < 4 * n; e += THREADS) { /* 8 keys of one dimension */
        const uint32_t d = e / 4, key = e % 4 * 8;
        const bool there = first_key + key < last;
        uint16_t *to = turn.k + (page * DIMS + d) * K_PITCH + key;
        if constexpr (T == KV_Q8) {
            float scale[8];
            for (unsigned i = 0; there && i < 8; i++) {
                scale[i] = scales_of(block, n)[key + i];
            }
            store_vector(to, there ? eight_of_q8(block + (size_t)d * KV_BLOCK + key, scale)
                                   : make_uint4(0, 0, 0, 0));
        } else {
            copy_to_shared(to, block + (there ? ((size_t)d * KV_BLOCK + key) * 2 : 0), there);
        }
    }
    for (uint32_t e = threadIdx.x; e < KV_BLOCK * chunks; e += THREADS) { /* of one key */
        const uint32_t key = e / chunks, d = e % chunks * 8;
        const bool there = first_key + key < last;
        uint16_t *to = turn.v + (page * KV_BLOCK + key) * V_PITCH + d;
        if constexpr (T == KV_Q8) {
            const float s = there ? scales_of(v_block, n)[key] : 0.0f;
            const float scale[8] = {s, s, s, s, s, s, s, s};
            store_vector(to, there ? eight_of_q8(v_block + (size_t)key * n + d, scale)
                                   : make_uint4(0, 0, 0, 0));
        } else {
            copy_to_shared(to, v_block + (there ? ((size_t)key * n + d) * 2 : 0), there);
        }
    }
}

template <KvType T, int DIMS, int PAGES>
__device__ __forceinline__ void copy_turn(const CudaAttention &c, uint32_t table, uint32_t kv_head,
                                          const Turn<DIMS, PAGES> &turn, uint32_t index,
                                          uint32_t last)
{
#pragma unroll
    for (unsigned p = 0; p < PAGES; p++) {
        const uint32_t block = index * PAGES + p, first_key = block * KV_BLOCK;
        const uint32_t page =
            first_key < last ? c.kv.tables[table * c.kv.table_ld + block] : 0; /* else unread */
        copy_page<T>(c, turn, p,
                     c.kv.base + page * c.kv.page_stride + (size_t)kv_head * c.kv.head_stride,
                     first_key, last);
    }
}

/* ---- fragments ---- */

/* What a warp knows of its items: rows g and g + 8 of each tile of 16. */
template <int MT, int DIMS> struct State {
    float o[MT][DIMS / 8][4];
    float m[MT][2], l[MT][2]; /* maximum; this lane's part of the sum */
    uint32_t first[MT][2], last[MT][2];

    __device__ __forceinline__ State() : o(), m(), l(), first(), last() {}
};

template <KvType T, int MT, int DIMS, int PAGES>
__device__ __forceinline__ void scores(const CudaAttention &c, const Turn<DIMS, PAGES> &turn,
                                       const uint16_t *q, float s[MT][PAGES * 4][4])
{
    const unsigned lane = lane_index();
#pragma unroll
    for (unsigned k = 0; k < DIMS / 16; k++) {
        if (16 * k >= c.head_size) {
            break;
        }
        uint32_t a[MT][4];
#pragma unroll
        for (unsigned m = 0; m < MT; m++) {
            load_matrices(a[m], q + (m * 16 + lane % 16) * (DIMS + 8) + k * 16 + lane / 16 * 8);
        }
#pragma unroll
        for (unsigned n = 0; n < PAGES * 2; n++) {
            uint32_t b[4];
            const unsigned d = k * 16 + lane / 8 % 2 * 8 + lane % 8;
            const unsigned key = n % 2 * 16 + lane / 16 * 8;
            load_matrices_transposed(b, turn.k + (n / 2 * DIMS + d) * K_PITCH + key);
#pragma unroll
            for (unsigned m = 0; m < MT; m++) {
                multiply<T>(s[m][2 * n], a[m], b[0], b[1]);
                multiply<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* Scores to exponentials; what went before is scaled to the new maximum. */
template <int MT, int DIMS, int NT>
__device__ __forceinline__ void exponentials(float scale, uint32_t first_key,
                                             State<MT, DIMS> &state, float s[MT][NT][4])
{
    const unsigned t = lane_index() % 4;
#pragma unroll
    for (unsigned m = 0; m < MT; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const uint32_t first = state.first[m][half], last = state.last[m][half];
            float most = state.m[m][half];
#pragma unroll
            for (unsigned n = 0; n < NT; n++) {
#pragma unroll
                for (unsigned e = 0; e < 2; e++) {
                    const uint32_t key = first_key + 8 * n + 2 * t + e;
                    float &score = s[m][n][2 * half + e];
                    score = key >= first && key < last ? score * scale : -INFINITY;
                    most = score > most ? score : most;
                }
            }
            most = quad_max(most);
            const float base = most == -INFINITY ? 0.0f : most;
            const float shrink = fast_exp2(state.m[m][half] - base);
            float sum = 0.0f;
#pragma unroll
            for (unsigned n = 0; n < NT; n++) {
#pragma unroll
                for (unsigned e = 0; e < 2; e++) {
                    float &score = s[m][n][2 * half + e];
                    score = fast_exp2(score - base);
                    sum += score;
                }
            }
            state.m[m][half] = most;
            state.l[m][half] = fmaf(state.l[m][half], shrink, sum);
#pragma unroll
            for (unsigned d = 0; d < DIMS / 8; d++) {
                state.o[m][d][2 * half] *= shrink;
                state.o[m][d][2 * half + 1] *= shrink;
            }
        }
    }
}

template <KvType T, int MT, int DIMS, int PAGES>
__device__ __forceinline__ void values(const CudaAttention &c, const Turn<DIMS, PAGES> &turn,
                                       const float s[MT][PAGES * 4][4], State<MT, DIMS> &state)
{
    constexpr unsigned V_PITCH = Turn<DIMS, PAGES>::V_PITCH;
    const unsigned lane = lane_index();
#pragma unroll
    for (unsigned k = 0; k < PAGES * 2; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (unsigned m = 0; m < MT; m++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) { /* rows g, g + 8, then the second 8 keys */
                const float *pair = s[m][2 * k + i / 2] + i % 2 * 2;
                a[m][i] = pack<T>(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (unsigned n = 0; n < DIMS / 16; n++) {
            if (16 * n >= c.head_size) {
                break;
            }
            uint32_t b[4];
            const unsigned key = k * 16 + lane / 8 % 2 * 8 + lane % 8;
            load_matrices_transposed(b, turn.v + key * V_PITCH + n * 16 + lane / 16 * 8);
#pragma unroll
            for (unsigned m = 0; m < MT; m++) {
                multiply<T>(state.o[m][2 * n], a[m], b[0], b[1]);
                multiply<T>(state.o[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* ---- the kernel ---- */

template <KvType T, int ITEMS, int DIMS>
__device__ __forceinline__ void load_queries(const CudaAttention &c, const CudaSegment &segment,
                                             HeadRange heads, uint32_t item0, uint16_t *q)
{
    const uint32_t pairs = c.head_size / 2;
    for (uint32_t e = threadIdx.x; e < ITEMS * pairs; e += THREADS) {
        const uint32_t i = e / pairs, d = e % pairs * 2;
        const Item item = item_of(c, segment, heads, item0 + i);
        uint32_t both = 0;
        if (item.row != UINT32_MAX) {
            const float *x = c.q + item.row * c.q_ld + (size_t)item.head * c.head_size + d;
            both = pack<T>(x[0], x[1]);
        }
        *reinterpret_cast<uint32_t *>(q + i * (DIMS + 8) + d) = both;
    }
}

template <int MT, int DIMS>
__device__ __forceinline__ void put_outputs(const CudaAttention &c, const CudaSegment &segment,
                                            HeadRange heads, uint32_t item0,
                                            const State<MT, DIMS> &state)
{
    const unsigned g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (unsigned m = 0; m < MT; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const float l = quad_sum(state.l[m][half]);
            const Item item = item_of(c, segment, heads, item0 + m * 16 + half * 8 + g);
            if (item.row == UINT32_MAX) {
                continue;
            }
            float *out = c.out + item.row * c.out_ld + (size_t)item.head * c.head_size;
            const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
#pragma unroll
            for (unsigned n = 0; n < DIMS / 8; n++) {
                if (8 * n < c.head_size) {
                    out[8 * n + 2 * t] = state.o[m][n][2 * half] * inverse;
                    out[8 * n + 2 * t + 1] = state.o[m][n][2 * half + 1] * inverse;
                }
            }
        }
    }
}

template <KvType T, int DIMS, int MT, int PAGES>
static __global__ void __launch_bounds__(THREADS)
    prefill_kernel(const __grid_constant__ PrefillArgs a)
{
    constexpr unsigned ITEMS = WARPS * MT * 16, KEYS = PAGES * KV_BLOCK;
    const CudaAttention &c = a.c;
    const uint32_t kv_head = blockIdx.y, tile = gridDim.x - 1 - blockIdx.x; /* the longest first */
    const CudaSegment segment = c.segments[blockIdx.z];
    const HeadRange heads = heads_of(c, kv_head);
    const uint32_t item0 = tile * ITEMS, n_items = segment.n_rows * heads.n;
    if (segment.n_rows < a.rows_from || item0 >= n_items) {
        return; /* the whole block */
    }
    uint16_t *q = dynamic_shared<uint16_t>();
    uint8_t *turns = dynamic_shared<uint8_t>(ITEMS * (DIMS + 8) * 2);
    const uint32_t end = item0 + ITEMS < n_items ? item0 + ITEMS : n_items;
    const uint32_t first = item_of(c, segment, heads, item0).first;
    const uint32_t last = item_of(c, segment, heads, end - 1).last;
    const uint32_t turn_end = (last + KEYS - 1) / KEYS, mine = item0 + warp_index() * MT * 16;
    State<MT, DIMS> state;
#pragma unroll
    for (unsigned m = 0; m < MT; m++) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const Item item =
                item_of(c, segment, heads, mine + m * 16 + half * 8 + lane_index() / 4);
            state.first[m][half] = item.first;
            state.last[m][half] = item.last; /* 0: no item, no key */
            state.m[m][half] = -INFINITY;
        }
    }
    load_queries<T, ITEMS, DIMS>(c, segment, heads, item0, q);
    uint32_t index = first / KEYS;
    copy_turn<T>(c, segment.table, kv_head, Turn<DIMS, PAGES>(turns), index, last);
    commit_copies();
    for (unsigned buffer = 0; index < turn_end; index++, buffer ^= 1) {
        const Turn<DIMS, PAGES> turn(turns + buffer * Turn<DIMS, PAGES>::BYTES);
        if (index + 1 < turn_end) {
            const Turn<DIMS, PAGES> next(turns + (buffer ^ 1) * Turn<DIMS, PAGES>::BYTES);
            copy_turn<T>(c, segment.table, kv_head, next, index + 1, last);
        }
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        float s[MT][PAGES * 4][4] = {};
        scores<T, MT>(c, turn, q + warp_index() * MT * 16 * (DIMS + 8), s);
        exponentials<MT, DIMS, PAGES * 4>(a.scale, index * KEYS, state, s);
        values<T, MT>(c, turn, s, state);
        __syncthreads(); /* before this buffer is filled again */
    }
    put_outputs(c, segment, heads, mine, state);
}

/* ---- the host's side ---- */

template <KvType T, int DIMS, int MT, int PAGES>
static int start(const PrefillArgs &args, WeftCudaStream stream)
{
    constexpr unsigned ITEMS = WARPS * MT * 16;
    constexpr size_t shared = ITEMS * (DIMS + 8) * sizeof(uint16_t) + 2 * Turn<DIMS, PAGES>::BYTES;
    const CudaAttention &c = args.c;
    const size_t most = (size_t)c.longest_segment * c.heads_per_kv;
    return launch(prefill_kernel<T, DIMS, MT, PAGES>,
                  dim3(blocks_of(most, ITEMS), c.kv.n_kv_heads, c.n_segments), THREADS, shared,
                  stream, args);
}

template <KvType T> static int start_type(const PrefillArgs &args, WeftCudaStream stream)
{
    return args.c.head_size <= 64    ? start<T, 64, 2, 2>(args, stream)
           : args.c.head_size <= 128 ? start<T, 128, 2, 1>(args, stream)
                                     : start<T, 256, 1, 1>(args, stream);
}

bool attention_prefill_takes(const CudaAttention *c)
{
    return c->kv.type != KV_F32 && c->head_size % 16 == 0 && c->n_segments <= 65535 &&
           c->kv.n_kv_heads <= 65535;
}

int attention_prefill(const CudaAttention *c, uint32_t rows_from, WeftCudaStream stream)
{
    const PrefillArgs args = {*c, rows_from, c->scale * 1.44269504f};
    switch (c->kv.type) {
    case KV_F16:
        return start_type<KV_F16>(args, stream);
    case KV_BF16:
        return start_type<KV_BF16>(args, stream);
    case KV_Q8:
        return start_type<KV_Q8>(args, stream);
    default:
        return (int)cudaErrorInvalidValue;
    }
}
