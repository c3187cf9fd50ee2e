#include "tools/weft/load_http.h"

#include "tools/weft/stream_answer.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/config/options.h"

#include <string.h>

enum { ASK_TIMEOUT_MS = 10000, MODELS_BYTES = 1 << 20 };

char *load_library(void)
{
    return g_strdup_printf("libcurl %s", curl_version_info(CURLVERSION_NOW)->version);
}

char *load_base_url(const char *text, GError **error)
{
    g_autofree char *whole =
        strstr(text, "://") != NULL ? g_strdup(text) : g_strconcat("http://", text, NULL);
    g_autoptr(GUri) uri = g_uri_parse(whole, G_URI_FLAGS_ENCODED, NULL);
    if (uri == NULL || g_uri_get_host(uri) == NULL || *g_uri_get_host(uri) == '\0' ||
        (strcmp(g_uri_get_scheme(uri), "http") != 0 &&
         strcmp(g_uri_get_scheme(uri), "https") != 0) ||
        g_uri_get_query(uri) != NULL || g_uri_get_fragment(uri) != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "'%s' is no address of a server: give http://HOST:PORT or its /v1", text);
        return NULL;
    }
    size_t length = strlen(whole);
    while (length > 0 && whole[length - 1] == '/') {
        whole[--length] = '\0';
    }
    const char *path = g_uri_get_path(uri);
    return *path == '\0' || strspn(path, "/") == strlen(path) ? g_strconcat(whole, "/v1", NULL)
                                                              : g_steal_pointer(&whole);
}

/* ---- limits ---- */

bool load_limits_parse(const char *text, LoadLimits *out, GError **error)
{
    static const char *const names[] = {"ttft", "itl", "e2e", NULL};
    int64_t *const fields[] = {&out->ttft_us, &out->itl_us, &out->e2e_us};
    g_auto(GStrv) words = g_strsplit(text, ",", -1);
    if (*words == NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "the slo is empty: say what a good request keeps, as in ttft=500ms");
        return false;
    }
    for (char **word = words; *word != NULL; word++) {
        char *value = strchr(*word, '=');
        unsigned i = 0;
        if (value != NULL) {
            *value++ = '\0';
        }
        while (names[i] != NULL && strcmp(names[i], *word) != 0) {
            i++;
        }
        if (value == NULL || names[i] == NULL) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "slo '%s' is not ttft=TIME, itl=TIME or e2e=TIME, as in "
                        "ttft=500ms,itl=50ms",
                        *word);
            return false;
        }
        if (!units_parse_duration(value, fields[i], error)) {
            g_prefix_error(error, "slo %s: ", names[i]);
            return false;
        }
    }
    return true;
}

/* ---- handles ---- */

CURL *load_http_new(const LoadOptions *o)
{
    CURL *easy = curl_easy_init();
    g_assert(easy != NULL);
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(easy, CURLOPT_PROXY, ""); /* the server is measured, nothing between */
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_USERAGENT, "weft/" WEFT_VERSION);
    if (o->ca != NULL) {
        curl_easy_setopt(easy, CURLOPT_CAINFO, o->ca);
    }
    return easy;
}

struct curl_slist *load_http_headers(const LoadOptions *o)
{
    struct curl_slist *list = curl_slist_append(NULL, "Content-Type: application/json");
    list = curl_slist_append(list, "Expect:"); /* no question before a long body */
    if (o->key != NULL) {
        g_autofree char *line = g_strconcat("Authorization: Bearer ", o->key, NULL);
        list = curl_slist_append(list, line);
    }
    return list;
}

const char *load_http_failure(CURLcode code, bool is_stream)
{
    switch (code) {
    case CURLE_OPERATION_TIMEDOUT:
        return "timeout";
    case CURLE_COULDNT_CONNECT:
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
        return "connect";
    default:
        return is_stream ? "truncated" : "connection";
    }
}

/* ---- which model ---- */

static size_t gather(char *bytes, size_t size, size_t n, void *user)
{
    GString *out = user;
    if (out->len + size * n > MODELS_BYTES) {
        return 0;
    }
    g_string_append_len(out, bytes, (gssize)(size * n));
    return size * n;
}

static char *first_model(const char *url, long status, const GString *said, GError **error)
{
    json_t *object = json_loadb(said->str, said->len, 0, NULL);
    const char *id = json_string_value(
        json_object_get(json_array_get(json_object_get(object, "data"), 0), "id"));
    char *model = status == 200 ? g_strdup(id) : NULL;
    json_decref(object);
    if (model == NULL) {
        g_autofree char *text = stream_answer_error_text(said->str, said->len);
        g_set_error(error, WEFT_ERROR,
                    status == 401 || status == 403 ? WEFT_ERROR_DENIED : WEFT_ERROR_PROTOCOL,
                    "%s: status %ld: %s: %s", url, status, text,
                    status == 401 || status == 403 ? "give --key" : "name the model with --model");
    }
    return model;
}

char *load_first_model(const LoadOptions *o, GError **error)
{
    g_autofree char *url = g_strconcat(o->url, "/models", NULL);
    g_autoptr(GString) said = g_string_new(NULL);
    char why[CURL_ERROR_SIZE] = "", *model = NULL;
    long status = 0;
    struct curl_slist *headers = load_http_headers(o);
    CURL *easy = load_http_new(o);
    curl_easy_setopt(easy, CURLOPT_URL, url);
    curl_easy_setopt(easy, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, (long)ASK_TIMEOUT_MS);
    curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, why);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, gather);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, said);
    const CURLcode code = curl_easy_perform(easy);
    if (code != CURLE_OK) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE, "%s: %s: is a server running there?",
                    url, *why != '\0' ? why : curl_easy_strerror(code));
    } else {
        curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
        model = first_model(url, status, said, error);
    }
    curl_easy_cleanup(easy);
    curl_slist_free_all(headers);
    return model;
}
