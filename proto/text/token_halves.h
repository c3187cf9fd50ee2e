/* In how many ways tokens can be made of two others: SentencePiece's vocabulary has a merge for
 * each. Work is near-linear in the texts' bytes, however long one is. */
#pragma once

#include "proto/text/tokenizer_vocab.h"

/* Of all cuts of all texts into two that are not empty, those into two of the texts. texts: n,
 * no two equal, any bytes. */
uint64_t token_halves_count(const VocabText *texts, uint64_t n);
