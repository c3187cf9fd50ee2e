/* A candidate is stale when one of its symbols has been joined since. Symbols only grow or vanish,
 * so a candidate is alive exactly if its left symbol still exists and its length and that of the
 * next one add up to what they did: no generation counter is needed.
 *
 * The heap never holds more than 2n: n - 1 pairs at the start, and each of at most n - 1 merges
 * takes one away and adds two. */
#include "proto/text/merge_queue.h"

#include "proto/base/checked.h"

#define NONE UINT32_MAX

/* Below this, words are given twice the room that they need, so that a few allocations serve a
 * whole text. */
enum { ROOM_TO_SPARE = 65536 };

bool merge_queue_reset(MergeQueue *queue, size_t n, GError **error)
{
    queue->n_symbols = queue->n_heap = 0;
    if (n <= queue->capacity) {
        return true;
    }
    size_t capacity = n < ROOM_TO_SPARE ? MAX(2 * n, 64) : n;
    merge_queue_clear(queue);
    queue->symbols =
        weft_alloc(capacity, sizeof *queue->symbols, "symbols of the tokenizer", error);
    queue->heap = queue->symbols != NULL ? weft_alloc(capacity, 2 * sizeof *queue->heap,
                                                      "merges of the tokenizer", error)
                                         : NULL;
    if (queue->heap == NULL) {
        merge_queue_clear(queue);
        return false;
    }
    queue->capacity = (uint32_t)capacity;
    return true;
}

void merge_queue_clear(MergeQueue *queue)
{
    weft_free(queue->symbols);
    weft_free(queue->heap);
    *queue = (MergeQueue){0};
}

void merge_queue_push(MergeQueue *queue, uint32_t start, uint32_t length, uint32_t id)
{
    g_assert(queue->n_symbols < queue->capacity);
    uint32_t at = queue->n_symbols++;
    queue->symbols[at] = (MergeSymbol){.start = start,
                                       .length = length,
                                       .id = id,
                                       .previous = at == 0 ? NONE : at - 1,
                                       .next = NONE};
    if (at > 0) {
        queue->symbols[at - 1].next = at;
    }
}

static void heap_push(MergeQueue *queue, MergeCandidate candidate)
{
    uint32_t at = queue->n_heap++;
    while (at > 0 && queue->heap[(at - 1) / 2].key > candidate.key) {
        queue->heap[at] = queue->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    queue->heap[at] = candidate;
}

static MergeCandidate heap_pop(MergeQueue *queue)
{
    MergeCandidate top = queue->heap[0], last = queue->heap[--queue->n_heap];
    uint32_t at = 0;
    for (uint32_t child = 1; child < queue->n_heap; child = 2 * at + 1) {
        if (child + 1 < queue->n_heap && queue->heap[child + 1].key < queue->heap[child].key) {
            child++;
        }
        if (queue->heap[child].key >= last.key) {
            break;
        }
        queue->heap[at] = queue->heap[child];
        at = child;
    }
    queue->heap[at] = last;
    return top;
}

static void merge_queue_consider(MergeQueue *queue, uint32_t left, uint32_t right, MergeRule rule,
                                 void *user)
{
    if (left == NONE || right == NONE) {
        return;
    }
    const MergeSymbol *l = &queue->symbols[left], *r = &queue->symbols[right];
    uint32_t order, id;
    if (rule(user, l, r, &order, &id)) {
        heap_push(queue, (MergeCandidate){.key = (uint64_t)order << 32 | left,
                                          .id = id,
                                          .length = l->length + r->length});
    }
}

void merge_queue_run(MergeQueue *queue, MergeRule rule, void *user)
{
    for (uint32_t i = 0; i + 1 < queue->n_symbols; i++) {
        merge_queue_consider(queue, i, i + 1, rule, user);
    }
    while (queue->n_heap > 0) {
        MergeCandidate best = heap_pop(queue);
        uint32_t at = (uint32_t)best.key;
        MergeSymbol *left = &queue->symbols[at];
        if (left->length == 0 || left->next == NONE ||
            left->length + queue->symbols[left->next].length != best.length) {
            continue;
        }
        MergeSymbol *right = &queue->symbols[left->next];
        left->length = best.length;
        left->id = best.id;
        left->next = right->next;
        right->length = 0;
        if (left->next != NONE) {
            queue->symbols[left->next].previous = at;
        }
        merge_queue_consider(queue, left->previous, at, rule, user);
        merge_queue_consider(queue, at, left->next, rule, user);
    }
}
