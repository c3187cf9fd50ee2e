/* A model whose file was changed under an unchanged size and time: whoever asks for it after that
 * was seen gets it read anew, also when its opening had begun before. Works over a pool without
 * threads, whose work and reports come one at a time, in order. */
#include "coordinator/jobs/models.h"

#include "tests/sim/sim_loop.h"
#include "tests/unit/coordinator/tiny_gguf.h"
#include "tests/unit/remove_tree.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define TENSOR 2u /* the one that is changed */

typedef struct World {
    SimWorld *sim;
    Loop *loop;
    char *dir, *path;
    StoreDisk *disk;
    Store *store;
    WorkPool *pool;
    Models *models;
} World;

static void begin(World *w)
{
    w->store = store_memory_new(w->disk, w->loop);
    w->pool = work_pool_new(w->loop, 0);
    w->models = models_new(w->pool, w->store, w->dir);
}

static void end(World *w)
{
    work_pool_free(w->pool);
    models_free(w->models);
    store_free(w->store);
}

static int set_up(void **state)
{
    World *w = g_new0(World, 1);
    w->sim = sim_world_new(sim_seed(3));
    w->loop = sim_world_loop(w->sim);
    w->dir = g_dir_make_tmp("weft-models-XXXXXX", NULL);
    w->path = g_build_filename(w->dir, "tiny.gguf", NULL);
    w->disk = store_disk_new();
    tiny_gguf_write(w->path);
    begin(w);
    *state = w;
    return 0;
}

static int tear_down(void **state)
{
    World *w = *state;
    end(w);
    sim_world_free(w->sim);
    store_disk_free(w->disk);
    remove_tree(w->dir);
    g_free(w->path);
    g_free(w->dir);
    g_free(w);
    return 0;
}

typedef struct Opened {
    bool done;
    Model *model;
    GError *error;
} Opened;

static void on_opened(Model *model, const GError *error, void *user)
{
    Opened *o = user;
    o->model = model != NULL ? model_ref(model) : NULL;
    o->error = error != NULL ? g_error_copy(error) : NULL;
    o->done = true;
}

/* Returned. */
static Model *wait_for(World *w, Opened *o)
{
    assert_true(sim_world_run_until(w->sim, &o->done, 1000000));
    g_assert_no_error(o->error);
    return o->model;
}

static Model *open_model(World *w, const char *name)
{
    Opened o = {0};
    models_open(w->models, name, on_opened, &o);
    return wait_for(w, &o);
}

/* One of its tensor's bytes; the file's size and time stay. */
static void change_file(World *w, const Model *model)
{
    const ModelSpec *spec = model->spec;
    const size_t size = model_spec_slice_bytes(spec, &spec->tensors[TENSOR], 0);
    g_autofree uint8_t *slice = g_malloc(size);
    g_autofree char *bytes = NULL;
    gsize length;
    struct stat before;
    assert_true(model_files_copy_slice(model->files, spec, TENSOR, 0, slice, NULL));
    assert_true(g_file_get_contents(w->path, &bytes, &length, NULL));
    const char *at = memmem(bytes, length, slice, size);
    assert_non_null(at);
    const uint8_t other = slice[0] ^ 1;
    const int fd = open(w->path, O_WRONLY | O_CLOEXEC);
    assert_int_equal(fstat(fd, &before), 0);
    assert_int_equal(pwrite(fd, &other, 1, at - bytes), 1);
    const struct timespec times[2] = {before.st_atim, before.st_mtim};
    assert_int_equal(futimens(fd, times), 0);
    close(fd);
}

/* Whether a slice can be had of it: its bytes are those of its manifest. */
static bool is_whole(const Model *model)
{
    const size_t size = model_spec_slice_bytes(model->spec, &model->spec->tensors[TENSOR], 0);
    g_autofree uint8_t *slice = g_malloc(size);
    bool changed;
    GError *error = NULL;
    const bool ok = model_copy_slice(model, TENSOR, 0, slice, &changed, &error);
    g_assert_no_error(error);
    assert_true(ok != changed);
    return ok;
}

/* What a fetch of a slice does when it finds the change; as work, so that it comes after the work
 * of an opening and before its report. */
typedef struct Finding {
    Models *models;
    Model *model;
} Finding;

static void find_change(void *user)
{
    const Finding *f = user;
    models_mark_stale(f->models, f->model);
}

static void nothing(void *user) {}

static void test_seen_before(void **state)
{
    World *w = *state;
    Model *first = open_model(w, "tiny");
    change_file(w, first);
    Model *again = open_model(w, "tiny");
    assert_ptr_equal(again, first); /* nobody knows */
    assert_false(is_whole(again));
    model_unref(again);
    models_mark_stale(w->models, first);
    again = open_model(w, "tiny");
    assert_true(is_whole(again));
    model_unref(again);
    model_unref(first);
}

/* Its opening had begun, and found the file's size and time as they were. */
static void test_seen_meanwhile(void **state)
{
    World *w = *state;
    Model *first = open_model(w, "tiny");
    Opened o = {0}, p = {0};
    Finding finding = {w->models, first};
    change_file(w, first);
    models_open(w->models, "tiny", on_opened, &o);
    models_open(w->models, "tiny", on_opened, &p);
    work_pool_run(w->pool, find_change, nothing, NULL, &finding);
    Model *again = wait_for(w, &o), *other = wait_for(w, &p);
    assert_true(is_whole(again));
    assert_ptr_equal(again, other);
    assert_ptr_equal(models_by_hash(w->models, again->spec->file_hash.bytes, NULL), again);
    model_unref(other);
    model_unref(again);
    model_unref(first);
}

/* The same, of another name of the file: what was known of its slices was taken for it. */
static void test_seen_meanwhile_by_another_name(void **state)
{
    World *w = *state;
    Model *first = open_model(w, "tiny");
    Opened o = {0};
    Finding finding = {w->models, first};
    change_file(w, first);
    models_open(w->models, "tiny.gguf", on_opened, &o);
    work_pool_run(w->pool, find_change, nothing, NULL, &finding);
    Model *again = wait_for(w, &o);
    assert_true(is_whole(again));
    model_unref(again);
    model_unref(first);
}

static void restore(const GPtrArray *rows, const GError *error, void *user)
{
    g_assert_no_error(error);
    for (guint i = 0; i < rows->len; i++) {
        models_restore(user, rows->pdata[i]);
    }
}

/* A coordinator that starts again does not take the slices' old hashes from its store either. */
static void test_seen_before_a_restart(void **state)
{
    World *w = *state;
    Model *first = open_model(w, "tiny");
    change_file(w, first);
    models_mark_stale(w->models, first);
    model_unref(first);
    sim_world_run_for(w->sim, 1000000);
    end(w);
    begin(w);
    store_read(w->store, STORE_MANIFESTS, restore, w->models);
    sim_world_run_for(w->sim, 1000000);
    Model *again = open_model(w, "tiny");
    assert_true(is_whole(again));
    model_unref(again);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {CASE(test_seen_before), CASE(test_seen_meanwhile),
                                       CASE(test_seen_meanwhile_by_another_name),
                                       CASE(test_seen_before_a_restart)};
    return cmocka_run_group_tests_name("models", tests, NULL, NULL);
}
