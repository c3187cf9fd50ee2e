/* Keys of the data plane (DESIGN 7.4): HKDF-SHA256(secret, info = "weft link" | generation | job |
 * replica | epoch | sender's boot id | receiver's boot id | sender rank | receiver rank). Directed:
 * sender and receiver derive the same key for that direction. */
#pragma once

#include <stdint.h>
#include <stddef.h>

typedef struct KeyScope {
    uint64_t generation, epoch;
    const char *job;
    uint32_t replica;
} KeyScope;

#define BOOT_ID_BYTES 16u
#define EPOCH_SECRET_BYTES 32u

void keys_derive(const uint8_t secret[EPOCH_SECRET_BYTES], const KeyScope *scope,
                 const uint8_t sender_boot[BOOT_ID_BYTES],
                 const uint8_t receiver_boot[BOOT_ID_BYTES], uint32_t sender_rank,
                 uint32_t receiver_rank, uint8_t key_out[32]);
/* The link's handle: the same on both ends, differs for each (scope, pair). */
uint64_t keys_handle(const uint8_t secret[EPOCH_SECRET_BYTES], const KeyScope *scope,
                     uint32_t rank_a, uint32_t rank_b);
/* Overwrites memory so that the compiler cannot leave it out. */
void keys_erase(void *data, size_t size);
