/* Links without room: who sends waits for it as for an answer, with a deadline, whatever commands
 * come meanwhile. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "kernels/kernels.h"
#include "tests/unit/worker/engine_runs.h"

#include <pthread.h>
#include <string.h>

enum { N_PROMPT = 20, N_TOKENS = 6, FOR_EVER = INT32_MAX };

/* A fill whose links have no room for the next `refusals` datagrams; each refusal brings the
 * leader, where it is named, a command. */
static struct {
    pthread_mutex_t lock;
    int refusals;
    Engine *leader;
} room = {.lock = PTHREAD_MUTEX_INITIALIZER};
static const LinkOps *inner_ops;

static bool is_refused(void)
{
    pthread_mutex_lock(&room.lock);
    const bool refused = room.refusals > 0;
    if (refused) {
        room.refusals--;
        if (room.leader != NULL) {
            engine_canary(room.leader);
        }
    }
    pthread_mutex_unlock(&room.lock);
    return refused;
}

static void refuse(int n, Engine *leader)
{
    pthread_mutex_lock(&room.lock);
    room.refusals = n;
    room.leader = leader;
    pthread_mutex_unlock(&room.lock);
}

static void *buffer_or_none(LinkRaw *raw, size_t size)
{
    return is_refused() ? NULL : inner_ops->buffer(raw, size);
}

/* Two stages; so many refusals once they have greeted each other. */
static void run(const Gguf *gguf, int n_refusals, bool commands, LocalResult *result)
{
    g_autoptr(GError) error = NULL;
    const LocalLayout layout = {2, {1, 1}, .threads = 1, .isa = ISA_GENERIC};
    LinkFill *inner = link_fill_inproc_new();
    LinkOps ops = *inner->ops;
    const LinkFill fill = {&ops, inner->self};
    uint32_t prompt[RUNS_PROMPT];
    ops.buffer = buffer_or_none;
    inner_ops = inner->ops;
    LocalReplica *replica = local_replica_new(gguf, &layout, &fill, &error);
    if (replica == NULL) {
        fail_msg("%s", error->message);
    }
    runs_prompt(prompt, N_PROMPT, 259);
    refuse(n_refusals, commands ? local_replica_engine(replica, 0) : NULL);
    local_replica_greedy(replica, prompt, N_PROMPT, N_TOKENS, result);
    refuse(0, NULL);
    local_replica_free(replica);
    link_fill_free(inner);
}

static void test_commands_do_not_end_the_wait(void **state)
{
    (void)state;
    g_autoptr(Gguf) gguf = runs_awkward_model(DTYPE_Q8_0);
    LocalResult with, without;
    run(gguf, 100, true, &with);
    run(gguf, 0, false, &without);
    if (with.error != NULL) {
        fail_msg("%s", with.error);
    }
    assert_null(without.error);
    assert_int_equal(with.n, N_TOKENS);
    assert_true(runs_equal(&with, &without));
    local_result_clear(&with);
    local_result_clear(&without);
}

static void test_the_wait_ends(void **state)
{
    (void)state;
    g_autoptr(Gguf) gguf = runs_awkward_model(DTYPE_Q8_0);
    LocalResult result;
    run(gguf, FOR_EVER, false, &result);
    assert_non_null(result.error);
    if (strstr(result.error, "node1 did not answer during sending activations") == NULL) {
        fail_msg("%s", result.error);
    }
    local_result_clear(&result);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commands_do_not_end_the_wait),
        cmocka_unit_test(test_the_wait_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
