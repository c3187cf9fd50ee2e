#include "tools/weft/sse.h"

#include <string.h>

struct SseReader {
    size_t max_bytes;
    SseFn fn;
    void *user;
    GString *line, *data;
    bool has_data;       /* a data field was seen, be it empty */
    bool after_cr;       /* an LF that comes now belongs to the line's end before it */
    bool is_first, full; /* line of the stream; a bound was passed */
};

SseReader *sse_reader_new(size_t max_bytes, SseFn fn, void *user)
{
    SseReader *r = g_new0(SseReader, 1);
    r->max_bytes = max_bytes;
    r->fn = fn;
    r->user = user;
    r->line = g_string_new(NULL);
    r->data = g_string_new(NULL);
    r->is_first = true;
    return r;
}

void sse_reader_free(SseReader *r)
{
    if (r == NULL) {
        return;
    }
    g_string_free(r->line, TRUE);
    g_string_free(r->data, TRUE);
    g_free(r);
}

void sse_reader_reset(SseReader *r)
{
    g_string_truncate(r->line, 0);
    g_string_truncate(r->data, 0);
    r->has_data = r->after_cr = r->full = false;
    r->is_first = true;
}

static void dispatch(SseReader *r)
{
    if (r->has_data) {
        r->fn(r->data->str, r->data->len, r->user);
    }
    g_string_truncate(r->data, 0);
    r->has_data = false;
}

static void add_data(SseReader *r, const char *value, size_t length)
{
    if (r->data->len + 1 + length > r->max_bytes) {
        r->full = true;
        return;
    }
    if (r->has_data) {
        g_string_append_c(r->data, '\n');
    }
    g_string_append_len(r->data, value, (gssize)length);
    r->has_data = true;
}

/* Of the fields only data says something here; a line without a colon is a field without value. */
static void end_line(SseReader *r)
{
    static const char bom[] = "\xef\xbb\xbf", field[] = "data";
    const char *line = r->line->str;
    size_t length = r->line->len;
    if (r->is_first && length >= 3 && memcmp(line, bom, 3) == 0) {
        line += 3;
        length -= 3;
    }
    r->is_first = false;
    const char *colon = memchr(line, ':', length);
    const size_t name = colon != NULL ? (size_t)(colon - line) : length;
    if (length == 0) {
        dispatch(r);
    } else if (name == sizeof field - 1 && memcmp(line, field, name) == 0) {
        const size_t blank = name + 1 < length && line[name + 1] == ' ',
                     from = MIN(name + 1 + blank, length);
        add_data(r, line + from, length - from);
    }
    g_string_truncate(r->line, 0);
}

bool sse_reader_feed(SseReader *r, const char *bytes, size_t length)
{
    const char *end = bytes + length;
    while (bytes < end && !r->full) {
        if (r->after_cr && *bytes == '\n') {
            bytes++;
        }
        r->after_cr = false;
        size_t n = 0;
        while (bytes + n < end && bytes[n] != '\n' && bytes[n] != '\r') {
            n++;
        }
        if (r->line->len + n > r->max_bytes) {
            r->full = true;
            break;
        }
        g_string_append_len(r->line, bytes, (gssize)n);
        bytes += n;
        if (bytes < end) {
            r->after_cr = *bytes++ == '\r';
            end_line(r);
        }
    }
    return !r->full;
}
