/* What every request of a load shares: address, credentials, libcurl's handles. Inside load* only.
 */
#pragma once

#include "tools/weft/load.h"

#include <curl/curl.h>

/* A handle with what all requests have in common. Returned. */
CURL *load_http_new(const LoadOptions *o);
struct curl_slist *load_http_headers(const LoadOptions *o); /* returned */
/* How a transfer that failed, or ended before its answer did, is called. */
const char *load_http_failure(CURLcode code, bool is_stream);
