/* XXH3-128 without a seed (its specification: doc/xxhash_spec.md of xxHash 0.8) of more than 240
 * bytes: what hash128() gives. A warp a hash. Included by .cu files only.
 *
 * Eight 64-bit accumulators take stripes of 64 bytes, each its own 8 bytes and its neighbour's, and
 * are scrambled after each block of 16 stripes; the last 64 bytes are one more stripe. Lanes 0 to 7
 * hold them, the others repeat what these do. */
#pragma once

#include "kernels/cuda/device.h"

#define XXH_PRIME32_1 0x9E3779B1u
#define XXH_PRIME32_2 0x85EBCA77u
#define XXH_PRIME32_3 0xC2B2AE3Du
#define XXH_PRIME64_1 0x9E3779B185EBCA87u
#define XXH_PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define XXH_PRIME64_3 0x165667B19E3779F9u
#define XXH_PRIME64_4 0x85EBCA77C2B2AE63u
#define XXH_PRIME64_5 0x27D4EB2F165667C5u
enum { XXH_STRIPE_WORDS = 16, XXH_BLOCK_STRIPES = 16 };

/* The default secret, 192 bytes, little-endian. */
static __device__ const uint64_t XXH_SECRET[24] = {
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u,
    0x78e5c0cc4ee679cbu, 0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u,
    0xcb00c391bb52283cu, 0xa32e531b8b65d088u, 0x4ef90da297486471u, 0xd8acdea946ef1938u,
    0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, 0x647378d9c97e9fc8u,
    0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu,
};

__device__ __forceinline__ uint64_t xxh_secret(unsigned byte)
{
    const unsigned word = byte / 8, shift = byte % 8 * 8;
    const uint64_t low = XXH_SECRET[word] >> shift;
    return shift == 0 ? low : low | XXH_SECRET[word + 1] << (64 - shift);
}

__device__ __forceinline__ uint64_t xxh_avalanche(uint64_t h)
{
    h ^= h >> 37;
    h *= 0x165667919E3779F9u;
    return h ^ h >> 32;
}

/* One stripe: this lane's 8 bytes are words 2 i and 2 i + 1 behind `words`. */
__device__ __forceinline__ void xxh_accumulate(uint64_t *acc, const uint32_t *words, unsigned i,
                                               unsigned secret)
{
    const uint64_t value = words[2 * i] | (uint64_t)words[2 * i + 1] << 32;
    const uint64_t key = value ^ xxh_secret(secret + 8 * i);
    *acc += __shfl_xor_sync(ALL_LANES, value, 1);
    *acc += (uint64_t)(uint32_t)key * (uint32_t)(key >> 32);
}

__device__ static uint64_t xxh_merge(const uint64_t acc[8], unsigned secret, uint64_t start)
{
    for (unsigned i = 0; i < 8; i += 2) {
        const uint64_t a = acc[i] ^ xxh_secret(secret + 8 * i);
        const uint64_t b = acc[i + 1] ^ xxh_secret(secret + 8 * i + 8);
        start += (a * b) ^ __umul64hi(a, b);
    }
    return xxh_avalanche(start);
}

__device__ static void xxh_put(uint8_t *to, uint64_t big_endian)
{
    for (unsigned i = 0; i < 8; i++) {
        to[i] = (uint8_t)(big_endian >> (56 - 8 * i));
    }
}

/* The digest of n (> 60) floats, by lane 0. */
__device__ static void xxh3_128(const float *data, uint32_t n, uint8_t digest[16])
{
    const uint32_t *words = reinterpret_cast<const uint32_t *>(data);
    const unsigned i = lane_index() % 8;
    const uint64_t first[8] = {XXH_PRIME32_3, XXH_PRIME64_1, XXH_PRIME64_2, XXH_PRIME64_3,
                               XXH_PRIME64_4, XXH_PRIME32_2, XXH_PRIME64_5, XXH_PRIME32_1};
    const uint32_t n_stripes = (n - 1) / XXH_STRIPE_WORDS; /* the last one is done by itself */
    uint64_t acc = first[i], all[8];
    for (uint32_t stripe = 0; stripe < n_stripes; stripe++) {
        xxh_accumulate(&acc, words + stripe * XXH_STRIPE_WORDS, i, stripe % XXH_BLOCK_STRIPES * 8);
        if ((stripe + 1) % XXH_BLOCK_STRIPES == 0) {
            acc ^= acc >> 47;
            acc ^= xxh_secret(128 + 8 * i);
            acc *= XXH_PRIME32_1;
        }
    }
    xxh_accumulate(&acc, words + n - XXH_STRIPE_WORDS, i, 121);
    for (unsigned j = 0; j < 8; j++) {
        all[j] = __shfl_sync(ALL_LANES, acc, j);
    }
    if (lane_index() == 0) {
        const uint64_t bytes = (uint64_t)n * sizeof(float);
        xxh_put(digest, xxh_merge(all, 117, ~(bytes * XXH_PRIME64_2)));
        xxh_put(digest + 8, xxh_merge(all, 11, bytes * XXH_PRIME64_1));
    }
}
