/* A training job over workers that die, freeze, are cut off and come back, under a coordinator that
 * is started again: the real job, members, store and checkpoints under virtual time; what the ranks
 * compute is a function of the step (sim_trainer.h). */
#include "tests/unit/coordinator/sim_streams.h"

#include "coordinator/train/train_job.h"
#include "coordinator/train/train_log.h"
#include "proto/base/error.h"
#include "proto/base/hash.h"
#include "proto/model/checkpoint.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define SEQUENCES 8u

typedef struct Toy {
    uint32_t dp, pp, tp; /* dp 0: auto */
    uint64_t steps, every;
    uint64_t trace_first, trace_steps; /* 0: no trace */
} Toy;

static const Toy toy = {2, 2, 1, 60, 10, 24, 4};

/* Size and file of the last one that was synced: what a power failure leaves of the job's log. */
static off_t synced_size;
static ino_t synced_file;
static ino_t broken_file; /* cannot be synced */

int fdatasync(int fd)
{
    struct stat status;
    if (fstat(fd, &status) != 0 || status.st_ino == broken_file) {
        errno = EIO;
        return -1;
    }
    synced_size = status.st_size;
    synced_file = status.st_ino;
    return 0;
}

/* ---- the job ---- */

static char *path_in(const SimCluster *s, const char *name)
{
    return g_build_filename(s->dir, name, NULL);
}

/* The error's code, or 0. */
static int try_submit(SimCluster *s, const Toy *t)
{
    g_autofree char *data = path_in(s, "text.txt"), *checkpoints = path_in(s, "ck");
    g_autofree char *layout =
        t->dp == 0 ? g_strdup("auto")
                   : g_strdup_printf("{dp: %u, pp: %u, tp: %u}", t->dp, t->pp, t->tp);
    g_autoptr(GString) text = g_string_new(NULL);
    for (unsigned i = 0; i < 200; i++) {
        g_string_append_printf(text, "line %u of a text that says nothing of note\n", i * i);
    }
    assert_true(g_file_set_contents(data, text->str, -1, NULL));
    g_autofree char *spec = g_strdup_printf(
        "kind: train\nname: toy\n"
        "model: {config: {family: gpt2, layers: 4, width: 16, heads: 2, context: 16}}\n"
        "data: {train: %s, tokenizer: {train: 270}}\n"
        "batch: {sequences: %u, length: 16, leaves: 8}\n"
        "steps: %" G_GUINT64_FORMAT "\noptimizer: {lr: 1e-3}\nlayout: %s\n"
        "checkpoint: {directory: %s, every: %" G_GUINT64_FORMAT ", keep: 2}\n",
        data, SEQUENCES, t->steps, layout, checkpoints, t->every);
    g_autofree char *traced =
        g_strdup_printf("%strace: {file: %s/traces/toy.json, first: %" G_GUINT64_FORMAT
                        ", steps: %" G_GUINT64_FORMAT "}\n",
                        spec, s->dir, t->trace_first, t->trace_steps);
    Answer a = {0};
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = t->trace_steps > 0 ? traced : spec;
    sim_call(s, &a, &weft__v1__admin__descriptor, "Submit", &request);
    sim_answer(s, &a, 5 * SECOND);
    const int code = a.error != NULL ? a.error->code : 0;
    answer_clear(&a);
    return code;
}

static void submit(SimCluster *s, const Toy *t)
{
    assert_int_equal(try_submit(s, t), 0);
}

/* The same by another account, which may submit. */
static int try_submit_as_other(SimCluster *s, const Toy *t)
{
    RpcChannel *admin = s->admin;
    g_autofree char *certificate = rpc_inproc_certificate("other", "submit", NULL);
    const RpcChannelOptions options = {
        .target = CONTROL,
        .credentials = {.ca_pem = s->ca_pem, .certificate_pem = certificate, .key_pem = "key"},
        .server_name = "weft-coordinator"};
    s->admin = rpc_channel_new(s->transport, s->client_loop, &options, NULL);
    const int code = try_submit(s, t);
    rpc_channel_free(s->admin);
    s->admin = admin;
    return code;
}

static void follow(SimCluster *s, Answer *a)
{
    Weft__V1__LogsRequest request = WEFT__V1__LOGS_REQUEST__INIT;
    request.name = (char *)"toy";
    request.follow = true;
    *a = (Answer){0};
    sim_call(s, a, &weft__v1__admin__descriptor, "Logs", &request);
}

/* Its state, and why; valid until the next call. */
static const char *job_state(SimCluster *s, const char **reason)
{
    static char state[32], why[512];
    Answer a = {0};
    Weft__V1__ListJobsRequest request = WEFT__V1__LIST_JOBS_REQUEST__INIT;
    sim_call(s, &a, &weft__v1__admin__descriptor, "ListJobs", &request);
    sim_answer(s, &a, 20 * SECOND);
    g_assert_no_error(a.error);
    const Weft__V1__ListJobsResponse *jobs = (const Weft__V1__ListJobsResponse *)a.message;
    g_assert_cmpuint(jobs->n_jobs, ==, 1);
    g_strlcpy(state, jobs->jobs[0]->state, sizeof state);
    g_strlcpy(why, jobs->jobs[0]->reason, sizeof why);
    answer_clear(&a);
    if (reason != NULL) {
        *reason = why;
    }
    return state;
}

static bool is_over(SimCluster *s)
{
    const char *state = job_state(s, NULL);
    return strcmp(state, "done") == 0 || strcmp(state, "failed") == 0;
}

static void run_to_end(SimCluster *s, int64_t limit_us)
{
    const int64_t end_us = sim_world_now_us(s->world) + limit_us;
    while (!is_over(s)) {
        g_assert_cmpint(sim_world_now_us(s->world), <, end_us);
        sim_run_for(s, SECOND / 10);
    }
}

/* ---- what it left ---- */

static uint64_t steps_told(SimCluster *s)
{
    g_autofree char *path = path_in(s, "train-toy.jsonl"), *text = NULL;
    uint64_t n = 0;
    if (g_file_get_contents(path, &text, NULL, NULL)) {
        for (const char *at = text; (at = strstr(at, "\"grad_norm\"")) != NULL; at++) {
            n++;
        }
    }
    return n;
}

static void run_to_step(SimCluster *s, uint64_t step)
{
    const int64_t end_us = sim_world_now_us(s->world) + 60 * SECOND;
    while (steps_told(s) < step) {
        g_assert_cmpint(sim_world_now_us(s->world), <, end_us);
        sim_run_for(s, 10000);
    }
}

/* Every step once, in order, with its loss and samples; then the end, with the digest. */
static void check_lines(SimCluster *s, const Toy *t)
{
    g_autofree char *path = path_in(s, "train-toy.jsonl"), *text = NULL;
    assert_true(g_file_get_contents(path, &text, NULL, NULL));
    g_auto(GStrv) all = g_strsplit(g_strchomp(text), "\n", -1), lines = g_strdupv(all + 1);
    g_assert_nonnull(strstr(all[0], "\"submitted_us\""));
    g_assert_cmpuint(g_strv_length(lines), ==, t->steps + 1);
    for (uint64_t i = 0; i < t->steps; i++) {
        json_t *o = json_loads(lines[i], 0, NULL);
        g_assert_nonnull(o);
        g_assert_cmpint(json_integer_value(json_object_get(o, "step")), ==, i + 1);
        g_assert_cmpint(json_integer_value(json_object_get(o, "samples_seen")), ==,
                        (i + 1) * SEQUENCES);
        g_assert_cmpfloat((float)json_number_value(json_object_get(o, "loss")), ==,
                          sim_training_loss(i + 1));
        json_decref(o);
    }
    const Hash128 digest = hash128(&t->steps, sizeof t->steps);
    char hex[33];
    hash128_hex(&digest, hex);
    json_t *end = json_loads(lines[t->steps], 0, NULL);
    g_assert_cmpstr(json_string_value(json_object_get(end, "weights_digest")), ==, hex);
    json_decref(end);
}

static void check_checkpoint(SimCluster *s, const Toy *t)
{
    g_autofree char *path = path_in(s, "ck");
    g_autoptr(GError) error = NULL;
    Checkpoint *c = checkpoint_open_newest(path, NULL, NULL, &error);
    g_assert_no_error(error);
    g_assert_cmpuint(checkpoint_state(c)->step, ==, t->steps);
    g_assert_cmpuint(checkpoint_state(c)->samples, ==, t->steps * SEQUENCES);
    checkpoint_free(c);
}

/* The spans of one kind that the trace has for a step, of all ranks. */
static size_t count_spans(const json_t *events, const char *name, uint64_t step)
{
    size_t i, n = 0;
    const json_t *e;
    json_array_foreach(events, i, e)
    {
        const json_t *args = json_object_get(e, "args");
        n += strcmp(json_string_value(json_object_get(e, "name")), name) == 0 &&
             (uint64_t)json_integer_value(json_object_get(args, "step")) == step;
    }
    return n;
}

/* Of the steps that the epoch which ran the last traced one ran, from its first on: all that all
 * ranks did. */
static void check_trace(SimCluster *s, const Toy *t, uint32_t n_ranks, uint64_t first)
{
    g_autofree char *path = path_in(s, "traces/toy.json");
    json_t *trace = json_load_file(path, 0, NULL);
    const json_t *events = json_object_get(trace, "traceEvents");
    g_assert_cmpint(json_integer_value(json_object_get(trace, "version")), ==, 1);
    g_assert_cmpuint(json_array_size(events), ==,
                     n_ranks * (2 + 4 * (t->trace_first + t->trace_steps - first)));
    for (uint64_t step = first; step < t->trace_first + t->trace_steps; step++) {
        g_assert_cmpuint(count_spans(events, "forward", step), ==, n_ranks);
        g_assert_cmpuint(count_spans(events, "backward", step), ==, n_ranks);
        g_assert_cmpuint(count_spans(events, "exchange and update", step), ==, n_ranks);
    }
    json_decref(trace);
}

static void check_done(SimCluster *s, const Toy *t)
{
    const char *why = NULL;
    g_assert_cmpstr(job_state(s, &why), ==, "done");
    g_assert_cmpstr(why, ==, "");
    check_lines(s, t);
    check_checkpoint(s, t);
    sim_run_for(s, SECOND);
    g_assert_cmpuint(s->training.ranks->len, ==, 0);
}

static void assert_failed(SimCluster *s, const char *reason)
{
    const char *why = NULL;
    g_assert_cmpstr(job_state(s, &why), ==, "failed");
    if (strstr(why, reason) == NULL) {
        fail_msg("'%s' lacks '%s'", why, reason);
    }
}

static void restart(SimCluster *s)
{
    sim_cluster_stop(s);
    sim_run_for(s, 2 * SECOND);
    sim_cluster_start(s);
    sim_run_for(s, 10 * SECOND);
}

/* The job runs on four workers and has told of so many steps. */
static void run_toy(SimCluster *s, const Toy *t, uint64_t step)
{
    start_workers(s, 4);
    submit(s, t);
    run_to_step(s, step);
}

/* The toy job, from its submission on, with somebody who follows it. */
static void follow_to_step(SimCluster *s, Answer *a, uint64_t step)
{
    run_toy(s, &toy, 0);
    follow(s, a);
    run_to_step(s, step);
}

static void run_to_done(SimCluster *s, const Toy *t, unsigned n_epochs)
{
    run_to_end(s, 30 * SECOND);
    check_done(s, t);
    assert_int_equal(s->training.n_epochs, n_epochs);
}

static void run_to_failure(SimCluster *s, const char *reason)
{
    run_to_end(s, 30 * SECOND);
    assert_failed(s, reason);
    sim_run_for(s, SECOND);
    assert_int_equal(s->training.ranks->len, 0);
}

/* A job that was taken up from a checkpoint, or found nothing left to do: its log is its own. */
static void run_to_done_from_checkpoint(SimCluster *s)
{
    run_to_end(s, 30 * SECOND);
    assert_string_equal(job_state(s, NULL), "done");
    assert_true(steps_told(s) < toy.steps);
    check_checkpoint(s, &toy);
}

/* What is computed again after a worker's death is not what was told. */
static void begin_other_numbers(SimCluster *s)
{
    s->training.wrong_loss = true;
    sim_worker_kill(&s->workers[1]);
}

static void end_other_numbers(SimCluster *s)
{
    s->training.wrong_loss = false;
    heal(s, &s->workers[1], KILL);
    sim_run_for(s, SECOND);
}

/* Step 10 was saved, step 20 was not. */
static void assert_save_lost(SimCluster *s)
{
    g_autofree char *lost = path_in(s, "ck/step-0000000020"),
                    *kept = path_in(s, "ck/step-0000000010");
    assert_false(g_file_test(lost, G_FILE_TEST_EXISTS));
    assert_true(g_file_test(kept, G_FILE_TEST_EXISTS));
}

static void ask(SimCluster *s, const char *method, const void *request)
{
    Answer a = {0};
    sim_call(s, &a, &weft__v1__admin__descriptor, method, request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
}

/* A call that is open ends so. */
static void assert_ends(SimCluster *s, Answer *a, int64_t limit_us, int code)
{
    sim_answer(s, a, limit_us);
    assert_true(g_error_matches(a->error, WEFT_ERROR, code));
    answer_clear(a);
}

/* ---- one harm ---- */

static void test_undisturbed(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 0);
    run_to_done(s, &toy, 1);
    check_trace(s, &toy, 4, toy.trace_first);
    assert_int_equal(s->training.steps_computed, toy.steps);
}

/* Named within the detector's time, and why; what is left goes on from the last checkpoint. */
static void survive(SimCluster *s, Harm how, unsigned victim, int64_t most_us)
{
    static const char *const reasons[] = {[KILL] = "is gone: ",
                                          [FREEZE] =
                                              "lost during training: no heartbeat for 4500 ms",
                                          [CUT] = "lost during training: no heartbeat for 4500 ms"};
    run_toy(s, &toy, 25);
    harm(&s->workers[victim], how);
    const int64_t from_us = sim_world_now_us(s->world);
    while (strstr(s->log->str, "epoch 1 ended: worker w") == NULL) {
        sim_run_for(s, 10000);
        assert_true(sim_world_now_us(s->world) - from_us <= most_us);
    }
    g_autofree char *named = g_strdup_printf("epoch 1 ended: worker w%u %s", victim, reasons[how]);
    const char *line = strstr(s->log->str, named);
    assert_non_null(line);
    g_autofree char *whole = g_strndup(line, strcspn(line, "\n"));
    assert_true(
        g_str_has_suffix(whole, ": it goes on from its newest checkpoint, on the workers left"));
    run_to_end(s, 30 * SECOND);
    assert_int_equal(s->training.n_epochs, 2);
    assert_int_equal(s->training.n_restored, 1);
    assert_true(s->training.steps_computed <= toy.steps + toy.every);
    check_trace(s, &toy, 2, toy.trace_first);
    heal(s, &s->workers[victim], how);
    check_done(s, &toy);
}

static void test_killed(void **state)
{
    survive(*state, KILL, 0, SECOND);
}

static void test_killed_other(void **state)
{
    survive(*state, KILL, 3, SECOND);
}

static void test_frozen(void **state)
{
    survive(*state, FREEZE, 0, 5 * SECOND);
}

static void test_cut_off(void **state)
{
    survive(*state, CUT, 2, 5 * SECOND);
}

/* The last weights were saved before the end was heard of: nothing is computed again. */
static void test_killed_at_the_end(void **state)
{
    SimCluster *s = *state;
    s->training.ends_unsaid = true;
    run_toy(s, &toy, toy.steps);
    sim_run_for(s, SECOND);
    assert_string_equal(job_state(s, NULL), "running");
    sim_worker_kill(&s->workers[2]);
    run_to_done(s, &toy, 1);
    assert_int_equal(s->training.steps_computed, toy.steps);
}

/* The epoch that runs the last traced step begins among them: the trace has what that one ran. */
static void test_trace_of_a_resumed_run(void **state)
{
    SimCluster *s = *state;
    const Toy t = {2, 2, 1, 60, 10, 18, 10};
    run_toy(s, &t, 25);
    sim_worker_kill(&s->workers[1]);
    run_to_done(s, &t, 2);
    check_trace(s, &t, 2, 21);
}

/* What no rank can have done ends the epoch; without the trace the job would be the same. */
static void test_trace_of_nonsense(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 10);
    s->training.wrong_trace = true;
    run_to_done(s, &toy, 2);
    assert_non_null(strstr(s->log->str, "tells of step 23 what cannot be"));
    check_trace(s, &toy, 4, toy.trace_first);
}

static void test_drained(void **state)
{
    SimCluster *s = *state;
    Weft__V1__DrainRequest request = WEFT__V1__DRAIN_REQUEST__INIT;
    request.node = (char *)"w1";
    run_toy(s, &toy, 25);
    ask(s, "Drain", &request);
    run_to_done(s, &toy, 2);
    assert_non_null(strstr(s->log->str, "worker w1 is drained"));
}

static void test_coordinator_killed(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 25);
    restart(s);
    run_to_done(s, &toy, 2);
    assert_true(s->training.steps_computed <= toy.steps + toy.every);
}

static void test_waits_for_workers(void **state)
{
    SimCluster *s = *state;
    const char *why = NULL;
    submit(s, &toy);
    sim_run_for(s, 5 * SECOND);
    assert_string_equal(job_state(s, &why), "planning");
    assert_non_null(strstr(why, "no worker is usable"));
    start_workers(s, 4);
    run_to_done(s, &toy, 1);
}

/* Another loss for a step that was told: the job stops, whoever is wrong. It is not taken up again:
 * it has failed, for the same reason, until its name is given to another. */
static void test_failed_stays_failed(void **state)
{
    SimCluster *s = *state;
    Answer a;
    run_toy(s, &toy, 25);
    begin_other_numbers(s);
    run_to_failure(s, "step 21 had another loss");
    const unsigned n_epochs = s->training.n_epochs;
    for (int i = 0; i < 2; i++) {
        restart(s);
        assert_failed(s, "step 21 had another loss");
        assert_int_equal(s->training.n_epochs, n_epochs);
        follow(s, &a);
        assert_ends(s, &a, SECOND, WEFT_ERROR_NUMERICS);
    }
    end_other_numbers(s);
    submit(s, &toy);
    run_to_done_from_checkpoint(s);
}

/* Ranks that end with other weights than the first: nobody's are the job's. */
static void test_other_weights(void **state)
{
    SimCluster *s = *state;
    const Toy t = {2, 2, 1, 25, 10};
    s->training.other_end = true;
    run_toy(s, &t, 0);
    run_to_failure(s, "worker w3 (rank 3) ends with other weights than worker w0 (rank 0)");
}

/* The same in the middle, found when they are saved. */
static void test_other_weights_saved(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 15);
    s->training.other_part = true;
    run_to_failure(s, "rank 3 is at step 20 with other weights than the first");
    assert_save_lost(s);
}

/* A worker that says what went wrong is there: it is named, and so is that. */
static void test_worker_says_why(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 25);
    s->training.fails = WEFT_ERROR_MEMORY;
    run_to_done(s, &toy, 2);
    assert_non_null(strstr(s->log->str, "epoch 1 ended: worker w3: so it was wished"));
}

/* A step that the job has not is nonsense, and none of its log. */
static void test_step_after_the_last(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 15);
    s->training.wrong_step = true;
    run_to_done(s, &toy, 2);
    assert_non_null(strstr(s->log->str, "tells of a step after the last, 60"));
}

/* Weights of more steps than the file asks for are not its result. */
static void test_checkpoint_beyond_the_end(void **state)
{
    SimCluster *s = *state;
    const Toy less = {2, 2, 1, 59, 10};
    run_toy(s, &toy, 0);
    run_to_done(s, &toy, 1);
    submit(s, &less);
    run_to_failure(s, "step-0000000060 is of step 60, and the job has steps: 59");
    submit(s, &toy);
    run_to_done_from_checkpoint(s);
}

/* A name is free when its training is over, for the account that submitted it; that one stays, with
 * its log, until the new row is durable. */
static void test_name_is_taken_again(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 0);
    assert_int_equal(try_submit(s, &toy), WEFT_ERROR_INVALID);
    run_to_end(s, 30 * SECOND);
    assert_int_equal(try_submit_as_other(s, &toy), WEFT_ERROR_DENIED);
    check_done(s, &toy);
    store_disk_fail_after(s->disk, 0);
    assert_int_equal(try_submit(s, &toy), WEFT_ERROR_IO);
    store_disk_fail_after(s->disk, -1);
    check_done(s, &toy);
    restart(s);
    check_done(s, &toy);
    submit(s, &toy);
    run_to_done_from_checkpoint(s);
    assert_int_equal(steps_told(s), 0);
}

/* The coordinator ends when the new row is durable, and the log of the job before is there yet:
 * that one's failure is not the new one's. */
static void test_log_of_the_one_before(void **state)
{
    SimCluster *s = *state;
    g_autofree char *path = path_in(s, "train-toy.jsonl"), *log = NULL;
    gsize size;
    run_toy(s, &toy, 25);
    begin_other_numbers(s);
    run_to_failure(s, "step 21 had another loss");
    assert_true(g_file_get_contents(path, &log, &size, NULL));
    end_other_numbers(s);
    submit(s, &toy);
    sim_cluster_stop(s);
    assert_true(g_file_set_contents(path, log, (gssize)size, NULL));
    sim_cluster_start(s);
    run_to_done_from_checkpoint(s);
}

/* A name that goes to a job of another kind takes the log with it, too. */
static void test_name_is_taken_by_another_kind(void **state)
{
    SimCluster *s = *state;
    g_autofree char *path = path_in(s, "train-toy.jsonl");
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = (char *)"kind: serve\nname: toy\nmodel: {from: there-is-none.gguf}\n";
    run_toy(s, &toy, 0);
    run_to_end(s, 30 * SECOND);
    assert_true(g_file_test(path, G_FILE_TEST_EXISTS));
    ask(s, "Submit", &request);
    assert_false(g_file_test(path, G_FILE_TEST_EXISTS));
}

/* Who follows a job hears its end when the log that says so is on the disk. */
static void test_end_is_durable(void **state)
{
    SimCluster *s = *state;
    g_autofree char *path = path_in(s, "train-toy.jsonl");
    struct stat status;
    Answer a;
    follow_to_step(s, &a, 25);
    begin_other_numbers(s);
    synced_file = 0;
    assert_ends(s, &a, 30 * SECOND, WEFT_ERROR_NUMERICS);
    assert_int_equal(stat(path, &status), 0);
    assert_true(synced_file == status.st_ino);
    assert_int_equal(synced_size, status.st_size);
}

/* On a disk that keeps nothing any more, the end is told all the same. */
static void test_end_that_is_not_durable(void **state)
{
    SimCluster *s = *state;
    g_autofree char *path = path_in(s, "train-toy.jsonl");
    struct stat status;
    Answer a;
    follow_to_step(s, &a, 25);
    assert_int_equal(stat(path, &status), 0);
    broken_file = status.st_ino;
    sim_answer(s, &a, 30 * SECOND);
    broken_file = 0;
    g_assert_no_error(a.error);
    answer_clear(&a);
    check_done(s, &toy);
    assert_non_null(strstr(s->log->str, "job toy may go on after a restart: the job's log was not "
                                        "written whole: Input/output error"));
}

/* A job that is freed while its log waits to be read: it makes none, and leaves the one that a job
 * of its name has begun meanwhile. */
static void test_freed_before_its_log(void **state)
{
    static const char later[] = "{\"version\":1,\"submitted_us\":8}\n{\"version\":1,\"step\":1}\n";
    static const char spec[] =
        "kind: train\nname: toy\n"
        "model: {config: {family: gpt2, layers: 1, width: 16, heads: 2, "
        "context: 16}}\n"
        "data: {train: /nowhere, tokenizer: {train: 270}}\n"
        "batch: {sequences: 1, length: 16}\nsteps: 1\noptimizer: {lr: 1e-3}\n";
    static const TrainJobCallbacks nobody = {0};
    for (int taken = 0; taken < 2; taken++) {
        g_autofree char *dir = g_dir_make_tmp("weft-train-XXXXXX", NULL);
        g_autofree char *path = g_build_filename(dir, "train-toy.jsonl", NULL), *text = NULL;
        SimWorld *world = sim_world_new(1);
        Loop *loop = sim_world_loop(world);
        WorkPool *pool = work_pool_new(loop, 0);
        const TrainJobOptions options = {.loop = loop, .pool = pool, .state_dir = dir};
        TrainJob *job = train_job_new(&options, spec, 7, false, nobody, NULL);
        assert_true(sim_world_step(world, SECOND)); /* its timer, which has the log read */
        train_job_free(job);
        if (taken) {
            assert_true(g_file_set_contents(path, later, -1, NULL));
        }
        sim_world_run_for(world, SECOND);
        assert_int_equal(g_file_get_contents(path, &text, NULL, NULL), taken);
        assert_true(!taken || strcmp(text, later) == 0);
        work_pool_free(pool);
        sim_world_free(world);
        g_unlink(path);
        g_rmdir(dir);
    }
}

/* Who follows a job that does not come to its end hears why. */
static void test_followers_of_a_cancelled_job(void **state)
{
    SimCluster *s = *state;
    Answer a;
    Weft__V1__CancelJobRequest request = WEFT__V1__CANCEL_JOB_REQUEST__INIT;
    request.name = (char *)"toy";
    follow_to_step(s, &a, 25);
    assert_false(a.done);
    ask(s, "CancelJob", &request);
    sim_answer(s, &a, SECOND);
    assert_string_equal(((const Weft__V1__JobLine *)a.message)->text, "cancelled");
    assert_ends(s, &a, SECOND, WEFT_ERROR_CANCELLED);
}

static void test_followers_when_the_coordinator_stops(void **state)
{
    SimCluster *s = *state;
    Answer a;
    follow_to_step(s, &a, 25);
    sim_cluster_stop(s);
    assert_ends(s, &a, 5 * SECOND, WEFT_ERROR_UNREACHABLE);
    sim_cluster_start(s);
    run_to_done(s, &toy, 2);
}

/* A checkpoint that is no whole one is not written, and said; the one before is gone on from. */
static void test_damaged_save(void **state)
{
    SimCluster *s = *state;
    run_toy(s, &toy, 15);
    s->training.piece_twice = true;
    run_to_step(s, 25);
    assert_false(s->training.piece_twice);
    assert_save_lost(s);
    run_to_done(s, &toy, 1);
}

/* ---- many ---- */

typedef struct Trouble {
    int64_t at_us;
    unsigned worker; /* WORKERS_LIMIT: the coordinator */
    Harm how;
    bool heals;
} Trouble;

static gint by_time(gconstpointer a, gconstpointer b)
{
    const Trouble *x = a, *y = b;
    return x->at_us < y->at_us ? -1 : x->at_us > y->at_us;
}

/* Harms and their ends at random times; all is healed in the end, so that the job must be done. */
static GArray *draw_troubles(GRand *rand, unsigned n_workers)
{
    GArray *all = g_array_new(FALSE, FALSE, sizeof(Trouble));
    for (unsigned n = (unsigned)g_rand_int_range(rand, 1, 7); n > 0; n--) {
        const bool coordinator = g_rand_int_range(rand, 0, 6) == 0;
        Trouble t = {.at_us = g_rand_int_range(rand, 300000, 9000000),
                     .worker = coordinator ? WORKERS_LIMIT
                                           : (unsigned)g_rand_int_range(rand, 0, (gint32)n_workers),
                     .how = (Harm)g_rand_int_range(rand, KILL, CUT + 1)};
        g_array_append_val(all, t);
        t.heals = true;
        t.at_us += g_rand_int_range(rand, 1000, 8000000);
        g_array_append_val(all, t);
    }
    g_array_sort(all, by_time);
    return all;
}

static void play(SimCluster *s, const Trouble *t, bool *harmed, Harm *how)
{
    if (t->worker == WORKERS_LIMIT) {
        if (t->heals && s->coordinator == NULL) {
            sim_cluster_start(s);
        } else if (!t->heals && s->coordinator != NULL) {
            sim_cluster_stop(s);
        }
        return;
    }
    FakeWorker *w = &s->workers[t->worker];
    if (!t->heals && !harmed[t->worker]) {
        harmed[t->worker] = true;
        how[t->worker] = t->how;
        harm(w, t->how);
    } else if (t->heals && harmed[t->worker]) {
        harmed[t->worker] = false;
        heal(s, w, how[t->worker]);
    }
}

static void random_trial(uint64_t seed)
{
    static const Toy toys[] = {{2, 2, 1, 60, 10, 5, 50}, {0, 0, 0, 50, 7},
                               {1, 4, 1, 40, 5},         {4, 1, 1, 80, 20, 80, 1},
                               {1, 2, 2, 45, 45},        {1, 1, 1, 60, 3, 1, 60}};
    SimCluster *s = sim_cluster_new(seed);
    GRand *rand = g_rand_new_with_seed((guint32)seed);
    const Toy *t = &toys[g_rand_int_range(rand, 0, G_N_ELEMENTS(toys))];
    const unsigned least = MAX(1, t->dp * t->pp * t->tp);
    const unsigned n_workers = least + (unsigned)g_rand_int_range(rand, 0, 3);
    bool harmed[WORKERS_LIMIT] = {false};
    Harm how[WORKERS_LIMIT] = {KILL};
    start_workers(s, n_workers);
    submit(s, t);
    g_autoptr(GArray) troubles = draw_troubles(rand, n_workers);
    const int64_t from_us = sim_world_now_us(s->world);
    for (guint i = 0; i < troubles->len; i++) {
        const Trouble *trouble = &g_array_index(troubles, Trouble, i);
        sim_run_for(s, MAX(0, from_us + trouble->at_us - sim_world_now_us(s->world)));
        play(s, trouble, harmed, how);
    }
    run_to_end(s, 60 * SECOND);
    check_done(s, t);
    g_rand_free(rand);
    sim_cluster_free(s);
}

static void test_random(void **state)
{
    const char *only = g_getenv("WEFT_TRIAL"), *many = g_getenv("WEFT_TRIALS");
    const uint64_t first = only != NULL ? g_ascii_strtoull(only, NULL, 10) : 1;
    const uint64_t n = only != NULL ? 1 : many != NULL ? g_ascii_strtoull(many, NULL, 10) : 20;
    for (uint64_t seed = first; seed < first + n; seed++) {
        print_message("# trial %" G_GUINT64_FORMAT "\n", seed);
        random_trial(seed);
    }
}

int main(void)
{
    if (g_access("/dev/shm", W_OK) == 0) {
        g_setenv("TMPDIR", "/dev/shm", FALSE); /* fsync costs nothing */
    }
    const struct CMUnitTest tests[] = {
#define CASE(f) cmocka_unit_test_setup_teardown(f, cluster_set_up, cluster_tear_down)
        CASE(test_undisturbed),
        CASE(test_killed),
        CASE(test_killed_other),
        CASE(test_frozen),
        CASE(test_cut_off),
        CASE(test_killed_at_the_end),
        CASE(test_drained),
        CASE(test_coordinator_killed),
        CASE(test_waits_for_workers),
        CASE(test_failed_stays_failed),
        CASE(test_other_weights),
        CASE(test_other_weights_saved),
        CASE(test_worker_says_why),
        CASE(test_step_after_the_last),
        CASE(test_checkpoint_beyond_the_end),
        CASE(test_name_is_taken_again),
        CASE(test_log_of_the_one_before),
        CASE(test_name_is_taken_by_another_kind),
        CASE(test_end_is_durable),
        CASE(test_end_that_is_not_durable),
        cmocka_unit_test(test_freed_before_its_log),
        CASE(test_followers_of_a_cancelled_job),
        CASE(test_followers_when_the_coordinator_stops),
        CASE(test_trace_of_a_resumed_run),
        CASE(test_trace_of_nonsense),
        CASE(test_damaged_save),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests_name("coordinator-train_job", tests, NULL, NULL);
}
