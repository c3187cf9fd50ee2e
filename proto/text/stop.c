/* Each stop string is followed by a Knuth-Morris-Pratt automaton over the stream. A stop that has
 * matched is final only when no other one that began earlier can still complete, so that the result
 * does not depend on how the stream is cut into pieces. */
#include "proto/text/stop.h"

#include <string.h>

typedef struct Stop {
    char *text;
    size_t length, matched; /* matched: bytes of text that the stream ends with */
    size_t *failure;        /* failure[i]: longest proper border of text[0..i] */
} Stop;

struct StopMatcher {
    Stop *stops;
    unsigned n_stops;
    GString *held;   /* not given out yet */
    gssize found_at; /* offset in held of the earliest match, -1 */
    bool stopped;
};

static void stop_init(Stop *stop, const char *text)
{
    stop->text = g_strdup(text);
    stop->length = strlen(text);
    stop->failure = g_new0(size_t, stop->length);
    for (size_t i = 1, border = 0; i < stop->length; i++) {
        while (border > 0 && text[i] != text[border]) {
            border = stop->failure[border - 1];
        }
        border += text[i] == text[border];
        stop->failure[i] = border;
    }
}

StopMatcher *stop_matcher_new(const char *const *stops, unsigned n)
{
    StopMatcher *m = g_new0(StopMatcher, 1);
    m->stops = g_new0(Stop, n);
    m->held = g_string_new(NULL);
    m->found_at = -1;
    for (unsigned i = 0; i < n; i++) {
        if (stops[i][0] != '\0') {
            stop_init(&m->stops[m->n_stops++], stops[i]);
        }
    }
    return m;
}

void stop_matcher_free(StopMatcher *m)
{
    if (m == NULL) {
        return;
    }
    for (unsigned i = 0; i < m->n_stops; i++) {
        g_free(m->stops[i].text);
        g_free(m->stops[i].failure);
    }
    g_free(m->stops);
    g_string_free(m->held, TRUE);
    g_free(m);
}

/* Takes the byte; true if the stop string now ends here. */
static bool stop_advance(Stop *stop, char byte)
{
    if (stop->matched == stop->length) {
        stop->matched = stop->failure[stop->length - 1];
    }
    while (stop->matched > 0 && stop->text[stop->matched] != byte) {
        stop->matched = stop->failure[stop->matched - 1];
    }
    stop->matched += stop->text[stop->matched] == byte;
    return stop->matched == stop->length;
}

/* Takes the last byte of held. Returns the bytes at its end that may be the beginning of a stop
 * string. */
static size_t stop_matcher_advance(StopMatcher *m)
{
    size_t open = 0;
    char byte = m->held->str[m->held->len - 1];
    for (unsigned i = 0; i < m->n_stops; i++) {
        Stop *stop = &m->stops[i];
        if (!stop_advance(stop, byte)) {
            open = MAX(open, stop->matched);
            continue;
        }
        gssize start = (gssize)(m->held->len - stop->length);
        m->found_at = m->found_at < 0 ? start : MIN(m->found_at, start);
        open = MAX(open, stop->failure[stop->length - 1]);
    }
    return open;
}

static bool stop_matcher_end(StopMatcher *m, GString *out)
{
    g_string_append_len(out, m->held->str, m->found_at);
    g_string_truncate(m->held, 0);
    m->stopped = true;
    return true;
}

bool stop_matcher_push(StopMatcher *m, const char *text, size_t length, GString *out)
{
    if (m->stopped) {
        return true;
    }
    if (m->n_stops == 0) {
        g_string_append_len(out, text, (gssize)length);
        return false;
    }
    size_t open = m->held->len;
    for (size_t i = 0; i < length; i++) {
        g_string_append_c(m->held, text[i]);
        open = stop_matcher_advance(m);
        if (m->found_at >= 0 && (gssize)(m->held->len - open) >= m->found_at) {
            return stop_matcher_end(m, out);
        }
    }
    size_t safe = m->held->len - open;
    if (m->found_at >= 0) {
        m->found_at -= (gssize)safe;
    }
    g_string_append_len(out, m->held->str, (gssize)safe);
    g_string_erase(m->held, 0, (gssize)safe);
    return false;
}

void stop_matcher_finish(StopMatcher *m, GString *out)
{
    if (m->stopped) {
        return;
    }
    g_string_append_len(out, m->held->str, m->found_at >= 0 ? m->found_at : (gssize)m->held->len);
    g_string_truncate(m->held, 0);
    m->stopped = m->found_at >= 0;
}
