#include "coordinator/gateway/openai/json_field.h"

#include <math.h>

json_t *json_field(const json_t *object, const char *name)
{
    json_t *value = json_object_get(object, name);
    return json_is_null(value) ? NULL : value;
}

const char *json_kind(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

static bool wrong_kind(const json_t *value, const char *name, const char *wanted, ApiError **error)
{
    api_error_field(error, name, "%s is %s: %s is expected", name,
                    json_is_real(value) ? "no whole number" : json_kind(value), wanted);
    return false;
}

bool json_field_number(const json_t *object, const char *name, double least, double most,
                       float *out, ApiError **error)
{
    const json_t *value = json_field(object, name);
    if (value == NULL) {
        return true;
    }
    if (!json_is_number(value)) {
        return wrong_kind(value, name, "a number", error);
    }
    double number = json_number_value(value);
    if (!(number >= least && number <= most)) {
        api_error_field(error, name, "%s %g is out of range: from %g to %g", name, number, least,
                        most);
        return false;
    }
    *out = (float)number;
    return true;
}

bool json_field_integer(const json_t *object, const char *name, int64_t *out, bool *given,
                        ApiError **error)
{
    const json_t *value = json_field(object, name);
    *given = value != NULL;
    if (value == NULL) {
        return true;
    }
    if (!json_is_integer(value)) {
        return wrong_kind(value, name, "a whole number", error);
    }
    *out = json_integer_value(value);
    return true;
}

bool json_field_count(const json_t *object, const char *name, int64_t least, int64_t most,
                      uint32_t *out, ApiError **error)
{
    int64_t number = 0;
    bool given;
    if (!json_field_integer(object, name, &number, &given, error)) {
        return false;
    }
    if (given && (number < least || number > most)) {
        api_error_field(error, name,
                        "%s %" G_GINT64_FORMAT " is out of range: from %" G_GINT64_FORMAT
                        " to %" G_GINT64_FORMAT,
                        name, number, least, most);
        return false;
    }
    *out = given ? (uint32_t)number : *out;
    return true;
}

bool json_field_bool(const json_t *object, const char *name, bool *out, ApiError **error)
{
    const json_t *value = json_field(object, name);
    if (value != NULL && !json_is_boolean(value)) {
        return wrong_kind(value, name, "true or false", error);
    }
    *out = value != NULL ? json_is_true(value) : *out;
    return true;
}

bool json_field_text(const json_t *object, const char *name, const char **out, ApiError **error)
{
    const json_t *value = json_field(object, name);
    if (value != NULL && !json_is_string(value)) {
        return wrong_kind(value, name, "a string", error);
    }
    *out = value != NULL ? json_string_value(value) : *out;
    return true;
}

GArray *json_ids(const json_t *array, const char *param, ApiError **error)
{
    size_t n = json_array_size(array);
    GArray *ids = g_array_sized_new(FALSE, FALSE, sizeof(uint32_t), (guint)n);
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(array, i);
        int64_t number = json_is_integer(value) ? json_integer_value(value) : -1;
        if (number < 0 || number > UINT32_MAX) {
            api_error_field(error, param, "%s has at index %zu what is no token id", param, i);
            g_array_unref(ids);
            return NULL;
        }
        uint32_t id = (uint32_t)number;
        g_array_append_val(ids, id);
    }
    return ids;
}
