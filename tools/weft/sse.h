/* SseReader: server-sent events out of bytes as they arrive, cut anywhere (WHATWG HTML, "Parsing an
 * event stream"). Comments, ids and retry times are dropped; lines may end in LF, CRLF or CR. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct SseReader SseReader;

/* One event: its data, lines joined by LF and NUL-ended, borrowed during the call. */
typedef void (*SseFn)(const char *data, size_t length, void *user);

SseReader *sse_reader_new(size_t max_bytes /* of one event's data and of one line */, SseFn fn,
                          void *user);
void sse_reader_free(SseReader *reader); /* NULL-safe */
/* Forgets what has come: a new stream begins. */
void sse_reader_reset(SseReader *reader);
/* Takes bytes and calls fn for each event that they complete. False once a line or an event is
 * longer than max_bytes; from there on until the next reset nothing is heard any more. */
bool sse_reader_feed(SseReader *reader, const char *bytes, size_t length);
