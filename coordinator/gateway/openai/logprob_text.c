#include "coordinator/gateway/openai/logprob_text.h"

#include "coordinator/gateway/openai/json_text.h"

#include <string.h>

#define LOGPROB_LEAST                                                                              \
    (-9999.0f) /* as OpenAI writes what has no likelihood at all: -inf is no JSON */

enum { TOKENS, LOGPROBS, TOP, OFFSETS };

void logprob_text_init(LogprobText *t, bool chat, unsigned top)
{
    *t = (LogprobText){.chat = chat, .top = top};
    for (size_t i = 0; i < G_N_ELEMENTS(t->parts); i++) {
        t->parts[i] = g_string_new(NULL);
    }
}

void logprob_text_free_parts(LogprobText *t)
{
    for (size_t i = 0; i < G_N_ELEMENTS(t->parts); i++) {
        if (t->parts[i] != NULL) {
            g_string_free(t->parts[i], TRUE);
            t->parts[i] = NULL;
        }
    }
}

void logprob_text_clear(LogprobText *t)
{
    t->n = 0;
    for (size_t i = 0; i < G_N_ELEMENTS(t->parts); i++) {
        g_string_truncate(t->parts[i], 0);
    }
}

static const char *piece_of(const Tokenizer *tokenizer, uint32_t id, size_t *length)
{
    const char *piece = tokenizer != NULL && id < tokenizer_size(tokenizer)
                            ? tokenizer_piece(tokenizer, id, true, length)
                            : NULL;
    if (piece == NULL) {
        *length = 0;
    }
    return piece != NULL ? piece : "";
}

static void put_logprob(GString *out, float logprob)
{
    json_text_float(out, logprob > LOGPROB_LEAST ? logprob : LOGPROB_LEAST);
}

/* {"token":...,"logprob":...,"bytes":[...]  without the closing brace */
static void put_chat_token(GString *out, const char *piece, size_t length, float logprob)
{
    g_string_append(out, "{\"token\":");
    json_text_bytes(out, piece, length);
    g_string_append(out, ",\"logprob\":");
    put_logprob(out, logprob);
    g_string_append(out, ",\"bytes\":[");
    for (size_t i = 0; i < length; i++) {
        g_string_append_printf(out, "%s%u", i > 0 ? "," : "", (unsigned)(unsigned char)piece[i]);
    }
    g_string_append_c(out, ']');
}

static void add_chat(LogprobText *t, const Tokenizer *tokenizer, const char *piece, size_t length,
                     float logprob, Weft__V1__TopLogprob *const *top, size_t n_top)
{
    GString *out = t->parts[0];
    put_chat_token(out, piece, length, logprob);
    g_string_append(out, ",\"top_logprobs\":[");
    for (size_t i = 0; i < n_top; i++) {
        size_t n;
        const char *other = piece_of(tokenizer, top[i]->id, &n);
        g_string_append(out, i > 0 ? "," : "");
        put_chat_token(out, other, n, top[i]->logprob);
        g_string_append_c(out, '}');
    }
    g_string_append(out, "]}");
}

typedef struct Alternatives {
    GString *out;
    GPtrArray *names; /* of GString *: an object has each name once */
} Alternatives;

static void free_name(void *data)
{
    g_string_free(data, TRUE);
}

static void put_alternative(Alternatives *a, const char *piece, size_t length, float logprob)
{
    GString *name = g_string_new(NULL);
    json_text_bytes(name, piece, length);
    for (guint i = 0; i < a->names->len; i++) {
        if (g_string_equal(name, a->names->pdata[i])) {
            g_string_free(name, TRUE);
            return;
        }
    }
    g_string_append_printf(a->out, "%s%s:", a->names->len > 0 ? "," : "", name->str);
    put_logprob(a->out, logprob);
    g_ptr_array_add(a->names, name);
}

static void add_completion(LogprobText *t, const Tokenizer *tokenizer, const char *piece,
                           size_t length, const float *logprob, Weft__V1__TopLogprob *const *top,
                           size_t n_top)
{
    json_text_bytes(t->parts[TOKENS], piece, length);
    g_string_append_printf(t->parts[OFFSETS], "%zu", t->offset);
    if (logprob == NULL) {
        g_string_append(t->parts[LOGPROBS], "null");
        g_string_append(t->parts[TOP], "null");
        return;
    }
    put_logprob(t->parts[LOGPROBS], *logprob);
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(free_name);
    Alternatives a = {t->parts[TOP], names};
    g_string_append_c(a.out, '{');
    for (size_t i = 0; i < n_top; i++) {
        size_t n;
        const char *other = piece_of(tokenizer, top[i]->id, &n);
        put_alternative(&a, other, n, top[i]->logprob);
    }
    put_alternative(&a, piece, length, *logprob);
    g_string_append_c(a.out, '}');
}

static size_t count_characters(const char *piece, size_t length)
{
    size_t n = 0;
    for (size_t i = 0; i < length; i++) {
        n += ((unsigned char)piece[i] & 0xc0) != 0x80;
    }
    return n;
}

void logprob_text_add(LogprobText *t, const Tokenizer *tokenizer, uint32_t id, const float *logprob,
                      Weft__V1__TopLogprob *const *top, size_t n_top)
{
    size_t length;
    const char *piece = piece_of(tokenizer, id, &length);
    for (size_t i = 0; t->n > 0 && i < G_N_ELEMENTS(t->parts); i++) {
        g_string_append_c(t->parts[i], ',');
    }
    n_top = MIN(n_top, t->top);
    if (t->chat) {
        add_chat(t, tokenizer, piece, length, logprob != NULL ? *logprob : 0, top, n_top);
    } else {
        add_completion(t, tokenizer, piece, length, logprob, top, n_top);
    }
    t->n++;
    t->offset += count_characters(piece, length);
}

void logprob_text_append(LogprobText *t, const LogprobText *more)
{
    if (more->n == 0) {
        return;
    }
    for (size_t i = 0; i < G_N_ELEMENTS(t->parts); i++) {
        g_string_append_printf(t->parts[i], "%s%s", t->n > 0 ? "," : "", more->parts[i]->str);
    }
    t->n += more->n;
    t->offset = more->offset;
}

void logprob_text_write(const LogprobText *t, GString *out)
{
    if (t->chat) {
        g_string_append_printf(out, "{\"content\":[%s],\"refusal\":null}", t->parts[0]->str);
        return;
    }
    g_string_append_printf(out, "{\"tokens\":[%s],\"token_logprobs\":[%s],\"top_logprobs\":",
                           t->parts[TOKENS]->str, t->parts[LOGPROBS]->str);
    if (t->top > 0) {
        g_string_append_printf(out, "[%s]", t->parts[TOP]->str);
    } else {
        g_string_append(out, "null");
    }
    g_string_append_printf(out, ",\"text_offset\":[%s]}", t->parts[OFFSETS]->str);
}
