#include "tests/unit/worker/mutants.h"

#include "proto/model/blocks.h"
#include "kernels/ops/math.h"
#include "kernels/ops/matmul_drive.h"

#include <glib.h>
#include <math.h>
#include <string.h>
#include <xmmintrin.h>

static const Kernels *real(void)
{
    return kernels_get(ISA_GENERIC);
}

/* ---- products ---- */

static float activation(const uint8_t *act, uint32_t k, unsigned n_rows, unsigned row)
{
    float x;
    memcpy(&x, act + 4 * ((size_t)k * n_rows + row), sizeof x);
    return x;
}

static void tile_forwards(const uint8_t *w, const uint8_t *act, uint32_t n, unsigned n_rows,
                          float *tile)
{
    const RecordF32 *record = (const RecordF32 *)w;
    for (unsigned i = 0; i < n_rows * PANEL_ROWS; i++) {
        float acc = 0;
        for (uint32_t k = 0; k < n; k++) {
            acc =
                fmaf(record[k].w[i % PANEL_ROWS], activation(act, k, n_rows, i / PANEL_ROWS), acc);
        }
        tile[i] = acc;
    }
}

static void tile_backwards(const uint8_t *w, const uint8_t *act, uint32_t n, unsigned n_rows,
                           float *tile)
{
    const RecordF32 *record = (const RecordF32 *)w;
    for (unsigned i = 0; i < n_rows * PANEL_ROWS; i++) {
        float acc = 0;
        for (uint32_t k = n; k-- > 0;) {
            acc =
                fmaf(record[k].w[i % PANEL_ROWS], activation(act, k, n_rows, i / PANEL_ROWS), acc);
        }
        tile[i] = acc;
    }
}

/* Even and odd k by themselves. */
static void tile_in_halves(const uint8_t *w, const uint8_t *act, uint32_t n, unsigned n_rows,
                           float *tile)
{
    const RecordF32 *record = (const RecordF32 *)w;
    for (unsigned i = 0; i < n_rows * PANEL_ROWS; i++) {
        float acc[2] = {0, 0};
        for (uint32_t k = 0; k < n; k++) {
            acc[k % 2] = fmaf(record[k].w[i % PANEL_ROWS],
                              activation(act, k, n_rows, i / PANEL_ROWS), acc[k % 2]);
        }
        tile[i] = acc[0] + acc[1];
    }
}

#define TILE(name, walk, n_rows)                                                                   \
    static void name(const uint8_t *w, size_t stride, const uint8_t *act, uint32_t n, TileTo to)   \
    {                                                                                              \
        (void)stride;                                                                              \
        walk(w, act, n, n_rows, to.at);                                                            \
        tile_merge(to, (n_rows)*PANEL_ROWS);                                                       \
    }
TILE(forwards1, tile_forwards, 1)
TILE(backwards1, tile_backwards, 1)
TILE(backwards4, tile_backwards, 4)
TILE(halves4, tile_in_halves, 4)

static void matmul_reversed(const MatmulArgs *args)
{
    matmul_drive(args, (TileKernel){backwards1, backwards4, 1, 1});
}

static void matmul_batch(const MatmulArgs *args)
{
    matmul_drive(args, (TileKernel){forwards1, halves4, 1, 1});
}

static void matmul_left_to_right(const MatmulArgs *args)
{
    MatmulUnit units[TREE_LEAVES_LIMIT];
    MatmulArgs changed = *args;
    bool first = true;
    for (uint32_t u = 0; u < args->n_units; u++) {
        units[u] = args->units[u];
        units[u].step.n_merges = first ? 0 : 1;
        first = units[u].step.emit != 0;
    }
    changed.units = units;
    real()->matmul[DTYPE_F32](&changed);
}

static void matmul_added_zero(const MatmulArgs *args)
{
    real()->matmul[DTYPE_F32](args);
    uint32_t subtree = 0, leaves = 0;
    for (uint32_t u = 0; u < args->n_units; u++) {
        leaves++;
        if (!args->units[u].step.emit) {
            continue;
        }
        const uint32_t last = MIN(args->panel1 * PANEL_ROWS, args->w->n_out);
        for (uint32_t r = 0; (leaves & (leaves - 1)) != 0 && r < args->rows; r++) {
            for (uint32_t n = args->panel0 * PANEL_ROWS; n < last; n++) {
                args->out[subtree * args->subtree_stride + r * args->ld + n] += 0.0f;
            }
        }
        subtree++;
        leaves = 0;
    }
}

static void matmul_flushed(const MatmulArgs *args)
{
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    real()->matmul[DTYPE_F32](args);
    _mm_setcsr(before);
}

/* ---- keys and values: a shadow of every block in f32 ---- */

static GHashTable *shadows; /* by block: its elements unrounded */

static float *shadow(const void *block, uint32_t head_size)
{
    float *values = g_hash_table_lookup(shadows, block);
    if (values == NULL) {
        values = g_new0(float, (size_t)KV_BLOCK *head_size);
        g_hash_table_insert(shadows, (gpointer)block, values);
    }
    return values;
}

static void kv_write_shadowed(const float *k, const float *v, uint32_t head_size, uint32_t slot,
                              void *k_block, void *v_block)
{
    real()->kv_write[KV_F16](k, v, head_size, slot, k_block, v_block);
    real()->kv_write[KV_F32](k, v, head_size, slot, shadow(k_block, head_size),
                             shadow(v_block, head_size));
}

/* The block in f32: rounded, but for slots from `fresh` on. A slot's elements: stride apart, `step`
 * between slots. */
static void unround(const uint8_t *block, uint32_t head_size, uint32_t fresh, bool keys, float *out)
{
    const float *unrounded = shadow(block, head_size);
    for (uint32_t i = 0; i < KV_BLOCK * head_size; i++) {
        uint16_t half;
        memcpy(&half, block + 2 * (size_t)i, sizeof half);
        const uint32_t slot = keys ? i % KV_BLOCK : i / head_size;
        out[i] = slot >= fresh ? unrounded[i] : f16_to_f32(half);
    }
}

static void attention_unrounded(const AttentionArgs *args)
{
    const uint32_t n_blocks = (args->n_keys + KV_BLOCK - 1) / KV_BLOCK,
                   block_floats = KV_BLOCK * args->head_size;
    g_autofree float *memory = g_new(float, (size_t)2 * n_blocks * block_floats);
    g_autofree const uint8_t **blocks = g_new(const uint8_t *, 2 * n_blocks);
    for (uint32_t b = 0; b < n_blocks; b++) {
        const uint32_t start = b * KV_BLOCK;
        const uint32_t fresh = args->first_position > start ? args->first_position - start : 0;
        float *k = memory + (size_t)2 * b * block_floats, *v = k + block_floats;
        unround(args->k_blocks[b], args->head_size, fresh, true, k);
        unround(args->v_blocks[b], args->head_size, fresh, false, v);
        blocks[b] = (const uint8_t *)k;
        blocks[n_blocks + b] = (const uint8_t *)v;
    }
    AttentionArgs changed = *args;
    changed.k_blocks = blocks;
    changed.v_blocks = blocks + n_blocks;
    real()->attention[KV_F32](&changed);
}

/* ---- norm and activation ---- */

static void rms_norm_eight_lanes(const float *x, const float *weight, float eps, uint32_t n,
                                 float *out)
{
    float lanes[32] = {0}; /* fold of 8: the others add +0 to sums of squares, which changes none */
    for (uint32_t i = 0; i < n; i++) {
        lanes[i % 8] = fmaf(x[i], x[i], lanes[i % 8]);
    }
    const float scale = 1.0f / sqrtf(lanes_fold(lanes) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++) {
        out[i] = (x[i] * scale) * weight[i];
    }
}

static void swiglu_libm(const float *gate, const float *up, uint32_t n, float *out)
{
    for (uint32_t i = 0; i < n; i++) {
        out[i] = (gate[i] / (1.0f + expf(-gate[i]))) * up[i];
    }
}

void mutant_table(Mutation mutation, Kernels *out)
{
    *out = *real();
    switch (mutation) {
    case MUTATION_REVERSED_K:
        out->matmul[DTYPE_F32] = matmul_reversed;
        break;
    case MUTATION_TREE_SHAPE:
        out->matmul[DTYPE_F32] = matmul_left_to_right;
        break;
    case MUTATION_UNROUNDED_KV:
        g_clear_pointer(&shadows, g_hash_table_unref);
        shadows = g_hash_table_new_full(NULL, NULL, NULL, g_free);
        out->kv_write[KV_F16] = kv_write_shadowed;
        out->attention[KV_F16] = attention_unrounded;
        break;
    case MUTATION_ADDED_ZERO:
        out->matmul[DTYPE_F32] = matmul_added_zero;
        break;
    case MUTATION_FLUSHED:
        out->matmul[DTYPE_F32] = matmul_flushed;
        break;
    case MUTATION_EIGHT_LANES:
        out->rms_norm = rms_norm_eight_lanes;
        break;
    case MUTATION_LIBM_EXP:
        out->swiglu = swiglu_libm;
        break;
    case MUTATION_BATCH:
        out->matmul[DTYPE_F32] = matmul_batch;
        break;
    case MUTATION_LIMIT:
        g_assert_not_reached();
    }
}
