/* Chat templates: the Jinja that real model files use (tokenizer.chat_template), interpreted with
 * bounds; no attribute walk to host objects, no include, import or file access. Statements:
 * for/else (loop.*), if/elif/else, set (with namespace()), macro, call-less; expressions: literals,
 * lists, dicts, arithmetic, comparison, in, is TEST, filters, slices, conditional, string and dict
 * methods, raise_exception, strftime_now, range. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ChatTemplate ChatTemplate;
typedef struct ChatMessageText {
    const char *role, *content; /* borrowed UTF-8 */
} ChatMessageText;

typedef struct ChatLimits {
    size_t steps, output_bytes;
    unsigned depth;
    int64_t now_s; /* Unix time that strftime_now() shows (UTC); 0: the function is undefined, as
                      templates test for */
} ChatLimits;
#define CHAT_LIMITS_DEFAULT ((ChatLimits){.steps = 1000000, .output_bytes = 4u << 20, .depth = 64})

/* Parses; INVALID with line and what is wrong. */
ChatTemplate *chat_template_parse(const char *source, size_t length, GError **error);
void chat_template_free(ChatTemplate *t);
G_DEFINE_AUTOPTR_CLEANUP_FUNC(ChatTemplate, chat_template_free)
/* Renders messages; returned text. raise_exception() in the template, an exceeded limit or an
 * unsupported feature is INVALID. */
char *chat_template_render(const ChatTemplate *t, const ChatMessageText *messages, unsigned n,
                           bool add_generation_prompt, const char *bos, const char *eos,
                           ChatLimits limits, GError **error);
