/* TrainTrace: the file of what ranks did, from what they tell: clocks of several hosts, order,
 * bounds. */
#include "coordinator/train/train_trace.h"

#include "proto/base/error.h"
#include "proto/plan/train_layout.h"
#include "tests/unit/remove_tree.h"

#include <errno.h>
#include <jansson.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

enum { FIRST = 3, STEPS = 2, FORWARD = 1, BACKWARD = 4 };

static const TrainLayoutChoice LAYOUT = {
    .dp = 1, .pp = 2, .tp = 1, .micro_sequences = 1, .chunks = 1};

static TrainTrace *trace_of(const char *const *hosts, uint64_t first_step, const char *file)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 2,
                                .width = 16,
                                .heads = 2,
                                .vocabulary = 40,
                                .context = 8};
    ModelSpec *model = model_spec_from_config(&config, NULL);
    Plan *plan = train_plan_new(model, 1, 2, 1, NULL);
    const JobSpec spec = {.name = (char *)"a \"job\"",
                          .trace_file = (char *)file,
                          .trace_first = FIRST,
                          .trace_steps = STEPS,
                          .steps = 10};
    TrainTrace *t = train_trace_new(&spec, &LAYOUT, plan, hosts, first_step);
    plan_free(plan);
    model_spec_free(model);
    return t;
}

/* One op of 5 us that begins 10 us after the step of 20 us. */
static bool tell_part(TrainTrace *t, uint32_t rank, uint64_t step, uint32_t kind, int64_t begin_us,
                      int64_t sent_us, int64_t now_us, bool last, GError **error)
{
    Weft__V1__TrainTrace m = WEFT__V1__TRAIN_TRACE__INIT;
    Weft__V1__TrainTraceOp op = WEFT__V1__TRAIN_TRACE_OP__INIT, *ops[] = {&op};
    op.kind = kind;
    op.chunk = 1;
    op.micro = 7;
    op.begin_us = begin_us + 10;
    op.end_us = begin_us + 15;
    m.step = step;
    m.begin_us = begin_us;
    m.end_us = begin_us + 20;
    m.now_us = sent_us;
    m.ops = ops;
    m.n_ops = 1;
    m.last = last;
    return train_trace_add(t, rank, &m, now_us, error);
}

static void tell(TrainTrace *t, uint32_t rank, uint64_t step, int64_t begin_us, int64_t sent_us,
                 int64_t now_us)
{
    g_autoptr(GError) error = NULL;
    tell_part(t, rank, step, rank == 0 ? FORWARD : BACKWARD, begin_us, sent_us, now_us, true,
              &error);
    assert_null(error);
}

static json_t *read_trace(const TrainTrace *t)
{
    g_autofree char *text = train_trace_json(t);
    json_t *trace = json_loads(text, 0, NULL);
    assert_non_null(trace);
    return trace;
}

/* The n-th span of a name; NULL: there are fewer. */
static const json_t *span(const json_t *trace, const char *name, size_t n)
{
    size_t i;
    const json_t *e;
    json_array_foreach(json_object_get(trace, "traceEvents"), i, e)
    {
        if (strcmp(json_string_value(json_object_get(e, "name")), name) == 0 && n-- == 0) {
            return e;
        }
    }
    return NULL;
}

static json_int_t number_of(const json_t *e, const char *key)
{
    assert_non_null(json_object_get(e, key));
    return json_integer_value(json_object_get(e, key));
}

/* ---- tests ---- */

/* The second host's clock is 1,000,000 us ahead; its messages take 40 and 4 us, the first one's 10.
 */
static void clocks_are_aligned(void **state)
{
    const char *const hosts[] = {"a", "b"};
    g_autoptr(TrainTrace) t = trace_of(hosts, 0, "t.json");
    tell(t, 0, 2, 5000, 5030, 5040);
    tell(t, 1, 2, 1005020, 1005050, 5090);
    assert_false(train_trace_is_whole(t));
    tell(t, 0, 3, 5100, 5130, 5140);
    tell(t, 1, 3, 1005120, 1005150, 5154);
    assert_true(train_trace_is_whole(t));
    json_t *trace = read_trace(t);
    const json_t *other = json_object_get(trace, "otherData"), *e = span(trace, "forward", 0);
    assert_string_equal(json_string_value(json_object_get(other, "job")), "a \"job\"");
    assert_string_equal(json_string_value(json_object_get(other, "layout")), "dp 1, pp 2, tp 1");
    assert_string_equal(json_string_value(json_object_get(other, "schedule")), "1f1b");
    assert_int_equal(number_of(span(trace, "step 3", 0), "ts"), 0);
    assert_int_equal(number_of(span(trace, "step 3", 0), "dur"), 20);
    assert_true(number_of(e, "ts") == 10 && number_of(e, "dur") == 5);
    assert_true(number_of(e, "pid") == 0 && number_of(e, "tid") == 0);
    assert_int_equal(number_of(json_object_get(e, "args"), "micro"), 7);
    assert_int_equal(number_of(json_object_get(e, "args"), "chunk"), 1);
    /* 20 us later by their clocks, and by the difference of 4 and 10 us early */
    assert_int_equal(number_of(span(trace, "step 3", 1), "ts"), 14);
    assert_int_equal(number_of(span(trace, "step 3", 1), "tid"), 1);
    assert_int_equal(number_of(span(trace, "backward", 1), "ts"), 100 + 14 + 10);
    assert_int_equal(number_of(span(trace, "exchange and update", 3), "dur"), 5);
    assert_null(span(trace, "forward", 2));
    json_decref(trace);
}

static void one_host_has_one_clock(void **state)
{
    const char *const hosts[] = {"a", "a"};
    g_autoptr(TrainTrace) t = trace_of(hosts, 3, "t.json");
    tell(t, 0, 3, 100, 130, 140);
    tell(t, 1, 3, 120, 150, 999);
    assert_true(train_trace_is_whole(t));
    json_t *trace = read_trace(t);
    assert_int_equal(number_of(span(trace, "step 4", 1), "ts"), 20);
    assert_null(span(trace, "step 3", 0));
    json_decref(trace);
}

static void nothing_is_asked_for(void **state)
{
    const char *const hosts[] = {NULL, NULL};
    assert_null(trace_of(hosts, 0, NULL));
    assert_null(trace_of(hosts, FIRST - 1 + STEPS, "t.json"));
}

static void what_cannot_be_is_refused(void **state)
{
    const char *const hosts[] = {NULL, NULL};
    const struct {
        uint64_t step;
        uint32_t kind;
        int64_t begin_us, sent_us, now_us;
    } cases[] = {
        {1, FORWARD, 0, 50, 60},                       /* not traced */
        {3, FORWARD, 0, 50, 60},                       /* one is missing */
        {4, FORWARD, 0, 50, 60},                       /* nor is this one */
        {2, 7, 0, 50, 60},                             /* no such operation */
        {2, FORWARD, 60, 50, 60},                      /* it has not been yet */
        {2, FORWARD, -30, 50, 60},                     /* no clock says so */
        {2, FORWARD, G_MAXINT64 - 20, G_MAXINT64, 60}, /* nor so */
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autoptr(TrainTrace) t = trace_of(hosts, 0, "t.json");
        g_autoptr(GError) error = NULL;
        assert_false(tell_part(t, 1, cases[i].step, cases[i].kind, cases[i].begin_us,
                               cases[i].sent_us, cases[i].now_us, true, &error));
        assert_int_equal(error->code, WEFT_ERROR_PROTOCOL);
        assert_non_null(strstr(error->message, "worker rank-1 tells of step"));
    }
}

/* A step is told in as many messages as it takes; what is more than is kept ends the trace before
 * the step in which it came, for all ranks. */
static void too_much_is_left_out(void **state)
{
    const char *const hosts[] = {"a", "a"};
    g_autofree char *folder = g_dir_make_tmp("weft-trace-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "deep/t.json", NULL);
    g_autoptr(TrainTrace) t = trace_of(hosts, 0, path);
    g_autoptr(GError) error = NULL;
    tell_part(t, 0, 2, FORWARD, 0, 30, 40, false, &error);
    tell_part(t, 0, 2, BACKWARD, 0, 30, 40, true, &error);
    assert_null(error);
    tell(t, 1, 2, 0, 30, 40);
    tell(t, 1, 3, 50, 80, 90);
    for (uint64_t i = 0; i <= TRAIN_TRACE_OPS_LIMIT; i++) {
        assert_true(tell_part(t, 0, 3, FORWARD, 50, 80, 90, i == TRAIN_TRACE_OPS_LIMIT, &error));
    }
    assert_true(train_trace_is_whole(t));
    g_autofree char *said = train_trace_write(t, path), *text = NULL;
    assert_non_null(strstr(said, "without its last 1 steps"));
    assert_true(g_file_get_contents(path, &text, NULL, NULL));
    json_t *trace = json_loads(text, 0, NULL);
    assert_non_null(span(trace, "forward", 0));
    assert_non_null(span(trace, "backward", 1));
    assert_null(span(trace, "backward", 2));
    assert_null(span(trace, "step 4", 0));
    json_decref(trace);
    g_autofree char *no_folder = g_build_filename(path, "t.json", NULL),
                    *unsaid = train_trace_write(t, no_folder);
    assert_non_null(strstr(unsaid, "no trace: "));
    assert_non_null(strstr(unsaid, "deep/t.json/t.json cannot be written"));
    remove_tree(folder);
}

/* A disk that is full, here by a limit of the file's size: nothing is left but the last whole file,
 * and what is said names the file and why. */
static void full_disk_leaves_no_part(void **state)
{
    const char *const hosts[] = {"a", "a"};
    g_autofree char *folder = g_dir_make_tmp("weft-trace-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(folder, "t.json", NULL), *text = NULL;
    g_autoptr(TrainTrace) t = trace_of(hosts, 0, path);
    struct rlimit before;
    assert_true(g_file_set_contents(path, "the last one", -1, NULL));
    tell(t, 0, 2, 0, 30, 40);
    tell(t, 1, 2, 0, 30, 40);
    signal(SIGXFSZ, SIG_IGN); /* as daemons do */
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    const struct rlimit small = {64, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    g_autofree char *said = train_trace_write(t, path);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    assert_true(g_str_has_prefix(said, "no trace: "));
    assert_non_null(strstr(said, path));
    assert_non_null(strstr(said, g_strerror(EFBIG)));
    assert_true(g_file_get_contents(path, &text, NULL, NULL));
    assert_string_equal(text, "the last one");
    GDir *left = g_dir_open(folder, 0, NULL);
    assert_string_equal(g_dir_read_name(left), "t.json");
    assert_null(g_dir_read_name(left));
    g_dir_close(left);
    remove_tree(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clocks_are_aligned),   cmocka_unit_test(one_host_has_one_clock),
        cmocka_unit_test(nothing_is_asked_for), cmocka_unit_test(what_cannot_be_is_refused),
        cmocka_unit_test(too_much_is_left_out), cmocka_unit_test(full_disk_leaves_no_part),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
