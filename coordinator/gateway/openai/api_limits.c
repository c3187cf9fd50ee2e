#include "coordinator/gateway/openai/api_limits.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/config/options.h"

#include <string.h>

typedef struct Limit {
    const char *name, *text; /* the default, as one would write it */
    size_t offset;
    uint64_t least, most;
} Limit;

#define AT(field) offsetof(ApiLimits, field)
static const Limit table[] = {
    {"body", "8M", AT(body), 1024, UINT64_C(1) << 30},
    {"json", "4M", AT(json), 1024, UINT64_C(1) << 30},
    {"depth", "64", AT(depth), 4, 1000},
    {"values", "200000", AT(values), 64, 10000000},
    {"strings", "32k", AT(strings), 64, 10000000},
    {"messages", "1024", AT(messages), 1, 100000},
    {"prompts", "16", AT(prompts), 1, 1024},
    {"n", "8", AT(n), 1, 1024},
    {"stops", "16", AT(stops), 0, 16},
    {"stop-bytes", "256", AT(stop_bytes), 1, 256},
    {"logprobs", "20", AT(logprobs), 0, 32},
    {"logit-bias", "1024", AT(logit_bias), 0, 1024},
    {"queue", "512", AT(queue), 1, 1000000},
    {"reader", "1M", AT(reader), 64u << 10, UINT64_C(1) << 30},
    {"stall", "10", AT(stall_s), 1, 3600},
    {"connections", "4096", AT(connections), 1, 1000000},
    {"source", "2048", AT(source), 0, 1000000},
    {"header", "16k", AT(header), 1024, 1u << 20},
    {"idle", "30", AT(idle_s), 1, 86400},
    {"request", "60", AT(request_s), 1, 86400},
    {"deadline", "0", AT(deadline_s), 0, 864000},
    {"keep-alive-ms", "10000", AT(keep_alive_ms), 10, 3600000},
};

static uint64_t *field(ApiLimits *limits, const Limit *limit)
{
    return (uint64_t *)(void *)((char *)limits + limit->offset);
}

ApiLimits api_limits_default(void)
{
    ApiLimits limits = {0};
    for (size_t i = 0; i < G_N_ELEMENTS(table); i++) {
        bool ok = units_parse_size(table[i].text, field(&limits, &table[i]), NULL);
        g_assert(ok);
    }
    return limits;
}

static const Limit *find(const char *name)
{
    for (size_t i = 0; i < G_N_ELEMENTS(table); i++) {
        if (strcmp(table[i].name, name) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

static void say_unknown(const char *name, GError **error)
{
    const char *names[G_N_ELEMENTS(table) + 1] = {NULL};
    for (size_t i = 0; i < G_N_ELEMENTS(table); i++) {
        names[i] = table[i].name;
    }
    const char *near = options_nearest(name, names);
    g_autofree char *all = g_strjoinv(", ", (char **)names);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "http limit '%s' is unknown%s%s%s: there are %s", name,
                near != NULL ? ", did you mean " : "", near != NULL ? near : "",
                near != NULL ? "?" : "", all);
}

static bool parse_one(const char *word, ApiLimits *limits, GError **error)
{
    const char *equals = strchr(word, '=');
    g_autofree char *name = equals != NULL ? g_strndup(word, (gsize)(equals - word)) : NULL;
    uint64_t value;
    if (equals == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "http limit '%s' is not NAME=NUMBER, as in n=4,body=1M", word);
        return false;
    }
    const Limit *limit = find(name);
    if (limit == NULL) {
        say_unknown(name, error);
        return false;
    }
    if (!units_parse_size(equals + 1, &value, error)) {
        g_prefix_error(error, "http limit %s: ", name);
        return false;
    }
    if (value < limit->least || value > limit->most) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "http limit %s %" G_GUINT64_FORMAT " is out of range: from %" G_GUINT64_FORMAT
                    " to %" G_GUINT64_FORMAT,
                    name, value, limit->least, limit->most);
        return false;
    }
    *field(limits, limit) = value;
    return true;
}

bool api_limits_parse(const char *text, ApiLimits *limits, GError **error)
{
    g_auto(GStrv) words = g_strsplit(text != NULL ? text : "", ",", -1);
    for (char **word = words; *word != NULL; word++) {
        g_strstrip(*word);
        if (**word != '\0' && !parse_one(*word, limits, error)) {
            return false;
        }
    }
    return true;
}

bool api_limits_is_stuck(const ApiLimits *limits, uint64_t waiting_bytes, int64_t stalled_us)
{
    enum { BURST = 8 };
    return waiting_bytes > BURST * limits->reader ||
           (waiting_bytes > limits->reader &&
            stalled_us > (int64_t)limits->stall_s * G_USEC_PER_SEC);
}

char *api_limits_help(void)
{
    GString *out = g_string_new(NULL);
    for (size_t i = 0; i < G_N_ELEMENTS(table); i++) {
        g_string_append_printf(out, "%s%s=%s", i > 0 ? ", " : "", table[i].name, table[i].text);
    }
    return g_string_free(out, FALSE);
}
