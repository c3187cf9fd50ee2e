/* Job files: what a file says is what the job holds; defaults; every error of a file at once with
 * its line and what would be possible; printing gives a file that reads as the same job. */
#include "proto/base/error.h"
#include "proto/config/job_spec.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static const char train_text[] =
    "kind: train                      # serve | train\n"
    "name: small-gpt\n"
    "model: {config: {family: gpt2, layers: 6, width: 384, heads: 6, context: 256}}\n"
    "data: {train: text.txt, validation: held.txt, format: text, tokenizer: {train: 4096}}\n"
    "batch: {sequences: 32, length: 256, leaves: 8}\n"
    "steps: 300\n"
    "seed: 1\n"
    "optimizer: {name: adamw, lr: 6e-4, betas: [0.9, 0.95], decay: 0.1, clip: 1.0, schedule: "
    "cosine, warmup: 30}\n"
    "precision: f32\n"
    "layout: {dp: 2, pp: 2, tp: 1, micro: 8, schedule: 1f1b, zero: 1, recompute: none}\n"
    "checkpoint: {directory: ckpt, every: 100, keep: 3}\n"
    "update: {rule: sync}\n";

static const char serve_text[] = "kind: serve\n"
                                 "name: assistant\n"
                                 "model: {from: model.gguf}\n"
                                 "layout: {dp: 1, pp: 1, tp: 2}\n"
                                 "limits: {context: 8192, streams: 64, queue: 512}\n"
                                 "kv: {type: f16, memory: 2G}\n";

static JobSpec *parse(const char *text, GError **error)
{
    return job_spec_parse(text, strlen(text), "job", error);
}

static JobSpec *read_job(const char *text)
{
    g_autoptr(GError) error = NULL;
    JobSpec *spec = parse(text, &error);
    if (spec == NULL) {
        fail_msg("%s", error->message);
    }
    return spec;
}

static void test_train(void **state)
{
    g_autoptr(JobSpec) s = read_job(train_text);
    assert_int_equal(s->kind, JOB_TRAIN);
    assert_string_equal(s->name, "small-gpt");
    assert_int_equal(s->model.family, JOB_GPT2);
    assert_int_equal(s->model.layers, 6);
    assert_int_equal(s->model.vocabulary, 4096);
    assert_int_equal(s->model.ffn, 4 * 384);
    assert_int_equal(s->model.kv_heads, 6);
    assert_string_equal(s->data.validation, "held.txt");
    assert_int_equal(s->data.tokenizer_train, 4096);
    assert_int_equal(s->sequences, 32);
    assert_int_equal(s->leaves, 8);
    assert_true(s->optimizer.lr == 6e-4 && s->optimizer.beta2 == 0.95);
    assert_true(s->optimizer.decay_embeddings == 0.1 && s->optimizer.decay_biases == 0.0);
    assert_true(s->optimizer.floor == 6e-4 / 10.0);
    assert_int_equal(s->layout.dp, 2);
    assert_int_equal(s->layout.micro, 8);
    assert_int_equal(s->layout.schedule, JOB_SCHEDULE_1F1B);
    assert_int_equal(s->layout.zero, 1);
    assert_int_equal(s->loss_scale.policy, JOB_SCALING_NONE);
    assert_int_equal(s->checkpoint_every, 100);
    assert_int_equal(s->validation_every, 30);
    const ModelConfig config = job_spec_model_config(s, 0);
    assert_int_equal(config.family, FAMILY_GPT2);
    assert_int_equal(config.vocabulary, 4096);
}

static void test_serve(void **state)
{
    g_autoptr(JobSpec) s = read_job(serve_text);
    assert_int_equal(s->kind, JOB_SERVE);
    assert_string_equal(s->model.from, "model.gguf");
    assert_int_equal(s->layout.tp, 2);
    assert_int_equal(s->context, 8192);
    assert_int_equal(s->streams, 64);
    assert_int_equal(s->kv_memory, UINT64_C(2) << 30);
    g_autoptr(JobSpec) small = read_job("kind: serve\nmodel: {from: a/some model.gguf}\n");
    assert_string_equal(small->name, "some-model-gguf");
    assert_int_equal(small->layout.dp, 0);
    assert_int_equal(small->queue, 512);
}

static void test_defaults(void **state)
{
    g_autoptr(JobSpec) s = read_job("kind: train\n"
                                    "model:\n"
                                    "  config: {family: llama, layers: 2, width: 64, heads: 4,\n"
                                    "           kv_heads: 2, context: 128}\n"
                                    "data: {train: t.txt}\n"
                                    "batch: {sequences: 4}\n"
                                    "steps: 5\n"
                                    "optimizer: {lr: 1e-3}\n"
                                    "precision: f16\n"
                                    "layout: auto\n");
    assert_int_equal(s->model.ffn, 192); /* 8/3 x 64 = 170.7, to a multiple of 32 */
    assert_int_equal(s->model.vocabulary, 257);
    assert_int_equal(s->length, 128);
    assert_int_equal(s->seed, 1);
    assert_true(s->optimizer.decay == 0.1 && s->optimizer.clip == 1.0);
    assert_int_equal(s->loss_scale.policy, JOB_SCALING_DYNAMIC);
    assert_true(s->loss_scale.start == 65536.0);
    assert_int_equal(s->layout.dp, 0);
    assert_null(s->checkpoint_directory);
}

/* Printing is a fixed point: the printed file reads as a job that prints the same. */
static void check_print(const char *text)
{
    g_autoptr(JobSpec) first = read_job(text);
    g_autoptr(GString) printed = g_string_new(NULL);
    job_spec_print(first, printed);
    g_autoptr(JobSpec) second = read_job(printed->str);
    g_autoptr(GString) again = g_string_new(NULL);
    job_spec_print(second, again);
    assert_string_equal(printed->str, again->str);
}

static void test_print(void **state)
{
    check_print(train_text);
    check_print(serve_text);
    check_print(
        "kind: train\nname: \"a \\\"b\\\" \xC3\xA9\"\n"
        "model: {from: 'dir: with # signs'}\n"
        "data: {train: '12', format: jsonl, packing: documents, "
        "attention: documents, positions: documents, text: body}\n"
        "batch: {sequences: 3, length: 7, leaves: 2}\nsteps: 10\nseed: 18446744073709551615\n"
        "optimizer: {name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, schedule: linear}\n"
        "precision: bf16\nloss_scale: {policy: fixed, start: 1024}\n"
        "layout: {schedule: interleaved, pp: 3, chunks: 2}\n"
        "sample: {every: 5, prompt: \" \\\"b\\\"\\n\\x01 \xC3\xA9\"}\n"
        "trace: {file: t.json, steps: 3}\n");
    g_autoptr(JobSpec) s = read_job(train_text);
    g_autoptr(GString) printed = g_string_new(NULL);
    job_spec_print(s, printed);
    assert_non_null(strstr(printed->str, "  betas: [0.9, 0.95]\n"));
    assert_non_null(strstr(printed->str, "model:\n  config:\n    family: gpt2\n    layers: 6\n"));
    assert_non_null(strstr(printed->str, "  lr: 0.0006\n"));
    assert_non_null(strstr(printed->str, "layout:\n  dp: 2\n"));
    assert_null(strstr(printed->str, "momentum"));
    assert_null(strstr(printed->str, "rope_base"));
    assert_null(strstr(printed->str, "trace"));
}

/* What only says where and how it runs is no part of the definition. */
static void test_definition(void **state)
{
    static const struct {
        const char *more;
        bool same;
    } cases[] = {
        {"name: other\n", true},
        {"layout: {dp: 2, pp: 2, schedule: gpipe, recompute: full}\n", true},
        {"checkpoint: {directory: /c, every: 7, keep: 2}\n", true},
        {"validation: {every: 3}\nsample: {every: 4}\n", true},
        {"seed: 2\n", false},
        {"precision: bf16\n", false},
        {"dropout: 0.1\n", false},
        {"numerics: fast\n", false},
    };
    static const char base[] = "kind: train\nmodel: {from: m.gguf}\n"
                               "data: {train: %s, validation: v.txt}\nsteps: 10\n"
                               "batch: {sequences: 4, length: 8}\noptimizer: {lr: 0.1}\n%s";
    g_autofree char *plain = g_strdup_printf(base, "t.txt", "");
    g_autoptr(JobSpec) first = read_job(plain);
    const Hash128 definition = job_spec_definition(first);
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *text = g_strdup_printf(base, "elsewhere/t.txt", cases[i].more);
        g_autoptr(JobSpec) s = read_job(text);
        const Hash128 got = job_spec_definition(s);
        if (hash128_equal(&got, &definition) != cases[i].same) {
            fail_msg("%s", cases[i].more);
        }
    }
}

static void test_resolve(void **state)
{
    g_autoptr(JobSpec) s = read_job(train_text);
    job_spec_resolve(s, "/jobs");
    assert_string_equal(s->data.train, "/jobs/text.txt");
    assert_string_equal(s->checkpoint_directory, "/jobs/ckpt");
    assert_null(s->model.from);
    g_autofree char *text = g_strconcat(train_text, "trace: {file: t/r.json}\n", NULL);
    g_autoptr(JobSpec) traced = read_job(text);
    job_spec_resolve(traced, "/jobs");
    assert_string_equal(traced->trace_file, "/jobs/t/r.json");
    assert_true(traced->trace_first == 2 && traced->trace_steps == 8);
    job_spec_resolve(s, "/elsewhere");
    assert_string_equal(s->data.train, "/jobs/text.txt");
}

/* ---- errors ---- */

static char *error_of(const char *text)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(JobSpec) spec = parse(text, &error);
    if (spec != NULL) {
        fail_msg("read without an error: %s", text);
    }
    assert_int_equal(error->code, WEFT_ERROR_INVALID);
    assert_null(strchr(error->message, '\n'));
    return g_strdup(error->message);
}

static void check_has(const char *message, const char *part)
{
    if (strstr(message, part) == NULL) {
        fail_msg("no \"%s\" in: %s", part, message);
    }
}

static void test_all_errors_at_once(void **state)
{
    g_autofree char *message =
        error_of("kind: train\n"
                 "modle: {from: x}\n"
                 "model: {config: {family: gtp2, layers: 0, width: 100, heads: 3, contxt: 64}}\n"
                 "data: {train: [a, b], format: csv, tokenizer: bytes}\n"
                 "batch: {sequences: -4, length: 256, leaves: 65}\n"
                 "steps: many\n"
                 "optimizer: {lr: nan, betas: [0.9, 0.95, 0.99], wramup: 3}\n"
                 "precision: fp32\n"
                 "width: 12\n"
                 "steps: 12\n");
    const char *const parts[] = {
        "job:2: unknown key 'modle': did you mean 'model'?",
        "job:3: model.config.family 'gtp2' is unknown: use one of llama|gpt2",
        "job:3: model.config.layers 0 is out of range: use 1 to 4096",
        "job:3: unknown key 'contxt' in model.config: did you mean 'context'?",
        "job:3: model.config.context is missing",
        "job:4: data.train takes one plain value",
        "job:4: data.format 'csv' is unknown: use one of text|jsonl|tokens",
        "job:4: data.tokenizer is a section: write its keys below it (from, train)",
        "job:5: batch.sequences '-4' is not a count",
        "job:5: batch.leaves 65 is out of range: use 1 to 64",
        "job:6: steps 'many' is not a count",
        "job:7: optimizer.lr 'nan' is not a number",
        "job:7: optimizer.betas has too many elements",
        "job:7: unknown key 'wramup' in optimizer: did you mean 'warmup'?",
        "job:8: precision 'fp32' is unknown: use one of f32|bf16|f16",
        "job:9: unknown key 'width': did you mean model.config.width?",
        "job:10: 'steps' is there twice: first in line 6",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(parts); i++) {
        check_has(message, parts[i]);
    }
}

static const char head[] = "kind: train\ndata: {train: t.txt}\nsteps: 100\noptimizer: {lr: 1e-3}\n";

/* What a file of `head`, a model of 6 layers and 12 heads, and these lines is refused for. */
static void check_refused(const char *lines, const char *part)
{
    g_autofree char *text = g_strconcat(head,
                                        "model: {config: {family: gpt2, layers: 6, width: 768, "
                                        "heads: 12, context: 64}}\n",
                                        lines, NULL);
    g_autofree char *message = error_of(text);
    check_has(message, part);
}

/* A job's files are called after it. */
static void test_names(void **state)
{
    static const char *const bad[] = {"../x", "a/b", ".hidden", "\"\"", "\"a\\tb\""};
    static const char *const good[] = {"small-gpt", "a b_c.2", "\"\\u00e4\""};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autofree char *lines = g_strconcat("batch: {sequences: 32}\nname: ", bad[i], "\n", NULL);
        check_refused(lines, "name cannot be a file's");
    }
    for (size_t i = 0; i < G_N_ELEMENTS(good); i++) {
        g_autofree char *text = g_strconcat(
            head, "model: {from: m.gguf}\nbatch: {sequences: 32, length: 16}\nname: ", good[i],
            "\n", NULL);
        g_autoptr(GError) error = NULL;
        g_autoptr(JobSpec) spec = job_spec_parse(text, strlen(text), "job", &error);
        g_assert_no_error(error);
        assert_non_null(spec);
    }
}

static void test_impossible_layouts(void **state)
{
    const char *const cases[][2] = {
        {"layout: {dp: 9}", "layout.dp 9 is impossible: a replica owns whole leaves of the batch "
                            "(batch.leaves); use 1 to 8"},
        {"layout: {pp: 7}", "layout.pp 7 is impossible: a stage needs a layer; use 1 to 6"},
        {"layout: {tp: 13}", "use 1 to 12"},
        {"layout: {dp: 2, micro: 17}", "layout.micro 17 is impossible"},
        {"layout: {dp: 3, micro: 9}", "use 1 to 8"},
        {"layout: {pp: 2, chunks: 2}", "chunks are for schedule: interleaved"},
        {"layout: {pp: 1, schedule: interleaved, chunks: 2}", "interleaved needs pp of 2 or more"},
        {"layout: {pp: 2, schedule: interleaved, chunks: 2, micro: 5}", "use 6"},
        {"layout: {pp: 2, schedule: interleaved, chunks: 4, micro: 4}", "use chunks 3"},
        {"layout: {pp: 2, schedule: zero-bubble, recompute: selective}", "recompute: none"},
        {"layout: {schedule: zero-buble}", "auto|gpipe|1f1b|interleaved|zero-bubble"},
        {"layout: fast", "layout 'fast' is unknown: use one of auto"},
        {"layout: {zero: 2}", "layout.zero 2 is out of range: use 0 to 1"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *lines = g_strconcat("batch: {sequences: 32}\n", cases[i][0], "\n", NULL);
        check_refused(lines, cases[i][1]);
    }
    check_refused("batch: {sequences: 4}\nlayout: {dp: 5}\n",
                  "a replica needs a sequence (batch.sequences); use 1 to 4");
}

static void test_contradictions(void **state)
{
    const char *const cases[][2] = {
        {"batch: {sequences: 2, length: 65}", "pass the model's context of 64"},
        {"batch: {sequences: 2}\nloss_scale: {policy: dynamic}", "f32 needs no loss scale"},
        {"batch: {sequences: 2}\nprecision: f16\nloss_scale: {start: 1000}", "use 512"},
        {"batch: {sequences: 2}\nprecision: f16\nloss_scale: {start: 2, least: 4}",
         "lies above the first"},
        {"batch: {sequences: 2}\ncheckpoint: {every: 5}", "needs checkpoint.directory"},
        {"batch: {sequences: 2}\nvalidation: {every: 5}", "needs data.validation"},
        {"batch: {sequences: 2}\ntrace: {steps: 5}", "trace.steps needs trace.file"},
        {"batch: {sequences: 2}\ntrace: {first: 5}", "trace.first needs trace.file"},
        {"batch: {sequences: 2}\ntrace: {file: ''}", "trace.file has no value"},
        {"batch: {sequences: 2}\ntrace: {file: t, steps: 1001}", "use 1 to 1000"},
        {"batch: {sequences: 2}\ntrace: {file: t, first: 0}", "trace.first 0 is out of range"},
        {"batch: {sequences: 2}\ntrace: {file: t, first: 101}", "use at most that"},
        {"batch: {sequences: 2}\ntrace: t.json", "write its keys below it (file, first, steps)"},
        {"", "batch.sequences is missing"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        check_refused(cases[i][0], cases[i][1]);
    }
}

static void test_optimizers(void **state)
{
    const char *const cases[][2] = {
        {"name: sgd, betas: [0.9, 0.9]", "betas is for adam and adamw"},
        {"name: sgd, nesterov: true", "nesterov needs momentum"},
        {"name: adamw, momentum: 0.9", "momentum is for sgd"},
        {"name: adam, decay: 0.1", "adam has no decoupled decay"},
        {"warmup: 101", "longer than the run's 100"},
        {"floor: 1", "lies above lr"},
        {"schedule: constant, floor: 0", "has no floor"},
        {"groups: {norms: 0.1}, betas: 0.9", "optimizer.betas is a list of 2 values"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *text = g_strdup_printf(
            "kind: train\ndata: {train: t}\nsteps: 100\nbatch: {sequences: 2, length: 8}\n"
            "model: {from: m}\noptimizer: {lr: 1e-3, %s}\n",
            cases[i][0]);
        g_autofree char *message = error_of(text);
        check_has(message, cases[i][1]);
    }
}

static void test_models_and_tokenizers(void **state)
{
    const char *const cases[][2] = {
        {"model: {}", "model needs a from or a config"},
        {"model: {from: a, config: {layers: 1}}", "model needs one of from and config"},
        {"model: {from: ''}", "model.from has no value"},
        {"model: {config: {family: llama, layers: 1, width: 60, heads: 4, context: 9}}",
         "width 60 does not give 4 heads of an even number of elements: use 56 or 64"},
        {"model: {config: {family: llama, layers: 1, width: 64, heads: 4, kv_heads: 3, context: "
         "9}}",
         "4 heads do not share 3 KV heads"},
        {"model: {config: {family: gpt2, layers: 1, width: 64, heads: 4, kv_heads: 2, context: 9}}",
         "gpt2 has as many KV heads as heads"},
        {"model: {config: {family: gpt2, layers: 1, width: 64, heads: 4, context: 9, rope_base: "
         "5}}",
         "rope_base is for llama"},
        {"model: {config: {family: gpt2, layers: 1, width: 600, heads: 2, context: 9}}",
         "head size is 300"},
        {"model: {config: {family: gpt2, layers: 1, width: 64, heads: 4, context: 9, vocabulary: "
         "9}}",
         "does not hold the tokenizer's 257 ids"},
        {"model: {from: a}\nbatch: {sequences: 1, length: 3}\nx: {y: {z: 1}}", "unknown key 'x'"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *text = g_strconcat(head, cases[i][0], "\n", NULL);
        g_autofree char *message = error_of(text);
        check_has(message, cases[i][1]);
    }
    g_autofree char *both =
        error_of("kind: train\nmodel: {from: m}\nsteps: 1\noptimizer: {lr: 1}\n"
                 "batch: {sequences: 1, length: 1}\n"
                 "data: {train: t, format: tokens, text: x, positions: documents,\n"
                 "  tokenizer: {train: 300, from: b}}\n");
    check_has(both, "needs one of train and from");
    check_has(both, "add data.attention: documents");
    check_has(both, "data.text is for format jsonl");
}

static void test_hostile_yaml(void **state)
{
    const char *const cases[][2] = {
        {"a: &x [1]\nb: *x\n", "anchors, aliases and tags are not read"},
        {"a: !!str 1\n", "anchors, aliases and tags are not read"},
        {"kind: train\n---\nkind: serve\n", "job:2: a second document"},
        {"- kind\n", "not a list"},
        {"kind", "the file is to be a mapping"},
        {"", "kind is missing"},
        {"kind: bake\n", "kind 'bake' is unknown"},
        {"kind: {a: 1}\n", "kind '' is unknown"},
        {"kind: [train\n", "job:2: "},
        {"kind: train\n? [a]\n: b\n", "names of settings are plain words"},
        {"a: {b: {c: {d: {e: {f: {g: {h: {i: 1}}}}}}}}\n", "nested more than 8 deep"},
        {"kind: \"tr\\0ain\"\n", "holds a zero byte"},
        {"kind: serve\nmodel.from: x\n", "is no name of a setting"},
        {"kind: serve\nmodel: {from: x}\nlimits: {context: 99999999999999999999999}\n",
         "is not a count"},
        {"kind: serve\nmodel: {from: x}\nkv: {memory: lots}\n", "is not a size"},
        {"kind: serve\nmodel: {from: x}\nsteps: 3\n", "unknown key 'steps'"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *message = error_of(cases[i][0]);
        check_has(message, cases[i][1]);
    }
    g_autoptr(GString) many = g_string_new("kind: serve\n");
    for (int i = 0; i < 5000; i++) {
        g_string_append_printf(many, "k%d: 1\n", i);
    }
    g_autofree char *message = error_of(many->str);
    check_has(message, "more than 4096 entries");
    g_string_truncate(many, (gsize)(strstr(many->str, "k100:") - many->str));
    g_autofree char *some = error_of(many->str);
    check_has(some, "; and ");
    assert_true(strlen(some) < 4096);
    g_autofree char *brackets = g_strnfill(100000, '[');
    g_autofree char *deep = g_strconcat("kind: ", brackets, NULL);
    g_autofree char *nested = error_of(deep);
    check_has(nested, "nested");
    g_autofree char *wide = g_strnfill(300 << 10, ' ');
    g_autofree char *large = error_of(wide);
    check_has(large, "at most 262144");
}

static void test_missing_file(void **state)
{
    g_autoptr(GError) error = NULL;
    assert_null(job_spec_load("/nonexistent/job.yaml", &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_train),
        cmocka_unit_test(test_serve),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_print),
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_resolve),
        cmocka_unit_test(test_all_errors_at_once),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_impossible_layouts),
        cmocka_unit_test(test_contradictions),
        cmocka_unit_test(test_optimizers),
        cmocka_unit_test(test_models_and_tokenizers),
        cmocka_unit_test(test_hostile_yaml),
        cmocka_unit_test(test_missing_file),
    };
    return cmocka_run_group_tests_name("job_spec", tests, NULL, NULL);
}
