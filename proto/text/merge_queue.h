/* MergeQueue: the greedy merging that both tokenizers share. Neighbouring symbols are joined, best
 * pair first (lowest order, then leftmost), until no pair can be; a binary heap over a linked list
 * makes it O(n log n) for a text without any break. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MERGE_NO_ID UINT32_MAX

/* A run of bytes of the text. length 0: eaten by its left neighbour. */
typedef struct MergeSymbol {
    uint32_t start, length;
    uint32_t id;             /* MERGE_NO_ID where no token has this text */
    uint32_t previous, next; /* indices, UINT32_MAX at the ends */
} MergeSymbol;

/* Whether two neighbours may be joined, in what order (lower first) and into which token. */
typedef bool (*MergeRule)(void *user, const MergeSymbol *left, const MergeSymbol *right,
                          uint32_t *order_out, uint32_t *id_out);

typedef struct MergeCandidate {
    uint64_t key;        /* order, then index of the left symbol */
    uint32_t id, length; /* of the joined symbol */
} MergeCandidate;

/* Scratch of one encoding, reused from word to word. */
typedef struct MergeQueue {
    MergeSymbol *symbols; /* symbols[0..n): the first is never eaten, so the result starts there */
    MergeCandidate *heap; /* 2 * capacity */
    uint32_t n_symbols, n_heap, capacity;
} MergeQueue;

/* Makes room for n symbols and forgets the old ones; MEMORY on failure. */
bool merge_queue_reset(MergeQueue *queue, size_t n, GError **error);
void merge_queue_clear(MergeQueue *queue);
/* Appends a symbol (within the room that reset made). */
void merge_queue_push(MergeQueue *queue, uint32_t start, uint32_t length, uint32_t id);
/* Merges; the result is the list from symbols[0] along next. */
void merge_queue_run(MergeQueue *queue, MergeRule rule, void *user);
