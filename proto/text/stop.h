/* Stop strings over a stream of text pieces: holds back what may be the beginning of a stop string.
 */
#pragma once

#include <glib.h>
#include <stdbool.h>

typedef struct StopMatcher StopMatcher;
StopMatcher *stop_matcher_new(const char *const *stops,
                              unsigned n); /* copied; empty strings are ignored */
void stop_matcher_free(StopMatcher *m);
/* Appends to `out` what is safe to show. True when a stop string was found: text up to it was
 * appended, nothing follows. The first match in the text wins. */
bool stop_matcher_push(StopMatcher *m, const char *text, size_t length, GString *out);
/* The end of the stream: the rest. */
void stop_matcher_finish(StopMatcher *m, GString *out);
