#include "tools/weft/stream_answer.h"

#include "tools/weft/shown.h"

#include <jansson.h>
#include <string.h>

enum { SHOWN = 200 };

/* {"error":{"message":S}}, {"error":S}, {"message":S}, {"detail":S}: all of them are in use. */
static const char *error_message(const json_t *object)
{
    const json_t *error = json_object_get(object, "error");
    if (json_is_object(error)) {
        return json_string_value(json_object_get(error, "message"));
    }
    static const char *const keys[] = {"error", "message", "detail"};
    for (unsigned i = 0; i < G_N_ELEMENTS(keys); i++) {
        const char *text = json_string_value(json_object_get(object, keys[i]));
        if (text != NULL) {
            return text;
        }
    }
    return NULL;
}

char *stream_answer_error_text(const char *text, size_t length)
{
    json_t *object = json_loadb(text, length, 0, NULL);
    const char *message = error_message(object);
    char *shown =
        message != NULL ? shown_line(message, -1, SHOWN) : shown_line(text, (gssize)length, SHOWN);
    json_decref(object);
    return shown;
}

static void fail(StreamAnswer *a, const char *what, char *error /* taken */)
{
    a->failed = what;
    a->error = error;
}

static bool is_text(const json_t *value)
{
    return json_string_length(value) > 0;
}

/* Some servers tell thoughts apart from the answer; both are tokens. */
static bool choice_has_text(const json_t *choice)
{
    const json_t *delta = json_object_get(choice, "delta");
    return is_text(json_object_get(choice, "text")) || is_text(json_object_get(delta, "content")) ||
           is_text(json_object_get(delta, "reasoning_content"));
}

static void take_usage(StreamAnswer *a, const json_t *usage)
{
    const json_int_t prompt = json_integer_value(json_object_get(usage, "prompt_tokens")),
                     output = json_integer_value(json_object_get(usage, "completion_tokens"));
    if (prompt >= 0 && output >= 0) {
        a->has_usage = true;
        a->prompt_tokens = (uint64_t)prompt;
        a->output_tokens = (uint64_t)output;
    }
}

static bool take_object(StreamAnswer *a, const json_t *object)
{
    const json_t *choices = json_object_get(object, "choices"),
                 *usage = json_object_get(object, "usage");
    const char *print = json_string_value(json_object_get(object, "system_fingerprint"));
    bool text = false;
    for (size_t i = 0; i < json_array_size(choices); i++) {
        text = choice_has_text(json_array_get(choices, i)) || text;
    }
    if (json_is_object(usage)) {
        take_usage(a, usage);
    }
    if (a->fingerprint == NULL && print != NULL) {
        a->fingerprint = shown_line(print, -1, SHOWN);
    }
    a->n_texts += text;
    return text;
}

bool stream_answer_take(StreamAnswer *a, const char *data, size_t length)
{
    static const char end[] = "[DONE]";
    if (a->done || a->failed != NULL) {
        return false;
    }
    if (length == sizeof end - 1 && memcmp(data, end, length) == 0) {
        a->done = true;
        return false;
    }
    json_t *object = json_loadb(data, length, 0, NULL);
    bool text = false;
    if (!json_is_object(object)) {
        g_autofree char *said = shown_line(data, (gssize)length, SHOWN);
        fail(a, "malformed", g_strdup_printf("an event is no JSON object: %s", said));
    } else if (json_object_get(object, "error") != NULL &&
               !json_is_null(json_object_get(object, "error"))) {
        fail(a, "error event", stream_answer_error_text(data, length));
    } else {
        text = take_object(a, object);
    }
    json_decref(object);
    return text;
}

void stream_answer_clear(StreamAnswer *a)
{
    g_free(a->error);
    g_free(a->fingerprint);
    *a = (StreamAnswer){0};
}
