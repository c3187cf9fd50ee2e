/* Training of a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909, over bytes as in GPT-2):
 * words by GPT-2's pattern; from the 256 bytes on, the pair of neighbours that is most frequent
 * over all words becomes a token, of equally frequent ones that with the lowest ids, until there
 * are enough or no pair is there twice. Which tokens come out is a function of the text alone. */
#pragma once

#include "proto/text/tokenizer_vocab.h"

#define BPE_END_OF_TEXT "<|endoftext|>"

/* The vocabulary: 256 bytes in the order of their characters, merges, and last the end of a text,
 * a control token. Owns what `vocab` points to. */
typedef struct BpeVocab BpeVocab;

typedef struct BpeTrainer BpeTrainer;
BpeTrainer *bpe_trainer_new(GError **error);
/* Counts the words of a text; any bytes, any number of calls. A document goes in at once: words do
 * not span two calls. INVALID for a word that the pattern cannot cut (none is known). */
bool bpe_trainer_add(BpeTrainer *t, const char *text, size_t length, GError **error);
/* At most `size` tokens, 257 or more. Returned; the trainer is used up but not freed. */
BpeVocab *bpe_trainer_finish(BpeTrainer *t, uint32_t size, GError **error);
void bpe_trainer_free(BpeTrainer *t); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BpeTrainer, bpe_trainer_free)

/* Borrowed. */
const TokenizerVocab *bpe_vocab_get(const BpeVocab *v);
void bpe_vocab_free(BpeVocab *v); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(BpeVocab, bpe_vocab_free)
