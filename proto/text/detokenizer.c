#include "proto/text/tokenizer_model.h"

#include "proto/text/utf8.h"

#include <string.h>

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

struct Detokenizer {
    const Tokenizer *tokenizer; /* borrowed */
    bool special;
    bool at_start; /* no text yet: a leading space would be the tokenizer's own */
    char held[4];  /* the beginning of a character */
    unsigned n_held;
};

Detokenizer *detokenizer_new(const Tokenizer *t, bool special)
{
    Detokenizer *d = g_new0(Detokenizer, 1);
    d->tokenizer = t;
    d->special = special;
    d->at_start = t->space_prefix != SPACE_PREFIX_NEVER;
    return d;
}

void detokenizer_free(Detokenizer *d)
{
    g_free(d);
}

/* One more byte: gives out a character once it is complete, U+FFFD for each part that cannot become
 * one. */
static void detokenizer_byte(Detokenizer *d, char byte, GString *out)
{
    d->held[d->n_held++] = byte;
    while (d->n_held > 0) {
        uint32_t code;
        int step = utf8_decode(d->held, d->n_held, &code);
        if (step == 0) {
            return;
        }
        unsigned done = (unsigned)(step > 0 ? step : -step);
        if (step > 0) {
            g_string_append_len(out, d->held, step);
        } else {
            g_string_append(out, REPLACEMENT);
        }
        d->n_held -= done;
        memmove(d->held, d->held + done, d->n_held);
    }
}

void detokenizer_push(Detokenizer *d, uint32_t id, GString *out)
{
    size_t length, at = 0;
    const char *piece = tokenizer_piece(d->tokenizer, id, d->special, &length);
    if (length > 0 && d->at_start && !tokenizer_is_control(d->tokenizer, id)) {
        at = piece[0] == ' ';
        d->at_start = false;
    }
    for (; at < length; at++) {
        detokenizer_byte(d, piece[at], out);
    }
}

void detokenizer_finish(Detokenizer *d, GString *out)
{
    if (d->n_held > 0) {
        g_string_append(out, REPLACEMENT);
        d->n_held = 0;
    }
}
