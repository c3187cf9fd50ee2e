/* The loaded tokenizer, shared by the files that build it and those that encode with it. Private to
 * proto/text. */
#pragma once

#include "proto/text/merge_queue.h"
#include "proto/text/pre_tokenizer.h"
#include "proto/text/token_table.h"
#include "proto/text/tokenizer_vocab.h"

/* More than any context window holds. A text without a break takes about 52 bytes for each of its
 * own while it is merged. */
#define TOKENIZER_TEXT_MAX (16u << 20)
#define TOKENIZER_TOKENS_MAX (4u << 20)
#define TOKENIZER_TOKEN_BYTES_MAX 4096u

/* Pair of token ids -> merge. Open addressing; order UINT32_MAX marks an empty slot. */
typedef struct MergePair {
    uint32_t left, right, order, id;
} MergePair;

struct Tokenizer {
    bool is_bpe; /* byte-level BPE, else SentencePiece */
    bool adds_bos, has_unused;
    SpacePrefix space_prefix; /* never DEFAULT */
    uint32_t n_tokens;
    int64_t bos, eos, unk;

    GByteArray *texts,
        *pieces; /* blobs: tokens as the vocabulary spells them and as text has them */
    TextSlice *text_slices, *piece_slices; /* n_tokens each */
    uint8_t *kinds;                        /* n_tokens, TokenKind */
    int64_t byte_ids[256];                 /* token of one byte, -1 if none */
    uint32_t longest; /* bytes that one token stands for, as an encoder sees texts: at most these */
    bool spells_bytes; /* every byte is a token: none is dropped from a text */

    /* Sorted by piece: user-defined tokens, which are cut out of every text; and those together
     * with control tokens. */
    uint32_t *always_special, *all_special;
    uint32_t n_always_special, n_all_special;

    uint32_t *end_ids;
    uint32_t n_end_ids;

    /* byte-level BPE */
    PreTokenizer *pre;
    MergePair *pairs;
    uint32_t pair_mask;
    TokenTable by_piece; /* only where words are looked up whole */

    /* SentencePiece */
    TokenTable by_text;    /* normal, user-defined, unused */
    uint32_t *score_order; /* n_tokens: 0 = highest score, equal scores share a number */
};

typedef struct EncodeRun {
    const Tokenizer *tokenizer;
    GArray *ids;   /* uint32_t */
    uint32_t most; /* of them; 0: any number */
    bool begun;    /* some of the text is behind */
    MergeQueue queue;
    PreTokenizerScratch *scratch; /* BPE */
    GString *normalized;
} EncodeRun;

/* False: there are, or with `length` bytes more of a text will be, too many ids. */
bool tokenizer_has_room(const EncodeRun *run, size_t length, GError **error);
/* What is left of a text once special tokens are cut out of it, as ids. */
bool tokenizer_bpe_encode(EncodeRun *run, const char *text, size_t length, GError **error);
bool tokenizer_spm_encode(EncodeRun *run, const char *text, size_t length, GError **error);
/* The model's own tables, after texts, pieces and kinds are there. */
bool tokenizer_bpe_build(Tokenizer *t, const TokenizerVocab *vocab, GError **error);
bool tokenizer_spm_build(Tokenizer *t, const TokenizerVocab *vocab, GError **error);
/* Appends the text form of a token to pieces. */
void tokenizer_bpe_append_piece(const Tokenizer *t, uint32_t id, const char *text, size_t length);
void tokenizer_spm_append_piece(const Tokenizer *t, uint32_t id, const char *text, size_t length);
/* "<0x41>" -> 65; -1 for anything else. */
int tokenizer_spm_byte(const char *text, size_t length);
