/* Any bytes as a tokenizer.json (and, behind a zero byte, its tokenizer_config.json): refused, or a
 * vocabulary that is written and read as the same. */
#include "proto/text/tokenizer_json.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *zero = size > 0 ? memchr(data, '\0', size) : NULL;
    const size_t n = zero != NULL ? (size_t)(zero - data) : size;
    const char *config = zero != NULL ? (const char *)zero + 1 : NULL;
    g_autoptr(GError) error = NULL;
    g_autoptr(JsonVocab) v =
        json_vocab_parse((const char *)data, n, config, zero != NULL ? size - n - 1 : 0, &error);
    g_assert((v == NULL) == (error != NULL));
    if (v == NULL) {
        return 0;
    }
    g_autoptr(Tokenizer) t = tokenizer_from_vocab(json_vocab_get(v), NULL);
    g_autofree char *text = t != NULL ? json_vocab_write(json_vocab_get(v), NULL) : NULL;
    g_autofree char *texts =
        json_vocab_write_config(json_vocab_get(v), json_vocab_chat_template(v));
    if (text != NULL) {
        g_autoptr(JsonVocab) again =
            json_vocab_parse(text, strlen(text), texts, strlen(texts), &error);
        g_assert_no_error(error);
        g_assert(json_vocab_get(again)->n_merges == json_vocab_get(v)->n_merges);
        g_assert(json_vocab_get(again)->n_tokens <= json_vocab_get(v)->n_tokens);
    }
    return 0;
}
