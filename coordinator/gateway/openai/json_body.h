/* A request's body, from bytes that may be anything to a JSON object. Pure, any thread. */
#pragma once

#include "coordinator/gateway/openai/api_error.h"
#include "coordinator/gateway/openai/api_limits.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* Returned (json_decref). NULL + 400 when it is no JSON object, is nested deeper or has more values
 * or strings than the limits say (found before anything is built from it), has a name twice, a
 * number that no double or int64 holds, invalid UTF-8 or U+0000. */
json_t *json_body_parse(const char *bytes, size_t length, const ApiLimits *limits,
                        ApiError **error);
