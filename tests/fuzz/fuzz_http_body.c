/* A body of the HTTP interface: from bytes to a request of the gateway, and an answer to it. The
 * first byte picks the address that it was sent to. What is accepted here must be acceptable to the
 * gateway, and every answer must be JSON. */
#include "coordinator/gateway/openai/api_answer.h"
#include "coordinator/gateway/openai/json_body.h"
#include "coordinator/gateway/requests/request_check.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_json(const char *text, size_t length)
{
    json_t *back = json_loadb(text, length, JSON_REJECT_DUPLICATES, NULL);
    g_assert(back != NULL);
    json_decref(back);
}

static void check_refusal(const ApiError *error)
{
    g_assert(error != NULL && error->status == 400);
    g_autofree char *page = api_error_json(error);
    check_json(page, strlen(page));
}

/* Each frame of a stream, or the one body. */
static void check_answer(const ApiRequest *r, const GString *out)
{
    if (!r->stream) {
        check_json(out->str, out->len);
        return;
    }
    g_auto(GStrv) frames = g_strsplit(out->str, "\n\n", -1);
    for (char **frame = frames; *frame != NULL && **frame != '\0'; frame++) {
        g_assert(g_str_has_prefix(*frame, "data: "));
        if (strcmp(*frame, "data: [DONE]") != 0) {
            check_json(*frame + 6, strlen(*frame) - 6);
        }
    }
}

static void push_token(ApiAnswer *answer, guint prompt, uint32_t choice, GString *out)
{
    uint32_t id = 3;
    float logprob = -1;
    Weft__V1__RunDelta delta = WEFT__V1__RUN_DELTA__INIT;
    delta.text = (char *)"\"\xff\n";
    delta.choice = choice;
    delta.ids = &id;
    delta.logprobs = &logprob;
    delta.n_ids = delta.n_logprobs = 1;
    Weft__V1__RunEvent event = WEFT__V1__RUN_EVENT__INIT;
    event.event_case = WEFT__V1__RUN_EVENT__EVENT_DELTA;
    event.delta = &delta;
    api_answer_event(answer, prompt, &event, out);
}

static void answer(const ApiRequest *r)
{
    GString *out = g_string_new(NULL);
    ApiAnswer *a = api_answer_new(r, NULL, "id", r->model != NULL ? r->model : "m", 1);
    for (guint p = 0; p < r->prompts->len; p++) {
        if (r->echo) {
            api_answer_echo(a, p, out);
        }
        for (uint32_t i = 0; i < r->n; i++) {
            push_token(a, p, i, out);
        }
        api_answer_nothing(a, p, out);
    }
    api_answer_end(a, out);
    check_answer(r, out);
    api_answer_free(a);
    g_string_free(out, TRUE);
}

static void submit(const ApiRequest *r)
{
    for (guint p = 0; p < r->prompts->len; p++) {
        Weft__V1__RunRequest request;
        g_autoptr(GError) error = NULL;
        api_request_generate(r, p, &request);
        request.model = (char *)"m";
        request.max_tokens = r->max_given && r->max_tokens > 0 ? r->max_tokens : 1;
        if (!request_check(&request, &error)) {
            g_error("what HTTP takes the gateway refuses: %s", error->message);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    const ApiKind kind = (ApiKind)(data[0] % 4);
    ApiLimits limits = api_limits_default();
    g_autoptr(ApiError) error = NULL;
    json_t *body = json_body_parse((const char *)data + 1, size - 1, &limits, &error);
    if (body == NULL) {
        check_refusal(error);
        return 0;
    }
    g_autoptr(ApiRequest) r = api_request_parse(kind, body, &limits, &error);
    json_decref(body);
    if (r == NULL) {
        check_refusal(error);
    } else if (kind == API_CHAT || kind == API_COMPLETION) {
        submit(r);
        answer(r);
    }
    return 0;
}
