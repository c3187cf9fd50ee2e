/* Files of logits, whole, damaged and of something else; divergences that are known. */
#include "tools/weft/divergence.h"
#include "tools/weft/logits_file.h"

#include "proto/base/error.h"
#include "tests/unit/remove_tree.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>
#include <glib/gstdio.h>
#include <fcntl.h>
#include <math.h>
#include <unistd.h>

enum { VOCAB = 37, WINDOW = 9, N_WINDOWS = 3, PER_WINDOW = 5, N_ROWS = N_WINDOWS * PER_WINDOW };

typedef struct Fixture {
    char *directory, *path;
    LogitsKind kind;
    float rows[N_ROWS][VOCAB];
} Fixture;

static int set_up(void **state)
{
    Fixture *f = g_new0(Fixture, 1);
    g_autoptr(GRand) rand = g_rand_new_with_seed(7);
    f->directory = g_dir_make_tmp("weft-logits-XXXXXX", NULL);
    f->path = g_build_filename(f->directory, "a.logits", NULL);
    f->kind = (LogitsKind){.vocab_size = VOCAB,
                           .window = WINDOW,
                           .n_windows = N_WINDOWS,
                           .numerics = NUMERICS_FAST,
                           .text = hash128("text", 4),
                           .vocabulary = hash128("vocabulary", 10),
                           .windows = hash128("windows", 7),
                           .definition = hash128("definition", 10),
                           .model = "model.gguf"};
    for (unsigned i = 0; i < N_ROWS * VOCAB; i++) {
        f->rows[i / VOCAB][i % VOCAB] = (float)g_rand_double_range(rand, -20, 20);
    }
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    Fixture *f = *state;
    remove_tree(f->directory);
    g_free(f->directory);
    g_free(f->path);
    g_free(f);
    return 0;
}

static void write_file(Fixture *f)
{
    g_autoptr(GError) error = NULL;
    LogitsWriter *w = logits_writer_new(f->path, &f->kind, &error);
    g_assert_no_error(error);
    for (unsigned i = 0; i < N_ROWS; i++) {
        const unsigned row = i * 7 % N_ROWS; /* any order */
        assert_true(logits_writer_put(w, row, f->rows[row], &error));
    }
    assert_true(logits_writer_finish(w, &error));
    logits_writer_free(w);
}

static unsigned n_files(const Fixture *f)
{
    GDir *directory = g_dir_open(f->directory, 0, NULL);
    unsigned n = 0;
    while (g_dir_read_name(directory) != NULL) {
        n++;
    }
    g_dir_close(directory);
    return n;
}

static void assert_kind(const LogitsKind *a, const LogitsKind *b)
{
    assert_int_equal(a->vocab_size, b->vocab_size);
    assert_int_equal(a->window, b->window);
    assert_int_equal(a->n_windows, b->n_windows);
    assert_int_equal(a->numerics, b->numerics);
    assert_true(
        hash128_equal(&a->text, &b->text) && hash128_equal(&a->vocabulary, &b->vocabulary) &&
        hash128_equal(&a->windows, &b->windows) && hash128_equal(&a->definition, &b->definition));
    assert_string_equal(a->model, b->model);
}

static void test_round_trip(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    float row[VOCAB];
    write_file(f);
    assert_int_equal(n_files(f), 1);
    LogitsReader *r = logits_reader_new(f->path, &error);
    g_assert_no_error(error);
    assert_kind(logits_reader_kind(r), &f->kind);
    for (unsigned i = N_ROWS; i-- > 0;) {
        assert_true(logits_reader_row(r, i, row, &error));
        assert_memory_equal(row, f->rows[i], sizeof row);
    }
    assert_true(logits_reader_fits_text(r, &f->kind.text, WINDOW, &error));
    assert_true(logits_reader_fits(r, &f->kind, &error));
    logits_reader_free(r);
}

static void assert_error(GError **error, int code, const char *text)
{
    assert_non_null(*error);
    assert_int_equal((*error)->code, code);
    if (strstr((*error)->message, text) == NULL) {
        fail_msg("'%s' has no '%s'", (*error)->message, text);
    }
    assert_null(strchr((*error)->message, '\n'));
    g_clear_error(error);
}

/* What opens and reads all of a file says, or nothing. */
static bool reads(const char *path, GError **error)
{
    float row[VOCAB];
    LogitsReader *r = logits_reader_new(path, error);
    bool ok = r != NULL;
    for (unsigned i = 0; ok && i < N_ROWS; i++) {
        ok = logits_reader_row(r, i, row, error);
    }
    logits_reader_free(r);
    return ok;
}

/* Every byte counts, and so does each that is missing. */
static void test_damage(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    g_autofree char *bytes = NULL;
    size_t size;
    write_file(f);
    assert_true(g_file_get_contents(f->path, &bytes, &size, NULL));
    assert_int_equal(size, logits_kind_bytes(&f->kind));
    for (size_t i = 0; i < size; i++) {
        bytes[i] ^= 0x10;
        assert_true(g_file_set_contents(f->path, bytes, (gssize)size, NULL));
        assert_false(reads(f->path, &error));
        assert_error(&error, WEFT_ERROR_INVALID, f->path);
        bytes[i] ^= 0x10;
    }
    for (size_t i = 0; i < size; i += i < 300 ? 1 : 97) {
        assert_true(g_file_set_contents(f->path, bytes, (gssize)i, NULL));
        assert_false(reads(f->path, &error));
        assert_error(&error, WEFT_ERROR_INVALID, f->path);
    }
    g_autofree char *longer = g_malloc0(size + 1);
    memcpy(longer, bytes, size);
    assert_true(g_file_set_contents(f->path, longer, (gssize)size + 1, NULL));
    assert_false(reads(f->path, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "where its header wants");
}

/* Headers that are whole and cannot be: their sizes are never believed. */
static void test_impossible_sizes(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    const struct {
        size_t at;
        uint32_t value;
        const char *says;
    } cases[] = {
        {8, 2, "version 2"},
        {12, 0, "vocabulary 0"},
        {12, UINT32_MAX, "vocabulary"},
        {16, 1, "windows of 1"},
        {16, UINT32_MAX, "windows"},
        {20, 0, "0 windows"},
        {20, UINT32_MAX, "windows"},
        {20, 1u << 24, "where its header wants"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *bytes = NULL;
        size_t size;
        write_file(f);
        assert_true(g_file_get_contents(f->path, &bytes, &size, NULL));
        memcpy(bytes + cases[i].at, &cases[i].value, 4);
        const Hash128 hash = hash128(bytes, 240);
        memcpy(bytes + 240, hash.bytes, 16);
        assert_true(g_file_set_contents(f->path, bytes, (gssize)size, NULL));
        assert_false(reads(f->path, &error));
        assert_error(&error, WEFT_ERROR_INVALID, cases[i].says);
    }
}

static void test_not_of_this(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    write_file(f);
    LogitsReader *r = logits_reader_new(f->path, &error);
    const Hash128 other = hash128("other", 5);
    assert_false(logits_reader_fits_text(r, &other, WINDOW, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "another text");
    assert_false(logits_reader_fits_text(r, &f->kind.text, 8, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "give --ctx 9");
    LogitsKind kind = f->kind;
    kind.vocabulary = other;
    assert_false(logits_reader_fits(r, &kind, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "another vocabulary");
    kind = f->kind;
    kind.vocab_size++;
    assert_false(logits_reader_fits(r, &kind, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "37 ids, this model has 38");
    kind = f->kind;
    kind.windows = other;
    assert_false(logits_reader_fits(r, &kind, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "other tokens");
    kind = f->kind;
    kind.numerics = NUMERICS_EXACT; /* those are what is compared */
    kind.definition = other;
    assert_true(logits_reader_fits(r, &kind, &error));
    logits_reader_free(r);
    assert_null(logits_reader_new("/none/such", &error));
    assert_error(&error, WEFT_ERROR_NOT_FOUND, "/none/such");
    assert_null(logits_reader_new(f->directory, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "no file of logits");
}

/* Until it is finished nothing is there; what was there stays. */
static void test_unfinished(void **state)
{
    Fixture *f = *state;
    g_autoptr(GError) error = NULL;
    LogitsWriter *w = logits_writer_new(f->path, &f->kind, &error);
    assert_non_null(w);
    assert_true(logits_writer_put(w, 0, f->rows[0], &error));
    const int nameless = open(f->directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (nameless >= 0) { /* offered there: who is killed now leaves nothing */
        close(nameless);
        assert_int_equal(n_files(f), 0);
    }
    logits_writer_free(w);
    assert_int_equal(n_files(f), 0);
    write_file(f);
    assert_int_equal(n_files(f), 1);
    w = logits_writer_new(f->path, &f->kind, &error);
    logits_writer_free(w);
    assert_int_equal(n_files(f), 1);
    assert_true(reads(f->path, &error));
    LogitsKind huge = f->kind; /* 2^43 rows of 2^26 bytes */
    huge.vocab_size = 1 << 24;
    huge.window = 1 << 20;
    huge.n_windows = 1 << 24;
    assert_null(logits_writer_new(f->path, &huge, &error));
    assert_error(&error, WEFT_ERROR_IO, "are free there");
    assert_int_equal(n_files(f), 1);
    assert_null(logits_writer_new("/none/such", &f->kind, &error));
    assert_error(&error, WEFT_ERROR_IO, "/none/such");
    assert_null(logits_writer_new("/dev/null", &f->kind, &error));
    assert_error(&error, WEFT_ERROR_INVALID, "no regular file");
    assert_int_equal(access("/dev/null.XXXXXX", F_OK), -1);
}

/* ---- divergence ---- */

static void assert_near(double got, double want)
{
    if (!(fabs(got - want) <= 1e-12 * fmax(1, fabs(want)))) {
        fail_msg("%.17g where %.17g is due", got, want);
    }
}

static DivergenceSummary summary_of(Divergence *d)
{
    DivergenceSummary out;
    divergence_summary(d, &out);
    divergence_free(d);
    return out;
}

/* Two outcomes, one row: worked out by hand. */
static void test_known_divergence(void **state)
{
    const float even[2] = {3, 3}, three_to_one[2] = {(float)log(3), 0};
    const double q = exp((double)three_to_one[0]) / (1 + exp((double)three_to_one[0]));
    Divergence *d = divergence_new(1, 2);
    assert_true(divergence_add(d, 0, even, three_to_one, 1));
    const DivergenceSummary s = summary_of(d);
    assert_near(s.kl_mean, 0.5 * log(0.5 / q) + 0.5 * log(0.5 / (1 - q)));
    assert_near(s.kl_median, s.kl_mean);
    assert_near(s.kl_max, s.kl_mean);
    assert_near(s.kl_standard_error, 0);
    assert_near(s.same_top, 1); /* of equals the first */
    assert_near(s.reference_perplexity, 2);
    assert_near(s.perplexity_ratio, 0.5 / (1 - q));
}

/* Rows whose divergences are known, so that what is said of all of them is, too. */
static void test_known_summary(void **state)
{
    enum { N = 101 };
    double sum = 0, squares = 0, kl[N];
    Divergence *d = divergence_new(N, 2);
    const float even[2] = {0, 0};
    for (unsigned i = 0; i < N; i++) {
        const unsigned row = i * 37 % N;
        const float other[2] = {0, (float)row / 8};
        const double z = (double)other[1];
        kl[row] = log1p(exp(z)) - z / 2 - log(2); /* grows with the row */
        assert_true(divergence_add(d, row, even, other, 0));
    }
    for (unsigned i = 0; i < N; i++) {
        sum += kl[i];
    }
    for (unsigned i = 0; i < N; i++) {
        squares += pow(kl[i] - sum / N, 2);
    }
    const DivergenceSummary s = summary_of(d);
    assert_near(s.kl_mean, sum / N);
    assert_near(s.kl_standard_error, sqrt(squares / (N - 1)) / sqrt(N));
    assert_near(s.kl_median, kl[50]);
    assert_near(s.kl_p99, kl[99]);
    assert_near(s.kl_max, kl[100]);
    assert_near(s.same_top, 1.0 / N);
}

static void test_equal_rows(void **state)
{
    Fixture *f = *state;
    Divergence *d = divergence_new(N_ROWS, VOCAB);
    for (unsigned i = 0; i < N_ROWS; i++) {
        assert_true(divergence_add(d, i, f->rows[i], f->rows[i], i));
    }
    const DivergenceSummary s = summary_of(d);
    assert_true(s.kl_mean == 0 && s.kl_max == 0 && s.kl_p99 == 0 && s.kl_median == 0 &&
                s.kl_standard_error == 0);
    assert_true(s.same_top == 1 && s.perplexity_ratio == 1);
}

/* The order of rows does not matter, nor a number that is added to all logits. */
static void test_order_and_shift(void **state)
{
    Fixture *f = *state;
    Divergence *d = divergence_new(N_ROWS, VOCAB), *e = divergence_new(N_ROWS, VOCAB);
    for (unsigned i = 0; i < N_ROWS; i++) {
        const unsigned row = i * 4 % N_ROWS;
        assert_true(divergence_add(d, i, f->rows[i], f->rows[(i + 1) % N_ROWS], 3));
        assert_true(divergence_add(e, row, f->rows[row], f->rows[(row + 1) % N_ROWS], 3));
    }
    const DivergenceSummary a = summary_of(d), b = summary_of(e);
    assert_memory_equal(&a, &b, sizeof a);
    float shifted[VOCAB];
    for (unsigned i = 0; i < VOCAB; i++) {
        shifted[i] = roundf(f->rows[0][i] * 16) / 16;
        f->rows[0][i] = shifted[i] + 1024; /* exact */
    }
    d = divergence_new(1, VOCAB);
    assert_true(divergence_add(d, 0, shifted, f->rows[0], 0));
    const DivergenceSummary s = summary_of(d);
    assert_true(s.kl_mean < 1e-12);
    assert_near(s.perplexity_ratio, 1);
}

static void test_not_finite(void **state)
{
    const float good[2] = {1, 2}, nan[2] = {NAN, 0}, inf[2] = {0, INFINITY},
                none[2] = {0, -INFINITY};
    const float *const bad[] = {nan, inf, none};
    for (unsigned i = 0; i < G_N_ELEMENTS(bad); i++) {
        Divergence *d = divergence_new(2, 2);
        assert_false(divergence_add(d, 0, good, bad[i], 0));
        assert_false(divergence_add(d, 1, bad[i], good, 0));
        divergence_free(d);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_round_trip, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_damage, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_impossible_sizes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_not_of_this, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_unfinished, set_up, tear_down),
        cmocka_unit_test(test_known_divergence),
        cmocka_unit_test(test_known_summary),
        cmocka_unit_test_setup_teardown(test_equal_rows, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_order_and_shift, set_up, tear_down),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
