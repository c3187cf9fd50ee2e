/* weft plan: which host would hold what, why, and how fast it would be; loads nothing. */
#include "tools/weft/job_file.h"
#include "tools/weft/plan_training.h"
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/plan_message.h"

#include <stdio.h>

typedef struct PlanOptions {
    CommonOptions common;
    RequestOptions request;
} PlanOptions;

static const Option PLAN_OPTIONS[] = {
    LAYOUT_OPTIONS(PlanOptions), UP_OPTION(PlanOptions), COMMON_OPTIONS(PlanOptions), {0}};

static void plan_defaults(void *values)
{
    request_defaults(&((PlanOptions *)values)->request);
}

static json_t *ranks_json(const Weft__V1__Stage *s)
{
    json_t *ranks = json_array();
    for (size_t i = 0; i < s->n_ranks; i++) {
        const Weft__V1__Rank *r = s->ranks[i];
        json_array_append_new(
            ranks,
            json_pack("{s:s,s:{s:[I,I],s:[I,I],s:[I,I]},s:I,s:I,s:I}", "worker", r->worker, "units",
                      "attention", (json_int_t)r->attn_first,
                      (json_int_t)(r->attn_first + r->attn_count), "ffn", (json_int_t)r->ffn_first,
                      (json_int_t)(r->ffn_first + r->ffn_count), "vocabulary",
                      (json_int_t)r->vocab_first, (json_int_t)(r->vocab_first + r->vocab_count),
                      "weight_bytes", (json_int_t)r->weight_bytes, "kv_bytes_per_token",
                      (json_int_t)r->kv_bytes_per_token, "peak_bytes", (json_int_t)r->peak_bytes));
    }
    return ranks;
}

/* The hash that a run under this plan will show. */
static void add_definition(json_t *object, const Weft__V1__Plan *message)
{
    char hex[33];
    g_autoptr(Plan) plan = plan_from_message(message, NULL);
    if (plan != NULL) {
        const Hash128 hash = definition_hash(&plan->definition);
        hash128_hex(&hash, hex);
        json_object_set_new(object, "definition", json_string(hex));
    }
}

static void print_plan_json(const Weft__V1__PlanResponse *p)
{
    json_t *object = cli_json_new(), *stages = json_array(), *violations = json_array(),
           *reasons = json_array(), *near = json_array();
    const Weft__V1__Replica *r =
        p->plan != NULL && p->plan->n_replicas > 0 ? p->plan->replicas[0] : NULL;
    for (size_t s = 0; r != NULL && s < r->n_stages; s++) {
        json_array_append_new(stages, json_pack("{s:[I,I],s:o}", "layers",
                                                (json_int_t)r->stages[s]->layer_first,
                                                (json_int_t)r->stages[s]->layer_last, "ranks",
                                                ranks_json(r->stages[s])));
    }
    for (size_t i = 0; i < p->n_violations; i++) {
        json_array_append_new(violations, json_string(p->violations[i]));
    }
    for (size_t i = 0; i < p->n_alternatives; i++) {
        json_array_append_new(near, json_string(p->alternatives[i]));
    }
    if (p->plan != NULL) {
        for (size_t i = 0; i < p->plan->n_reasons; i++) {
            json_array_append_new(reasons, json_string(p->plan->reasons[i]));
        }
        json_object_set_new(object, "layout", plan_message_layout_json(p->plan));
        json_object_set_new(object, "numerics", json_string(plan_message_numerics(p->plan)));
        add_definition(object, p->plan);
    }
    json_object_set_new(object, "stages", stages);
    if (p->plan != NULL) {
        json_object_set_new(object, "predicted",
                            json_pack("{s:f,s:f,s:s}", "prefill_tokens_per_s",
                                      p->plan->predicted_prefill_tokens_per_s,
                                      "decode_tokens_per_s", p->plan->predicted_decode_tokens_per_s,
                                      "bound", p->plan->predicted_bound));
        json_object_set_new(object, "roof_decode_tokens_per_s",
                            json_real(p->roof_decode_tokens_per_s));
    }
    json_object_set_new(object, "violations", violations);
    json_object_set_new(object, "alternatives", near);
    json_object_set_new(object, "reasons", reasons);
    cli_print_json(object);
}

static void print_replica(TextTable *t, const Weft__V1__PlanResponse *p, size_t replica)
{
    const Weft__V1__Replica *r = p->plan->replicas[replica];
    for (size_t s = 0; s < r->n_stages; s++) {
        for (size_t i = 0; i < r->stages[s]->n_ranks; i++) {
            const Weft__V1__Rank *k = r->stages[s]->ranks[i];
            g_autofree char *part = g_strdup_printf("%zu/%zu/%zu", replica, s, i);
            g_autofree char *layers =
                g_strdup_printf("%u-%u", r->stages[s]->layer_first, r->stages[s]->layer_last);
            g_autofree char *attention =
                g_strdup_printf("%u of %u", k->attn_count, p->n_attn_units);
            g_autofree char *ffn = g_strdup_printf("%u of %u", k->ffn_count, p->n_ffn_units);
            g_autofree char *weights = units_format_size(k->weight_bytes);
            g_autofree char *peak = units_format_size(k->peak_bytes);
            text_table_row(t, k->worker, part, layers, attention, ffn, weights, peak, NULL);
        }
    }
}

static void print_plan(const Weft__V1__PlanResponse *p)
{
    g_autofree char *layout = plan_message_layout(p->plan);
    TextTable *t = text_table_new((const char *const[]){"WORKER", "DP/PP/TP", "LAYERS", "ATTENTION",
                                                        "FFN", "WEIGHTS", "PEAK", NULL});
    printf("layout %s, numerics %s\n\n", layout, plan_message_numerics(p->plan));
    for (size_t r = 0; r < p->plan->n_replicas; r++) {
        print_replica(t, p, r);
    }
    text_table_print(t);
    printf("\n");
    for (size_t i = 0; i < p->plan->n_reasons; i++) {
        printf("- %s\n", p->plan->reasons[i]);
    }
    printf("\npredicted: prefill %.0f tokens/s, decode %.1f tokens/s, bound by %s; memory roof of "
           "this layout %.0f tokens/s\n",
           p->plan->predicted_prefill_tokens_per_s, p->plan->predicted_decode_tokens_per_s,
           p->plan->predicted_bound, p->roof_decode_tokens_per_s);
}

static int impossible(const PlanOptions *o, const Weft__V1__PlanResponse *p)
{
    if (o->common.json) {
        print_plan_json(p);
    }
    return cli_no_plan(p->violations, p->n_violations, p->alternatives, p->n_alternatives);
}

static bool ask_plan(const PlanOptions *o, const char *model, Weft__V1__PlanResponse **response,
                     GError **error)
{
    g_autofree char *path = request_model_path(model);
    Weft__V1__PlanRequest request = WEFT__V1__PLAN_REQUEST__INIT;
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.dp = (uint32_t)o->request.dp;
    layout.pp = (uint32_t)o->request.pp;
    layout.tp = (uint32_t)o->request.tp;
    request.model = path;
    request.layout = &layout;
    request.context = (uint32_t)o->request.context;
    request.numerics = o->request.numerics != NULL ? o->request.numerics : "";
    request.kv = o->request.kv != NULL ? o->request.kv : "";
    Client *client = client_new(&o->common, error);
    if (client == NULL) {
        return false;
    }
    const bool ok = client_call(client, &weft__v1__admin__descriptor, "Plan", &request.base, 60000,
                                (ProtobufCMessage **)response, error);
    client_free(client);
    return ok;
}

/* A job file: of kind train it has its own plan; of kind serve it names model and layout. */
static int plan_job(PlanOptions *o, const char *path, char **model)
{
    GError *error = NULL;
    g_autoptr(JobSpec) spec = job_file_read(path, &error);
    if (spec == NULL) {
        return cli_fail(error);
    }
    if (spec->kind == JOB_TRAIN) {
        return plan_training(&o->common, spec);
    }
    static char *const classes[] = {"exact", "fast", "auto"};
    *model = g_strdup(spec->model.from);
    g_free(o->request.numerics);
    o->request.numerics = g_strdup(classes[spec->numerics]);
    o->request.dp = spec->layout.dp;
    o->request.pp = spec->layout.pp;
    o->request.tp = spec->layout.tp;
    o->request.context = spec->context;
    return 0;
}

static int plan_run(const Verb *verb, void *values, GPtrArray *rest)
{
    PlanOptions *o = values;
    GError *error = NULL;
    g_autofree char *served = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one model or job file is expected");
    }
    const char *path = rest->pdata[0];
    if (g_str_has_suffix(path, ".yaml") || g_str_has_suffix(path, ".yml")) {
        const int code = plan_job(o, path, &served);
        if (served == NULL) {
            return code;
        }
        path = served;
    }
    LocalCluster *cluster = local_cluster_for(&o->common, &error);
    Weft__V1__PlanResponse *response = NULL;
    const bool ok = error == NULL && ask_plan(o, path, &response, &error);
    local_cluster_free(cluster);
    if (!ok) {
        return cli_fail(error);
    }
    int code = 0;
    if (response->plan == NULL) {
        code = impossible(o, response);
    } else if (o->common.json) {
        print_plan_json(response);
    } else {
        print_plan(response);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return code;
}

const Verb VERB_PLAN = {"plan",       "MODEL|SPEC.yaml",   "who would hold what, and how fast",
                        PLAN_OPTIONS, sizeof(PlanOptions), plan_defaults,
                        plan_run};
