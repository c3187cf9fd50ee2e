/* What a worker may send on a call of service Trainer, at the coordinator that made the call: the
 * real training job, on inproc and a virtual clock, with one rank that says what the records are.
 * It must live on, answer at the end, cancel the job, and free everything. */
#include "tests/fuzz/calls.h"
#include "tests/unit/coordinator/sim_cluster.h"
#include "weft/v1/train.pb-c.h"

#include <glib/gstdio.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SPEC                                                                                       \
    "kind: train\nname: toy\n"                                                                     \
    "model: {config: {family: gpt2, layers: 1, width: 16, heads: 2, context: 8}}\n"                \
    "data: {train: %s, tokenizer: {train: 260}}\n"                                                 \
    "batch: {sequences: 2, length: 8, leaves: 2}\nsteps: 4\noptimizer: {lr: 1e-3}\n"               \
    "layout: {dp: 1, pp: 1, tp: 1}\ncheckpoint: {directory: %s, every: 2, keep: 1}\n"              \
    "trace: {file: %s.json, first: 1, steps: 2}\n"

enum {
    KIND_REPORT,
    KIND_SAVE, /* an honest checkpoint of step [first byte] */
    KIND_TIME, /* first byte x 100 ms pass */
    N_KINDS
};

const ProtobufCMessageDescriptor *record_type(uint8_t kind)
{
    return kind % N_KINDS == KIND_REPORT ? &weft__v1__train_report__descriptor : NULL;
}

static void call(SimCluster *s, const char *method, const void *request)
{
    Answer a = {0};
    sim_call(s, &a, &weft__v1__admin__descriptor, method, request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
}

static void submit(SimCluster *s)
{
    g_autofree char *text = g_build_filename(s->dir, "text", NULL);
    g_autofree char *checkpoints = g_build_filename(s->dir, "ck", NULL);
    g_autofree char *spec = g_strdup_printf(SPEC, text, checkpoints, text);
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = spec;
    g_assert_true(g_file_set_contents(text, "a text of a few words, with few words", -1, NULL));
    call(s, "Submit", &request.base);
}

/* The job begins again after each failure, with another rank. */
static SimRank *rank_of(SimCluster *s)
{
    for (unsigned i = 0; i < 20 && s->training.ranks->len == 0; i++) {
        sim_run_for(s, SECOND / 10);
    }
    return s->training.ranks->len > 0 ? s->training.ranks->pdata[0] : NULL;
}

static void play(SimCluster *s, const Record *record)
{
    const unsigned kind = record->kind % N_KINDS;
    SimRank *rank = rank_of(s);
    ProtobufCMessage *message = record_unpack(record);
    if (rank != NULL && message != NULL) {
        sim_rank_say(rank, message);
    } else if (rank != NULL && kind == KIND_SAVE && record->size > 0) {
        sim_rank_save(rank, record->bytes[0]);
    } else if (kind == KIND_TIME && record->size > 0) {
        sim_run_for(s, record->bytes[0] * (SECOND / 10));
    }
    if (message != NULL) {
        protobuf_c_message_free_unpacked(message, NULL);
    }
    sim_run_for(s, SECOND / 50);
}

static void mute(const char *text) {}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Record record;
    Weft__V1__StatusRequest status = WEFT__V1__STATUS_REQUEST__INIT;
    Weft__V1__CancelJobRequest cancel = WEFT__V1__CANCEL_JOB_REQUEST__INIT;
    g_set_printerr_handler(mute); /* the seed of each world */
    if (g_access("/dev/shm", W_OK) == 0) {
        g_setenv("TMPDIR", "/dev/shm", FALSE); /* fsync costs nothing */
    }
    SimCluster *s = sim_cluster_new(3);
    s->training.puppets = true;
    sim_worker_start(s, 0);
    sim_run_for(s, SECOND);
    submit(s);
    for (Records r = {data, size, 0}; records_next(&r, &record);) {
        play(s, &record);
    }
    sim_run_for(s, 2 * SECOND);
    call(s, "Status", &status.base);
    cancel.name = (char *)"toy";
    call(s, "CancelJob", &cancel.base);
    sim_run_for(s, SECOND);
    g_assert_cmpuint(s->training.ranks->len, ==, 0);
    sim_cluster_free(s);
    return 0;
}
