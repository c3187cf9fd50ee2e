/* weft run, weft chat: a prompt through the cluster, the answer as it comes. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct RunOptions {
    CommonOptions common;
    RequestOptions request;
    char *prompt, *file, *logits;
    GPtrArray *stop;
    uint64_t top_logprobs;
    bool chat;
} RunOptions;

static const Option RUN_OPTIONS[] = {
    {"prompt", 'p', OPTION_STRING, offsetof(RunOptions, prompt), "TEXT", "the prompt", NULL, 0, 0,
     NULL, false},
    {"file", 'f', OPTION_STRING, offsetof(RunOptions, file), "FILE",
     "the prompt from a file, - = stdin", NULL, 0, 0, NULL, false},
    {"chat", 0, OPTION_FLAG, offsetof(RunOptions, chat), "",
     "the prompt as a user's message, through the model's template", NULL, 0, 0, NULL, false},
    {"stop", 0, OPTION_STRINGS, offsetof(RunOptions, stop), "TEXT",
     "end when this text comes (may be repeated)", NULL, 0, 0, NULL, false},
    {"logits", 0, OPTION_STRING, offsetof(RunOptions, logits), "FILE",
     "write the sampled rows' logits, float32", NULL, 0, 0, NULL, false},
    {"top-logprobs", 0, OPTION_COUNT, offsetof(RunOptions, top_logprobs), "N",
     "with --json: each token's log-probability and the N best in its place", NULL, 1, 32, NULL,
     false},
    SAMPLER_OPTIONS(RunOptions),
    LAYOUT_OPTIONS(RunOptions),
    UP_OPTION(RunOptions),
    COMMON_OPTIONS_BUT_DRY_RUN(RunOptions),
    {0},
};

static void run_defaults(void *values)
{
    request_defaults(&((RunOptions *)values)->request);
}

/* A text ends at its first NUL byte. */
static bool has_no_nul(const char *what, const char *text, size_t length, GError **error)
{
    const char *nul = memchr(text, '\0', length);
    if (nul != NULL) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: byte %zu is NUL: a prompt is text in UTF-8", what, (size_t)(nul - text));
    }
    return nul == NULL;
}

static bool read_stdin(char **text, size_t *length, GError **error)
{
    GString *all = g_string_new(NULL);
    char buffer[4096];
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, stdin)) > 0) {
        g_string_append_len(all, buffer, (gssize)n);
    }
    const bool whole = !ferror(stdin);
    if (!whole) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "the prompt on stdin: %s",
                    g_strerror(errno));
    }
    *length = all->len;
    *text = g_string_free(all, FALSE);
    return whole;
}

static bool read_prompt(RunOptions *o, GError **error)
{
    size_t length;
    if (o->file == NULL) {
        return true;
    }
    if (strcmp(o->file, "-") == 0) {
        return read_stdin(&o->prompt, &length, error) &&
               has_no_nul("the prompt on stdin", o->prompt, length, error);
    }
    GError *why = NULL;
    if (!g_file_get_contents(o->file, &o->prompt, &length, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND, "prompt file: %s", why->message);
        g_error_free(why);
        return false;
    }
    return has_no_nul(o->file, o->prompt, length, error);
}

static json_t *workers_json(const Weft__V1__Plan *plan)
{
    json_t *list = json_array();
    const Weft__V1__Replica *r = plan->n_replicas > 0 ? plan->replicas[0] : NULL;
    for (size_t s = 0; r != NULL && s < r->n_stages; s++) {
        for (size_t i = 0; i < r->stages[s]->n_ranks; i++) {
            json_array_append_new(list, json_string(r->stages[s]->ranks[i]->worker));
        }
    }
    return list;
}

static double rate(double n, double seconds)
{
    return seconds > 0 ? n / seconds : 0;
}

static void print_run_json(const char *model, const RunOutcome *out)
{
    json_t *object = cli_json_new();
    json_t *ids = json_array();
    for (guint i = 0; i < out->ids->len; i++) {
        json_array_append_new(ids, json_integer(g_array_index(out->ids, uint32_t, i)));
    }
    json_object_set_new(object, "model", cli_json_text(model));
    json_object_set_new(object, "text", cli_json_text(out->text->str));
    json_object_set_new(object, "tokens", ids);
    if (out->logprobs != NULL) {
        json_object_set(object, "logprobs", out->logprobs);
    }
    json_object_set_new(object, "prompt_tokens", json_integer(out->prompt_tokens));
    json_object_set_new(object, "finish_reason", json_string(out->finish_reason));
    json_object_set_new(object, "digest", json_string(out->digest));
    if (out->plan != NULL) {
        json_object_set_new(object, "layout", plan_message_layout_json(out->plan));
        json_object_set_new(object, "workers", workers_json(out->plan));
    }
    json_object_set_new(object, "numerics", json_string(out->numerics));
    json_object_set_new(object, "definition", json_string(out->definition));
    json_object_set_new(object, "seed", json_integer((json_int_t)out->seed));
    json_object_set_new(object, "timings",
                        json_pack("{s:f,s:f,s:f,s:f,s:f}", "load_s", out->load_s, "prefill_s",
                                  out->prefill_s, "prefill_tokens_per_s",
                                  rate(out->prefill_tokens, out->prefill_s), "decode_tokens_per_s",
                                  rate(out->ids->len > 0 ? out->ids->len - 1.0 : 0, out->decode_s),
                                  "stall_s", out->stall_s));
    json_object_set_new(object, "recoveries", json_integer(out->recoveries));
    cli_print_json(object);
}

static void print_run_speed(const RunOptions *o, const RunOutcome *out)
{
    if (o->common.quiet) {
        return;
    }
    g_autofree char *layout = out->plan != NULL ? plan_message_layout(out->plan) : g_strdup("?");
    fprintf(stderr,
            "%u prompt tokens at %.1f/s, %u tokens at %.1f/s (predicted %.1f/s), %s, %s, %s, seed "
            "%" G_GUINT64_FORMAT ", digest %s\n",
            out->prompt_tokens, rate(out->prefill_tokens, out->prefill_s), out->ids->len,
            rate(out->ids->len > 0 ? out->ids->len - 1.0 : 0, out->decode_s),
            out->plan != NULL ? out->plan->predicted_decode_tokens_per_s : 0.0, layout,
            out->numerics, out->finish_reason, out->seed, out->digest);
}

static bool dump_logits(const char *path, const RunOutcome *out, GError **error)
{
    GError *why = NULL;
    if (!g_file_set_contents(path, (const char *)(void *)out->logits->data,
                             (gssize)(out->logits->len * sizeof(float)), &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "logits file: %s", why->message);
        g_error_free(why);
        return false;
    }
    return true;
}

/* The request is made; the cluster is there. */
static bool run_once(RunOptions *o, const char *model, GError **error)
{
    Weft__V1__RunRequest message = WEFT__V1__RUN_REQUEST__INIT;
    Weft__V1__Sampler sampler;
    Weft__V1__Layout layout;
    Weft__V1__ChatMessage user = WEFT__V1__CHAT_MESSAGE__INIT, *messages[] = {&user};
    g_autofree char *path = request_model_path(model);
    if (!request_fill(&message, &sampler, &layout, &o->request, error)) {
        return false;
    }
    message.model = path;
    message.want_logits = o->logits != NULL;
    message.top_logprobs = o->common.json ? (uint32_t)o->top_logprobs : 0;
    message.stop = o->stop != NULL ? (char **)o->stop->pdata : NULL;
    message.n_stop = o->stop != NULL ? o->stop->len : 0;
    if (o->chat) {
        user.role = "user";
        user.content = o->prompt;
        message.messages = messages;
        message.n_messages = 1;
    } else {
        message.prompt = o->prompt;
    }
    Client *client = client_new(&o->common, error);
    if (client == NULL) {
        return false;
    }
    RunOutcome out;
    bool ok =
        request_run(client, &o->common, &message, o->common.json ? NULL : stdout, &out, error);
    if (!o->common.json && out.text->len > 0) {
        printf("\n");
        fflush(stdout);
    }
    ok = ok && (o->logits == NULL || dump_logits(o->logits, &out, error));
    if (ok && o->common.json) {
        print_run_json(model, &out);
    } else if (ok) {
        print_run_speed(o, &out);
    }
    run_outcome_clear(&out);
    client_free(client);
    return ok;
}

static int run_run(const Verb *verb, void *values, GPtrArray *rest)
{
    RunOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb,
                         rest->len == 0 ? "a model file is needed" : "one model file is expected");
    }
    if (o->prompt == NULL && o->file == NULL) {
        return cli_usage(verb, "a prompt is needed: -p TEXT or -f FILE");
    }
    if (o->prompt != NULL && o->file != NULL) {
        return cli_usage(verb, "one prompt is expected: -p TEXT or -f FILE, not both");
    }
    if (o->top_logprobs > 0 && !o->common.json) {
        return cli_usage(verb, "--top-logprobs is shown by --json alone: give both");
    }
    if (!read_prompt(o, &error)) {
        return cli_fail(error);
    }
    LocalCluster *cluster = local_cluster_for(&o->common, &error);
    const bool ok = error == NULL && run_once(o, rest->pdata[0], &error);
    local_cluster_free(cluster);
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_RUN = {"run",       "MODEL -p TEXT|-f FILE", "one prompt, one answer",
                       RUN_OPTIONS, sizeof(RunOptions),      run_defaults,
                       run_run};

/* ---- chat ---- */

typedef struct ChatOptions {
    CommonOptions common;
    RequestOptions request;
    char *system;
} ChatOptions;

static const Option CHAT_OPTIONS[] = {
    {"system", 0, OPTION_STRING, offsetof(ChatOptions, system), "TEXT", "system message", NULL, 0,
     0, NULL, false},
    SAMPLER_OPTIONS(ChatOptions),
    LAYOUT_OPTIONS(ChatOptions),
    UP_OPTION(ChatOptions),
    COMMON_OPTIONS_BUT_DRY_RUN(ChatOptions),
    {0},
};

static void chat_defaults(void *values)
{
    ChatOptions *o = values;
    request_defaults(&o->request);
    o->request.n = 512;
}

static void chat_message_free(Weft__V1__ChatMessage *m)
{
    g_free(m->role);
    g_free(m->content);
    g_free(m);
}

static void add_message(GPtrArray *history, const char *role, const char *content)
{
    Weft__V1__ChatMessage *m = g_new0(Weft__V1__ChatMessage, 1);
    weft__v1__chat_message__init(m);
    m->role = g_strdup(role);
    m->content = g_strdup(content);
    g_ptr_array_add(history, m);
}

/* stdin, a line at a time. The loop runs while a line is waited for: a signal ends the wait. */
typedef struct Input {
    Client *client;
    GString *text; /* read and not given out yet */
    bool ended;
} Input;

static void set_true(void *user)
{
    *(bool *)user = true;
}

static bool wait_for_input(Client *client, GError **error)
{
    bool over = client->interrupted;
    const unsigned watch = main_loop_watch_fd(client->loop, STDIN_FILENO, set_true, &over);
    client->on_interrupt = set_true;
    client->interrupt_user = &over;
    main_loop_run_until(client->loop, &over, -1);
    client->on_interrupt = NULL;
    main_loop_unwatch(client->loop, watch);
    if (client->interrupted) {
        if (isatty(STDIN_FILENO)) {
            fprintf(stderr, "\n"); /* below the prompt */
        }
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "interrupted");
    }
    return !client->interrupted;
}

static bool read_more(Input *input, GError **error)
{
    char buffer[4096];
    if (!wait_for_input(input->client, error)) {
        return false;
    }
    const ssize_t n = read(STDIN_FILENO, buffer, sizeof buffer);
    if (n < 0 && errno != EINTR && errno != EAGAIN) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "stdin: %s", g_strerror(errno));
        return false;
    }
    input->ended = n == 0;
    g_string_append_len(input->text, buffer, MAX(n, 0));
    return true;
}

/* Returned, without its line feed; NULL at the end, and with an error. */
static char *read_line(Input *input, GError **error)
{
    const char *feed;
    if (isatty(STDIN_FILENO)) {
        fprintf(stderr, "> ");
    }
    while ((feed = memchr(input->text->str, '\n', input->text->len)) == NULL && !input->ended) {
        if (!read_more(input, error)) {
            return NULL;
        }
    }
    const size_t length = feed != NULL ? (size_t)(feed - input->text->str) : input->text->len;
    if ((feed == NULL && length == 0) || !has_no_nul("stdin", input->text->str, length, error)) {
        return NULL;
    }
    char *line = g_strndup(input->text->str, length);
    g_string_erase(input->text, 0, (gssize)(length + (feed != NULL)));
    return line;
}

static bool converse(ChatOptions *o, const char *model, GError **error)
{
    g_autofree char *path = request_model_path(model);
    g_autoptr(GPtrArray) history =
        g_ptr_array_new_with_free_func((GDestroyNotify)chat_message_free);
    Client *client = client_new(&o->common, error);
    if (client == NULL) {
        return false;
    }
    if (o->system != NULL) {
        add_message(history, "system", o->system);
    }
    Input input = {.client = client, .text = g_string_new(NULL)};
    GError *failed = NULL;
    bool ok = true;
    char *line;
    while (ok && (line = read_line(&input, &failed)) != NULL) {
        Weft__V1__RunRequest message = WEFT__V1__RUN_REQUEST__INIT;
        Weft__V1__Sampler sampler;
        Weft__V1__Layout layout;
        RunOutcome out;
        add_message(history, "user", line);
        g_free(line);
        ok = request_fill(&message, &sampler, &layout, &o->request, error);
        if (ok) {
            message.model = path;
            message.messages = (Weft__V1__ChatMessage **)history->pdata;
            message.n_messages = history->len;
            ok = request_run(client, &o->common, &message, stdout, &out, error);
            if (ok || out.text->len > 0) {
                printf("\n");
                fflush(stdout);
            }
            add_message(history, "assistant", out.text->str);
            run_outcome_clear(&out);
        }
    }
    if (failed != NULL) {
        g_propagate_error(error, failed);
        ok = false;
    }
    g_string_free(input.text, TRUE);
    client_free(client);
    return ok;
}

static int chat_run(const Verb *verb, void *values, GPtrArray *rest)
{
    ChatOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one model file is expected");
    }
    LocalCluster *cluster = local_cluster_for(&o->common, &error);
    const bool ok = error == NULL && converse(o, rest->pdata[0], &error);
    local_cluster_free(cluster);
    return ok ? 0 : cli_fail(error);
}

const Verb VERB_CHAT = {
    "chat",        "MODEL", "a conversation, a line a message", CHAT_OPTIONS, sizeof(ChatOptions),
    chat_defaults, chat_run};
