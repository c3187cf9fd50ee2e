/* From a token to an identity on disk, and what a damaged or shared state directory says. */
#include "proto/base/error.h"
#include "tests/unit/worker/fake_coordinator.h"
#include "transport/crypto/x509.h"
#include "worker/agent/identity.h"
#include "worker/agent/join.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <glib/gstdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct Env {
    SimWorld *world;
    RpcTransport *transport;
    FakeCoordinator *c;
    Loop *loop;
    Identity identity;
    GError *error;
    bool done;
} Env;

static Env *env_new(void)
{
    Env *env = g_new0(Env, 1);
    GError *error = NULL;
    env->world = sim_world_new(sim_seed(1));
    env->transport = rpc_transport_inproc_new();
    env->loop = sim_world_loop(env->world);
    char *key = x509_new_key(&error);
    g_autofree char *ca = x509_new_ca(key, "test", loop_wall_us(env->loop), &error);
    g_assert_no_error(error);
    env->c = fake_coordinator_new(env->world, env->transport, "10.0.0.1:7471", ca);
    env->c->ca_key_pem = key;
    env->c->token = "right";
    return env;
}

static void env_free(Env *env)
{
    fake_coordinator_free(env->c);
    sim_world_run_for(env->world, 1000000);
    rpc_transport_inproc_free(env->transport);
    sim_world_free(env->world);
    identity_clear(&env->identity);
    g_clear_error(&env->error);
    g_free(env);
}

static void on_joined(const Identity *identity, const GError *error, void *user)
{
    Env *env = user;
    env->done = true;
    if (identity) {
        identity_copy(identity, &env->identity);
    } else {
        env->error = g_error_copy(error);
    }
}

static void join(Env *env, const char *address, const char *token)
{
    const char *const addresses[] = {"10.0.0.2", NULL};
    JoinOptions options = {.loop = env->loop,
                           .transport = env->transport,
                           .address = address,
                           .ca_pem = env->c->ca_pem,
                           .token = token,
                           .name = "w7",
                           .addresses = addresses};
    g_clear_error(&env->error);
    env->done = false;
    join_start(&options, on_joined, env);
    assert_true(sim_world_run_until(env->world, &env->done, 60000000));
}

static void test_token_becomes_an_identity(void **state)
{
    (void)state;
    Env *env = env_new();
    join(env, "10.0.0.1:7471", "right");
    g_assert_no_error(env->error);
    assert_string_equal(env->identity.name, "w7");
    assert_string_equal(env->identity.cluster, "test");
    assert_string_equal(env->identity.control_address,
                        "10.0.0.1:7470"); /* told as 0.0.0.0: the host that we know */
    X509Info info;
    assert_true(x509_parse(env->identity.certificate_pem, &info, NULL));
    assert_string_equal(info.name, "w7");
    assert_string_equal(info.role, "worker");
    x509_info_clear(&info);
    g_autofree char *dir = g_dir_make_tmp("weft-state-XXXXXX", NULL);
    GError *error = NULL;
    assert_true(identity_save(dir, &env->identity, &error));
    Identity again;
    assert_true(identity_load(dir, &again, &error));
    assert_string_equal(again.key_pem, env->identity.key_pem);
    assert_string_equal(again.certificate_pem, env->identity.certificate_pem);
    assert_string_equal(again.ca_pem, env->identity.ca_pem);
    assert_string_equal(again.control_address, "10.0.0.1:7470");
    identity_clear(&again);
    const char *names[] = {"node.pem", "node.conf", "ca.pem"};
    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *path = g_build_filename(dir, names[i], NULL);
        struct stat st;
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
        g_unlink(path);
    }
    g_rmdir(dir);
    env_free(env);
}

static void test_refusals(void **state)
{
    (void)state;
    Env *env = env_new();
    join(env, "10.0.0.1:7471", "wrong");
    assert_true(g_error_matches(env->error, WEFT_ERROR, WEFT_ERROR_DENIED));
    assert_null(strstr(env->error->message, "wrong")); /* a token is in no message */
    env->c->join_role = "admin";
    join(env, "10.0.0.1:7471", "right");
    assert_true(g_error_matches(env->error, WEFT_ERROR, WEFT_ERROR_DENIED));
    assert_non_null(strstr(env->error->message, "role admin"));
    join(env, "10.0.0.9:7471", "right");
    assert_non_null(env->error);
    int code = weft_error_exit_code(env->error);
    assert_true(code == 5 || code == 7);
    env_free(env);
}

static void test_wrong_hash_texts(void **state)
{
    (void)state;
    g_autoptr(GError) error = NULL;
    assert_null(join_fetch_ca("127.0.0.1:1", "sha256:zz", &error));
    assert_int_equal(weft_error_exit_code(error), 2);
    g_clear_error(&error);
    g_autofree char *hash = x509_format_hash((const uint8_t[32]){1});
    assert_null(join_fetch_ca("127.0.0.1:1", hash, &error)); /* nobody listens on port 1 */
    assert_int_equal(weft_error_exit_code(error), 5);
}

static void test_reachable_address(void **state)
{
    (void)state;
    const char *cases[][3] = {{"0.0.0.0:7470", "10.1.1.1:7471", "10.1.1.1:7470"},
                              {"[::]:7470", "node.example:1", "node.example:7470"},
                              {"10.0.0.5:7470", "10.1.1.1:7471", "10.0.0.5:7470"},
                              {"nonsense", "10.1.1.1:7471", "nonsense"}};
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *got = join_reachable_address(cases[i][0], cases[i][1]);
        assert_string_equal(got, cases[i][2]);
    }
}

static void test_damaged_and_shared_directories(void **state)
{
    (void)state;
    g_autofree char *dir = g_dir_make_tmp("weft-state-XXXXXX", NULL);
    g_autofree char *pem = g_build_filename(dir, "node.pem", NULL);
    g_autofree char *lock = g_build_filename(dir, "lock", NULL);
    g_autoptr(GError) error = NULL;
    Identity identity;
    assert_false(identity_load(dir, &identity, &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_NOT_FOUND));
    g_clear_error(&error);
    const char *wrong[] = {"", "garbage",
                           "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"};
    for (size_t i = 0; i < G_N_ELEMENTS(wrong); i++) {
        assert_true(g_file_set_contents(pem, wrong[i], -1, NULL));
        assert_false(identity_load(dir, &identity, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        assert_null(identity.key_pem);
        g_clear_error(&error);
    }
    int held = identity_lock(dir, &error);
    assert_true(held >= 0);
    int second = identity_lock(dir, &error);
    assert_int_equal(second, -1);
    assert_non_null(strstr(error->message, "another weft-worker"));
    close(held);
    g_clear_error(&error);
    held = identity_lock(dir, &error);
    assert_true(held >= 0);
    close(held);
    g_unlink(pem);
    g_unlink(lock);
    g_rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_token_becomes_an_identity),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_wrong_hash_texts),
        cmocka_unit_test(test_reachable_address),
        cmocka_unit_test(test_damaged_and_shared_directories),
    };
    return cmocka_run_group_tests_name("join", tests, NULL, NULL);
}
