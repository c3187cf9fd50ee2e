/* PreTokenizer: cuts text into the words inside which byte-level BPE merges. A model file names its
 * rules (tokenizer.ggml.pre); the rules themselves are the model makers' own regular expressions,
 * applied in stages: each cuts the pieces of the one before into matches and what lies between.
 * Immutable after load; any thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct PreTokenizer PreTokenizer;
typedef struct PreTokenizerScratch PreTokenizerScratch;

/* INVALID with the names that are known. */
PreTokenizer *pre_tokenizer_new(const char *name, GError **error);
void pre_tokenizer_free(PreTokenizer *pre);
/* The file's rules want NFC first (qwen2). */
bool pre_tokenizer_normalizes(const PreTokenizer *pre);
/* A word that is a token as a whole is that token, whatever the merges say (llama-bpe). */
bool pre_tokenizer_ignores_merges(const PreTokenizer *pre);
/* BOS is prepended where the file does not say (llama-bpe). */
bool pre_tokenizer_adds_bos(const PreTokenizer *pre);

/* Working memory of one thread's calls; freed with its function. MEMORY. */
PreTokenizerScratch *pre_tokenizer_scratch_new(GError **error);
void pre_tokenizer_scratch_free(PreTokenizerScratch *scratch);

typedef bool (*PreTokenizerWord)(void *user, const char *word, size_t length, GError **error);
/* Calls `word` for each piece of well-formed UTF-8, in order, without gap or overlap. INVALID if a
 * pattern runs into its limits. */
bool pre_tokenizer_split(const PreTokenizer *pre, PreTokenizerScratch *scratch, const char *text,
                         size_t length, PreTokenizerWord word, void *user, GError **error);
