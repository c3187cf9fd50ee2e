/* A cut of a text is one into two texts when its left part is a text that begins it and its right
 * part one that ends it. Sorted by their bytes, every text that begins another one stands before
 * it, and begins all that stand between the two. So those that begin a text are the previous text
 * and those that begin that one, as far as they are no longer than what both texts share; each text
 * keeps the longest of its own. Sorted by their bytes from the end, the same holds of those that
 * end a text. */
#include "proto/text/token_halves.h"

#include <stdlib.h>

/* From which end the bytes of a text are read. */
typedef enum Side { HEAD, TAIL, N_SIDES } Side;

typedef struct Piece {
    VocabText all;
    const struct Piece *longest[N_SIDES]; /* of the others that begin and end it; NULL = none */
} Piece;

static char byte_at(const VocabText *text, size_t i, Side side)
{
    return text->text[side == HEAD ? i : text->length - i - 1];
}

static size_t count_shared(const VocabText *a, const VocabText *b, Side side)
{
    const size_t limit = MIN(a->length, b->length);
    size_t n = 0;
    while (n < limit && byte_at(a, n, side) == byte_at(b, n, side)) {
        n++;
    }
    return n;
}

static int compare(const VocabText *a, const VocabText *b, Side side)
{
    const size_t n = count_shared(a, b, side);
    if (n == a->length || n == b->length) {
        return (a->length > b->length) - (a->length < b->length);
    }
    return byte_at(a, n, side) < byte_at(b, n, side) ? -1 : 1;
}

static int compare_heads(const void *a, const void *b)
{
    return compare(&(*(const Piece *const *)a)->all, &(*(const Piece *const *)b)->all, HEAD);
}

static int compare_tails(const void *a, const void *b)
{
    return compare(&(*(const Piece *const *)a)->all, &(*(const Piece *const *)b)->all, TAIL);
}

static void find_longest(Piece **order, uint64_t n, Side side)
{
    qsort(order, n, sizeof *order, side == HEAD ? compare_heads : compare_tails);
    for (uint64_t i = 1; i < n; i++) {
        const size_t shared = count_shared(&order[i - 1]->all, &order[i]->all, side);
        const Piece *longest = order[i - 1];
        while (longest != NULL && longest->all.length > shared) {
            longest = longest->longest[side];
        }
        order[i]->longest[side] = longest;
    }
}

/* tails: scratch. Heads come by falling length, so the tails that complete them by rising one. */
static uint64_t halves_of(const Piece *piece, GArray *tails)
{
    uint64_t n = 0;
    g_array_set_size(tails, 0);
    for (const Piece *tail = piece->longest[TAIL]; tail != NULL; tail = tail->longest[TAIL]) {
        g_array_append_val(tails, tail->all.length);
    }
    guint left = tails->len;
    for (const Piece *head = piece->longest[HEAD]; head != NULL && left > 0;
         head = head->longest[HEAD]) {
        const size_t rest = piece->all.length - head->all.length;
        while (left > 0 && g_array_index(tails, size_t, left - 1) < rest) {
            left--;
        }
        n += left > 0 && g_array_index(tails, size_t, left - 1) == rest;
    }
    return n;
}

uint64_t token_halves_count(const VocabText *texts, uint64_t n)
{
    g_autofree Piece *pieces = g_new0(Piece, MAX(n, 1));
    g_autofree Piece **order = g_new(Piece *, MAX(n, 1));
    g_autoptr(GArray) tails = g_array_new(FALSE, FALSE, sizeof(size_t));
    uint64_t n_halves = 0;
    for (uint64_t i = 0; i < n; i++) {
        pieces[i].all = texts[i];
        order[i] = &pieces[i];
    }
    find_longest(order, n, HEAD);
    find_longest(order, n, TAIL);
    for (uint64_t i = 0; i < n; i++) {
        n_halves += halves_of(&pieces[i], tails);
    }
    return n_halves;
}
