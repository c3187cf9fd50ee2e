/* Any bytes as a server's event stream, read by `weft bench serve`: whole, and in pieces of which
 * the first byte gives the size, it has the same events, and what they say is valid to print. */
#include "tools/weft/sse.h"
#include "tools/weft/stream_answer.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MOST = 256 };

typedef struct Heard {
    GString *events; /* each with its length before it */
    StreamAnswer answer;
} Heard;

static void hear(const char *data, size_t length, void *user)
{
    Heard *h = user;
    g_assert(length <= MOST && data[length] == '\0');
    g_string_append_len(h->events, (const char *)&length, sizeof length);
    g_string_append_len(h->events, data, (gssize)length);
    stream_answer_take(&h->answer, data, length);
}

static void check_shown(const char *text)
{
    g_assert(text == NULL || (g_utf8_validate(text, -1, NULL) && strchr(text, '\x1b') == NULL));
}

/* Events of the bytes in pieces of this size; whether none was too long, in *ok. */
static GString *events_of(const char *bytes, size_t size, size_t piece, bool *ok)
{
    Heard h = {.events = g_string_new(NULL)};
    SseReader *r = sse_reader_new(MOST, hear, &h);
    *ok = true;
    for (size_t at = 0; at < size && *ok; at += piece) {
        *ok = sse_reader_feed(r, bytes + at, MIN(piece, size - at));
    }
    g_assert(h.answer.failed == NULL || h.answer.error != NULL);
    check_shown(h.answer.error);
    check_shown(h.answer.fingerprint);
    stream_answer_clear(&h.answer);
    sse_reader_free(r);
    return h.events;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    const char *bytes = (const char *)data + 1;
    bool ok, ok_cut;
    GString *whole = events_of(bytes, size - 1, size, &ok);
    GString *cut = events_of(bytes, size - 1, 1 + data[0] % 16, &ok_cut);
    g_assert(ok == ok_cut && g_string_equal(whole, cut));
    g_string_free(whole, TRUE);
    g_string_free(cut, TRUE);
    return 0;
}
