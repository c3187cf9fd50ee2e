/* Checkpoints: what any set of ranks writes, any rectangle reads; a thousand random damages are
 * found before use and the one before is loaded; a full disk costs the new one, never the last. */
#include "proto/base/error.h"
#include "proto/model/model_config.h"
#include "coordinator/train/checkpoint.h"
#include "proto/model/model_source.h"
#include "tests/unit/remove_tree.h"
#include "tests/unit/write_part.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { DAMAGES = 1000 };

typedef struct World {
    char *directory;
    ModelSpec *model;
} World;

static float value_of(uint32_t tensor, const TensorSpec *t, uint32_t row, uint32_t column)
{
    return (float)tensor + 1e-3f * (float)(row * t->columns + column);
}

static int setup(void **state)
{
    World *w = g_new0(World, 1);
    const ModelConfig config = {.family = FAMILY_LLAMA,
                                .layers = 2,
                                .width = 16,
                                .heads = 2,
                                .vocabulary = 40,
                                .context = 8,
                                .qkv_bias = true,
                                .name = "tiny"};
    w->directory = g_dir_make_tmp("weft-checkpoint-XXXXXX", NULL);
    w->model = model_spec_from_config(&config, NULL);
    *state = w;
    return w->model != NULL ? 0 : -1;
}

static int teardown(void **state)
{
    World *w = *state;
    remove_tree(w->directory);
    g_free(w->directory);
    model_spec_free(w->model);
    g_free(w);
    return 0;
}

/* ---- writing ---- */

/* Part `rank` of `n` of each tensor: by rows where there are some, else by columns; a matrix cut
 * along the contraction in two kinds of model files is cut by columns. */
static SliceRect part_of(const TensorSpec *t, uint32_t rank, uint32_t n)
{
    const bool by_column = t->rows == 1 || t->cut == CUT_ATTN_UNITS || t->cut == CUT_FFN_COLS;
    const uint32_t total = by_column ? t->columns : t->rows, first = total * rank / n,
                   last = total * (rank + 1) / n;
    return by_column ? (SliceRect){0, t->rows, first, last - first}
                     : (SliceRect){first, last - first, 0, t->columns};
}

typedef struct Owned {
    GPtrArray *buffers; /* float *, one a tensor, whole */
    GPtrArray *names;
    GArray *pieces; /* CheckpointPiece */
} Owned;

static void owned_clear(Owned *o)
{
    g_ptr_array_unref(o->buffers);
    g_ptr_array_unref(o->names);
    g_array_unref(o->pieces);
}

static Owned own(const World *w, uint32_t rank, uint32_t n, float add)
{
    Owned o = {g_ptr_array_new_with_free_func(g_free), g_ptr_array_new_with_free_func(g_free),
               g_array_new(FALSE, FALSE, sizeof(CheckpointPiece))};
    static const char *const kinds[] = {"weights", "first", "second"};
    for (uint32_t i = 0; i < 3 * w->model->n_tensors; i++) {
        const TensorSpec *t = &w->model->tensors[i / 3];
        float *buffer = g_new(float, (size_t)t->rows * t->columns);
        for (uint32_t e = 0; e < t->rows * t->columns; e++) {
            buffer[e] = value_of(i, t, e / t->columns, e % t->columns) + add;
        }
        const SliceRect r = part_of(t, rank, n);
        const CheckpointPiece piece = {
            .tensor = g_strdup_printf("%s/%s", kinds[i % 3], t->name),
            .rows = t->rows,
            .columns = t->columns,
            .rect = r,
            .data = buffer + (size_t)r.row0 * t->columns + r.col0,
            .ld = t->columns,
        };
        g_ptr_array_add(o.buffers, buffer);
        g_ptr_array_add(o.names, (char *)piece.tensor);
        if (r.n_rows > 0 && r.n_cols > 0) {
            g_array_append_val(o.pieces, piece);
        }
    }
    return o;
}

static bool save(const World *w, CheckpointDisk *disk, uint64_t step, uint32_t ranks, unsigned keep,
                 GError **error)
{
    g_autoptr(GPtrArray) parts = g_ptr_array_new_with_free_func(g_free);
    bool ok = true;
    for (uint32_t rank = 0; ok && rank < ranks; rank++) {
        Owned o = own(w, rank, ranks, (float)step);
        char *part =
            write_part(disk, w->directory, step, rank,
                       (const CheckpointPiece *)(void *)o.pieces->data, o.pieces->len, error);
        ok = part != NULL;
        g_ptr_array_add(parts, part);
        owned_clear(&o);
    }
    char *file =
        ok ? checkpoint_write_file(disk, w->directory, step, "notes.json", "{}", 2, error) : NULL;
    ok = file != NULL;
    g_ptr_array_add(parts, file);
    const CheckpointState state = {.step = step,
                                   .samples = 32 * step,
                                   .loss_scale = 65536.0,
                                   .scale_growth = 7,
                                   .scale_hysteresis = 2,
                                   .job = (char *)"kind: train\n",
                                   .weights_digest = (char *)"00112233445566778899aabbccddeeff"};
    if (!ok) {
        checkpoint_abandon(w->directory, step);
        return false;
    }
    return checkpoint_commit(disk, w->directory, &state, w->model,
                             (const char *const *)parts->pdata, parts->len, keep, error);
}

static void save_ok(const World *w, uint64_t step, uint32_t ranks, unsigned keep)
{
    g_autoptr(GError) error = NULL;
    if (!save(w, checkpoint_disk(), step, ranks, keep, &error)) {
        fail_msg("%s", error->message);
    }
}

static void check_rect(const World *w, const Checkpoint *c, uint32_t tensor, SliceRect r,
                       uint64_t step)
{
    static const char *const kinds[] = {"weights", "first", "second"};
    const TensorSpec *t = &w->model->tensors[tensor / 3];
    g_autofree char *name = g_strdup_printf("%s/%s", kinds[tensor % 3], t->name);
    const size_t ld = r.n_cols + 3;
    g_autofree float *out = g_new0(float, ld *r.n_rows);
    assert_true(checkpoint_read(c, name, r, out, ld, NULL));
    for (uint32_t row = 0; row < r.n_rows; row++) {
        for (uint32_t column = 0; column < r.n_cols; column++) {
            const float wanted = value_of(tensor, t, r.row0 + row, r.col0 + column) + (float)step;
            assert_true(out[row * ld + column] == wanted);
        }
        assert_true(out[row * ld + r.n_cols] == 0.0f);
    }
}

static void check_contents(const World *w, const Checkpoint *c, uint64_t step)
{
    assert_int_equal(checkpoint_state(c)->step, step);
    assert_int_equal(checkpoint_state(c)->samples, 32 * step);
    assert_true(checkpoint_state(c)->loss_scale == 65536.0);
    assert_string_equal(checkpoint_state(c)->job, "kind: train\n");
    assert_null(checkpoint_state(c)->definition);
    for (uint32_t i = 0; i < 3 * w->model->n_tensors; i++) {
        const TensorSpec *t = &w->model->tensors[i / 3];
        check_rect(w, c, i, (SliceRect){0, t->rows, 0, t->columns}, step);
    }
}

/* ---- tests ---- */

static void test_any_layout_reads_any(void **state)
{
    const World *w = *state;
    static const uint32_t ranks[] = {1, 2, 3, 7};
    g_autoptr(GRand) random = g_rand_new_with_seed(1);
    for (size_t i = 0; i < G_N_ELEMENTS(ranks); i++) {
        const uint64_t step = 10 + i;
        save_ok(w, step, ranks[i], 9);
        g_autoptr(GError) error = NULL;
        g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, &error);
        assert_non_null(c);
        check_contents(w, c, step);
        for (int k = 0; k < 200; k++) {
            const uint32_t tensor =
                (uint32_t)g_rand_int_range(random, 0, (gint32)(3 * w->model->n_tensors));
            const TensorSpec *t = &w->model->tensors[tensor / 3];
            SliceRect r;
            r.row0 = (uint32_t)g_rand_int_range(random, 0, (gint32)t->rows);
            r.col0 = (uint32_t)g_rand_int_range(random, 0, (gint32)t->columns);
            r.n_rows = (uint32_t)g_rand_int_range(random, 1, (gint32)(t->rows - r.row0 + 1));
            r.n_cols = (uint32_t)g_rand_int_range(random, 1, (gint32)(t->columns - r.col0 + 1));
            check_rect(w, c, tensor, r, step);
        }
        const ModelSpec *model = checkpoint_model(c);
        assert_string_equal(model->name, "tiny");
        assert_int_equal(model->n_tensors, w->model->n_tensors);
        assert_true(model->rope.freq_base == w->model->rope.freq_base);
        g_autofree char *tokenizer = g_build_filename(checkpoint_path(c), "notes.json", NULL);
        assert_true(g_file_test(tokenizer, G_FILE_TEST_EXISTS));
        assert_false(checkpoint_read(c, "weights/none", (SliceRect){0, 1, 0, 1}, NULL, 0, &error));
        assert_int_equal(error->code, WEFT_ERROR_INVALID);
        assert_false(checkpoint_read(c, "weights/token_embd.weight", (SliceRect){39, 2, 0, 16},
                                     NULL, 0, NULL));
    }
}

/* What `weft export` does: a job's folder as a model, and that as a GGUF file. */
static void check_source(const World *w, const ModelSource *s, uint64_t step)
{
    for (uint32_t i = 0; i < w->model->n_tensors; i++) {
        const TensorSpec *t = &w->model->tensors[i];
        g_autofree float *rows = g_new(float, (size_t)t->rows * t->columns);
        assert_true(model_source_read(s, i, 0, t->rows, rows, NULL));
        for (uint32_t e = 0; e < t->rows * t->columns; e++) {
            assert_true(rows[e] ==
                        value_of(3 * i, t, e / t->columns, e % t->columns) + (float)step);
        }
    }
}

static void test_export(void **state)
{
    const World *w = *state;
    save_ok(w, 3, 2, 3);
    save_ok(w, 4, 3, 3);
    g_autoptr(GError) error = NULL;
    g_autofree char *older = g_build_filename(w->directory, "step-0000000003", NULL);
    g_autofree char *path = g_build_filename(w->directory, "model.gguf", NULL);
    g_autoptr(ModelSource) newest = model_source_open(w->directory, &error),
                           named = model_source_open(older, &error);
    assert_non_null(newest);
    assert_non_null(named);
    check_source(w, newest, 4);
    check_source(w, named, 3);
    assert_string_equal(model_source_digest(newest), "00112233445566778899aabbccddeeff");
    assert_null(model_source_vocab(newest));
    const ModelContents contents = model_source_contents(newest);
    assert_true(gguf_write(path, &contents, DTYPE_F32, &error));
    g_autoptr(ModelSource) written = model_source_open(path, &error);
    assert_non_null(written);
    check_source(w, written, 4);
}

static unsigned count_folders(const World *w)
{
    g_autoptr(GDir) dir = g_dir_open(w->directory, 0, NULL);
    unsigned n = 0;
    while (g_dir_read_name(dir) != NULL) {
        n++;
    }
    return n;
}

static void test_keep(void **state)
{
    const World *w = *state;
    for (uint64_t step = 1; step <= 5; step++) {
        save_ok(w, step, 2, 3);
    }
    assert_int_equal(count_folders(w), 3);
    g_autoptr(GArray) steps = checkpoint_steps(w->directory);
    assert_int_equal(g_array_index(steps, uint64_t, 0), 3);
    /* The same step again, and something that a crash left behind. */
    g_autofree char *left = g_build_filename(w->directory, ".step-0000000004", NULL);
    g_autofree char *ahead = g_build_filename(w->directory, ".step-0000000006", NULL);
    assert_int_equal(g_mkdir(left, 0755), 0);
    assert_int_equal(g_mkdir(ahead, 0755), 0);
    save_ok(w, 5, 3, 2);
    assert_int_equal(count_folders(w), 3); /* 4, 5 and the one that is being written */
    assert_true(g_file_test(ahead, G_FILE_TEST_IS_DIR));
    g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
    check_contents(w, c, 5);
}

/* Later ones that are damaged were passed over: they cost no whole one its place. */
static void test_keep_beside_damage(void **state)
{
    const World *w = *state;
    save_ok(w, 100, 2, 1);
    save_ok(w, 200, 2, 2);
    g_autofree char *damaged = g_build_filename(w->directory, "step-0000000200", NULL),
                    *manifest = g_build_filename(damaged, CHECKPOINT_MANIFEST, NULL);
    assert_true(g_file_set_contents(manifest, "{", 1, NULL));
    save_ok(w, 150, 2, 1);
    g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
    assert_non_null(c);
    check_contents(w, c, 150);
    assert_int_equal(count_folders(w), 2);
    save_ok(w, 200, 2, 1); /* in the place of the damaged one */
    g_autoptr(Checkpoint) last = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
    check_contents(w, last, 200);
    assert_int_equal(count_folders(w), 1);
}

static void test_nothing_there(void **state)
{
    const World *w = *state;
    g_autoptr(GError) error = NULL;
    assert_null(checkpoint_open_newest(w->directory, NULL, NULL, &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
    g_clear_error(&error);
    assert_null(checkpoint_open_newest("/nonexistent", NULL, NULL, &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
    g_clear_error(&error);
    assert_null(checkpoint_open("/nonexistent/step-0000000001", &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
}

/* Pieces that leave a hole or overlap are no checkpoint. */
static void test_cover(void **state)
{
    const World *w = *state;
    static const SliceRect wrong[][2] = {
        {{0, 1, 0, 4}, {1, 1, 0, 3}}, {{0, 2, 0, 3}, {0, 2, 2, 2}}, {{0, 2, 0, 2}, {0, 1, 2, 2}}};
    static const SliceRect right[2] = {{0, 2, 0, 3}, {0, 2, 3, 1}};
    static const float data[8];
    const CheckpointState at = {.step = 1};
    for (size_t i = 0; i <= G_N_ELEMENTS(wrong); i++) {
        const SliceRect *rects = i < G_N_ELEMENTS(wrong) ? wrong[i] : right;
        const CheckpointPiece pieces[] = {{"weights/x", 2, 4, rects[0], data, 4},
                                          {"weights/x", 2, 4, rects[1], data, 4}};
        g_autoptr(GError) error = NULL;
        const CheckpointFile file = {"part-000.safetensors", 1, {{0}}};
        g_autofree char *part = checkpoint_part_json(&file, pieces, 2);
        const char *const parts[] = {part};
        g_autofree char *manifest = checkpoint_manifest(&at, w->model, parts, 1, &error);
        assert_int_equal(manifest != NULL, i == G_N_ELEMENTS(wrong));
    }
}

/* ---- damage ---- */

static void count_damage(void *user, const char *message)
{
    assert_non_null(strstr(message, "step-0000000002 is damaged: "));
    assert_null(strchr(message, '\n'));
    ++*(unsigned *)user;
}

/* Changes `size` bytes in place or cuts them; the new length, G_MAXSIZE: the file goes. */
static size_t damage(GRand *random, guint8 *bytes, size_t size)
{
    const size_t at = (size_t)g_rand_int_range(random, 0, (gint32)size);
    switch (g_rand_int_range(random, 0, 5)) {
    case 0: /* cut */
        return at;
    case 1: /* torn: the rest was never written */
        bytes[at] = (guint8)~bytes[at];
        memset(bytes + at + 1, 0, size - at - 1);
        return size;
    case 2:
        return G_MAXSIZE;
    case 3: { /* a block of something else */
        const size_t n = MIN(size - at, 64);
        for (size_t i = 0; i < n; i++) {
            bytes[at + i] = (guint8)(bytes[at + i] + 1 + i % 200);
        }
        return size;
    }
    default:
        bytes[at] ^= (guint8)(1u << g_rand_int_range(random, 0, 8));
        return size;
    }
}

static void check_damage(const World *w, GRand *random, const char *path)
{
    g_autofree char *before = NULL;
    gsize size;
    assert_true(g_file_get_contents(path, &before, &size, NULL));
    g_autofree guint8 *bytes = g_memdup2(before, size);
    const size_t left = damage(random, bytes, size);
    g_unlink(path);
    FILE *file = left != G_MAXSIZE ? fopen(path, "w") : NULL;
    if (file != NULL) {
        assert_int_equal(fwrite(bytes, 1, left, file), left);
        fclose(file);
    }
    unsigned n_damaged = 0;
    g_autoptr(GError) error = NULL;
    g_autoptr(Checkpoint) c =
        checkpoint_open_newest(w->directory, count_damage, &n_damaged, &error);
    assert_non_null(c);
    /* The last digit of a number of the manifest may change without changing the number. */
    if (n_damaged == 0 && g_str_has_suffix(path, CHECKPOINT_MANIFEST)) {
        check_contents(w, c, 2);
    } else {
        assert_int_equal(n_damaged, 1);
        assert_int_equal(checkpoint_state(c)->step, 1);
    }
    file = fopen(path, "w");
    assert_int_equal(fwrite(before, 1, size, file), size);
    fclose(file);
}

static void test_damages(void **state)
{
    const World *w = *state;
    save_ok(w, 1, 2, 3);
    save_ok(w, 2, 3, 3);
    static const char *const files[] = {CHECKPOINT_MANIFEST, "part-000.safetensors",
                                        "part-001.safetensors", "part-002.safetensors",
                                        "notes.json"};
    g_autoptr(GRand) random = g_rand_new_with_seed(7);
    for (int i = 0; i < DAMAGES; i++) {
        g_autofree char *path = g_build_filename(w->directory, "step-0000000002",
                                                 files[(size_t)i % G_N_ELEMENTS(files)], NULL);
        check_damage(w, random, path);
    }
    g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
    check_contents(w, c, 2);
}

/* ---- a disk that fills up ---- */

typedef struct FullDisk {
    CheckpointDisk base;
    int writes_left, syncs_left;
} FullDisk;

static ssize_t full_write(CheckpointDisk *self, int fd, const void *bytes, size_t n)
{
    FullDisk *d = (FullDisk *)self;
    if (d->writes_left-- > 0) {
        return checkpoint_disk()->write(checkpoint_disk(), fd, bytes, n);
    }
    errno = ENOSPC;
    return -1;
}

static int full_sync(CheckpointDisk *self, int fd)
{
    FullDisk *d = (FullDisk *)self;
    errno = EIO;
    return d->syncs_left-- > 0 ? 0 : -1;
}

static void test_disk_full(void **state)
{
    const World *w = *state;
    save_ok(w, 1, 2, 3);
    unsigned n_failed = 0;
    for (int limit = 0, saved = 0; !saved; limit = limit < 20 ? limit + 1 : limit * 2) {
        for (int sync = 0; sync < 2 && !saved; sync++) {
            FullDisk disk = {
                {full_write, full_sync}, sync ? G_MAXINT : limit, sync ? limit : G_MAXINT};
            g_autoptr(GError) error = NULL;
            const bool done = save(w, &disk.base, 2, 2, 3, &error);
            g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
            assert_non_null(c);
            if (!done) {
                assert_int_equal(error->code, WEFT_ERROR_IO);
                n_failed++;
                check_contents(w, c, 1);
                assert_int_equal(count_folders(w), 1);
                if (!sync) {
                    assert_non_null(strstr(error->message, "the last checkpoint is kept"));
                }
            } else if (!sync) {
                saved = 1;
                check_contents(w, c, 2);
            } else {
                g_autofree char *second = g_build_filename(w->directory, "step-0000000002", NULL);
                remove_tree(second);
            }
        }
    }
    assert_true(n_failed > 20);
}

/* One of the same step stays until the new one is there: also when only the last sync, after the
 * names were given, fails. */
static void test_same_step_on_a_bad_disk(void **state)
{
    const World *w = *state;
    int n_failed = 0;
    save_ok(w, 2, 2, 3);
    for (bool done = false; !done; n_failed += !done) {
        FullDisk disk = {{full_write, full_sync}, G_MAXINT, n_failed};
        g_autoptr(GError) error = NULL;
        done = save(w, &disk.base, 2, 3, 3, &error);
        g_autoptr(Checkpoint) c = checkpoint_open_newest(w->directory, NULL, NULL, NULL);
        assert_non_null(c);
        check_contents(w, c, 2);
        assert_int_equal(count_folders(w), 1);
        g_autofree char *third =
            g_build_filename(w->directory, "step-0000000002/part-002.safetensors", NULL);
        assert_int_equal(g_file_test(third, G_FILE_TEST_EXISTS), done);
    }
    assert_int_equal(n_failed, 7); /* parts, notes, manifest, the folder and the one above */
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_any_layout_reads_any),
        CASE(test_export),
        CASE(test_keep),
        CASE(test_keep_beside_damage),
        CASE(test_nothing_there),
        CASE(test_cover),
        CASE(test_damages),
        CASE(test_disk_full),
        CASE(test_same_step_on_a_bad_disk),
    };
    return cmocka_run_group_tests_name("checkpoint", tests, NULL, NULL);
}
