/* Tokenizer: text to ids and back, from a model file's own vocabulary: byte-level BPE (gpt2 family,
 * with the file's pre-tokenizer pattern) and SentencePiece (llama: unigram scores merged greedily,
 * byte fallback). Immutable after load; any thread. */
#pragma once

#include "proto/model/gguf.h"

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Tokenizer Tokenizer;

/* From tokenizer.ggml.*; INVALID names the key, value and what is supported. */
Tokenizer *tokenizer_from_gguf(const Gguf *g, GError **error);
void tokenizer_free(Tokenizer *t);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(Tokenizer, tokenizer_free)

/* Any bytes (invalid UTF-8 is tokenized byte by byte). add_bos: prepend BOS if the model wants one.
 * parse_special: control tokens in the text
 * ("<|im_start|>") become their ids; else they are plain text. Returned GArray of uint32_t. Linear
 * time; error only for absurd sizes. */
GArray *tokenizer_encode(const Tokenizer *t, const char *text, size_t length, bool add_bos,
                         bool parse_special, GError **error);

/* The same, but TOO_LONG as soon as it is plain that there are more than `most` tokens, 0 = any
 * number: a text of which a small part would do is not read to its end. Up to four times as many
 * are still given out, so that it can be said how many there are. */
GArray *tokenizer_encode_most(const Tokenizer *t, const char *text, size_t length, bool add_bos,
                              bool parse_special, uint32_t most, GError **error);

/* Bytes of one token as it appears in text (control tokens: their text when `special`, else
 * nothing). Borrowed. */
const char *tokenizer_piece(const Tokenizer *t, uint32_t id, bool special, size_t *length_out);
uint32_t tokenizer_size(const Tokenizer *t);
/* -1 if the model has none. */
int64_t tokenizer_bos(const Tokenizer *t);
int64_t tokenizer_eos(const Tokenizer *t);
bool tokenizer_adds_bos(const Tokenizer *t);
bool tokenizer_is_control(const Tokenizer *t, uint32_t id);
/* Ids that end a generation: eos, eot, eom, and control tokens named like them (<|im_end|>,
 * <|eot_id|>, <|endoftext|>, ...). Borrowed. */
const uint32_t *tokenizer_end_ids(const Tokenizer *t, uint32_t *n_out);

/* Incremental decoding: ids to complete UTF-8 characters. Bytes that cannot become a character are
 * given out as U+FFFD; at most 3 bytes are held back. SentencePiece's leading space is dropped
 * once, at the start of a text that begins the sequence. */
typedef struct Detokenizer Detokenizer;
Detokenizer *detokenizer_new(const Tokenizer *t, bool special);
void detokenizer_free(Detokenizer *d);
/* Appends the text that became complete with this id. */
void detokenizer_push(Detokenizer *d, uint32_t id, GString *out);
/* What is held back, as U+FFFD. */
void detokenizer_finish(Detokenizer *d, GString *out);
