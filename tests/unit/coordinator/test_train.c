/* Parts of a training job: the layout for the workers at hand, steps that
 * outlive the coordinator. */
#include "coordinator/train/train_layout_choice.h"
#include "coordinator/train/train_log.h"
#include "coordinator/train/train_rate.h"
#include "proto/base/error.h"

#include <glib/gstdio.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

static ModelSpec *model_new(void)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 4,
                                .width = 16,
                                .heads = 2,
                                .vocabulary = 40,
                                .context = 8};
    return model_spec_from_config(&config, NULL);
}

/* ---- layouts ---- */

typedef struct Choice {
    JobLayout wish;
    uint32_t n_workers;
    uint32_t stages; /* that fit */
    bool shrink;
    uint32_t dp, pp, tp; /* dp 0: refused */
} Choice;

static void layouts(void **state)
{
    ModelSpec *model = model_new();
    const Choice choices[] = {
        {{0}, 3, 1, false, 3, 1, 1},
        {{0}, 9, 1, false, 6, 1, 1}, /* a leaf and a sample for each */
        {{0}, 4, 2, false, 2, 2, 1},
        {{.tp = 2}, 5, 1, false, 2, 1, 2},
        {{.dp = 2, .pp = 2, .tp = 1}, 4, 1, false, 2, 2, 1},
        {{.dp = 2, .pp = 2, .tp = 1}, 3, 1, false, 0, 0, 0},
        {{.dp = 2, .pp = 2, .tp = 1}, 3, 1, true, 1, 2, 1},
        {{.dp = 1, .pp = 2, .tp = 2}, 2, 1, true, 1, 1, 2},
        {{.dp = 1, .pp = 1, .tp = 2}, 1, 1, true, 1, 1, 1},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(choices); i++) {
        const Choice *c = &choices[i];
        const JobSpec job = {.layout = c->wish, .sequences = 6, .leaves = 8};
        TrainLayoutChoice got = {0};
        g_autoptr(GError) error = NULL;
        const bool ok =
            train_layout_choose(&job, model, c->n_workers, c->stages, c->shrink, &got, &error);
        assert_int_equal(ok, c->dp > 0);
        if (!ok) {
            assert_int_equal(error->code, WEFT_ERROR_IMPOSSIBLE);
            assert_non_null(strstr(error->message,
                                   "needs 4 workers and there are 3: start more, or choose "
                                   "layout: {dp: 2, pp: 1, tp: 1} or {dp: 1, pp: 2, tp: 1}"));
            continue;
        }
        assert_int_equal(got.dp, c->dp);
        assert_int_equal(got.pp, c->pp);
        assert_int_equal(got.tp, c->tp);
        assert_true(got.micro_sequences >= 1 && got.micro_sequences <= 6);
    }
    model_spec_free(model);
}

/* ---- the log ---- */

static Weft__V1__TrainProgress step_of(uint64_t step, float loss)
{
    Weft__V1__TrainProgress s = WEFT__V1__TRAIN_PROGRESS__INIT;
    s.step = step;
    s.loss = loss;
    s.samples_seen = (step + 1) * 6;
    s.seconds = 0.5;
    return s;
}

/* Read, then begun, as a job does it. */
static TrainLog *open_log(const char *path, int64_t submitted_us, GError **error)
{
    TrainLog *l = train_log_read(path, submitted_us, error);
    if (l != NULL && !train_log_begin(l, error)) {
        g_clear_pointer(&l, train_log_free);
    }
    return l;
}

static void steps_outlive_the_coordinator(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-log-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "train-a.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    TrainLog *l = open_log(path, 7, NULL);
    for (uint64_t i = 0; i < 3; i++) {
        const Weft__V1__TrainProgress s = step_of(i, 4.0f - (float)i);
        assert_non_null(train_log_step(l, &s, 100, NULL, &error));
    }
    train_log_free(l);
    FILE *torn = fopen(path, "a");
    fputs("{\"version\":1,\"step\":4,\"lo", torn);
    fclose(torn);

    l = open_log(path, 7, NULL);
    assert_int_equal(train_log_steps(l), 3);
    assert_int_equal(train_log_lines(l)->len, 3);
    assert_non_null(strstr(train_log_lines(l)->pdata[2], "\"step\":3,\"loss\":2.0"));
    assert_non_null(strstr(train_log_lines(l)->pdata[2], "\"tokens_per_s\":200.0"));
    assert_null(strstr(train_log_lines(l)->pdata[2], "\"mfu\""));
    assert_true(train_log_speed(train_log_points(l)) == 200.0);
    train_log_set_course(l, 10, 0.002); /* 6 steps of half a second are left after the next */
    const Weft__V1__TrainProgress same = step_of(1, 3.0f), next = step_of(3, 1.0f),
                                  other = step_of(2, 2.5f);
    assert_null(train_log_step(l, &same, 100, NULL, &error));
    assert_null(error);
    const char *told = train_log_step(l, &next, 100, NULL, &error);
    assert_non_null(strstr(told, "\"mfu\":0.4"));
    assert_non_null(strstr(told, "\"eta_s\":3.0"));
    assert_null(train_log_step(l, &other, 100, NULL, &error));
    assert_int_equal(error->code, WEFT_ERROR_NUMERICS);
    assert_false(train_log_ended(l));
    const TrainEnd end = {NULL, "a.svg", "abcd", "dp 1", 0.0, 0.25};
    const char *last = train_log_end(l, &end);
    assert_non_null(strstr(last, "\"weights_digest\":\"abcd\""));
    assert_non_null(
        strstr(last, "\"step_s\":0.25,\"predicted_step_s\":null,\"numerics\":\"exact\""));
    train_log_free(l);

    l = open_log(path, 7, NULL);
    assert_true(train_log_ended(l));
    assert_int_equal(train_log_points(l)->len, 4);
    const TrainPoint *point = &g_array_index(train_log_points(l), TrainPoint, 3);
    assert_true(point->step == 4 && point->loss == 1.0 && isnan(point->validation) &&
                point->tokens_per_s == 200.0);
    assert_int_equal(train_log_lines(l)->len, 5);
    train_log_free(l);
    g_unlink(path);
    g_rmdir(folder);
}

/* A checkpoint that came without its log: steps before it are unknown, not wrong. */
static void steps_before_the_log(void **state)
{
    TrainLog *l = open_log(NULL, 7, NULL);
    g_autoptr(GError) error = NULL;
    const Weft__V1__TrainProgress far = step_of(9, 2.0f), before = step_of(4, 3.0f);
    assert_non_null(train_log_step(l, &far, 1, NULL, &error));
    assert_int_equal(train_log_steps(l), 10);
    assert_null(train_log_step(l, &before, 1, NULL, &error));
    assert_null(error);
    train_log_free(l);
}

/* The same, and the coordinator is started again: a step is known by its number, not by its line.
 */
static void steps_before_the_log_after_a_restart(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    const Weft__V1__TrainProgress told[] = {step_of(100, 2.0f), step_of(101, 1.5f)},
                                  before = step_of(0, 9.0f), other = step_of(101, 1.25f);
    TrainLog *l = open_log(path, 7, NULL);
    assert_non_null(train_log_step(l, &told[0], 1, NULL, &error));
    assert_non_null(train_log_step(l, &told[1], 1, NULL, &error));
    train_log_free(l);
    l = open_log(path, 7, NULL);
    assert_int_equal(train_log_steps(l), 102);
    assert_int_equal(train_log_points(l)->len, 2);
    for (guint i = 0; i < G_N_ELEMENTS(told); i++) {
        assert_null(train_log_step(l, &told[i], 1, NULL, &error));
        assert_null(error);
    }
    assert_null(train_log_step(l, &before, 1, NULL, &error));
    assert_null(error);
    assert_null(train_log_step(l, &other, 1, NULL, &error));
    assert_int_equal(error->code, WEFT_ERROR_NUMERICS);
    train_log_free(l);
    g_unlink(path);
    g_rmdir(folder);
}

/* A log that cannot be read is an error, and stays as it is. */
static void unread_log_stays(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    const uid_t account = geteuid();
    assert_true(g_file_set_contents(path, "{}\n", 3, NULL));
    assert_int_equal(g_chmod(path, 0222), 0);
    assert_int_equal(g_chmod(folder, 0777), 0);
    if (account == 0 && seteuid(1) != 0) {
        print_message("# root reads every file\n");
        skip();
    }
    assert_null(open_log(path, 7, &error));
    assert_int_equal(seteuid(account), 0);
    assert_int_equal(error->code, WEFT_ERROR_IO);
    assert_non_null(strstr(error->message, "cannot be read"));
    GStatBuf status;
    assert_int_equal(g_stat(path, &status), 0);
    assert_int_equal(status.st_size, 3);
    g_unlink(path);
    g_rmdir(folder);
}

/* A log that cannot be written is an error, also where its folder is gone. */
static void unwritten_log(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    assert_int_equal(g_rmdir(folder), 0);
    assert_null(open_log(path, 7, &error));
    assert_int_equal(error->code, WEFT_ERROR_IO);
    assert_non_null(strstr(error->message, "cannot be written: No such file"));
}

/* A full disk: the job goes on, and its log says that it is not whole. */
static void log_on_a_full_disk(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    const Weft__V1__TrainProgress step = step_of(0, 4.0f);
    struct rlimit all, none;
    TrainLog *l = open_log(path, 7, NULL);
    assert_true(train_log_sync(l, &error));
    getrlimit(RLIMIT_FSIZE, &all);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = all.rlim_max};
    signal(SIGXFSZ, SIG_IGN); /* daemon_prepare() */
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
    const bool told = train_log_step(l, &step, 1, NULL, &error) != NULL;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &all), 0);
    assert_true(told);
    assert_null(error);
    assert_false(train_log_sync(l, &error));
    assert_int_equal(error->code, WEFT_ERROR_IO);
    assert_non_null(strstr(error->message, "the disk may be full"));
    train_log_free(l);
    g_unlink(path);
    g_rmdir(folder);
}

/* A repeated step of class fast may come near, not far; what was not finite stays so. */
static void steps_of_class_fast(void **state)
{
    TrainLog *l = open_log(NULL, 7, NULL);
    g_autoptr(GError) error = NULL;
    const Weft__V1__TrainProgress told[] = {step_of(0, 4.0f), step_of(1, INFINITY)},
                                  near[] = {step_of(0, 4.1f), step_of(0, 3.9f), step_of(1, NAN)},
                                  far[] = {step_of(0, 4.3f), step_of(0, NAN), step_of(1, 2.0f)};
    train_log_set_class(l, NUMERICS_FAST);
    for (guint i = 0; i < G_N_ELEMENTS(told); i++) {
        assert_non_null(train_log_step(l, &told[i], 1, NULL, &error));
    }
    for (guint i = 0; i < G_N_ELEMENTS(near); i++) {
        assert_null(train_log_step(l, &near[i], 1, NULL, &error));
        assert_null(error);
    }
    for (guint i = 0; i < G_N_ELEMENTS(far); i++) {
        assert_null(train_log_step(l, &far[i], 1, NULL, &error));
        assert_int_equal(error->code, WEFT_ERROR_NUMERICS);
        g_clear_error(&error);
    }
    const TrainEnd end = {NULL, NULL, "abcd", "dp 1", 0.0, 0.0};
    assert_non_null(strstr(train_log_end(l, &end), "\"numerics\":\"fast\""));
    train_log_free(l);
}

/* A job that failed is known again by its log, with its reason; that is no line of its steps. */
static void failure_outlives_the_coordinator(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    g_autoptr(GError) why =
        g_error_new_literal(WEFT_ERROR, WEFT_ERROR_NUMERICS, "step 2 had \"another\" loss");
    const Weft__V1__TrainProgress step = step_of(0, 4.0f);
    TrainLog *l = open_log(path, 7, NULL);
    assert_non_null(train_log_step(l, &step, 1, NULL, &error));
    assert_null(train_log_failure(l));
    train_log_fail(l, why);
    assert_int_equal(train_log_lines(l)->len, 1);
    train_log_free(l);
    l = open_log(path, 7, NULL);
    assert_int_equal(train_log_lines(l)->len, 1);
    assert_int_equal(train_log_steps(l), 1);
    assert_false(train_log_ended(l));
    assert_true(g_error_matches(train_log_failure(l), WEFT_ERROR, WEFT_ERROR_NUMERICS));
    assert_string_equal(train_log_failure(l)->message, why->message);
    train_log_free(l);
    g_unlink(path);
    g_rmdir(folder);
}

/* A coordinator that ended between the row of a job and the log of the one before, whose name it
 * took: the log is not this job's. One without an owner is of an older release. */
static void log_of_another_job(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    static const char old[] = "{\"version\":1,\"failed\":\"no\",\"code\":1}\n";
    g_autoptr(GError) error = NULL;
    g_autoptr(GError) why = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_NUMERICS, "no");
    const Weft__V1__TrainProgress step = step_of(0, 4.0f), other = step_of(0, 3.0f);
    TrainLog *l = open_log(path, 7, NULL);
    assert_non_null(train_log_step(l, &step, 1, NULL, &error));
    train_log_fail(l, why);
    train_log_free(l);
    for (int i = 0; i < 2; i++) { /* it stays the second one's */
        l = open_log(path, 8, NULL);
        assert_null(train_log_failure(l));
        assert_int_equal(train_log_steps(l), i);
        assert_int_equal(train_log_lines(l)->len, i);
        if (i == 0) {
            assert_non_null(train_log_step(l, &other, 1, NULL, &error));
        }
        train_log_free(l);
    }
    assert_true(g_file_set_contents(path, old, -1, NULL));
    l = open_log(path, 7, NULL);
    assert_non_null(train_log_failure(l));
    train_log_free(l);
    g_unlink(path);
    g_rmdir(folder);
}

/* The class of a log's steps is known again when it is opened: a job keeps it. */
static void class_of_the_log(void **state)
{
    g_autofree char *folder = g_dir_make_tmp("weft-train-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "log.jsonl", NULL);
    g_autoptr(GError) error = NULL;
    const Weft__V1__TrainProgress step = step_of(0, 4.0f);
    NumericsClass numerics;
    for (NumericsClass c = NUMERICS_EXACT; c <= NUMERICS_FAST; c++) {
        TrainLog *l = open_log(path, 7, NULL);
        assert_false(train_log_class(l, &numerics));
        train_log_set_class(l, c);
        assert_non_null(train_log_step(l, &step, 1, NULL, &error));
        train_log_free(l);
        l = open_log(path, 7, NULL);
        assert_true(train_log_class(l, &numerics));
        assert_int_equal(numerics, c);
        train_log_free(l);
        g_unlink(path);
    }
    g_rmdir(folder);
}

/* ---- curves ---- */

typedef struct Picture {
    uint32_t lines, circles, n;
    double x[512], y[512]; /* of the first curve */
} Picture;

static void on_element(GMarkupParseContext *context, const char *element, const char **names,
                       const char **values, void *user, GError **error)
{
    Picture *p = user;
    p->circles += strcmp(element, "circle") == 0;
    if (strcmp(element, "polyline") != 0) {
        return;
    }
    for (size_t i = 0; p->lines == 0 && names[i] != NULL; i++) {
        char *at = (char *)values[i];
        while (strcmp(names[i], "points") == 0 && *at != '\0') {
            p->x[p->n] = g_ascii_strtod(at, &at);
            assert_int_equal(*at++, ',');
            p->y[p->n++] = g_ascii_strtod(at, &at);
            at += *at == ' ';
        }
    }
    p->lines++;
}

static Picture picture_of(const char *svg)
{
    static const GMarkupParser parser = {.start_element = on_element};
    Picture p = {0};
    GMarkupParseContext *context = g_markup_parse_context_new(&parser, 0, &p, NULL);
    assert_true(g_markup_parse_context_parse(context, svg, -1, NULL));
    assert_true(g_markup_parse_context_end_parse(context, NULL));
    g_markup_parse_context_free(context);
    return p;
}

/* Curves go from left to right inside the picture, a falling loss goes down, many steps make no
 * larger picture, and a name is text. */
static void curves_of_any_run(void **state)
{
    const size_t counts[] = {0, 1, 2, 37, 100000};
    g_autofree TrainPoint *points = g_new0(TrainPoint, 100000);
    for (size_t i = 0; i < 100000; i++) {
        points[i] = (TrainPoint){.step = i + 1,
                                 .loss = 100 / (double)(i + 1),
                                 .validation = i % 20 == 0 && i < 100 ? 5 : (double)NAN,
                                 .rate = 1e-3,
                                 .tokens_per_s = i == 3 ? (double)NAN : 12345};
    }
    for (size_t c = 0; c < G_N_ELEMENTS(counts); c++) {
        g_autofree char *svg = train_plot_svg("a<b>&c", points, counts[c]);
        const Picture p = picture_of(svg);
        assert_non_null(strstr(svg, "a&lt;b&gt;&amp;c"));
        assert_null(strstr(svg, "nan"));
        assert_null(strstr(svg, "inf"));
        assert_int_equal(p.lines, counts[c] > 0 ? 4 : 0);
        assert_int_equal(p.circles, counts[c] == 0    ? 0
                                    : counts[c] == 37 ? 2
                                    : counts[c] < 37  ? 1
                                                      : p.circles);
        assert_int_equal(p.n, MIN(counts[c], 400));
        for (uint32_t i = 0; i < p.n; i++) {
            assert_true(p.x[i] >= 70 && p.x[i] <= 920 && p.y[i] >= 66 && p.y[i] <= 366);
            assert_true(i == 0 || (p.x[i] > p.x[i - 1] && p.y[i] >= p.y[i - 1]));
        }
    }
}

/* ---- speed ---- */

/* Passes that take twice as long as was said run at half the share that was assumed. */
static void rate_is_learnt(void **state)
{
    TrainRate rate = {0};
    TrainPace pace;
    assert_true(train_rate_efficiency(NULL) == 0.5 && train_rate_efficiency(&rate) == 0.5);
    train_pace_init(&pace, &rate);
    train_pace_predict(&pace, 0.5, 3.0, 1.0);
    train_pace_begin(&pace, 20);
    train_pace_end(&pace);
    assert_true(train_pace_measured_s(&pace) == 0 && rate.efficiency == 0);
    train_pace_step(&pace, 20, 100.0); /* warms up */
    train_pace_step(&pace, 21, 5.0);
    train_pace_step(&pace, 22, 90.0);
    assert_true(rate.efficiency == 0);
    train_pace_step(&pace, 23, 4.0);
    assert_true(rate.efficiency == 0.25 && train_rate_efficiency(&rate) == 0.25);
    assert_true(train_pace_measured_s(&pace) == 5.0);
    train_pace_step(&pace, 24, 3.0);
    train_pace_step(&pace, 25, 3.0);
    train_pace_step(&pace, 26, 3.0);
    train_pace_end(&pace);
    assert_true(train_pace_measured_s(&pace) == 4.0);
    train_rate_learn(&rate, 0.5, 3.0, 1.0, 1.0); /* nothing is left for the passes */
    train_rate_learn(&rate, 0.5, 3.0, 1.0, 1e6);
    assert_true(rate.efficiency > 0 && rate.efficiency < 0.1);
    train_pace_clear(&pace);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layouts),
        cmocka_unit_test(rate_is_learnt),
        cmocka_unit_test(steps_outlive_the_coordinator),
        cmocka_unit_test(steps_before_the_log),
        cmocka_unit_test(steps_before_the_log_after_a_restart),
        cmocka_unit_test(unread_log_stays),
        cmocka_unit_test(unwritten_log),
        cmocka_unit_test(log_on_a_full_disk),
        cmocka_unit_test(steps_of_class_fast),
        cmocka_unit_test(failure_outlives_the_coordinator),
        cmocka_unit_test(log_of_another_job),
        cmocka_unit_test(class_of_the_log),
        cmocka_unit_test(curves_of_any_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
