#include "coordinator/gateway/openai/json_body.h"

#include <string.h>

/* One pass over the bytes that a parser would see as structure. What is no JSON may be counted
 * wrongly: the parser refuses it anyway. */
typedef struct Shape {
    uint64_t depth, deepest, values, strings;
} Shape;

static bool fits(const Shape *s, const ApiLimits *limits)
{
    return s->deepest <= limits->depth && s->values <= limits->values &&
           s->strings <= limits->strings;
}

/* The quote that ends the string before `at`, or the end. Strings are what a large body mostly is:
 * whole runs of them are skipped at once. */
static const char *string_end(const char *at, const char *end)
{
    const char *quote = NULL; /* the next one, escaped or not: each byte is looked at twice */
    while (at < end) {
        if (quote == NULL || quote < at) {
            quote = memchr(at, '"', (size_t)(end - at));
            quote = quote != NULL ? quote : end;
        }
        const char *escape = memchr(at, '\\', (size_t)(quote - at));
        if (escape == NULL) {
            return quote;
        }
        at = escape + 2;
    }
    return end;
}

/* As far as it fits. */
static Shape measure(const char *bytes, size_t length, const ApiLimits *limits)
{
    Shape s = {.values = 1};
    const char *end = bytes + length;
    for (const char *at = bytes; at < end && fits(&s, limits);) {
        switch (*at++) {
        case '"':
            at = string_end(at, end);
            at += at < end;
            s.strings++;
            break;
        case '{':
        case '[':
            s.depth++;
            s.deepest = MAX(s.deepest, s.depth);
            s.values++;
            break;
        case '}':
        case ']':
            s.depth -= s.depth > 0;
            break;
        case ',':
            s.values++;
            break;
        default:
            break;
        }
    }
    return s;
}

/* A parser's time goes with these, so they are known before it begins. */
static bool check_shape(const Shape *s, size_t length, const ApiLimits *limits, ApiError **error)
{
    const struct {
        uint64_t got, most;
        const char *what;
    } bounds[] = {{s->deepest, limits->depth, "levels of nesting"},
                  {s->values, limits->values, "values"},
                  {s->strings, limits->strings, "strings and names"},
                  {length, limits->json, "bytes"}};
    for (size_t i = 0; i < G_N_ELEMENTS(bounds); i++) {
        if (bounds[i].got > bounds[i].most) {
            api_error_field(error, NULL,
                            "the body has more than %" G_GUINT64_FORMAT " %s: it cannot be taken",
                            bounds[i].most, bounds[i].what);
            return false;
        }
    }
    return true;
}

json_t *json_body_parse(const char *bytes, size_t length, const ApiLimits *limits, ApiError **error)
{
    const Shape shape = measure(bytes, length, limits);
    if (!check_shape(&shape, length, limits, error)) {
        return NULL;
    }
    json_error_t problem;
    json_t *root = json_loadb(bytes, length, JSON_REJECT_DUPLICATES, &problem);
    if (root == NULL) {
        api_error_field(error, NULL, "the body is not valid JSON: %s (line %d, column %d)",
                        problem.text, problem.line, problem.column);
        return NULL;
    }
    if (!json_is_object(root)) {
        api_error_field(error, NULL, "the body is not a JSON object");
        json_decref(root);
        return NULL;
    }
    return root;
}
