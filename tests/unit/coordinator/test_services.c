/* What the coordinator serves beside runs: plans, slices, renewal, status; and what it does when
 * its disk fails. */
#include "tests/unit/coordinator/sim_cluster.h"

#include "coordinator/message.h"
#include "proto/base/error.h"
#include "proto/model/gguf.h"
#include "tests/unit/coordinator/tiny_gguf.h"
#include "transport/crypto/x509.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static int set_up(void **state)
{
    *state = sim_cluster_new(7);
    return 0;
}

static int tear_down(void **state)
{
    sim_cluster_free(*state);
    return 0;
}

static void start_workers(SimCluster *s, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        sim_worker_start(s, i);
    }
    sim_run_for(s, SECOND);
}

static void ask_plan(SimCluster *s, Answer *a, uint32_t pp, uint32_t tp)
{
    Weft__V1__Layout layout = WEFT__V1__LAYOUT__INIT;
    layout.pp = pp;
    layout.tp = tp;
    Weft__V1__PlanRequest request = WEFT__V1__PLAN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    request.layout = &layout;
    sim_call(s, a, &weft__v1__admin__descriptor, "Plan", &request);
    sim_answer(s, a, 5 * SECOND);
    g_assert_no_error(a->error);
}

static void test_plan_loads_nothing(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    ask_plan(s, &a, 2, 1);
    const Weft__V1__PlanResponse *response = (const Weft__V1__PlanResponse *)a.message;
    assert_non_null(response->plan);
    assert_int_equal(response->plan->replicas[0]->n_stages, 2);
    assert_true(response->roof_decode_tokens_per_s > 0);
    assert_int_equal(response->model->n_tensors, 0);
    assert_int_equal(response->n_violations, 0);
    assert_int_equal(s->workers[0].n_loads + s->workers[1].n_loads, 0);
    answer_clear(&a);
}

static void test_impossible_plan_says_why_and_what_else(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 2);
    Answer a = {0};
    ask_plan(s, &a, 1, 50);
    const Weft__V1__PlanResponse *response = (const Weft__V1__PlanResponse *)a.message;
    assert_null(response->plan);
    assert_true(response->n_violations > 0);
    assert_true(response->n_alternatives > 0);
    answer_clear(&a);
}

/* ---- slices ---- */

typedef struct Fetched {
    bool done;
    GError *error;
    GByteArray *bytes[8];
    bool last[8], missing[8];
} Fetched;

static void on_chunk(const ProtobufCMessage *message, void *user)
{
    Fetched *f = user;
    const Weft__V1__FetchChunk *chunk = (const Weft__V1__FetchChunk *)message;
    assert_true(chunk->index < 8);
    assert_true(chunk->data.len <= 1u << 20);
    if (f->bytes[chunk->index] == NULL) {
        f->bytes[chunk->index] = g_byte_array_new();
    }
    g_byte_array_append(f->bytes[chunk->index], chunk->data.data, (guint)chunk->data.len);
    f->last[chunk->index] = chunk->last;
    f->missing[chunk->index] = chunk->missing;
}

static void on_fetched(const GError *error, void *user)
{
    Fetched *f = user;
    f->done = true;
    f->error = error != NULL ? g_error_copy(error) : NULL;
}

static void fetch(SimCluster *s, Fetched *f, const uint8_t *hash, Weft__V1__SliceRef **refs,
                  size_t n)
{
    Weft__V1__FetchRequest request = WEFT__V1__FETCH_REQUEST__INIT;
    request.file_hash = (ProtobufCBinaryData){16, (uint8_t *)hash};
    request.slices = refs;
    request.n_slices = n;
    RpcCallbacks callbacks = {.on_message = on_chunk, .on_done = on_fetched};
    rpc_call_start(s->workers[0].channel, &weft__v1__slices__descriptor, "Fetch", &request.base, 0,
                   true, callbacks, f);
    assert_true(sim_world_run_until(s->world, &f->done, 5 * SECOND));
}

/* A worker may fetch slices of it. Returned: the same file. */
static Gguf *open_model(SimCluster *s)
{
    start_workers(s, 1);
    Answer a = {0};
    ask_plan(s, &a, 1, 1); /* the coordinator opens it */
    answer_clear(&a);
    g_autofree char *path = g_build_filename(s->dir, sim_cluster_model(s), NULL);
    return gguf_open(path, NULL);
}

static void test_slices_are_the_files_bytes(void **state)
{
    SimCluster *s = *state;
    g_autoptr(Gguf) gguf = open_model(s);
    g_autoptr(ModelSpec) spec = gguf_model_spec(gguf, NULL);
    Hash128 hash = gguf_hash(gguf);
    Weft__V1__SliceRef refs[3] = {WEFT__V1__SLICE_REF__INIT, WEFT__V1__SLICE_REF__INIT,
                                  WEFT__V1__SLICE_REF__INIT};
    Weft__V1__SliceRef *list[3] = {&refs[0], &refs[1], &refs[2]};
    refs[0].tensor = 2;
    refs[1].tensor = 999; /* not in this model */
    refs[2].tensor = 0;
    Fetched f = {0};
    fetch(s, &f, hash.bytes, list, 3);
    g_assert_no_error(f.error);
    for (int i = 0; i < 3; i += 2) {
        const TensorSpec *tensor = &spec->tensors[refs[i].tensor];
        size_t size = model_spec_slice_bytes(spec, tensor, 0);
        g_autofree uint8_t *expected = g_malloc(size);
        gguf_copy_slice(gguf, spec, tensor, 0, expected);
        assert_int_equal(f.bytes[i]->len, size);
        assert_memory_equal(f.bytes[i]->data, expected, size);
        assert_true(f.last[i] && !f.missing[i]);
    }
    assert_true(f.missing[1]);
    for (int i = 0; i < 3; i++) {
        g_byte_array_unref(f.bytes[i]);
    }
    hash.bytes[0] ^= 1;
    Fetched other = {0};
    fetch(s, &other, hash.bytes, list, 3);
    assert_int_equal(other.error->code, WEFT_ERROR_NOT_FOUND);
    g_error_free(other.error);
}

/* A worker that has not the old file's slices, and hears that nobody has. */
static bool refuse_old(RpcCall *call, const ProtobufCMessage *request, void *user)
{
    if (request->descriptor != &weft__v1__load_request__descriptor ||
        memcmp(((const Weft__V1__LoadRequest *)request)->model->file_hash.data, user, 16) != 0) {
        return false;
    }
    g_autoptr(GError) error = g_error_new_literal(WEFT_ERROR, WEFT_ERROR_IO, "it was changed");
    rpc_call_finish(call, error);
    return true;
}

/* One byte of tensor 2, in place. */
static void change_file(SimCluster *s, const Gguf *gguf, const ModelSpec *spec)
{
    const size_t size = model_spec_slice_bytes(spec, &spec->tensors[2], 0);
    g_autofree char *path = g_build_filename(s->dir, sim_cluster_model(s), NULL), *bytes = NULL;
    g_autofree uint8_t *slice = g_malloc(size);
    gsize length;
    gguf_copy_slice(gguf, spec, &spec->tensors[2], 0, slice);
    assert_true(g_file_get_contents(path, &bytes, &length, NULL));
    const char *at = memmem(bytes, length, slice, size);
    assert_non_null(at);
    FILE *file = fopen(path, "r+");
    fseek(file, at - bytes, SEEK_SET);
    fputc(slice[0] ^ 1, file);
    fclose(file);
}

/* Its state, and what is said of it; valid until the next call. */
static const char *served_state(SimCluster *s, const char **reason)
{
    static char state[16], why[512];
    Answer a = {0};
    Weft__V1__ListJobsRequest request = WEFT__V1__LIST_JOBS_REQUEST__INIT;
    sim_call(s, &a, &weft__v1__admin__descriptor, "ListJobs", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    const Weft__V1__Submission *job = ((const Weft__V1__ListJobsResponse *)a.message)->jobs[0];
    g_strlcpy(state, job->state, sizeof state);
    g_strlcpy(why, job->reason, sizeof why);
    answer_clear(&a);
    if (reason != NULL) {
        *reason = why;
    }
    return state;
}

/* A job that serves a model whose file is changed before all workers have it; nobody asks for a
 * changed slice yet. hash: the file's before. */
static void serve_what_changes(SimCluster *s, Hash128 *hash)
{
    g_autoptr(Gguf) gguf = open_model(s);
    g_autoptr(ModelSpec) spec = gguf_model_spec(gguf, NULL);
    Answer a = {0};
    Weft__V1__SubmitRequest request = WEFT__V1__SUBMIT_REQUEST__INIT;
    request.spec = (char *)"kind: serve\nname: chat\nmodel: {from: tiny.gguf}\n";
    *hash = gguf_hash(gguf);
    s->workers[0].answer = refuse_old;
    s->workers[0].answer_user = hash->bytes;
    sim_call(s, &a, &weft__v1__admin__descriptor, "Submit", &request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
    sim_run_for(s, 10 * SECOND);
    assert_string_not_equal(served_state(s, NULL), "ready");
    assert_true(s->workers[0].n_loads > 1);
    change_file(s, gguf, spec);
}

static void fetch_what_changed(SimCluster *s, const Hash128 *hash)
{
    Weft__V1__SliceRef ref = WEFT__V1__SLICE_REF__INIT, *list[] = {&ref};
    ref.tensor = 2;
    Fetched f = {0};
    fetch(s, &f, hash->bytes, list, 1);
    assert_int_equal(f.error->code, WEFT_ERROR_IO);
    g_error_free(f.error);
}

/* It is read anew: trying again with what was read before would be in vain for ever. */
static void test_served_model_that_changed(void **state)
{
    SimCluster *s = *state;
    Hash128 hash;
    serve_what_changes(s, &hash);
    fetch_what_changed(s, &hash);
    sim_run_for(s, 10 * SECOND);
    assert_string_equal(served_state(s, NULL), "ready");
}

/* Its file is gone when it is to be read anew: the job waits for it, and says so. */
static void test_served_model_that_is_gone(void **state)
{
    SimCluster *s = *state;
    Hash128 hash;
    const char *why;
    serve_what_changes(s, &hash);
    g_autofree char *path = g_build_filename(s->dir, sim_cluster_model(s), NULL),
                    *away = g_strconcat(path, ".away", NULL);
    assert_int_equal(rename(path, away), 0);
    fetch_what_changed(s, &hash);
    for (int i = 0; i < 3; i++) { /* again and again */
        sim_run_for(s, 10 * SECOND);
        assert_string_equal(served_state(s, &why), "waiting");
        assert_non_null(strstr(why, "no such model file"));
    }
    const unsigned n_loads = s->workers[0].n_loads;
    assert_int_equal(rename(away, path), 0);
    sim_run_for(s, 10 * SECOND);
    assert_string_equal(served_state(s, NULL), "ready");
    assert_int_equal(s->workers[0].n_loads, n_loads + 1);
}

static void count_chunk(const ProtobufCMessage *message, void *user)
{
    *(uint64_t *)user += ((const Weft__V1__FetchChunk *)message)->data.len;
}

typedef struct Counted {
    uint64_t n_bytes; /* first: see count_chunk() */
    bool done;
    GError *error;
} Counted;

static void on_counted(const GError *error, void *user)
{
    Counted *c = user;
    c->done = true;
    c->error = error != NULL ? g_error_copy(error) : NULL;
}

/* The asker stands still for a second, with far more on its way than may wait for it. */
static RpcClientCall *fetch_standing_still(SimCluster *s, RpcChannel *channel,
                                           const Weft__V1__FetchRequest *request, Counted *c)
{
    *c = (Counted){0};
    RpcClientCall *call =
        rpc_call_start(channel, &weft__v1__slices__descriptor, "Fetch", &request->base, 0, true,
                       (RpcCallbacks){count_chunk, on_counted}, c);
    sim_loop_freeze(s->workers[0].loop, true);
    sim_world_run_for(s->world, SECOND);
    sim_loop_freeze(s->workers[0].loop, false);
    assert_false(c->done);
    return call;
}

/* More than may wait for an asker comes whole once it reads; one that leaves meanwhile is left. */
static void test_slices_wait_for_their_asker(void **state)
{
    enum { N = 512 };
    SimCluster *s = *state;
    g_autoptr(Gguf) gguf = open_model(s);
    g_autoptr(ModelSpec) spec = gguf_model_spec(gguf, NULL);
    Hash128 hash = gguf_hash(gguf);
    Weft__V1__SliceRef ref = WEFT__V1__SLICE_REF__INIT, *list[N];
    for (unsigned i = 0; i < N; i++) {
        list[i] = &ref;
    }
    const uint64_t n_bytes = N * (uint64_t)model_spec_slice_bytes(spec, &spec->tensors[0], 0);
    assert_true(n_bytes > 32u << 20);
    Weft__V1__FetchRequest request = WEFT__V1__FETCH_REQUEST__INIT;
    request.file_hash = (ProtobufCBinaryData){16, hash.bytes};
    request.slices = list;
    request.n_slices = N;
    Counted c;
    RpcClientCall *call = fetch_standing_still(s, s->workers[0].channel, &request, &c);
    rpc_client_cancel(call);
    assert_true(sim_world_run_until(s->world, &c.done, 5 * SECOND));
    assert_int_equal(c.error->code, WEFT_ERROR_CANCELLED);
    g_clear_error(&c.error);
    fetch_standing_still(s, s->workers[0].channel, &request, &c);
    assert_true(sim_world_run_until(s->world, &c.done, 5 * SECOND));
    g_assert_no_error(c.error);
    assert_true(c.n_bytes == n_bytes);
}

/* ---- renewal ---- */

static void test_renew_gives_the_same_name(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    g_autofree char *key = x509_new_key(NULL);
    g_autofree char *csr = x509_new_request(key, "somebody-else", NULL);
    Weft__V1__RenewRequest request = WEFT__V1__RENEW_REQUEST__INIT;
    request.csr_pem = (ProtobufCBinaryData){strlen(csr), (uint8_t *)csr};
    RpcChannel *admin = s->admin;
    Answer a = {0};
    s->admin = s->workers[0].channel;
    sim_call(s, &a, &weft__v1__cluster__descriptor, "Renew", &request);
    s->admin = admin;
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    const Weft__V1__RenewResponse *response = (const Weft__V1__RenewResponse *)a.message;
    g_autofree char *pem =
        g_strndup((char *)response->certificate_pem.data, response->certificate_pem.len);
    X509Info info = {0};
    assert_true(x509_parse(pem, &info, NULL));
    assert_string_equal(info.name, "w0");
    assert_string_equal(info.role, "worker");
    x509_info_clear(&info);
    answer_clear(&a);
    const Weft__V1__Member *member = sim_status(s, &a, "w0");
    assert_true(member->certificate_expires > 0);
    answer_clear(&a);
}

/* ---- the disk ---- */

static void test_no_epoch_without_a_disk(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    ask_plan(s, &a, 1, 1);
    store_disk_fail_after(s->disk, 0);
    sim_run_begin(s, &a, "hello", 3, 1, 1);
    sim_answer(s, &a, 5 * SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IO);
    assert_int_equal(s->workers[0].n_loads, 0); /* invariant 1 of deployments */
    store_disk_fail_after(s->disk, -1);
    sim_run_begin(s, &a, "hello", 3, 1, 1);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    answer_clear(&a);
}

static void test_no_token_without_a_disk(void **state)
{
    SimCluster *s = *state;
    store_disk_fail_after(s->disk, 0);
    Weft__V1__CreateTokenRequest request = WEFT__V1__CREATE_TOKEN_REQUEST__INIT;
    Answer a = {0};
    sim_call(s, &a, &weft__v1__admin__descriptor, "CreateToken", &request);
    sim_answer(s, &a, SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_IO);
    request.role = (char *)"king";
    sim_call(s, &a, &weft__v1__admin__descriptor, "CreateToken", &request);
    sim_answer(s, &a, SECOND);
    assert_int_equal(a.error->code, WEFT_ERROR_INVALID);
    answer_clear(&a);
}

/* ---- memory ---- */

/* Two deployments that do not fit beside each other: the idle one gives way; one in use does not.
 */
static void test_idle_deployment_gives_way(void **state)
{
    SimCluster *s = *state;
    s->workers[0].memory_bytes = 0;
    start_workers(s, 1);
    Answer a = {0}, b = {0};
    ask_plan(s, &a, 1, 1);
    uint64_t peak = ((const Weft__V1__PlanResponse *)a.message)
                        ->plan->replicas[0]
                        ->stages[0]
                        ->ranks[0]
                        ->peak_bytes;
    sim_worker_kill(&s->workers[0]);
    s->workers[0].memory_bytes = peak + peak / 4;
    start_workers(s, 1);
    sim_run_for(s, SECOND);
    sim_run_begin(s, &a, "hello", 3, 1, 1);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    request.prompt = (char *)"hello";
    request.max_tokens = 3;
    request.context = 48; /* another definition: another deployment */
    sim_call(s, &b, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &b, 5 * SECOND);
    g_assert_no_error(b.error);
    answer_clear(&a);
    answer_clear(&b);
}

static void test_unload(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Answer a = {0};
    sim_run_begin(s, &a, "hello", 3, 1, 1);
    sim_answer(s, &a, 5 * SECOND);
    Weft__V1__UnloadRequest request = WEFT__V1__UNLOAD_REQUEST__INIT;
    request.model = (char *)"tiny";
    sim_call(s, &a, &weft__v1__admin__descriptor, "Unload", &request);
    sim_answer(s, &a, SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(((const Weft__V1__UnloadResponse *)a.message)->jobs, 1);
    sim_run_for(s, SECOND);
    assert_int_equal(s->workers[0].n_full_drops, 1);
    answer_clear(&a);
}

/* Several sequences of one request, each with its own choice index; a seed that was not given is
 * reported. */
static void test_streams(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    request.random_prompt = 10;
    request.streams = 3;
    request.max_tokens = 4;
    request.ignore_end = true;
    Answer a = {0};
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.run_done->tokens, 12);
    assert_int_equal(a.run_done->prefill_tokens, 30);
    assert_int_equal(s->workers[0].n_generates, 3);
    assert_true(a.started->seed != 0);
    answer_clear(&a);
}

static void test_chat_template(void **state)
{
    SimCluster *s = *state;
    start_workers(s, 1);
    Weft__V1__ChatMessage message = WEFT__V1__CHAT_MESSAGE__INIT;
    message.role = (char *)"user";
    message.content = (char *)"hey";
    Weft__V1__ChatMessage *messages[] = {&message};
    Weft__V1__RunRequest request = WEFT__V1__RUN_REQUEST__INIT;
    request.model = (char *)sim_cluster_model(s);
    request.messages = messages;
    request.n_messages = 1;
    request.max_tokens = 1;
    Answer a = {0};
    sim_call(s, &a, &weft__v1__serve__descriptor, "Run", &request);
    sim_answer(s, &a, 5 * SECOND);
    g_assert_no_error(a.error);
    assert_int_equal(a.started->prompt_tokens,
                     1 + strlen("user\nhey") + 1 +
                         1); /* <|im_start|> ... <|im_end|> and a line end */
    answer_clear(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_plan_loads_nothing, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_impossible_plan_says_why_and_what_else, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_slices_are_the_files_bytes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_served_model_that_changed, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_served_model_that_is_gone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_slices_wait_for_their_asker, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_renew_gives_the_same_name, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_no_epoch_without_a_disk, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_no_token_without_a_disk, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_idle_deployment_gives_way, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_unload, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_streams, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_chat_template, set_up, tear_down),
    };
    return cmocka_run_group_tests_name("coordinator services", tests, NULL, NULL);
}
