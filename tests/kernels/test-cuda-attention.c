/* Device attention against generic, by bits: page tables in any order, groups of heads, chunks of
 * rows, windows, several splits, NaN wherever no key was written. */
#include "tests/kernels/cuda_case.h"

static const Kernels *generic;

enum { SEQUENCES = 3, PAGES = 90, TABLE = 40 };

typedef struct Case {
    KvType type;
    uint32_t head_size, n_heads, n_kv, head_first, kv_first, heads_per_kv, window;
    uint32_t n_segments, lengths[SEQUENCES], positions[SEQUENCES]; /* a segment a sequence */
    size_t workspace;                                              /* 0: as much as is asked for */
    double apart; /* class fast: of the largest value, what the result may differ; 0: exact */
} Case;

typedef struct Memory {
    uint8_t *pages;
    size_t block, page;
    uint32_t tables[SEQUENCES][TABLE];
} Memory;

static uint8_t *block_at(const Memory *m, uint32_t sequence, uint32_t block, uint32_t head)
{
    return m->pages + m->tables[sequence][block] * m->page + head * 2 * m->block;
}

/* Pages full of NaN, but for the keys that the rows see. */
static void fill_pages(const Case *c, Numbers *numbers, Memory *m)
{
    float k[256], v[256];
    m->block = kv_block_bytes(c->type, c->head_size);
    m->page = c->n_kv * 2 * m->block;
    m->pages = malloc(PAGES * m->page);
    memset(m->pages, 0xff, PAGES * m->page);
    uint32_t next = 7; /* 7, 44, 81, ...: 37 and 90 share no divisor */
    for (unsigned s = 0; s < c->n_segments; s++) {
        const uint32_t n_keys = c->positions[s] + c->lengths[s];
        for (unsigned b = 0; b < TABLE; b++) {
            m->tables[s][b] = UINT32_MAX; /* beyond the sequence: never followed */
        }
        for (uint32_t b = 0; b * 32 < n_keys; b++) {
            m->tables[s][b] = next = (next + 37) % PAGES;
        }
        for (uint32_t j = 0; j < n_keys; j++) {
            for (uint32_t h = 0; h < c->n_kv; h++) {
                numbers_fill(numbers, k, c->head_size, -2, 2);
                numbers_fill(numbers, v, c->head_size, -2, 2);
                if (c->apart == 0 && j + 1 == n_keys) {
                    v[0] = 1e30f; /* f16: infinite, for those who see it */
                }
                uint8_t *at = block_at(m, s, j / 32, h);
                generic->kv_write[c->type](k, v, c->head_size, j % 32, at, at + m->block);
            }
        }
    }
}

static void specified(const Case *c, const Memory *m, const float *q, size_t ld, float *out)
{
    float *scratch = malloc(attention_scratch_floats(1, c->head_size) * sizeof *scratch);
    uint32_t row0 = 0;
    for (unsigned s = 0; s < c->n_segments; s++) {
        for (uint32_t h = 0; h < c->n_heads; h++) {
            const uint32_t kv_head = (c->head_first + h) / c->heads_per_kv - c->kv_first;
            const uint8_t *k_blocks[TABLE], *v_blocks[TABLE];
            for (unsigned b = 0; b < TABLE && m->tables[s][b] != UINT32_MAX; b++) {
                k_blocks[b] = block_at(m, s, b, kv_head);
                v_blocks[b] = k_blocks[b] + m->block;
            }
            const AttentionArgs args = {.q = q + row0 * ld + h * c->head_size,
                                        .q_ld = ld,
                                        .out = out + row0 * ld + h * c->head_size,
                                        .out_ld = ld,
                                        .n_rows = c->lengths[s],
                                        .first_position = c->positions[s],
                                        .n_q = 1,
                                        .head_size = c->head_size,
                                        .scale = 0.125f,
                                        .window = c->window,
                                        .causal = true,
                                        .n_keys = c->positions[s] + c->lengths[s],
                                        .k_blocks = k_blocks,
                                        .v_blocks = v_blocks,
                                        .scratch = scratch};
            generic->attention[c->type](&args);
        }
        row0 += c->lengths[s];
    }
    free(scratch);
}

static void assert_near(const Case *c, const float *got, const float *want, size_t n)
{
    static const char *const types[KV_TYPE_LIMIT] = {
        [KV_F16] = "f16", [KV_BF16] = "bf16", [KV_F32] = "f32", [KV_Q8] = "q8"};
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        const double apart = fabs((double)got[i] - (double)want[i]);
        largest = fmax(largest, apart); /* of NaN and a number the number: rows' ends */
        if (isnan(want[i]) != isnan(got[i]) || apart > 2 * c->apart) { /* values are within 2 */
            fail_msg("element %zu: %g, specified %g", i, (double)got[i], (double)want[i]);
        }
    }
    note_closeness("attention of class fast", types[c->type], largest / 2, c->apart,
                   "the largest value");
}

static void attention_case(const Case *c, bool every_order)
{
    Numbers numbers = {c->head_size + c->n_heads};
    Memory m;
    CudaSegment segments[SEQUENCES];
    uint32_t rows = 0, longest = 0, max_keys = 0;
    fill_pages(c, &numbers, &m);
    for (unsigned s = 0; s < c->n_segments; s++) {
        segments[s] = (CudaSegment){rows, c->lengths[s], c->positions[s], s};
        rows += c->lengths[s];
        longest = c->lengths[s] > longest ? c->lengths[s] : longest;
        const uint32_t n_keys = c->positions[s] + c->lengths[s];
        max_keys = n_keys > max_keys ? n_keys : max_keys;
    }
    const size_t ld = c->n_heads * c->head_size + 5;
    float *q = padded_rows(&numbers, rows, c->n_heads * c->head_size, ld, -2, 2);
    float *want = malloc(rows * ld * sizeof *want), *got = malloc(rows * ld * sizeof *got);
    memset(want, 0xff, rows * ld * sizeof *want);
    specified(c, &m, q, ld, want);
    FOR_EACH_ORDER
    {
        if (order_ > 1 && !every_order) {
            break;
        }
        CudaAttention a = {.q = device_floats(q, rows * ld),
                           .q_ld = ld,
                           .out = device_floats(NULL, rows * ld),
                           .out_ld = ld,
                           .n_heads = c->n_heads,
                           .head_size = c->head_size,
                           .head_first = c->head_first,
                           .kv_first = c->kv_first,
                           .heads_per_kv = c->heads_per_kv,
                           .scale = 0.125f,
                           .window = c->window,
                           .fast = c->apart > 0,
                           .segments = device_of(segments, c->n_segments * sizeof segments[0]),
                           .n_segments = c->n_segments,
                           .longest_segment = longest,
                           .max_keys = max_keys};
        a.kv = (CudaKv){.type = c->type,
                        .n_kv_heads = c->n_kv,
                        .head_size = c->head_size,
                        .base = device_of(m.pages, PAGES * m.page),
                        .page_stride = m.page,
                        .head_stride = 2 * m.block,
                        .v_offset = m.block,
                        .tables = device_of(m.tables, sizeof m.tables),
                        .table_ld = TABLE};
        a.workspace_bytes = c->workspace != 0 ? c->workspace : weft_cuda_attention_bytes(&a);
        a.workspace = device_of(NULL, a.workspace_bytes + 1);
        run(weft_cuda_attention(&a, NULL));
        device_read(got, a.out, rows * ld * sizeof *got);
        if (c->apart > 0) {
            assert_near(c, got, want, rows * ld);
        } else {
            assert_bits("attention", got, want, rows * ld);
        }
        device_free_all();
    }
    free(q);
    free(want);
    free(got);
    free(m.pages);
}

/* Decoding: one row a sequence, one split and more. */
static void test_decoding(void **state)
{
    static const uint32_t sizes[] = {64, 48, 128, 256};
    for (unsigned type = 0; type < KV_TYPE_LIMIT; type++) {
        for (unsigned s = 0; s < 4; s++) {
            const Case c = {.type = (KvType)type,
                            .head_size = sizes[s],
                            .n_heads = s == 1 ? 2 : 6,
                            .n_kv = 2,
                            .heads_per_kv = s == 1 ? 1 : 3,
                            .n_segments = 3,
                            .lengths = {1, 1, 1},
                            .positions = {0, 37, s == type ? 1050 : 255}};
            attention_case(&c, sizes[s] == 64);
        }
    }
}

/* Chunks of rows, some of which end inside a page and a split, beside rows of other sequences. */
static void test_chunks(void **state)
{
    const Case chunks[] = {
        {.type = KV_F16,
         .head_size = 32,
         .n_heads = 4,
         .n_kv = 1,
         .heads_per_kv = 4,
         .n_segments = 3,
         .lengths = {5, 1, 13},
         .positions = {30, 3, 250}},
        {.type = KV_Q8,
         .head_size = 32,
         .n_heads = 3,
         .n_kv = 3,
         .heads_per_kv = 1,
         .n_segments = 2,
         .lengths = {9, 33},
         .positions = {0, 500}},
        {.type = KV_BF16,
         .head_size = 32,
         .n_heads = 12,
         .n_kv = 1,
         .heads_per_kv = 12,
         .n_segments = 1,
         .lengths = {3},
         .positions = {62}},
    };
    for (unsigned i = 0; i < sizeof chunks / sizeof chunks[0]; i++) {
        attention_case(&chunks[i], true);
    }
}

/* Keys older than the window do not exist; whole splits may lie behind it. */
static void test_window(void **state)
{
    static const uint32_t windows[] = {1, 31, 33, 300};
    for (unsigned i = 0; i < 4; i++) {
        const Case c = {.type = KV_F16,
                        .head_size = 64,
                        .n_heads = 2,
                        .n_kv = 1,
                        .heads_per_kv = 2,
                        .window = windows[i],
                        .n_segments = 2,
                        .lengths = {1, 6},
                        .positions = {600, 20}};
        attention_case(&c, false);
    }
}

/* A rank whose heads begin inside a group, and a workspace that holds one tile at a time. */
static void test_ranks_and_small_workspace(void **state)
{
    const Case c = {.type = KV_F32,
                    .head_size = 16,
                    .n_heads = 5,
                    .n_kv = 3,
                    .head_first = 6,
                    .kv_first = 1,
                    .heads_per_kv = 3,
                    .n_segments = 2,
                    .lengths = {4, 2},
                    .positions = {511, 9},
                    .workspace = 3 * 8 * 3 * 18 * sizeof(float)};
    attention_case(&c, true);
    const Case crooked = {.type = KV_F16,
                          .head_size = 16,
                          .n_heads = 4,
                          .n_kv = 3,
                          .head_first = 2,
                          .heads_per_kv = 2,
                          .kv_first = 0,
                          .n_segments = 1,
                          .lengths = {2},
                          .positions = {40}};
    attention_case(&crooked, true);
    CudaAttention none = {.head_size = 16,
                          .heads_per_kv = 1,
                          .n_heads = 1,
                          .max_keys = 600,
                          .n_segments = 1,
                          .longest_segment = 1};
    none.kv.n_kv_heads = 1;
    assert_int_not_equal(weft_cuda_attention(&none, NULL), 0); /* no workspace */
    none.head_size = 257;
    assert_int_not_equal(weft_cuda_attention(&none, NULL), 0);
}

/* Class fast: long segments by matrix instructions, short ones beside them. What it may differ by:
 * f16 and 8-bit caches 2^-9 of the largest value, bf16 2^-6. */
static void test_fast(void **state)
{
    const Case cases[] = {
        {.type = KV_F16, /* several tiles of items, keys over many turns */
         .head_size = 64,
         .n_heads = 4,
         .n_kv = 2,
         .heads_per_kv = 2,
         .n_segments = 2,
         .lengths = {150, 9},
         .positions = {70, 0}},
        {.type = KV_F16, /* beside decoding rows and a segment that is too short */
         .head_size = 128,
         .n_heads = 3,
         .n_kv = 1,
         .heads_per_kv = 3,
         .n_segments = 3,
         .lengths = {1, 45, 3},
         .positions = {300, 211, 40}},
        {.type = KV_BF16, /* an awkward head, a crooked group */
         .head_size = 80,
         .n_heads = 5,
         .n_kv = 3,
         .head_first = 3,
         .kv_first = 0,
         .heads_per_kv = 4,
         .n_segments = 1,
         .lengths = {33},
         .positions = {31}},
        {.type = KV_Q8,
         .head_size = 48,
         .n_heads = 12,
         .n_kv = 1,
         .heads_per_kv = 12,
         .n_segments = 2,
         .lengths = {17, 2},
         .positions = {500, 64}},
        {.type = KV_BF16, /* the widest head */
         .head_size = 256,
         .n_heads = 1,
         .n_kv = 1,
         .heads_per_kv = 1,
         .n_segments = 2,
         .lengths = {66, 1},
         .positions = {0, 33}},
        {.type = KV_F32, /* no such kernel: the other one */
         .head_size = 32,
         .n_heads = 1,
         .n_kv = 1,
         .heads_per_kv = 1,
         .n_segments = 1,
         .lengths = {40},
         .positions = {3}},
    };
    for (unsigned i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        static const uint32_t windows[] = {0, 1, 37};
        for (unsigned w = 0; w < 3; w++) {
            Case c = cases[i];
            c.apart = c.type == KV_BF16 ? 0x1p-6 : 0x1p-9;
            c.window = windows[w];
            attention_case(&c, w == 2);
        }
    }
}

int main(void)
{
    leave_without_device();
    generic = kernels_get(ISA_GENERIC);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decoding), cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_window),   cmocka_unit_test(test_ranks_and_small_workspace),
        cmocka_unit_test(test_fast),
    };
    return tell_closeness(cmocka_run_group_tests(tests, NULL, NULL));
}
