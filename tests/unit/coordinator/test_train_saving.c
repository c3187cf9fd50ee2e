/* Checkpoints on their way from ranks to the disk: parts that are told in order, memory that is
 * bounded whatever the model's size, ranks that leave in the middle, a disk that is full. */
#include "coordinator/train/train_saving.h"
#include "proto/base/error.h"
#include "proto/model/model_config.h"
#include "tests/sim/sim_loop.h"
#include "tests/unit/remove_tree.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { RANKS = 2, PIECE_FLOATS = 256 << 10 };

static const char *const kinds[] = {"weights", "first", "second"};

typedef struct World World;

/* Sends its rows of all tensors, as much at a time as the window lets it. */
typedef struct Rank {
    World *w;
    uint32_t index, tensor; /* three times the model's */
    uint64_t offset, on_way, step;
} Rank;

struct World {
    SimWorld *sim;
    WorkPool *pool;
    ModelSpec *model;
    char *directory;
    TrainSaving *saving;
    Rank ranks[RANKS];
    uint64_t saved_step, n_saved, n_failed;
    bool closed;
};

/* A disk that is full after so many bytes. */
typedef struct SmallDisk {
    CheckpointDisk disk;
    int64_t room;
} SmallDisk;

static ssize_t small_write(CheckpointDisk *self, int fd, const void *bytes, size_t n)
{
    SmallDisk *d = (SmallDisk *)self;
    d->room -= (int64_t)n;
    if (d->room < 0) {
        errno = ENOSPC;
        return -1;
    }
    return checkpoint_disk()->write(checkpoint_disk(), fd, bytes, n);
}

static int small_sync(CheckpointDisk *self, int fd)
{
    return 0;
}

/* ---- a world ---- */

static void on_taken(uint32_t rank, uint64_t bytes, void *user)
{
    World *w = user;
    assert_true(bytes <= w->ranks[rank].on_way);
    w->ranks[rank].on_way -= bytes;
}

static void on_saved(uint64_t step, const GError *error, void *user)
{
    World *w = user;
    w->saved_step = error == NULL ? step : w->saved_step;
    w->n_saved += error == NULL;
    w->n_failed += error != NULL;
}

static void on_closed(bool dropped, void *user)
{
    World *w = user;
    assert_false(w->closed);
    assert_false(dropped);
    w->closed = true;
}

static ModelSpec *model_new(uint32_t vocabulary)
{
    const ModelConfig config = {.family = FAMILY_GPT2,
                                .layers = 1,
                                .width = 64,
                                .heads = 2,
                                .vocabulary = vocabulary,
                                .context = 8};
    return model_spec_from_config(&config, NULL);
}

static void world_open(World *w, uint32_t vocabulary, CheckpointDisk *disk)
{
    *w = (World){.sim = sim_world_new(1), .model = model_new(vocabulary)};
    w->directory = g_dir_make_tmp("weft-saving-XXXXXX", NULL);
    w->pool = work_pool_new(sim_world_loop(w->sim), 0);
    const TrainSavingOptions options = {.pool = w->pool,
                                        .disk = disk,
                                        .directory = w->directory,
                                        .job = "kind: train\n",
                                        .tokenizer_json = "{}",
                                        .spec = w->model,
                                        .keep = 2,
                                        .n_ranks = RANKS};
    const TrainSavingEvents events = {on_taken, on_saved, on_closed, w};
    w->saving = train_saving_new(&options, &events);
    for (uint32_t r = 0; r < RANKS; r++) {
        w->ranks[r] = (Rank){.w = w, .index = r};
    }
}

static void world_run(World *w)
{
    sim_world_run_for(w->sim, 1000);
}

static void world_close(World *w)
{
    if (!w->closed) {
        train_saving_close(w->saving);
    }
    world_run(w);
    assert_true(w->closed);
    work_pool_free(w->pool);
    sim_world_free(w->sim);
    model_spec_free(w->model);
    remove_tree(w->directory);
    g_free(w->directory);
}

/* ---- ranks ---- */

static SliceRect share(const Rank *r, const TensorSpec *t)
{
    const uint32_t first = t->rows * r->index / RANKS, last = t->rows * (r->index + 1) / RANKS;
    return (SliceRect){first, last - first, 0, t->columns};
}

static bool say(const Rank *r, Weft__V1__TrainReport__ReportCase which, void *what, GError **error)
{
    Weft__V1__TrainReport report = WEFT__V1__TRAIN_REPORT__INIT;
    report.report_case = which;
    report.want = what; /* any member of the union */
    return train_saving_add(r->w->saving, r->index, &report, error);
}

static bool begin(Rank *r, uint64_t step, GError **error)
{
    const ModelSpec *model = r->w->model;
    const uint32_t most = 3 * model->n_tensors;
    g_autofree Weft__V1__TrainPlace *places = g_new(Weft__V1__TrainPlace, most);
    g_autofree Weft__V1__TrainPlace **pointers = g_new(Weft__V1__TrainPlace *, most);
    g_autofree Weft__V1__TrainRect *rects = g_new(Weft__V1__TrainRect, most);
    g_autoptr(GPtrArray) names = g_ptr_array_new_with_free_func(g_free);
    Weft__V1__TrainPartBegin m = WEFT__V1__TRAIN_PART_BEGIN__INIT;
    for (uint32_t i = 0; i < most; i++) {
        const TensorSpec *t = &model->tensors[i / 3];
        const SliceRect s = share(r, t);
        if (s.n_rows > 0) {
            Weft__V1__TrainPlace *place = &places[m.n_places];
            Weft__V1__TrainRect *rect = &rects[m.n_places];
            weft__v1__train_place__init(place);
            weft__v1__train_rect__init(rect);
            place->tensor = g_strdup_printf("%s/%s", kinds[i % 3], t->name);
            place->rect = rect;
            rect->row0 = s.row0;
            rect->n_rows = s.n_rows;
            rect->n_cols = s.n_cols;
            g_ptr_array_add(names, place->tensor);
            pointers[m.n_places++] = place;
        }
    }
    m.step = step;
    m.places = pointers;
    r->step = step;
    r->tensor = 0;
    r->offset = 0;
    return say(r, WEFT__V1__TRAIN_REPORT__REPORT_BEGIN, &m, error);
}

/* The next floats; floats: how many at most. */
static bool send(Rank *r, uint64_t floats, GError **error)
{
    static float content[(TRAIN_SAVING_WINDOW / sizeof(float)) + 1];
    const TensorSpec *t = &r->w->model->tensors[r->tensor / 3];
    const SliceRect s = share(r, t);
    const uint64_t total = (uint64_t)s.n_rows * s.n_cols, n = MIN(total - r->offset, floats);
    g_autofree char *name = g_strdup_printf("%s/%s", kinds[r->tensor % 3], t->name);
    Weft__V1__TrainPiece m = WEFT__V1__TRAIN_PIECE__INIT;
    m.step = r->step;
    m.tensor = name;
    m.offset = r->offset;
    m.data = (ProtobufCBinaryData){n * sizeof *content, (uint8_t *)(void *)content};
    r->offset += n;
    r->on_way += m.data.len;
    if (r->offset == total) {
        r->tensor++;
        r->offset = 0;
    }
    return say(r, WEFT__V1__TRAIN_REPORT__REPORT_PIECE, &m, error);
}

/* What the window has room for; true: the part has been sent. */
static bool send_some(Rank *r)
{
    const ModelSpec *model = r->w->model;
    while (r->tensor < 3 * model->n_tensors) {
        const SliceRect s = share(r, &model->tensors[r->tensor / 3]);
        const uint64_t left = (uint64_t)s.n_rows * s.n_cols - r->offset;
        if (s.n_rows == 0) {
            r->tensor++;
        } else if (r->on_way + MIN(left, PIECE_FLOATS) * sizeof(float) > TRAIN_SAVING_WINDOW) {
            return false;
        } else {
            assert_true(send(r, PIECE_FLOATS, NULL));
        }
    }
    return true;
}

static bool end(Rank *r, uint8_t digest, GError **error)
{
    uint8_t bytes[16] = {digest};
    Weft__V1__TrainPart m = WEFT__V1__TRAIN_PART__INIT;
    Weft__V1__TrainState state = WEFT__V1__TRAIN_STATE__INIT;
    state.updates = r->step;
    state.scale = 0x1p12f;
    state.good = 3;
    state.hysteresis = -1;
    m.step = r->step;
    m.samples = 8 * r->step;
    m.state = &state;
    m.digest = (ProtobufCBinaryData){sizeof bytes, bytes};
    return say(r, WEFT__V1__TRAIN_REPORT__REPORT_PART, &m, error);
}

static void send_part(Rank *r, uint64_t step, uint8_t digest)
{
    assert_true(begin(r, step, NULL));
    while (!send_some(r)) {
        world_run(r->w);
    }
    assert_true(end(r, digest, NULL));
}

static bool there_is(const World *w, const char *name)
{
    g_autofree char *path = g_build_filename(w->directory, name, NULL);
    return g_file_test(path, G_FILE_TEST_EXISTS);
}

/* ---- tests ---- */

/* A checkpoint of 38 MB goes through windows of 4 MiB a rank, and is whole. */
static void memory_is_bounded(void **state)
{
    World w;
    world_open(&w, 49000, checkpoint_disk());
    const uint64_t bytes = 12 * model_spec_parameters(w.model);
    assert_true(bytes > 4 * RANKS * TRAIN_SAVING_WINDOW);
    assert_true(begin(&w.ranks[0], 7, NULL) && begin(&w.ranks[1], 7, NULL));
    for (bool all = false; !all; world_run(&w)) {
        const bool first = send_some(&w.ranks[0]), second = send_some(&w.ranks[1]);
        all = first && second;
    }
    assert_true(end(&w.ranks[0], 1, NULL) && end(&w.ranks[1], 1, NULL));
    assert_false(train_saving_is_idle(w.saving));
    world_run(&w);
    assert_true(train_saving_is_idle(w.saving));
    assert_int_equal(w.n_saved, 1);
    assert_true(train_saving_most_bytes(w.saving) > TRAIN_SAVING_WINDOW);
    assert_true(train_saving_most_bytes(w.saving) <= RANKS * TRAIN_SAVING_WINDOW);
    g_autoptr(Checkpoint) c = checkpoint_open_newest(w.directory, NULL, NULL, NULL);
    assert_non_null(c);
    const CheckpointState *s = checkpoint_state(c);
    assert_true(s->step == 7 && s->samples == 56 && s->updates == 7 && s->loss_scale == 4096.0);
    assert_true(s->scale_growth == 3 && s->scale_hysteresis == -1);
    g_autofree char *tokenizer = g_build_filename(checkpoint_path(c), "tokenizer.json", NULL);
    assert_true(g_file_test(tokenizer, G_FILE_TEST_EXISTS));
    world_close(&w);
}

/* A rank may be a checkpoint ahead, not two. */
static void next_part_may_come_early(void **state)
{
    World w;
    world_open(&w, 40, checkpoint_disk());
    send_part(&w.ranks[0], 5, 1);
    send_part(&w.ranks[0], 10, 2);
    world_run(&w);
    g_autoptr(GError) error = NULL;
    assert_false(begin(&w.ranks[0], 15, &error));
    assert_int_equal(error->code, WEFT_ERROR_PROTOCOL);
    assert_int_equal(w.n_saved, 0);
    send_part(&w.ranks[1], 5, 1);
    world_run(&w);
    assert_int_equal(w.saved_step, 5);
    send_part(&w.ranks[1], 10, 2);
    world_run(&w);
    assert_int_equal(w.saved_step, 10);
    assert_int_equal(w.n_saved, 2);
    world_close(&w);
}

static void other_weights_are_not_saved(void **state)
{
    World w;
    world_open(&w, 40, checkpoint_disk());
    send_part(&w.ranks[0], 5, 1);
    send_part(&w.ranks[1], 5, 2);
    world_run(&w);
    assert_true(w.n_failed == 1 && w.n_saved == 0);
    assert_false(there_is(&w, "step-0000000005") || there_is(&w, ".step-0000000005"));
    send_part(&w.ranks[0], 10, 3);
    send_part(&w.ranks[1], 11, 3);
    world_run(&w);
    assert_true(w.n_failed == 2 && w.n_saved == 0);
    assert_false(there_is(&w, ".step-0000000010") || there_is(&w, ".step-0000000011"));
    world_close(&w);
}

/* The ranks leave: what came whole is saved, what did not leaves nothing. */
static void ranks_may_leave(void **state)
{
    World w;
    world_open(&w, 40, checkpoint_disk());
    send_part(&w.ranks[0], 5, 1);
    send_part(&w.ranks[1], 5, 1);
    assert_true(begin(&w.ranks[0], 10, NULL));
    train_saving_close(w.saving);
    world_run(&w);
    assert_true(w.closed && w.n_saved == 1 && w.saved_step == 5);
    assert_false(there_is(&w, ".step-0000000010"));
    world_close(&w);
    world_open(&w, 40, checkpoint_disk());
    send_part(&w.ranks[0], 5, 1);
    assert_true(begin(&w.ranks[1], 5, NULL));
    world_run(&w);
    assert_true(there_is(&w, ".step-0000000005"));
    train_saving_close(w.saving);
    world_run(&w);
    assert_true(w.closed && w.n_saved == 0);
    assert_false(there_is(&w, ".step-0000000005"));
    world_close(&w);
}

/* What does not fit is removed at once and said at the end; the ranks are heard on. */
static void disk_may_be_full(void **state)
{
    World w;
    SmallDisk small = {{small_write, small_sync}, 100000};
    world_open(&w, 400, &small.disk);
    assert_true(begin(&w.ranks[0], 5, NULL) && begin(&w.ranks[1], 5, NULL));
    assert_true(send_some(&w.ranks[0]));
    world_run(&w);
    assert_true(small.room < 0);
    assert_false(there_is(&w, ".step-0000000005"));
    assert_int_equal(w.n_failed, 0);
    small.room = INT64_MAX;
    assert_true(send_some(&w.ranks[1]));
    world_run(&w);
    assert_true(w.ranks[0].on_way == 0 && w.ranks[1].on_way == 0);
    assert_true(end(&w.ranks[0], 1, NULL) && end(&w.ranks[1], 1, NULL));
    world_run(&w);
    assert_int_equal(w.n_failed, 1);
    assert_false(there_is(&w, ".step-0000000005"));
    send_part(&w.ranks[0], 10, 1);
    send_part(&w.ranks[1], 10, 1);
    world_run(&w);
    assert_int_equal(w.saved_step, 10);
    world_close(&w);
}

/* ---- what is refused ---- */

#define assert_refused(call)                                                                       \
    do {                                                                                           \
        g_autoptr(GError) error = NULL;                                                            \
        assert_false(call);                                                                        \
        assert_int_equal(error->code, WEFT_ERROR_PROTOCOL);                                        \
    } while (0)

static void order_is_kept(void **state)
{
    World w;
    world_open(&w, 49000, checkpoint_disk());
    Rank *r = &w.ranks[0];
    assert_refused(send(r, PIECE_FLOATS, &error)); /* not announced */
    assert_refused(end(r, 1, &error));
    *r = (Rank){.w = &w};
    assert_true(begin(r, 5, NULL));
    assert_refused(begin(r, 5, &error));  /* it has one */
    assert_refused(send(r, 100, &error)); /* too little at a time */
    r->offset = 0;
    r->on_way = 0;
    assert_true(send(r, PIECE_FLOATS, NULL));
    r->offset += 1;
    assert_refused(send(r, PIECE_FLOATS, &error));
    r->offset = PIECE_FLOATS;
    assert_refused(end(r, 1, &error)); /* not whole */
    r->step = 5;
    for (int i = 0; i < 3; i++) { /* nothing is written meanwhile: the window fills up */
        assert_true(send(r, PIECE_FLOATS, NULL));
    }
    assert_refused(send(r, PIECE_FLOATS, &error));
    assert_true(train_saving_most_bytes(w.saving) == TRAIN_SAVING_WINDOW);
    world_close(&w);
}

static void places_lie_in_the_model(void **state)
{
    ModelSpec *model = model_new(40);
    g_autofree char *name = g_strconcat("weights/", model->tensors[0].name, NULL);
    const uint32_t columns = model->tensors[0].columns;
    const struct {
        const char *tensor;
        SliceRect rect;
    } bad[] = {
        {"weights/none", {8, 32, 0, 16}},
        {model->tensors[0].name, {8, 32, 0, 16}},
        {name, {8, 33, 0, 16}},
        {name, {UINT32_MAX, 2, 0, 16}},
        {name, {0, 1, 1, columns}},
        {name, {0, 0, 0, 16}},
        {name, {0, 1, 0, 0}},
    };
    for (size_t i = 0; i <= G_N_ELEMENTS(bad); i++) {
        Weft__V1__TrainPartBegin m = WEFT__V1__TRAIN_PART_BEGIN__INIT;
        Weft__V1__TrainPlace place = WEFT__V1__TRAIN_PLACE__INIT, *places = &place;
        Weft__V1__TrainRect rect = WEFT__V1__TRAIN_RECT__INIT;
        const SliceRect *r = &bad[MIN(i, G_N_ELEMENTS(bad) - 1)].rect;
        rect.row0 = r->row0;
        rect.n_rows = r->n_rows;
        rect.col0 = r->col0;
        rect.n_cols = r->n_cols;
        place.tensor = (char *)bad[MIN(i, G_N_ELEMENTS(bad) - 1)].tensor;
        place.rect = i < G_N_ELEMENTS(bad) ? &rect : NULL;
        m.places = &places;
        m.n_places = 1;
        assert_refused(train_part_new(model, &m, &error) != NULL);
    }
    model_spec_free(model);
}

int main(void)
{
    if (g_access("/dev/shm", W_OK) == 0) {
        g_setenv("TMPDIR", "/dev/shm", FALSE); /* fsync costs nothing */
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_is_bounded),
        cmocka_unit_test(next_part_may_come_early),
        cmocka_unit_test(other_weights_are_not_saved),
        cmocka_unit_test(ranks_may_leave),
        cmocka_unit_test(disk_may_be_full),
        cmocka_unit_test(order_is_kept),
        cmocka_unit_test(places_lie_in_the_model),
    };
    return cmocka_run_group_tests_name("coordinator-train_saving", tests, NULL, NULL);
}
