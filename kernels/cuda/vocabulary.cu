/* What is done with logits: statistics of vocabulary chunks, the best candidates of a row, and the
 * loss and its gradient. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/philox.h"
#include "kernels/cuda/xxh3.h"
extern "C" {
#include "kernels/ops/xent.h"
}

enum { THREADS = 256, WARPS = 8, SORT_THREADS = 512, SORT_KEYS = 1024, CHUNKS_LIMIT = 1024 };

/* ---- (m, l) of chunks, and of rows ---- */

struct StatsArgs {
    const float *logits;
    size_t ld;
    const float *divisors; /* by row, or NULL */
    uint32_t rows, n, n_chunks;
    float *m, *l;
    size_t stats_ld;
};

struct ChunkStats {
    float m, l;
};

/* chunk_stats() of z[i] / divisor by a warp; NaN for both where one is not finite. */
__device__ static ChunkStats stats_of(const float *z, uint32_t n, float divisor)
{
    float m = -INFINITY, lane = 0.0f;
    bool finite = true;
    for (uint32_t i = lane_index(); i < n; i += WARP) {
        const float v = z[i] / divisor;
        finite = finite && fabsf(v) < INFINITY;
        m = v > m ? v : m;
    }
    finite = __ballot_sync(ALL_LANES, !finite) == 0;
    m = warp_max(m);
    for (uint32_t i = lane_index(); i < n; i += WARP) {
        lane += exp32_inline(z[i] / divisor - m);
    }
    const float l = warp_fold(lane);
    return {finite ? m + 0.0f : NAN, finite ? l : NAN};
}

/* Where a warp's chunk begins, and its ids. */
struct Chunk {
    uint32_t row, first, n;
};
__device__ static Chunk chunk_of(size_t item, uint32_t n_chunks, uint32_t n)
{
    const uint32_t row = (uint32_t)(item / n_chunks);
    const uint32_t first = (uint32_t)(item % n_chunks) * VOCAB_CHUNK;
    return {row, first, n - first < VOCAB_CHUNK ? n - first : VOCAB_CHUNK};
}

/* A warp a chunk. */
static __global__ void __launch_bounds__(THREADS) chunk_stats_kernel(StatsArgs a)
{
    const size_t item = (size_t)blockIdx.x * WARPS + warp_index();
    if (item >= (size_t)a.rows * a.n_chunks) {
        return; /* a whole warp */
    }
    const Chunk chunk = chunk_of(item, a.n_chunks, a.n);
    const ChunkStats stats = stats_of(a.logits + chunk.row * a.ld + chunk.first, chunk.n,
                                      a.divisors != nullptr ? a.divisors[chunk.row] : 1.0f);
    if (lane_index() == 0) {
        const size_t at = chunk.row * a.stats_ld + item % a.n_chunks;
        a.m[at] = stats.m;
        a.l[at] = stats.l;
    }
}

extern "C" int weft_cuda_chunk_stats(const float *logits, size_t ld, const float *divisors,
                                     uint32_t rows, uint32_t n, float *m, float *l,
                                     WeftCudaStream stream)
{
    const uint32_t n_chunks = blocks_of(n, VOCAB_CHUNK);
    const StatsArgs args = {logits, ld, divisors, rows, n, n_chunks, m, l, n_chunks};
    return launch(chunk_stats_kernel, dim3(blocks_of((size_t)rows * n_chunks, WARPS)), THREADS, 0,
                  stream, args);
}

extern "C" int weft_cuda_chunk_stats_of(const float *logits, size_t ld, uint32_t rows, uint32_t n,
                                        float *m, float *l, size_t stats_ld, WeftCudaStream stream)
{
    const uint32_t n_chunks = blocks_of(n, VOCAB_CHUNK);
    const StatsArgs args = {logits, ld, nullptr, rows, n, n_chunks, m, l, stats_ld};
    return launch(chunk_stats_kernel, dim3(blocks_of((size_t)rows * n_chunks, WARPS)), THREADS, 0,
                  stream, args);
}

/* A warp a chunk. */
static __global__ void __launch_bounds__(THREADS)
    chunk_sums_kernel(const float *logits, size_t ld, uint32_t rows, uint32_t n, uint32_t n_chunks,
                      float *sums, size_t sums_ld)
{
    const size_t item = (size_t)blockIdx.x * WARPS + warp_index();
    if (item >= (size_t)rows * n_chunks) {
        return; /* a whole warp */
    }
    const size_t row = item / n_chunks, first = item % n_chunks * VOCAB_CHUNK;
    const uint32_t end = n - first < VOCAB_CHUNK ? (uint32_t)(n - first) : VOCAB_CHUNK;
    float lane = 0.0f;
    for (uint32_t i = lane_index(); i < end; i += WARP) {
        lane += logits[row * ld + first + i];
    }
    const float sum = warp_fold(lane);
    if (lane_index() == 0) {
        sums[row * sums_ld + item % n_chunks] = sum;
    }
}

extern "C" int weft_cuda_chunk_sums(const float *logits, size_t ld, uint32_t rows, uint32_t n,
                                    float *sums, size_t sums_ld, WeftCudaStream stream)
{
    const uint32_t n_chunks = blocks_of(n, VOCAB_CHUNK);
    return launch(chunk_sums_kernel, dim3(blocks_of((size_t)rows * n_chunks, WARPS)), THREADS, 0,
                  stream, logits, ld, rows, n, n_chunks, sums, sums_ld);
}

/* ---- what the sampler needs of a chunk ---- */

struct PartsArgs {
    const float *logits;
    size_t ld;
    const DeviceDraw *draws;
    uint32_t rows, n, n_chunks;
    DeviceChunk *chunks;
};

/* A warp a chunk. */
static __global__ void __launch_bounds__(THREADS) chunk_parts_kernel(PartsArgs a)
{
    const size_t item = (size_t)blockIdx.x * WARPS + warp_index();
    if (item >= (size_t)a.rows * a.n_chunks) {
        return; /* a whole warp */
    }
    const Chunk chunk = chunk_of(item, a.n_chunks, a.n);
    const float *z = a.logits + chunk.row * a.ld + chunk.first;
    const float temperature = a.draws[chunk.row].temperature;
    DeviceChunk *to = &a.chunks[item];
    const ChunkStats raw = stats_of(z, chunk.n, 1.0f);
    const ChunkStats tempered =
        temperature != 0.0f ? stats_of(z, chunk.n, temperature) : ChunkStats{0.0f, 0.0f};
    xxh3_128(z, chunk.n, to->hash);
    if (lane_index() == 0) {
        to->m = raw.m;
        to->l = raw.l;
        to->tempered_m = tempered.m;
        to->tempered_l = tempered.l;
    }
}

extern "C" int weft_cuda_chunk_parts(const float *logits, size_t ld, const DeviceDraw *draws,
                                     uint32_t rows, uint32_t n, DeviceChunk *chunks,
                                     WeftCudaStream stream)
{
    const uint32_t n_chunks = blocks_of(n, VOCAB_CHUNK);
    if (n == 0 || (n - 1) % VOCAB_CHUNK + 1 < DEVICE_SHORTEST_CHUNK) {
        return (int)cudaErrorInvalidValue;
    }
    const PartsArgs args = {logits, ld, draws, rows, n, n_chunks, chunks};
    return launch(chunk_parts_kernel, dim3(blocks_of((size_t)rows * n_chunks, WARPS)), THREADS, 0,
                  stream, args);
}

/* ---- merging pairs ---- */

/* Range of node `index` of depth `depth` of node(0, n): its bits say left or right at each step
 * from the root; empty where the path ends above. */
__device__ static void node_range(uint32_t n, unsigned depth, uint32_t index, uint32_t *begin,
                                  uint32_t *end)
{
    uint32_t a = 0, b = n;
    for (unsigned bit = depth; bit-- > 0;) {
        const uint32_t middle = a + (b - a + 1) / 2;
        if (b - a < 2) { /* a leaf: it is its own left descendant */
            b = (index >> bit & 1u) != 0 ? a : b;
        } else if ((index >> bit & 1u) != 0) {
            a = middle;
        } else {
            b = middle;
        }
    }
    *begin = a;
    *end = b;
}

/* node(0, n) of each row's (m, l); a block a row. */
static __global__ void __launch_bounds__(THREADS)
    merge_stats_kernel(const float *m_in, const float *l_in, uint32_t n, float *m_out, float *l_out)
{
    float *m = dynamic_shared<float>(), *l = m + n;
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
        m[i] = m_in[(size_t)blockIdx.x * n + i];
        l[i] = l_in[(size_t)blockIdx.x * n + i];
    }
    unsigned depth = 0;
    while (1u << depth < n) {
        depth++;
    }
    while (depth-- > 0) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 1u << depth; i += THREADS) {
            uint32_t a, b;
            node_range(n, depth, i, &a, &b);
            if (b - a < 2 || b <= a) {
                continue;
            }
            const uint32_t middle = a + (b - a + 1) / 2;
            const float top = m[a] > m[middle] ? m[a] : m[middle];
            l[a] = fmaf(l[a], exp32_inline(m[a] - top), l[middle] * exp32_inline(m[middle] - top));
            m[a] = top;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        m_out[blockIdx.x] = m[0];
        l_out[blockIdx.x] = l[0];
    }
}

extern "C" int weft_cuda_merge_stats(const float *m, const float *l, uint32_t rows,
                                     uint32_t n_chunks, float *m_out, float *l_out,
                                     WeftCudaStream stream)
{
    if (n_chunks == 0 || n_chunks > CHUNKS_LIMIT) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(merge_stats_kernel, dim3(rows), THREADS, 2 * n_chunks * sizeof(float), stream, m,
                  l, n_chunks, m_out, l_out);
}

/* ---- candidates ---- */

__device__ static float noise_of(const DeviceDraw &draw, uint32_t id)
{
    const uint32_t counter[4] = {draw.position, id / 4, draw.purpose, draw.choice};
    const uint32_t key[2] = {(uint32_t)draw.seed, (uint32_t)(draw.seed >> 32)};
    uint32_t random[4];
    philox(counter, key, random);
    const uint32_t low = id % 2 ? random[1] : random[0], high = id % 2 ? random[3] : random[2];
    return gumbel_inline(id % 4 < 2 ? low : high);
}

/* Sorts ascending as "larger value first, then lower id". */
__device__ static uint64_t key_of(float value, uint32_t id)
{
    const uint32_t bits = float_bits(value + 0.0f); /* -0 is +0 */
    const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
    return (uint64_t)~ordered << 32 | id;
}
__device__ static float value_of(uint64_t key)
{
    const uint32_t ordered = ~(uint32_t)(key >> 32);
    return float_of_bits(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

/* The block's SORT_KEYS keys ascending (Batcher's bitonic network, a pair a thread). */
__device__ static void sort_keys(uint64_t *keys)
{
    for (unsigned k = 2; k <= SORT_KEYS; k *= 2) {
        for (unsigned j = k / 2; j > 0; j /= 2) {
            __syncthreads();
            const unsigned i = 2 * threadIdx.x - (threadIdx.x & (j - 1));
            const uint64_t a = keys[i], b = keys[i + j];
            if ((a > b) == ((i & k) == 0)) {
                keys[i] = b;
                keys[i + j] = a;
            }
        }
    }
    __syncthreads();
}

struct CandidateArgs {
    const float *logits;
    size_t ld;
    const DeviceDraw *draws;
    uint32_t first_id, n, keep;
    const uint64_t *from; /* NULL: the logits */
    uint64_t *to;         /* [rows][gridDim.x][keep] */
};

/* What id i of the row is compared by. */
__device__ static float value_at(const CandidateArgs &a, uint32_t row, uint32_t i)
{
    const float logit = a.logits[row * a.ld + i];
    if (a.draws == nullptr || a.draws[row].temperature == 0.0f) {
        return logit;
    }
    const DeviceDraw draw = a.draws[row];
    const float v = logit / draw.temperature;
    return draw.noise ? v + noise_of(draw, a.first_id + i) : v;
}

/* The best `keep` of 1,024 values or keys. */
static __global__ void __launch_bounds__(SORT_THREADS) best_kernel(CandidateArgs a)
{
    uint64_t *keys = dynamic_shared<uint64_t>();
    const uint32_t row = blockIdx.y, first = blockIdx.x * SORT_KEYS;
    for (uint32_t e = threadIdx.x; e < SORT_KEYS; e += SORT_THREADS) {
        const uint32_t i = first + e;
        uint64_t key = UINT64_MAX;
        if (i < a.n && a.from != nullptr) {
            key = a.from[(size_t)row * a.n + i];
        } else if (i < a.n) {
            key = key_of(value_at(a, row, i), a.first_id + i);
        }
        keys[e] = key;
    }
    sort_keys(keys);
    for (uint32_t e = threadIdx.x; e < a.keep; e += SORT_THREADS) {
        a.to[((size_t)row * gridDim.x + blockIdx.x) * a.keep + e] = keys[e];
    }
}

static __global__ void __launch_bounds__(THREADS)
    candidates_kernel(const uint64_t *keys, const float *logits, size_t ld, uint32_t first_id,
                      uint32_t keep, DeviceCandidate *out)
{
    for (uint32_t e = threadIdx.x; e < keep; e += THREADS) {
        const uint64_t key = keys[(size_t)blockIdx.x * keep + e];
        const uint32_t id = (uint32_t)key;
        const bool there = key != UINT64_MAX;
        const float raw = there ? logits[blockIdx.x * ld + id - first_id] : -INFINITY;
        out[(size_t)blockIdx.x * keep + e] = {there ? value_of(key) : -INFINITY, raw, id};
    }
}

extern "C" size_t weft_cuda_candidates_bytes(uint32_t rows, uint32_t n, uint32_t keep)
{
    const size_t first = blocks_of(n, SORT_KEYS), second = blocks_of(first * keep, SORT_KEYS);
    return (size_t)rows * keep * (first + second) * sizeof(uint64_t);
}

extern "C" int weft_cuda_candidates(const float *logits, size_t ld, const DeviceDraw *draws,
                                    uint32_t first_id, uint32_t rows, uint32_t n, uint32_t keep,
                                    DeviceCandidate *out, void *workspace, WeftCudaStream stream)
{
    if (keep == 0 || keep > SORT_KEYS / 2 || n == 0 || rows > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    uint64_t *here = static_cast<uint64_t *>(workspace);
    uint32_t groups = blocks_of(n, SORT_KEYS);
    uint64_t *there = here + (size_t)rows * keep * groups;
    CandidateArgs args = {logits, ld, draws, first_id, n, keep, nullptr, here};
    const size_t shared = SORT_KEYS * sizeof(uint64_t);
    int status = launch(best_kernel, dim3(groups, rows), SORT_THREADS, shared, stream, args);
    while (status == 0 && groups > 1) {
        args.from = here;
        args.to = there;
        args.n = groups * keep;
        groups = blocks_of(args.n, SORT_KEYS);
        status = launch(best_kernel, dim3(groups, rows), SORT_THREADS, shared, stream, args);
        uint64_t *const swap = here;
        here = there;
        there = swap;
    }
    if (status != 0) {
        return status;
    }
    return launch(candidates_kernel, dim3(rows), THREADS, 0, stream, (const uint64_t *)here, logits,
                  ld, first_id, keep, out);
}

/* ---- the loss ---- */

static __global__ void __launch_bounds__(THREADS)
    xent_loss_kernel(const float *m, const float *l, const float *target_logit, uint32_t rows,
                     float *loss)
{
    const uint32_t r = blockIdx.x * THREADS + threadIdx.x;
    if (r < rows) {
        loss[r] = (m[r] - target_logit[r]) + log32_inline(l[r]);
    }
}

static __global__ void __launch_bounds__(THREADS)
    xent_backward_kernel(const float *z, size_t ld, uint32_t n, const float *m, const float *l,
                         const uint32_t *targets, float factor, float *dz)
{
    const uint32_t row = blockIdx.y, i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) {
        const float r = 1.0f / l[row];
        const float p = exp32_inline(z[row * ld + i] - m[row]) * r;
        dz[row * ld + i] = (i == targets[row] ? p - 1.0f : p) * factor;
    }
}

extern "C" int weft_cuda_xent_loss(const float *m, const float *l, const float *target_logit,
                                   uint32_t rows, float *loss, WeftCudaStream stream)
{
    return launch(xent_loss_kernel, dim3(blocks_of(rows, THREADS)), THREADS, 0, stream, m, l,
                  target_logit, rows, loss);
}

extern "C" int weft_cuda_xent_backward(const float *z, size_t ld, uint32_t rows, uint32_t n,
                                       const float *m, const float *l, const uint32_t *targets,
                                       float factor, float *dz, WeftCudaStream stream)
{
    if (rows > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(xent_backward_kernel, dim3(blocks_of(n, THREADS), rows), THREADS, 0, stream, z,
                  ld, n, m, l, targets, factor, dz);
}

/* ---- the loss with smoothed labels ---- */

/* A block a row; shared: the sums of its chunks. */
static __global__ void __launch_bounds__(THREADS)
    row_losses_kernel(const float *m, const float *l, const float *target, const float *totals,
                      uint32_t n_chunks, const uint32_t *learnt, float smoothing,
                      uint32_t vocabulary, float *losses)
{
    float *sums = dynamic_shared<float>();
    const uint32_t row = blockIdx.x;
    unsigned depth = 0;
    for (uint32_t i = threadIdx.x; smoothing > 0.0f && i < n_chunks; i += THREADS) {
        sums[i] = totals[(size_t)row * n_chunks + i];
    }
    while (smoothing > 0.0f && 1u << depth < n_chunks) {
        depth++;
    }
    while (depth-- > 0) {
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 1u << depth; i += THREADS) {
            uint32_t a, b;
            node_range(n_chunks, depth, i, &a, &b);
            if (b > a && b - a >= 2) {
                sums[a] += sums[a + (b - a + 1) / 2];
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float z = target[row];
        if (smoothing > 0.0f) {
            z = fmaf(smoothing, sums[0] / (float)vocabulary - z, z);
        }
        losses[row] = l[row] != l[row]   ? NAN
                      : learnt[row] == 0 ? 0.0f
                                         : (m[row] - z) + log32_inline(l[row]);
    }
}

extern "C" int weft_cuda_row_losses(const float *m, const float *l, const float *target,
                                    const float *totals, uint32_t rows, uint32_t n_chunks,
                                    const uint32_t *learnt, float smoothing, uint32_t vocabulary,
                                    float *losses, WeftCudaStream stream)
{
    if (n_chunks == 0 || n_chunks > CHUNKS_LIMIT) {
        return (int)cudaErrorInvalidValue;
    }
    return launch(row_losses_kernel, dim3(rows), THREADS, n_chunks * sizeof(float), stream, m, l,
                  target, totals, n_chunks, learnt, smoothing, vocabulary, losses);
}

static __global__ void __launch_bounds__(THREADS)
    target_logits_kernel(const float *z, size_t ld, const uint32_t *targets, uint32_t rows,
                         float *target)
{
    const uint32_t r = blockIdx.x * THREADS + threadIdx.x;
    if (r < rows) {
        target[r] = targets[r] == XENT_NO_TARGET ? 0.0f : z[r * ld + targets[r]];
    }
}

extern "C" int weft_cuda_target_logits(const float *z, size_t ld, const uint32_t *targets,
                                       uint32_t rows, float *target, WeftCudaStream stream)
{
    return launch(target_logits_kernel, dim3(blocks_of(rows, THREADS)), THREADS, 0, stream, z, ld,
                  targets, rows, target);
}

struct GradientArgs {
    float *z;
    size_t ld;
    uint32_t n;
    const float *m, *l;
    const uint32_t *targets, *learnt;
    float factor, share, at_target; /* share 0: no smoothing */
    bool smooth;
};

static __global__ void __launch_bounds__(THREADS) loss_gradient_kernel(GradientArgs a)
{
    const uint32_t row = blockIdx.x, target = a.targets[row];
    const float factor = a.learnt[row] != 0 ? a.factor : 0.0f, r = 1.0f / a.l[row];
    const bool smooth = a.smooth && factor > 0.0f;
    for (uint32_t i = blockIdx.y * THREADS + threadIdx.x; i < a.n; i += gridDim.y * THREADS) {
        float *z = a.z + row * a.ld + i;
        const float p = exp32_inline(*z - a.m[row]) * r;
        float dz = (i == target && !smooth ? p - 1.0f : p) * factor;
        if (smooth) {
            dz += a.share;
            dz = i == target ? dz - a.at_target : dz;
        }
        *z = dz;
    }
}

extern "C" int weft_cuda_loss_gradient(float *z, size_t ld, uint32_t rows, uint32_t n,
                                       const float *m, const float *l, const uint32_t *targets,
                                       const uint32_t *learnt, float factor, float smoothing,
                                       uint32_t vocabulary, WeftCudaStream stream)
{
    const GradientArgs args = {z,
                               ld,
                               n,
                               m,
                               l,
                               targets,
                               learnt,
                               factor,
                               -(smoothing / (float)vocabulary * factor),
                               (1.0f - smoothing) * factor,
                               smoothing > 0.0f};
    const unsigned columns = blocks_of(n, 4 * THREADS);
    return launch(loss_gradient_kernel, dim3(rows, columns < 65535 ? columns : 65535), THREADS, 0,
                  stream, args);
}
