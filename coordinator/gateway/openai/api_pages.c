#include "coordinator/gateway/openai/api_internal.h"

#include "coordinator/gateway/openai/json_text.h"
#include "proto/base/version.h"

#include <string.h>

#define LAG_LIMIT_MS 1000.0

/* ---- models ---- */

static void put_model(GString *out, const Served *served)
{
    g_string_append(out, "{\"id\":");
    json_text_string(out, served_name(served));
    g_string_append_printf(out,
                           ",\"object\":\"model\",\"created\":%" G_GINT64_FORMAT
                           ",\"owned_by\":\"weft\",\"max_model_len\":",
                           served_since_s(served));
    uint32_t context = served_context(served);
    g_string_append_printf(out, context > 0 ? "%u}" : "null}", context);
}

static void put_model_of_list(const Served *served, void *user)
{
    GString *out = user;
    g_string_append(out, g_str_has_suffix(out->str, "}") ? "," : "");
    put_model(out, served);
}

void api_page_models(ApiService *service, HttpExchange *x)
{
    GString *out = g_string_new("{\"object\":\"list\",\"data\":[");
    served_each(service->served, put_model_of_list, out);
    g_string_append(out, "]}");
    api_reply(service, x, 200, JSON_TYPE, g_string_free(out, FALSE));
}

void api_page_model(ApiService *service, HttpExchange *x, const char *name)
{
    const Served *served = served_find(service->served, name);
    if (served == NULL) {
        g_autoptr(ApiError) error = NULL;
        api_error_set(&error, 404, "invalid_request_error", "model_not_found", "model",
                      "there is no such model here: GET /v1/models lists what is served");
        api_reply_error(service, x, error);
        return;
    }
    GString *out = g_string_new(NULL);
    put_model(out, served);
    api_reply(service, x, 200, JSON_TYPE, g_string_free(out, FALSE));
}

/* ---- health ---- */

void api_page_health(ApiService *service, HttpExchange *x)
{
    api_reply(service, x, 200, JSON_TYPE, g_strdup("{\"status\":\"ok\"}"));
}

/* A list of checks, one a line, "[+]name ok" or "[-]name failed: why". */
typedef struct Checks {
    ApiService *service;
    GString *out;
    bool failed;
    const Served *served; /* whose workers are looked at */
    char *problem;        /* of them */
    unsigned n_usable;
} Checks;

static void put_check(Checks *checks, const char *name, const char *problem /* NULL: ok */)
{
    if (problem == NULL) {
        g_string_append_printf(checks->out, "[+]%s ok\n", name);
    } else {
        checks->failed = true;
        g_string_append_printf(checks->out, "[-]%s failed: %s\n", name, problem);
    }
}

static void count_usable(Member *member, void *user)
{
    ((Checks *)user)->n_usable += member_usable(member);
}

static void check_worker(Checks *checks, const char *worker)
{
    const Member *member = members_find(checks->service->options.members, worker);
    const Weft__V1__Heartbeat *beat = member != NULL ? member_heartbeat(member) : NULL;
    bool heard =
        member != NULL && (member_usable(member) || member_state(member) == MEMBER_DRAINING);
    if (checks->problem == NULL && (!heard || beat == NULL || !beat->serving)) {
        const char *told = member != NULL ? member_problem(member) : NULL;
        checks->problem = g_strdup_printf("worker %s makes no progress%s%s", worker,
                                          told != NULL ? ": " : "", told != NULL ? told : "");
    }
}

static void check_job(const Weft__V1__Job *job, const Plan *plan, void *user)
{
    Checks *checks = user;
    const char *path = served_path(checks->served);
    if (plan == NULL || path == NULL || strcmp(job->model, path) != 0) {
        return;
    }
    for (uint32_t r = 0; r < plan->n_replicas; r++) {
        for (uint32_t s = 0; s < plan->replicas[r].n_stages; s++) {
            const PlanStage *stage = &plan->replicas[r].stages[s];
            for (uint32_t k = 0; k < stage->n_ranks; k++) {
                check_worker(checks, stage->ranks[k].worker);
            }
        }
    }
}

static void check_served(const Served *served, void *user)
{
    Checks *checks = user;
    g_autofree char *name = g_strdup_printf("model %s", served_name(served));
    if (!served_is_ready(served)) {
        put_check(checks, name, "it is not loaded on enough workers");
        return;
    }
    checks->served = served;
    jobs_describe(checks->service->options.jobs, check_job, checks);
    put_check(checks, name, checks->problem);
    g_clear_pointer(&checks->problem, g_free);
}

void api_page_ready(ApiService *service, HttpExchange *x)
{
    const ApiServiceOptions *o = &service->options;
    Checks checks = {.service = service, .out = g_string_new(NULL)};
    double lag = o->lag_ms != NULL ? o->lag_ms(o->lag_user) : 0;
    members_each(o->members, count_usable, &checks);
    put_check(&checks, "coordinator", lag < LAG_LIMIT_MS ? NULL : "its main loop is late");
    put_check(&checks, "workers", checks.n_usable > 0 ? NULL : "none is usable");
    if (served_count(service->served) == 0) {
        put_check(&checks, "models", "none is served (weft serve MODEL)");
    }
    served_each(service->served, check_served, &checks);
    if (checks.failed) {
        http_add_header(x, "Retry-After", "1");
    }
    api_reply(service, x, checks.failed ? 503 : 200, "text/plain; charset=utf-8",
              g_string_free(checks.out, FALSE));
}

void api_page_version(ApiService *service, HttpExchange *x)
{
    GString *out = g_string_new("{\"version\":");
    json_text_string(out, WEFT_VERSION);
    g_string_append_printf(out, ",\"generation\":%" G_GUINT64_FORMAT "}",
                           service->options.generation);
    api_reply(service, x, 200, JSON_TYPE, g_string_free(out, FALSE));
}
