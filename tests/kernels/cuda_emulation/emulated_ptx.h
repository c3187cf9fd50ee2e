/* kernels/cuda/ptx.h lane by lane, with the fragments of its head comment. Included at the end of
 * the emulated cuda_runtime.h. */
#pragma once

struct EmulatedFragments {
    uint32_t a[4], b[2];
};

static inline const EmulatedSlot *emulated_fragments(const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    const EmulatedFragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    return emulated_gather("a matrix instruction", ~0u, &mine, sizeof mine);
}

/* c[i] += sum over k of product(A of row and k, B of k and column), both found in the registers of
 * the lanes that hold them: k runs over the quad's four lanes and each register's elements. */
template <typename Sum, typename Product>
static inline void emulated_mma(Sum c[4], const EmulatedSlot *slots, unsigned per_register,
                                const Product &product)
{
    const unsigned g = emulated_thread->lane / 4, t = emulated_thread->lane % 4;
    EmulatedFragments rows[4], columns[2][4];
    for (unsigned quad = 0; quad < 4; quad++) {
        std::memcpy(&rows[quad], slots[4 * g + quad], sizeof rows[quad]);
        std::memcpy(&columns[0][quad], slots[4 * (2 * t) + quad], sizeof rows[quad]);
        std::memcpy(&columns[1][quad], slots[4 * (2 * t + 1) + quad], sizeof rows[quad]);
    }
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned half = 0; half < 2; half++) {
            for (unsigned quad = 0; quad < 4; quad++) {
                const uint32_t a = rows[quad].a[2 * half + i / 2];
                const uint32_t b = columns[i % 2][quad].b[half];
                for (unsigned e = 0; e < per_register; e++) {
                    c[i] = product(c[i], a, b, e);
                }
            }
        }
    }
}

static inline void mma_u8_s8(int c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    emulated_mma(c, emulated_fragments(a, b0, b1), 4,
                 [](int sum, uint32_t x, uint32_t y, unsigned e) {
                     const int left = (int)(x >> 8 * e & 255u), right = (int8_t)(y >> 8 * e & 255u);
                     return (int)((unsigned)sum + (unsigned)(left * right));
                 });
}

float emulated_bf16(uint16_t bits);
float emulated_f16(uint16_t bits);
static inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    emulated_mma(c, emulated_fragments(a, b0, b1), 2,
                 [](float sum, uint32_t x, uint32_t y, unsigned e) {
                     return fmaf(emulated_bf16((uint16_t)(x >> 16 * e)),
                                 emulated_bf16((uint16_t)(y >> 16 * e)), sum);
                 });
}
static inline void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    emulated_mma(c, emulated_fragments(a, b0, b1), 2,
                 [](float sum, uint32_t x, uint32_t y, unsigned e) {
                     return fmaf(emulated_f16((uint16_t)(x >> 16 * e)),
                                 emulated_f16((uint16_t)(y >> 16 * e)), sum);
                 });
}

/* Row r of matrix m is where lane 8m + r points. */
static inline const uint16_t *emulated_row(const EmulatedSlot *slots, unsigned matrix, unsigned row)
{
    const uint16_t *at;
    std::memcpy(&at, slots[8 * matrix + row], sizeof at);
    return at;
}
static inline void load_matrices(uint32_t r[4], const void *row)
{
    emulated_check_aligned(row, 16);
    const EmulatedSlot *slots = emulated_gather("a load of matrices", ~0u, &row, sizeof row);
    const unsigned g = emulated_thread->lane / 4, t = emulated_thread->lane % 4;
    for (unsigned m = 0; m < 4; m++) {
        const uint16_t *at = emulated_row(slots, m, g) + 2 * t;
        r[m] = at[0] | (uint32_t)at[1] << 16;
    }
}
static inline void load_matrices_transposed(uint32_t r[4], const void *row)
{
    emulated_check_aligned(row, 16);
    const EmulatedSlot *slots = emulated_gather("a load of matrices", ~0u, &row, sizeof row);
    const unsigned g = emulated_thread->lane / 4, t = emulated_thread->lane % 4;
    for (unsigned m = 0; m < 4; m++) {
        r[m] = emulated_row(slots, m, 2 * t)[g] | (uint32_t)emulated_row(slots, m, 2 * t + 1)[g]
                                                      << 16;
    }
}
uint32_t emulated_to_bf16(float f);
uint32_t emulated_to_f16(float f);
static inline uint32_t pack_bf16(float low, float high)
{
    return emulated_to_bf16(low) | emulated_to_bf16(high) << 16;
}
static inline uint32_t pack_f16(float low, float high)
{
    return emulated_to_f16(low) | emulated_to_f16(high) << 16;
}
static inline uint32_t times_256(uint32_t both)
{
    return emulated_to_f16(emulated_f16((uint16_t)both) * 256) |
           emulated_to_f16(emulated_f16((uint16_t)(both >> 16)) * 256) << 16;
}
static inline float fast_exp2(float x)
{
    return exp2f(x);
}

/* The bytes come when they are waited for, not before. */
void copy_to_shared(void *shared, const void *global, bool there);
void commit_copies();
void emulated_wait_copies(unsigned under_way);
template <int N> static inline void wait_copies()
{
    emulated_wait_copies(N);
}
