/* weft plot: the curves of a training job, as the coordinator has them, in a file. */
#include "tools/weft/request.h"
#include "tools/weft/verbs.h"

#include "proto/base/error.h"

#include <stdio.h>
#include <string.h>

typedef struct PlotOptions {
    CommonOptions common;
    char *output;
} PlotOptions;

static const Option PLOT_OPTIONS[] = {
    {"output", 'o', OPTION_STRING, offsetof(PlotOptions, output), "FILE",
     "the SVG file to write, - for stdout (default: JOB.svg here)", NULL, 0, 0, NULL, false},
    COMMON_OPTIONS(PlotOptions),
    {0},
};

static bool write_picture(const char *path, const char *svg, GError **error)
{
    g_autoptr(GError) why = NULL;
    if (!g_file_set_contents(path, svg, -1, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s cannot be written: %s", path,
                    why->message);
        return false;
    }
    return true;
}

static void report(const PlotOptions *o, const char *name, const char *path, uint64_t steps)
{
    if (o->common.json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:s,s:s,s:I}", "job", name, "file", path,
                                                 "steps", (json_int_t)steps));
        cli_print_json(object);
    } else {
        printf("%s: %" G_GUINT64_FORMAT " steps of %s\n", path, steps, name);
    }
}

static int plot_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const PlotOptions *o = values;
    GError *error = NULL;
    if (rest->len != 1) {
        return cli_usage(verb, "one job is expected");
    }
    char *name = rest->pdata[0];
    g_autofree char *path =
        o->output != NULL ? g_strdup(o->output) : g_strconcat(name, ".svg", NULL);
    Weft__V1__PlotJobRequest request = WEFT__V1__PLOT_JOB_REQUEST__INIT;
    Weft__V1__PlotJobResponse *response;
    request.name = name;
    if (!admin_call(&o->common, "PlotJob", &request.base, (ProtobufCMessage **)&response, &error)) {
        return cli_fail(error);
    }
    if (strcmp(path, "-") == 0) {
        printf("%s", response->svg);
    } else if (o->common.dry_run) {
        printf("would write %s\n", path);
    } else if (write_picture(path, response->svg, &error)) {
        report(o, name, path, response->steps);
    }
    protobuf_c_message_free_unpacked(&response->base, NULL);
    return error != NULL ? cli_fail(error) : 0;
}

const Verb VERB_PLOT = {
    "plot",       "JOB [-o FILE]",     "the curves of a training job, as an SVG file",
    PLOT_OPTIONS, sizeof(PlotOptions), NULL,
    plot_run};
