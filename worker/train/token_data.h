/* Training data: a text as ids, cut into windows of `length` tokens, each with the next token of
 * every position as its target. Which window a sample is, is a pure function of (seed, sample):
 * epochs go through all windows once, each in an order of its own. Immutable; any thread. */
#pragma once

#include "proto/text/tokenizer.h"
#include "worker/train/sample_source.h"

typedef struct TokenData TokenData;

/* ids: copied. INVALID: fewer ids than a window and its last target take. Returned. */
TokenData *token_data_new(const uint32_t *ids, size_t n, uint32_t length, GError **error);
/* A text file: its tokens, or its bytes when there is no tokenizer (borrowed for the call). */
TokenData *token_data_load(const char *path, const Tokenizer *tokenizer, uint32_t length,
                           GError **error);
void token_data_free(TokenData *d); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(TokenData, token_data_free)

uint64_t token_data_windows(const TokenData *d);
/* 1 + the highest id: what a vocabulary must hold. */
uint32_t token_data_vocabulary(const TokenData *d);
/* The window of sample number `sample` (0, 1, ... over all steps). */
uint64_t token_data_window_of(const TokenData *d, uint64_t seed, uint64_t sample);
/* Its tokens and targets, `length` each. */
void token_data_read(const TokenData *d, uint64_t window, uint32_t *tokens, uint32_t *targets);

/* Windows as samples: by the order of a seed, or in the text's own order (validation). */
typedef struct TokenSamples {
    const TokenData *data; /* borrowed */
    uint64_t seed;
    bool in_order;
} TokenSamples;
/* Borrows `samples`. */
SampleSource token_samples_source(TokenSamples *samples);
