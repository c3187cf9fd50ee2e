/* weft export, weft quantize: a model's weights and tokenizer as files that others read. Both work
 * on this machine's files alone, without a cluster. */
#include "tools/weft/verbs.h"

#include "proto/base/error.h"
#include "proto/base/units.h"
#include "proto/model/hf_model.h"
#include "proto/model/model_source.h"

#include <glib/gstdio.h>
#include <stdio.h>
#include <string.h>

typedef struct ExportOptions {
    CommonOptions common;
    char *type;
} ExportOptions;

static const Option EXPORT_OPTIONS[] = {
    {"type", 't', OPTION_STRING, offsetof(ExportOptions, type), "TYPE",
     "of the weights (default f32; directories: f32, f16, bf16)", NULL, 0, 0,
     "f32|f16|bf16|q8_0|q4_0|q4_1", false},
    COMMON_OPTIONS(ExportOptions),
    {0},
};
static const Option QUANTIZE_OPTIONS[] = {
    COMMON_OPTIONS(ExportOptions),
    {0},
};

typedef struct Export {
    const CommonOptions *common;
    const char *in, *out;
    Dtype type;
} Export;

static bool is_gguf(const char *path)
{
    return g_str_has_suffix(path, ".gguf");
}

static bool check(const Export *e, GError **error)
{
    if (!is_gguf(e->out) && dtype_info(e->type)->block != 1) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s would be a Hugging Face directory, which has no %s: name a file that ends "
                    "in .gguf, or use f32, f16 or bf16",
                    e->out, dtype_info(e->type)->name);
        return false;
    }
    g_autofree char *in = g_canonicalize_filename(e->in, NULL),
                    *out = g_canonicalize_filename(e->out, NULL);
    if (strcmp(in, out) == 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s would be read and written at once: name another file", e->out);
        return false;
    }
    return true;
}

static uint64_t size_of(const Export *e)
{
    g_autofree char *weights =
        is_gguf(e->out) ? g_strdup(e->out) : g_build_filename(e->out, "model.safetensors", NULL);
    GStatBuf s;
    return g_stat(weights, &s) == 0 ? (uint64_t)s.st_size : 0;
}

static void report(const Export *e, const ModelSource *source)
{
    const char *type = dtype_info(e->type)->name,
               *format = is_gguf(e->out) ? "gguf" : "huggingface",
               *digest = model_source_digest(source);
    const uint64_t size = size_of(e);
    if (e->common->json) {
        json_t *object = cli_json_new();
        json_object_update_new(object, json_pack("{s:s,s:s,s:s,s:s,s:s,s:I,s:b}", "model",
                                                 model_source_spec(source)->name, "from", e->in,
                                                 "to", e->out, "format", format, "type", type,
                                                 "bytes", (json_int_t)size, "tokenizer",
                                                 (int)(model_source_vocab(source) != NULL)));
        if (digest != NULL) {
            json_object_set_new(object, "weights_digest", json_string(digest));
        }
        cli_print_json(object);
        return;
    }
    g_autofree char *text = units_format_size(size);
    printf("%s: %s, %s, %s%s\n", e->out, format, type, text,
           model_source_vocab(source) != NULL ? "" : ", without a tokenizer");
}

static int run(const Export *e)
{
    GError *error = NULL;
    if (!check(e, &error)) {
        return cli_fail(error);
    }
    g_autoptr(ModelSource) source = model_source_open(e->in, &error);
    if (source == NULL) {
        return cli_fail(error);
    }
    if (e->common->dry_run) {
        printf("would write %s as %s\n", e->out, dtype_info(e->type)->name);
        return 0;
    }
    const ModelContents contents = model_source_contents(source);
    cli_progress(e->common, "writing %s", e->out);
    const bool ok = is_gguf(e->out) ? gguf_write(e->out, &contents, e->type, &error)
                                    : hf_model_write(e->out, &contents, e->type, &error);
    cli_progress_end(e->common);
    if (!ok) {
        return cli_fail(error);
    }
    report(e, source);
    return 0;
}

static int export_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const ExportOptions *o = values;
    Export e = {.common = &o->common, .type = DTYPE_F32};
    if (rest->len != 2) {
        return cli_usage(verb, "a checkpoint and what to write are expected");
    }
    e.in = rest->pdata[0];
    e.out = rest->pdata[1];
    if (o->type != NULL && !gguf_write_type(o->type, &e.type)) {
        return cli_usage(verb, "type '%s' is not written", o->type);
    }
    return run(&e);
}

static int quantize_run(const Verb *verb, void *values, GPtrArray *rest)
{
    const ExportOptions *o = values;
    Export e = {.common = &o->common};
    if (rest->len != 3) {
        return cli_usage(verb, "a model, the file to write and a type are expected");
    }
    e.in = rest->pdata[0];
    e.out = rest->pdata[1];
    if (!gguf_write_type(rest->pdata[2], &e.type)) {
        return cli_usage(verb, "type '%s' is unknown: use f32, f16, bf16, q8_0, q4_0 or q4_1",
                         (const char *)rest->pdata[2]);
    }
    if (!is_gguf(e.out)) {
        return cli_usage(verb, "%s is to end in .gguf", e.out);
    }
    return run(&e);
}

const Verb VERB_EXPORT = {"export",
                          "CHECKPOINT OUT",
                          "a checkpoint as a GGUF file (OUT.gguf) or a Hugging Face directory",
                          EXPORT_OPTIONS,
                          sizeof(ExportOptions),
                          NULL,
                          export_run};
const Verb VERB_QUANTIZE = {
    "quantize",       "IN OUT TYPE",         "a model's weights in another type, as a GGUF file",
    QUANTIZE_OPTIONS, sizeof(ExportOptions), NULL,
    quantize_run};
