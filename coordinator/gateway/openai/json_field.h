/* Reading members of a request's object. A member that is absent or null leaves *out alone and is
 * no error; one of the wrong kind or out of range is 400 naming member, value and range. All return
 * false only with *error set. */
#pragma once

#include "coordinator/gateway/openai/api_error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* The member, or NULL where it is absent or null. Borrowed. */
json_t *json_field(const json_t *object, const char *name);
bool json_field_number(const json_t *object, const char *name, double least, double most,
                       float *out, ApiError **error);
bool json_field_count(const json_t *object, const char *name, int64_t least, int64_t most,
                      uint32_t *out, ApiError **error);
bool json_field_integer(const json_t *object, const char *name, int64_t *out, bool *given,
                        ApiError **error);
bool json_field_bool(const json_t *object, const char *name, bool *out, ApiError **error);
/* Borrowed from the object. */
bool json_field_text(const json_t *object, const char *name, const char **out, ApiError **error);
/* An array of ids from 0 to 2^32 - 1; returned, of uint32_t. NULL + error. */
GArray *json_ids(const json_t *array, const char *param, ApiError **error);
const char *json_kind(const json_t *value); /* "a string", "an array", ... */
