#include "proto/model/hf_config.h"

#include "proto/base/error.h"

bool hf_fail(const char *directory, GError **error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "%s: %s", directory, what);
    return false;
}

double hf_number(const json_t *object, const char *key, double fallback)
{
    const json_t *value = json_object_get(object, key);
    return json_is_number(value) ? json_number_value(value) : fallback;
}
