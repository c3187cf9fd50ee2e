/* TokenizerVocab: what a model file says about its tokens, before anything is checked.
 * tokenizer_from_gguf() fills it from a file, tests by hand. */
#pragma once

#include "proto/text/tokenizer.h"

/* tokenizer.ggml.token_type */
typedef enum TokenKind {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER_DEFINED = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
} TokenKind;

typedef struct VocabText {
    const char *text; /* not NUL-terminated, any bytes */
    size_t length;
} VocabText;

typedef enum VocabChoice { VOCAB_DEFAULT = -1, VOCAB_NO = 0, VOCAB_YES = 1 } VocabChoice;

/* Which pieces of a text, cut at special tokens, get a space before them. */
typedef enum SpacePrefix {
    SPACE_PREFIX_DEFAULT = -1,
    SPACE_PREFIX_NEVER = 0,
    SPACE_PREFIX_ALWAYS = 1,
    SPACE_PREFIX_FIRST = 2, /* what a text begins with, if that is no space */
} SpacePrefix;

typedef struct TokenizerVocab {
    const char *model, *pre; /* pre: NULL if the file has none */
    uint64_t n_tokens, n_merges;
    const VocabText *tokens;         /* n_tokens */
    const int64_t *kinds;            /* n_tokens or NULL */
    const double *scores;            /* n_tokens or NULL */
    const VocabText *merges;         /* n_merges: "left right" */
    int64_t bos, eos, eot, eom, unk; /* -1: none */
    VocabChoice adds_bos;
    SpacePrefix space_prefix;
} TokenizerVocab;

/* Copies what it needs (all borrowed). INVALID names the key, the value and what is supported;
 * MEMORY. */
Tokenizer *tokenizer_from_vocab(const TokenizerVocab *vocab, GError **error);

/* What tokenizer.ggml.* of a model file says; points into the file. */
typedef struct GgufVocab {
    TokenizerVocab vocab;
    VocabText *tokens, *merges;
    int64_t *kinds;
    double *scores;
    char *model, *pre;
} GgufVocab;
/* INVALID names the key; also if the file has no tokenizer. Cleared in any case. */
bool gguf_vocab_read(const Gguf *g, GgufVocab *out, GError **error);
void gguf_vocab_clear(GgufVocab *v);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(GgufVocab, gguf_vocab_clear)
