#include "transport/link/buffer_pool.h"

#include "proto/base/checked.h"

#define SMALL_BYTES (1u << 20)
#define KEPT_LARGE 2u /* two sets, used in turn */

_Static_assert(sizeof(LinkBuffer) == 64, "the data behind the head is 64-byte aligned");

static size_t capacity_for(size_t size)
{
    size_t capacity = BUFFER_LEAST_BYTES;
    while (capacity < size) {
        capacity *= 2;
    }
    return capacity;
}

void buffer_free(LinkBuffer *buffer)
{
    weft_free(buffer);
}

/* Unlinks the smallest kept buffer that is large enough. */
static LinkBuffer *take_kept(BufferPool *pool, size_t size)
{
    LinkBuffer **best = NULL;
    for (LinkBuffer **at = &pool->free; *at != NULL; at = &(*at)->next) {
        if ((*at)->capacity >= size && (best == NULL || (*at)->capacity < (*best)->capacity)) {
            best = at;
        }
    }
    if (best == NULL) {
        return NULL;
    }
    LinkBuffer *buffer = *best;
    *best = buffer->next;
    pool->n_free--;
    return buffer;
}

bool buffer_pool_is_full(const BufferPool *pool, size_t size)
{
    return pool->n_out > 0 &&
           (pool->n_out >= pool->out_limit || pool->bytes_out + size > pool->bytes_out_limit);
}

LinkBuffer *buffer_pool_get(BufferPool *pool, size_t size)
{
    if (buffer_pool_is_full(pool, size)) {
        return NULL;
    }
    LinkBuffer *buffer = take_kept(pool, size);
    if (buffer == NULL) {
        size_t capacity = capacity_for(size);
        buffer = weft_alloc(1, sizeof *buffer + capacity, "a link buffer", NULL);
        if (buffer == NULL) {
            return NULL;
        }
        buffer->capacity = capacity;
    }
    buffer->next = NULL;
    buffer->size = size;
    pool->n_out++;
    pool->bytes_out += buffer->capacity;
    return buffer;
}

static unsigned count_large(const BufferPool *pool)
{
    unsigned n = 0;
    for (const LinkBuffer *b = pool->free; b != NULL; b = b->next) {
        n += b->capacity > SMALL_BYTES;
    }
    return n;
}

void buffer_pool_put(BufferPool *pool, LinkBuffer *buffer)
{
    pool->n_out--;
    pool->bytes_out -= buffer->capacity;
    unsigned n_large = count_large(pool);
    bool keep = buffer->capacity > SMALL_BYTES ? n_large < KEPT_LARGE
                                               : pool->n_free - n_large < BUFFER_POOL_KEPT;
    if (!keep) {
        buffer_free(buffer);
        return;
    }
    buffer->next = pool->free;
    pool->free = buffer;
    pool->n_free++;
}

void buffer_pool_clear(BufferPool *pool)
{
    while (pool->free != NULL) {
        LinkBuffer *buffer = pool->free;
        pool->free = buffer->next;
        buffer_free(buffer);
    }
    pool->n_free = 0;
}
