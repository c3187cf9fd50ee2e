#include "tools/weft/plan_training.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/plan/plan_message.h"
#include "tools/weft/request.h"

#include <stdio.h>

typedef Weft__V1__PlanTrainingResponse Response;

/* ---- JSON ---- */

static json_t *strings_json(char *const *texts, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(list, json_string(texts[i]));
    }
    return list;
}

static json_t *rank_json(const Response *p, const Weft__V1__Rank *rank, size_t number)
{
    const Weft__V1__TrainMemory *m = p->memory[number];
    return json_pack("{s:s,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "worker", rank->worker,
                     "weight_bytes", (json_int_t)m->weights, "gradient_bytes",
                     (json_int_t)m->gradients, "optimizer_bytes", (json_int_t)m->optimizer,
                     "activation_bytes", (json_int_t)m->activations, "buffer_bytes",
                     (json_int_t)m->buffers, "process_bytes", (json_int_t)m->process, "peak_bytes",
                     (json_int_t)plan_message_train_total(m), "memory_bytes",
                     (json_int_t)p->limits[number], "host_bytes", (json_int_t)m->host);
}

/* Stages of all replicas, in order. */
static json_t *stages_json(const Response *p)
{
    json_t *stages = json_array();
    size_t number = 0;
    for (size_t d = 0; p->plan != NULL && d < p->plan->n_replicas; d++) {
        for (size_t s = 0; s < p->plan->replicas[d]->n_stages; s++) {
            const Weft__V1__Stage *stage = p->plan->replicas[d]->stages[s];
            json_t *ranks = json_array();
            for (size_t r = 0; r < stage->n_ranks; r++) {
                json_array_append_new(ranks, rank_json(p, stage->ranks[r], number++));
            }
            json_array_append_new(stages, json_pack("{s:I,s:[I,I],s:o}", "replica", (json_int_t)d,
                                                    "layers", (json_int_t)stage->layer_first,
                                                    (json_int_t)stage->layer_last, "ranks", ranks));
        }
    }
    return stages;
}

static void print_json(const Response *p)
{
    json_t *object = cli_json_new();
    if (p->plan != NULL) {
        json_object_set_new(object, "layout", plan_message_layout_json(p->plan));
        json_object_update_new(
            object, json_pack("{s:s,s:I,s:I,s:I,s:I,s:o}", "schedule", p->schedule, "micro_batches",
                              (json_int_t)p->micro_batches, "micro_sequences",
                              (json_int_t)p->micro_sequences, "chunks", (json_int_t)p->chunks,
                              "parameters", (json_int_t)p->parameters, "stages", stages_json(p)));
        json_object_set_new(object, "numerics", json_string(p->numerics));
        json_object_set_new(object, "predicted",
                            json_pack("{s:f,s:f,s:f,s:f,s:f,s:f}", "step_s", p->step_s,
                                      "tokens_per_s", p->tokens_per_s, "bubble", p->bubble,
                                      "exchange_s", p->exchange_s, "update_s", p->update_s, "flops",
                                      p->flops));
        json_object_set_new(object, "reasons", strings_json(p->plan->reasons, p->plan->n_reasons));
    }
    json_object_set_new(object, "violations", strings_json(p->violations, p->n_violations));
    json_object_set_new(object, "alternatives", strings_json(p->alternatives, p->n_alternatives));
    cli_print_json(object);
}

/* ---- text ---- */

static void add_row(TextTable *t, const Response *p, const Weft__V1__Stage *stage, size_t place[3],
                    size_t number)
{
    const Weft__V1__TrainMemory *m = p->memory[number];
    g_autofree char *where = g_strdup_printf("%zu/%zu/%zu", place[0], place[1], place[2]);
    g_autofree char *layers = g_strdup_printf("%u-%u", stage->layer_first, stage->layer_last);
    g_autofree char *weights = units_format_size(m->weights),
                    *gradients = units_format_size(m->gradients),
                    *optimizer = units_format_size(m->optimizer),
                    *activations = units_format_size(m->activations),
                    *buffers = units_format_size(m->buffers + m->process),
                    *total = units_format_size(plan_message_train_total(m)),
                    *limit = units_format_size(p->limits[number]);
    text_table_row(t, stage->ranks[place[2]]->worker, where, layers, weights, gradients, optimizer,
                   activations, buffers, total, limit, NULL);
}

static void print_memory(const Response *p)
{
    TextTable *t = text_table_new((const char *const[]){"WORKER", "DP/PP/TP", "LAYERS", "WEIGHTS",
                                                        "GRADIENTS", "OPTIMIZER", "ACTIVATIONS",
                                                        "BUFFERS", "TOTAL", "OF", NULL});
    size_t number = 0;
    for (size_t d = 0; d < p->plan->n_replicas; d++) {
        for (size_t s = 0; s < p->plan->replicas[d]->n_stages; s++) {
            const Weft__V1__Stage *stage = p->plan->replicas[d]->stages[s];
            for (size_t r = 0; r < stage->n_ranks; r++) {
                add_row(t, p, stage, (size_t[3]){d, s, r}, number++);
            }
        }
    }
    text_table_print(t);
}

static void print_plan(const Response *p)
{
    g_autofree char *layout = plan_message_layout(p->plan);
    printf(
        "layout %s, numerics %s, %s, %u micro-batches of at most %u sequences, %" G_GUINT64_FORMAT
        " parameters\n\n",
        layout, p->numerics, p->schedule, p->micro_batches, p->micro_sequences, p->parameters);
    print_memory(p);
    printf("\n");
    for (size_t i = 0; i < p->plan->n_reasons; i++) {
        printf("- %s\n", p->plan->reasons[i]);
    }
    printf("\npredicted: %.3g s a step, %.0f tokens/s; bubble %.0f %% of the passes, exchange of "
           "replicas %.2g s, update %.2g s\n",
           p->step_s, p->tokens_per_s, p->bubble * 100, p->exchange_s, p->update_s);
}

static int impossible(const CommonOptions *common, const Response *p)
{
    if (common->json) {
        print_json(p);
    }
    return cli_no_plan(p->violations, p->n_violations, p->alternatives, p->n_alternatives);
}

int plan_training(CommonOptions *common, const JobSpec *spec)
{
    GError *error = NULL;
    g_autoptr(GString) text = g_string_new(NULL);
    Weft__V1__PlanTrainingRequest request = WEFT__V1__PLAN_TRAINING_REQUEST__INIT;
    Response *response = NULL;
    job_spec_print(spec, text);
    request.spec = text->str;
    LocalCluster *cluster = local_cluster_for(common, &error);
    const bool ok = error == NULL && admin_call(common, "PlanTraining", &request.base,
                                                (ProtobufCMessage **)&response, &error);
    local_cluster_free(cluster);
    if (!ok) {
        return cli_fail(error);
    }
    int code = 0;
    if (response->n_violations > 0) {
        code = impossible(common, response);
    } else if (common->json) {
        print_json(response);
    } else {
        print_plan(response);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return code;
}
