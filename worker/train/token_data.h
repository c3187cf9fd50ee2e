/* Training data: ids in windows of `length` tokens, each with the next token of every position as
 * its target. Which window a sample is, is a pure function of (seed, sample):
 * epochs go through all windows once, each in an order of its own. Immutable; any thread. */
#pragma once

#include "proto/text/documents.h"
#include "worker/train/sample_source.h"

typedef struct TokenData TokenData;

/* stream: windows of the whole text, documents or not. documents: a window holds whole documents in
 * order, as many as fit; one that is longer than a window is cut into several; what is left of a
 * window has no targets, and no target lies in another document. */
typedef enum TokenPacking { TOKENS_STREAM, TOKENS_DOCUMENTS } TokenPacking;

/* ids: copied. INVALID: fewer ids than a window and its last target take. Returned. */
TokenData *token_data_new(const uint32_t *ids, size_t n, uint32_t length, GError **error);
/* The ids of documents (copied), those without LOSS as no targets. INVALID as above. */
TokenData *token_data_from(const Documents *documents, uint32_t length, TokenPacking packing,
                           GError **error);
void token_data_free(TokenData *d); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TokenData, token_data_free)

/* Bytes that n tokens take. */
static inline uint64_t token_data_bytes(uint64_t n)
{
    return n * (sizeof(uint32_t) + sizeof(uint8_t));
}
uint64_t token_data_windows(const TokenData *d);
/* The window of sample number `sample` (0, 1, ... over all steps). */
uint64_t token_data_window_of(const TokenData *d, uint64_t seed, uint64_t sample);
/* Its tokens and targets, `length` each; TARGET_NONE (training.h) where there is none. */
void token_data_read(const TokenData *d, uint64_t window, uint32_t *tokens, uint32_t *targets);
/* The position at which the document of each of its positions begins; what fills the window up is
 * one more document. */
void token_data_begins(const TokenData *d, uint64_t window, uint32_t *begins);

/* What stays inside a window's documents: nothing; attention; attention, and positions begin anew
 * with each. */
typedef enum TokenBounds { BOUNDS_NONE, BOUNDS_ATTENTION, BOUNDS_POSITIONS } TokenBounds;

/* Windows as samples: by the order of a seed, or in the text's own order (validation). */
typedef struct TokenSamples {
    const TokenData *data; /* borrowed */
    uint64_t seed;
    bool in_order;
    TokenBounds bounds;
} TokenSamples;
/* Borrows `samples`. */
SampleSource token_samples_source(TokenSamples *samples);
