/* weft verify: the same request on every layout; digests must be equal, and where they are not, the
 * first site that differs is named. */
#include "tools/weft/difference.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct VerifyOptions {
    CommonOptions common;
    RequestOptions request;
    char *layouts, *prompt;
} VerifyOptions;

static const Option VERIFY_OPTIONS[] = {
    {"layouts", 0, OPTION_STRING, offsetof(VerifyOptions, layouts), "LIST",
     "all, or such as tp1,tp2,pp2,pp2tp2,dp2 ", NULL, 0, 0, NULL, false},
    {"prompt", 'p', OPTION_STRING, offsetof(VerifyOptions, prompt), "TEXT", "what to compute", NULL,
     0, 0, NULL, false},
    SAMPLER_OPTIONS(VerifyOptions),
    LAYOUT_OPTIONS(VerifyOptions),
    UP_OPTION(VerifyOptions),
    COMMON_OPTIONS_BUT_DRY_RUN(VerifyOptions),
    {0},
};

static void verify_defaults(void *values)
{
    VerifyOptions *o = values;
    request_defaults(&o->request);
    o->request.numerics = g_strdup("exact"); /* the class that promises what is verified */
    o->request.n = 32;
}

static uint32_t usable_members(const Weft__V1__StatusResponse *s)
{
    uint32_t n = 0;
    for (size_t i = 0; i < s->n_members; i++) {
        n += member_is_usable(s->members[i]) ? (uint32_t)MAX(s->members[i]->n_devices, 1u) : 0;
    }
    return n;
}

/* ---- layouts ---- */

typedef struct LayoutWish {
    uint32_t dp, pp, tp;
} LayoutWish;

/* "pp2tp3" and the like. */
static bool parse_layout(const char *text, LayoutWish *out, GError **error)
{
    *out = (LayoutWish){1, 1, 1};
    const char *at = text;
    while (*at != '\0') {
        uint32_t *field = g_str_has_prefix(at, "dp")   ? &out->dp
                          : g_str_has_prefix(at, "pp") ? &out->pp
                          : g_str_has_prefix(at, "tp") ? &out->tp
                                                       : NULL;
        char *end = NULL;
        const unsigned long n = field != NULL ? strtoul(at + 2, &end, 10) : 0;
        if (field == NULL || end == at + 2 || n < 1 || n > 64) {
            g_set_error(
                error, WEFT_ERROR, WEFT_ERROR_INVALID,
                "layout '%s' is not understood: write dp, pp, tp and a number, as in pp2tp3", text);
            return false;
        }
        *field = (uint32_t)n;
        at = end;
    }
    return true;
}

/* Every mix that the members have room for. */
static GArray *all_layouts(uint32_t members)
{
    GArray *list = g_array_new(FALSE, FALSE, sizeof(LayoutWish));
    for (uint32_t pp = 1; pp <= members; pp++) {
        for (uint32_t tp = 1; pp * tp <= members; tp++) {
            const LayoutWish wish = {1, pp, tp};
            g_array_append_val(list, wish);
        }
    }
    if (members >= 2) {
        const LayoutWish replicas = {2, 1, 1};
        g_array_append_val(list, replicas);
    }
    return list;
}

static GArray *wished_layouts(const VerifyOptions *o, uint32_t members, GError **error)
{
    if (o->layouts == NULL || strcmp(o->layouts, "all") == 0) {
        return all_layouts(members);
    }
    GArray *list = g_array_new(FALSE, FALSE, sizeof(LayoutWish));
    g_auto(GStrv) names = g_strsplit(o->layouts, ",", -1);
    for (char **name = names; *name != NULL; name++) {
        LayoutWish wish;
        if (!parse_layout(*name, &wish, error)) {
            g_array_unref(list);
            return NULL;
        }
        g_array_append_val(list, wish);
    }
    return list;
}

/* ---- runs ---- */

typedef struct Verdict {
    LayoutWish wish;
    char *layout, *why;
    char digest[33], definition[33];
    bool same;
    Difference difference;
    char *difference_text; /* where it parts from the reference; NULL = it does not */
} Verdict;

static void verdict_clear(void *p)
{
    Verdict *v = p;
    g_free(v->layout);
    g_free(v->why);
    g_free(v->difference_text);
}

static bool run_layout(Client *client, const VerifyOptions *o, const char *path, LayoutWish wish,
                       bool trace, RunOutcome *out, GError **error)
{
    Weft__V1__RunRequest message = WEFT__V1__RUN_REQUEST__INIT;
    Weft__V1__Sampler sampler;
    Weft__V1__Layout layout;
    if (!request_fill(&message, &sampler, &layout, &o->request, error)) {
        *out = (RunOutcome){0};
        return false;
    }
    layout = (Weft__V1__Layout)WEFT__V1__LAYOUT__INIT;
    layout.dp = wish.dp;
    layout.pp = wish.pp;
    layout.tp = wish.tp;
    message.model = (char *)path;
    message.prompt = o->prompt != NULL
                         ? o->prompt
                         : "The same weights, the same prompt, the same bits: whatever the layout,";
    message.ignore_end = true;
    message.fresh = true;
    message.seed_given = true; /* the same for all layouts also where nobody chose one */
    message.trace = trace;
    return request_run(client, &o->common, &message, NULL, out, error);
}

/* One layout; a layout that the model or the members do not allow is noted, not an error. */
static bool verify_layout(Client *client, const VerifyOptions *o, const char *path, LayoutWish wish,
                          Verdict *v, GError **error)
{
    RunOutcome out;
    g_autoptr(GError) failed = NULL;
    *v = (Verdict){.wish = wish,
                   .layout = g_strdup_printf("dp%u pp%u tp%u", wish.dp, wish.pp, wish.tp)};
    const bool ok = run_layout(client, o, path, wish, false, &out, &failed);
    if (ok) {
        g_strlcpy(v->digest, out.digest, sizeof v->digest);
        g_strlcpy(v->definition, out.definition, sizeof v->definition);
    } else if (g_error_matches(failed, WEFT_ERROR, WEFT_ERROR_IMPOSSIBLE)) {
        v->why = g_strdup(failed->message);
    }
    run_outcome_clear(&out);
    if (!ok && v->why == NULL) {
        g_propagate_prefixed_error(error, g_steal_pointer(&failed), "layout %s: ", v->layout);
        return false;
    }
    return true;
}

/* Whether it ran under this definition: another kind of device has exact bits of its own. */
static bool ran_as(const Verdict *v, const char *definition)
{
    return v->why == NULL && strcmp(v->definition, definition) == 0;
}

static guint count_digest(GArray *verdicts, const Verdict *like)
{
    guint n = 0;
    for (guint i = 0; i < verdicts->len; i++) {
        const Verdict *v = &g_array_index(verdicts, Verdict, i);
        n += ran_as(v, like->definition) && strcmp(v->digest, like->digest) == 0;
    }
    return n;
}

/* Of those that ran under the definition, the first that most agree with. */
static const Verdict *reference_of(GArray *verdicts, const char *definition)
{
    const Verdict *best = NULL;
    for (guint i = 0; i < verdicts->len; i++) {
        const Verdict *v = &g_array_index(verdicts, Verdict, i);
        if (ran_as(v, definition) &&
            (best == NULL || count_digest(verdicts, v) > count_digest(verdicts, best))) {
            best = v;
        }
    }
    return best;
}

/* Runs a layout that differs once more, traced. A trace that cannot be had is told in its place. */
static void locate(Client *client, const VerifyOptions *o, const char *path,
                   const RunOutcome *reference, Verdict *v)
{
    g_autoptr(GError) error = NULL;
    RunOutcome traced;
    if (run_layout(client, o, path, v->wish, true, &traced, &error)) {
        v->difference = difference_find(reference, &traced);
        v->difference_text = difference_text(&v->difference, &traced);
    } else {
        v->difference_text = g_strdup_printf("not traced: %s", error->message);
    }
    run_outcome_clear(&traced);
}

/* Whether all that ran under one definition are equal; for those that are not, where they part from
 * what most of them gave. */
static bool judge(Client *client, const VerifyOptions *o, const char *path, GArray *verdicts)
{
    const Verdict *tried = NULL;
    RunOutcome traced = {0};
    g_autoptr(GError) error = NULL;
    bool equal = true;
    for (guint i = 0; i < verdicts->len; i++) {
        Verdict *v = &g_array_index(verdicts, Verdict, i);
        const Verdict *reference = v->why == NULL ? reference_of(verdicts, v->definition) : NULL;
        v->same = reference != NULL && strcmp(reference->digest, v->digest) == 0;
        if (reference == NULL || v->same) {
            continue;
        }
        equal = false;
        if (tried != reference) {
            tried = reference;
            g_clear_error(&error);
            run_outcome_clear(&traced);
            run_layout(client, o, path, reference->wish, true, &traced, &error);
        }
        if (error == NULL) {
            locate(client, o, path, &traced, v);
        } else {
            v->difference_text = g_strdup_printf("not traced: %s", error->message);
        }
    }
    run_outcome_clear(&traced);
    return equal;
}

/* Of the first layout that ran: they ask for the same, and all do it on hosts or one kind of
 * device, unless no layout has room on one. */
static const char *verdict_definition(GArray *verdicts)
{
    for (guint i = 0; i < verdicts->len; i++) {
        const Verdict *v = &g_array_index(verdicts, Verdict, i);
        if (v->why == NULL) {
            return v->definition;
        }
    }
    return "";
}

static guint refused_layouts(GArray *verdicts)
{
    guint n = 0;
    for (guint i = 0; i < verdicts->len; i++) {
        n += g_array_index(verdicts, Verdict, i).why != NULL;
    }
    return n;
}

static json_t *verdict_json(const Verdict *v)
{
    if (v->why != NULL) {
        return json_pack("{s:s,s:n,s:s}", "layout", v->layout, "digest", "refused", v->why);
    }
    json_t *object = json_pack("{s:s,s:s,s:b,s:s}", "layout", v->layout, "digest", v->digest,
                               "equal", (int)v->same, "definition", v->definition);
    if (v->difference_text != NULL) {
        g_autofree char *site = difference_site(&v->difference);
        json_object_set_new(object, "first_difference",
                            json_pack("{s:s,s:I,s:s}", "site", site, "token",
                                      (json_int_t)v->difference.position, "text",
                                      v->difference_text));
    }
    return object;
}

static void print_verdicts(const VerifyOptions *o, GArray *verdicts, bool equal)
{
    if (o->common.json) {
        json_t *object = cli_json_new(), *list = json_array();
        for (guint i = 0; i < verdicts->len; i++) {
            json_array_append_new(list, verdict_json(&g_array_index(verdicts, Verdict, i)));
        }
        json_object_set_new(object, "layouts", list);
        json_object_set_new(object, "equal", json_boolean(equal));
        json_object_set_new(object, "definition", json_string(verdict_definition(verdicts)));
        cli_print_json(object);
        return;
    }
    TextTable *t = text_table_new((const char *const[]){"LAYOUT", "DIGEST", "RESULT", NULL});
    for (guint i = 0; i < verdicts->len; i++) {
        const Verdict *v = &g_array_index(verdicts, Verdict, i);
        g_autofree char *differs = v->difference_text != NULL
                                       ? g_strdup_printf("differs, first at %s", v->difference_text)
                                       : NULL;
        text_table_row(t, v->layout, v->why != NULL ? "-" : v->digest,
                       v->why != NULL    ? v->why
                       : differs != NULL ? differs
                       : ran_as(v, verdict_definition(verdicts))
                           ? "equal"
                           : "equal to others of this kind of device",
                       NULL);
    }
    text_table_print(t);
}

typedef struct Tally {
    bool equal;
    guint n, refused;
} Tally;

static bool verify_all(const VerifyOptions *o, const char *model, Tally *tally, GError **error)
{
    g_autofree char *path = request_model_path(model);
    Client *client = client_new(&o->common, error);
    Weft__V1__StatusResponse *status = client != NULL ? request_status(client, error) : NULL;
    GArray *wishes = status != NULL ? wished_layouts(o, usable_members(status), error) : NULL;
    g_autoptr(GArray) verdicts = g_array_new(FALSE, FALSE, sizeof(Verdict));
    g_array_set_clear_func(verdicts, verdict_clear);
    bool ok = wishes != NULL;
    for (guint i = 0; ok && i < wishes->len; i++) {
        Verdict v;
        ok = verify_layout(client, o, path, g_array_index(wishes, LayoutWish, i), &v, error);
        g_array_append_val(verdicts, v);
        cli_progress(&o->common, "%s: %s", v.layout, v.why != NULL ? v.why : v.digest);
    }
    cli_progress_end(&o->common);
    if (ok) {
        *tally =
            (Tally){judge(client, o, path, verdicts), verdicts->len, refused_layouts(verdicts)};
        print_verdicts(o, verdicts, tally->equal);
    }
    g_clear_pointer(&wishes, g_array_unref);
    if (status != NULL) {
        protobuf_c_message_free_unpacked(&status->base, NULL);
    }
    client_free(client);
    return ok;
}

static int verify_run(const Verb *verb, void *values, GPtrArray *rest)
{
    VerifyOptions *o = values;
    GError *error = NULL;
    Tally tally = {0};
    if (rest->len != 1) {
        return cli_usage(verb, "one model file is expected");
    }
    LocalCluster *cluster = local_cluster_for(&o->common, &error);
    const bool ok = error == NULL && verify_all(o, rest->pdata[0], &tally, &error);
    local_cluster_free(cluster);
    if (!ok) {
        return cli_fail(error);
    }
    if (!tally.equal) {
        fprintf(stderr, "weft: layouts differ: a worker computes other bits: the table above says "
                        "where they part first; drain it, or see `weft doctor` there\n");
        return 1;
    }
    if (tally.refused == tally.n ||
        (tally.refused > 0 && o->layouts != NULL && strcmp(o->layouts, "all") != 0)) {
        fprintf(stderr,
                "weft: %u of %u layouts cannot be had: the table says why: choose others with "
                "--layouts\n",
                tally.refused, tally.n);
        return 2;
    }
    return 0;
}

const Verb VERB_VERIFY = {"verify",
                          "MODEL [--layouts all|LIST]",
                          "run layouts on this cluster and compare their bits",
                          VERIFY_OPTIONS,
                          sizeof(VerifyOptions),
                          verify_defaults,
                          verify_run};
