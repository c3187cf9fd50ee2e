/* StreamAnswer: what the events of one streamed answer say, OpenAI's chat or completion. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct StreamAnswer {
    bool done; /* [DONE] came */
    bool has_usage;
    uint64_t n_texts; /* events that carried text */
    uint64_t prompt_tokens, output_tokens;
    const char *failed; /* "error event", "malformed"; NULL: nothing is wrong */
    char *error;        /* with failed: what was said; fit to be printed */
    char *fingerprint;  /* system_fingerprint; NULL if none was told */
} StreamAnswer;

/* Takes the data of one event; true if it carries text of the answer. After [DONE] or a failure
 * nothing is looked at any more. */
bool stream_answer_take(StreamAnswer *answer, const char *data, size_t length);
void stream_answer_clear(StreamAnswer *answer);
/* The message of an error object {"error":{"message"}} (or of what resembles one), else the text
 * itself, fit to be printed. Returned. */
char *stream_answer_error_text(const char *text, size_t length);
