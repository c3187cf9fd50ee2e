/* BufferPool: the datagram buffers of one sender, kept and used again so that the steady state
 * allocates nothing. No lock of its own. The fills hand out buffer_data() and find the LinkBuffer
 * before it again. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* 64 bytes, then the data, 64-byte aligned. */
typedef struct LinkBuffer {
    struct LinkBuffer *next;
    size_t capacity, size;
    uint64_t tag; /* for the fill */
    void *owner;  /* for the fill */
    size_t head;  /* for the fill */
    uint64_t unused[2];
} LinkBuffer;

#define BUFFER_POOL_KEPT 16u /* of at most 1 MiB: a decode step's messages in flight */

typedef struct BufferPool {
    LinkBuffer *free;
    unsigned n_free, n_out;
    size_t bytes_out;
    unsigned out_limit;     /* buffers in flight */
    size_t bytes_out_limit; /* bytes in flight; one buffer may always be out */
} BufferPool;

static inline void *buffer_data(LinkBuffer *buffer)
{
    return buffer + 1;
}
static inline LinkBuffer *buffer_of(void *data)
{
    return (LinkBuffer *)data - 1;
}

#define BUFFER_LEAST_BYTES 512u /* what the smallest has room for; others are powers of two */

/* A buffer of at least size bytes, or NULL when the limits are reached or memory is short. */
LinkBuffer *buffer_pool_get(BufferPool *pool, size_t size);
/* The limits leave no room for one of so many bytes. */
bool buffer_pool_is_full(const BufferPool *pool, size_t size);
/* Gives it back; kept for the next get unless enough are. */
void buffer_pool_put(BufferPool *pool, LinkBuffer *buffer);
/* Frees those that are kept; those still out are their holder's to buffer_free(). */
void buffer_pool_clear(BufferPool *pool);
void buffer_free(LinkBuffer *buffer);
