/* tokenizer.json (Hugging Face tokenizers) of byte-level BPE, to a vocabulary and back, and of
 * SentencePiece's BPE (Llama 2's, Mistral's), to a vocabulary. What would cut texts otherwise than
 * the file says (a normalizer, another pre-tokenizer, another model) is refused by name. */
#pragma once

#include "proto/text/tokenizer_vocab.h"

/* Owns what its vocabulary points to. */
typedef struct JsonVocab JsonVocab;

/* text: tokenizer.json; config: tokenizer_config.json, which says what begins and ends a text, or
 * NULL. INVALID. Returned. */
JsonVocab *json_vocab_parse(const char *text, size_t length, const char *config,
                            size_t config_length, GError **error);
/* The file, or the one in the directory, with its tokenizer_config.json and chat_template.jinja
 * beside it. NOT_FOUND. */
JsonVocab *json_vocab_load(const char *path, GError **error);
const TokenizerVocab *json_vocab_get(const JsonVocab *v);
/* The file chat_template.jinja, else what tokenizer_config.json has (of several by name, the
 * "default" one); NULL if there is none. Borrowed. */
const char *json_vocab_chat_template(const JsonVocab *v);
void json_vocab_free(JsonVocab *v); /* NULL-safe */
G_DEFINE_AUTOPTR_CLEANUP_FUNC(JsonVocab, json_vocab_free)

/* The texts of both files; returned, g_free. INVALID for a vocabulary that is no byte-level BPE
 * with a pre-tokenizer that tokenizer.json can describe. */
char *json_vocab_write(const TokenizerVocab *vocab, GError **error);
char *json_vocab_write_config(const TokenizerVocab *vocab, const char *chat_template);
