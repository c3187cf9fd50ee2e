/* proto/base: errors and their round trip over gRPC statuses, checked memory, byte reader, hash,
 * units, random, log, fail points. */
#include "proto/base/bytes.h"
#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/base/failpoint.h"
#include "proto/base/hash.h"
#include "proto/base/log.h"
#include "proto/base/random.h"
#include "proto/base/units.h"

#include <fcntl.h>
#include <glib/gstdio.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- errors -----------------------------------------------------------------------------------
 */

static const struct {
    WeftErrorCode code;
    WeftErrorGroup group;
    int exit_code;
} codes[] = {
    {WEFT_ERROR_INVALID, WEFT_GROUP_REQUEST, 2},
    {WEFT_ERROR_IMPOSSIBLE, WEFT_GROUP_REQUEST, 2},
    {WEFT_ERROR_NOT_FOUND, WEFT_GROUP_REQUEST, 3},
    {WEFT_ERROR_DENIED, WEFT_GROUP_REQUEST, 6},
    {WEFT_ERROR_DEADLINE, WEFT_GROUP_REQUEST, 7},
    {WEFT_ERROR_CANCELLED, WEFT_GROUP_REQUEST, 130},
    {WEFT_ERROR_UNREACHABLE, WEFT_GROUP_PEER, 5},
    {WEFT_ERROR_PROTOCOL, WEFT_GROUP_PEER, 1},
    {WEFT_ERROR_VERSION, WEFT_GROUP_PEER, 1},
    {WEFT_ERROR_STALE, WEFT_GROUP_PEER, 1},
    {WEFT_ERROR_WORKER_LOST, WEFT_GROUP_WORKER, 1},
    {WEFT_ERROR_NOT_READY, WEFT_GROUP_WORKER, 4},
    {WEFT_ERROR_MEMORY, WEFT_GROUP_WORKER, 1},
    {WEFT_ERROR_IO, WEFT_GROUP_WORKER, 1},
    {WEFT_ERROR_NUMERICS, WEFT_GROUP_WORKER, 1},
    {WEFT_ERROR_FAILED, WEFT_GROUP_JOB, 1},
    {WEFT_ERROR_PEER_UNREACHABLE, WEFT_GROUP_PEER, 1},
    {WEFT_ERROR_FULL, WEFT_GROUP_REQUEST, 4},
    {WEFT_ERROR_TOO_LONG, WEFT_GROUP_REQUEST, 2},
};

static void *ask_domain(void *go)
{
    while (!atomic_load((atomic_bool *)go)) {
    }
    return GUINT_TO_POINTER(WEFT_ERROR);
}

/* Before anybody else asks. That they do not race, ThreadSanitizer says. */
static void test_domain_of_many_threads(void **state)
{
    pthread_t threads[4];
    atomic_bool go = false;
    for (size_t i = 0; i < G_N_ELEMENTS(threads); i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, ask_domain, &go), 0);
    }
    atomic_store(&go, true);
    for (size_t i = 0; i < G_N_ELEMENTS(threads); i++) {
        void *domain;
        assert_int_equal(pthread_join(threads[i], &domain), 0);
        assert_string_equal(g_quark_to_string(GPOINTER_TO_UINT(domain)), "weft-error-quark");
    }
}

static void test_error_groups_and_exit_codes(void **state)
{
    for (size_t i = 0; i < G_N_ELEMENTS(codes); i++) {
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, codes[i].code, "x");
        assert_int_equal(weft_error_group(error), codes[i].group);
        assert_int_equal(weft_error_exit_code(error), codes[i].exit_code);
    }
    g_autoptr(GError) foreign = g_error_new(G_FILE_ERROR, 100, "x");
    assert_int_equal(weft_error_group(foreign), WEFT_GROUP_JOB);
    assert_int_equal(weft_error_exit_code(foreign), 1);
    g_autoptr(GError) unknown = g_error_new(WEFT_ERROR, 199, "x");
    assert_int_equal(weft_error_exit_code(unknown), 1);
}

static void test_error_survives_a_status(void **state)
{
    for (size_t i = 0; i < G_N_ELEMENTS(codes); i++) {
        g_autofree char *message = NULL;
        g_autoptr(GError) error = g_error_new(WEFT_ERROR, codes[i].code, "what failed: %zu", i);
        int status = weft_error_to_status(error, &message);
        assert_in_range(status, 1, 16);
        g_autoptr(GError) back = weft_error_from_status(status, message);
        assert_true(g_error_matches(back, WEFT_ERROR, codes[i].code));
        assert_string_equal(back->message, error->message);
    }
}

static void assert_status(int status, const char *message, int code)
{
    g_autoptr(GError) error = weft_error_from_status(status, message);
    assert_non_null(error);
    assert_int_equal(error->code, code);
}

static void test_foreign_statuses(void **state)
{
    assert_null(weft_error_from_status(0, "fine"));
    assert_status(3, "bad", WEFT_ERROR_INVALID);
    assert_status(11, "bad", WEFT_ERROR_INVALID);
    assert_status(14, "gone", WEFT_ERROR_UNREACHABLE);
    assert_status(16, "who", WEFT_ERROR_DENIED);
    assert_status(2, NULL, WEFT_ERROR_FAILED);
    assert_status(9, "[weft 20", WEFT_ERROR_IMPOSSIBLE);
    assert_status(9, "[weft 999] no such code", WEFT_ERROR_IMPOSSIBLE);
    assert_status(77, "no such status", WEFT_ERROR_FAILED);
    g_autoptr(GError) error = weft_error_from_status(14, "");
    assert_true(strlen(error->message) > 0);
    g_autoptr(GError) bytes = weft_error_from_status(14, "[weft 303] file \xff is \xc3");
    assert_int_equal(bytes->code, WEFT_ERROR_IO);
    assert_string_equal(bytes->message, "file \xef\xbf\xbd is \xef\xbf\xbd");
}

/* ---- checked ----------------------------------------------------------------------------------
 */

static void test_checked_arithmetic(void **state)
{
    size_t out = 7;
    assert_false(sz_add(SIZE_MAX, 1, &out));
    assert_false(sz_mul(SIZE_MAX / 2 + 1, 2, &out));
    assert_int_equal(out, 7);
    assert_true(sz_add(SIZE_MAX - 1, 1, &out));
    assert_true(out == SIZE_MAX);
    assert_true(sz_mul(1u << 20, 1u << 20, &out));
    assert_true(out == (size_t)1 << 40);
}

static void test_alloc(void **state)
{
    g_autoptr(GError) error = NULL;
    uint8_t *p = weft_alloc(13, 5, "a thing", &error);
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 64, 0);
    for (int i = 0; i < 65; i++) {
        assert_int_equal(p[i], 0);
    }
    weft_free(p);
    p = weft_alloc(0, 8, "nothing", &error);
    assert_non_null(p);
    weft_free(p);
    assert_null(weft_alloc(SIZE_MAX / 4, 8, "a thing", &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY));
    assert_non_null(strstr(error->message, "a thing"));
    g_clear_error(&error);
    assert_null(weft_alloc(SIZE_MAX - 3, 1, "a thing", &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY));
}

static void test_nth_allocation_fails_once(void **state)
{
    weft_alloc_fail_after(2);
    for (int i = 0; i < 5; i++) {
        g_autoptr(GError) error = NULL;
        void *p = i % 2 == 0 ? weft_alloc(1, 1, "it", &error) : weft_map(4096, "it", &error);
        assert_int_equal(p == NULL, i == 2);
        assert_int_equal(error != NULL, i == 2);
        if (i % 2 == 0) {
            weft_free(p);
        } else {
            weft_unmap(p, 4096);
        }
    }
    weft_alloc_fail_after(0);
    weft_alloc_fail_after(-1);
    void *p = weft_alloc(1, 1, "it", NULL);
    assert_non_null(p);
    weft_free(p);
}

static size_t address_space_pages(void)
{
    char text[64] = {0};
    int fd = open("/proc/self/statm", O_RDONLY);
    assert_true(fd >= 0 && read(fd, text, sizeof text - 1) > 0);
    close(fd);
    return strtoul(text, NULL, 10);
}

static void test_map(void **state)
{
    g_autoptr(GError) error = NULL;
    size_t size = (size_t)5 << 20;
    uint8_t *p = weft_map(size, "pages", &error);
    assert_non_null(p);
    assert_int_equal(p[size - 1], 0);
    p[size - 1] = 1;
    weft_unmap(p, size);
    /* large ones begin at a huge page, are whole, and give back what they do not need; untouched
     * they take no memory */
    static const size_t sizes[] = {(size_t)2 << 20, ((size_t)2 << 20) + 1, ((size_t)9 << 20) - 4096,
                                   (size_t)33 << 20};
    uint8_t *maps[G_N_ELEMENTS(sizes)];
    size_t wanted = 0, before = address_space_pages();
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        unsigned char resident[(33 << 20) / 4096];
        const size_t n_pages = (sizes[i] + 4095) / 4096;
        maps[i] = weft_map(sizes[i], "pages", &error);
        assert_non_null(maps[i]);
        assert_int_equal((uintptr_t)maps[i] % ((uintptr_t)2 << 20), 0);
        assert_int_equal(mincore(maps[i], sizes[i], resident), 0); /* all of it is mapped */
        for (size_t k = 0; k < n_pages; k++) {
            assert_int_equal(resident[k] & 1, 0);
        }
        maps[i][0] = maps[i][sizes[i] - 1] = 1;
        wanted += n_pages;
    }
    const size_t taken = address_space_pages() - before;
    assert_true(taken >= wanted && taken < wanted + 64);
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        weft_unmap(maps[i], sizes[i]);
    }
    assert_null(weft_map(SIZE_MAX / 2, "pages", &error));
    assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_MEMORY));
    weft_unmap(NULL, 5);
}

/* ---- bytes ------------------------------------------------------------------------------------
 */

static void test_byte_reader(void **state)
{
    const uint8_t data[] = {1,  2, 3, 4,    5,    6, 7, 8, 9, 10, 11, 12,   13,  14,
                            15, 0, 0, 0x80, 0x3f, 0, 0, 0, 0, 0,  0,  0xf8, 0x3f};
    ByteReader r = byte_reader(data, sizeof data);
    assert_int_equal(byte_reader_u8(&r), 1);
    assert_int_equal(byte_reader_u16le(&r), 0x0302);
    assert_int_equal(byte_reader_u32le(&r), 0x07060504);
    assert_true(byte_reader_u64le(&r) == UINT64_C(0x0f0e0d0c0b0a0908));
    assert_true(byte_reader_f32le(&r) == 1.0f);
    assert_true(byte_reader_f64le(&r) == 1.5);
    assert_false(r.failed);
    assert_int_equal(r.offset, sizeof data);
    assert_int_equal(byte_reader_u8(&r), 0);
    assert_true(r.failed);
}

static void test_byte_reader_stays_failed(void **state)
{
    const uint8_t data[] = {1, 2, 3};
    ByteReader r = byte_reader(data, sizeof data);
    assert_int_equal(byte_reader_u32le(&r), 0);
    assert_true(r.failed);
    assert_int_equal(r.offset, 0);
    assert_int_equal(byte_reader_u8(&r), 0); /* though a byte is there */
    assert_null(byte_reader_take(&r, 0));
    r = byte_reader(data, sizeof data);
    assert_null(byte_reader_take(&r, SIZE_MAX));
}

/* ---- hash -------------------------------------------------------------------------------------
 */

/* XXH3-128 of the empty input and of "abc", published with the algorithm's reference test values
 * (xxhsum -H2). */
static void test_hash_values(void **state)
{
    char hex[33];
    Hash128 h = hash128("", 0);
    hash128_hex(&h, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    h = hash128("abc", 3);
    hash128_hex(&h, hex);
    assert_string_equal(hex, "06b05ab6733a618578af5f94892f3950");
}

static void test_hash_streams(void **state)
{
    uint8_t data[5000];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (uint8_t)(i * 7);
    }
    Hash128 whole = hash128(data, sizeof data);
    for (size_t step = 1; step < sizeof data; step = step * 3 + 1) {
        Hasher *hasher = hasher_new();
        for (size_t at = 0; at < sizeof data; at += step) {
            hasher_update(hasher, data + at, MIN(step, sizeof data - at));
        }
        Hash128 h = hasher_finish(hasher);
        assert_true(hash128_equal(&h, &whole));
        hasher_free(hasher);
    }
    data[4999] ^= 1;
    Hash128 other = hash128(data, sizeof data);
    assert_false(hash128_equal(&other, &whole));
    hasher_free(NULL);
}

/* ---- units ------------------------------------------------------------------------------------
 */

static void test_parse_size(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"8G", 8ull << 30},
        {"8GiB", 8ull << 30},
        {"1.5g", 3ull << 29},
        {"123", 123},
        {"512M", 512ull << 20},
        {"0", 0},
        {"4 kb", 4096},
        {"2t", 2ull << 40},
        {"7b", 7},
        {"18446744073709551615", UINT64_MAX},
        {"9007199254740993", 9007199254740993ull},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(good); i++) {
        uint64_t bytes = 0;
        assert_true(units_parse_size(good[i].text, &bytes, NULL));
        assert_true(bytes == good[i].bytes);
    }
    static const char *const bad[] = {
        "",    "G",   "8X", "-1", "1.2.3G", "1e9", "18446744073709551616", "20000000000G",
        "8G ", "nan", "."};
    for (size_t i = 0; i < G_N_ELEMENTS(bad); i++) {
        g_autoptr(GError) error = NULL;
        uint64_t bytes = 42;
        assert_false(units_parse_size(bad[i], &bytes, &error));
        assert_true(g_error_matches(error, WEFT_ERROR, WEFT_ERROR_INVALID));
        assert_true(bytes == 42);
    }
}

static void test_parse_duration_and_count(void **state)
{
    int64_t us;
    uint64_t n;
    assert_true(units_parse_duration("5s", &us, NULL) && us == 5000000);
    assert_true(units_parse_duration("200ms", &us, NULL) && us == 200000);
    assert_true(units_parse_duration("1h", &us, NULL) && us == 3600000000ll);
    assert_true(units_parse_duration("2m", &us, NULL) && us == 120000000);
    assert_true(units_parse_duration("7d", &us, NULL) && us == 7 * 86400000000ll);
    assert_true(units_parse_duration("0.5", &us, NULL) && us == 500000);
    assert_false(units_parse_duration("5 years", &us, NULL));
    assert_false(units_parse_duration("999999999999d", &us, NULL));
    assert_true(units_parse_count("32k", &n, NULL) && n == 32768);
    assert_true(units_parse_count("8192", &n, NULL) && n == 8192);
    assert_true(units_parse_count("1.5k", &n, NULL) && n == 1536);
    assert_false(units_parse_count("1.5", &n, NULL));
    assert_false(units_parse_count("2.", &n, NULL));
    assert_false(units_parse_count("many", &n, NULL));
    assert_false(units_parse_count(NULL, &n, NULL));
}

static void assert_text(char *text /* taken */, const char *wanted)
{
    assert_string_equal(text, wanted);
    g_free(text);
}

static void test_format(void **state)
{
    assert_text(units_format_size(0), "0 B");
    assert_text(units_format_size(1023), "1023 B");
    assert_text(units_format_size(1024), "1.0 KiB");
    assert_text(units_format_size(1288490189), "1.2 GiB");
    assert_text(units_format_size((1ull << 30) - 1), "1.0 GiB");
    for (uint64_t bytes = 1; bytes != 0; bytes <<= 1) {
        for (int64_t delta = -1; delta <= 1; delta++) {
            g_autofree char *text = units_format_size(bytes + (uint64_t)delta);
            assert_true(strlen(text) <= 8);
        }
    }
    assert_text(units_format_duration(0), "0ms");
    assert_text(units_format_duration(350000), "350ms");
    assert_text(units_format_duration(12000000), "12s");
    assert_text(units_format_duration(192000000), "3m12s");
    assert_text(units_format_duration(7500000000), "2h5m");
    assert_text(units_format_duration(4 * 86400000000ll + 3 * 3600000000ll), "4d3h");
    assert_text(units_format_duration(-12000000), "-12s");
}

/* ---- random -----------------------------------------------------------------------------------
 */

static void test_random_seeded(void **state)
{
    RandomSeeded a, b;
    random_seeded_init(&a, 1234567);
    /* Reference: SplitMix64 from seed 1234567, as published with Vigna's splitmix64.c and Rosetta
     * Code's task. */
    assert_true(random_u64(&a.base) == UINT64_C(6457827717110365317));
    assert_true(random_u64(&a.base) == UINT64_C(3203168211198807973));
    assert_true(random_u64(&a.base) == UINT64_C(9817491932198370423));
    random_seeded_init(&a, 5);
    random_seeded_init(&b, 5);
    uint8_t x[37], y[37];
    random_fill(&a.base, x, sizeof x);
    random_fill(&b.base, y, sizeof y);
    assert_memory_equal(x, y, sizeof x);
}

static void test_random_system(void **state)
{
    uint8_t a[1000] = {0}, b[1000] = {0};
    random_fill(random_system(), a, sizeof a);
    random_fill(random_system(), b, sizeof b);
    assert_memory_not_equal(a, b, sizeof a);
    assert_memory_not_equal(a + 984, (uint8_t[16]){0}, 16);
}

/* ---- log --------------------------------------------------------------------------------------
 */

typedef struct LogCatcher {
    Log base;
    GString *text;
} LogCatcher;

static void catch_line(Log *self, LogLevel level, const char *line)
{
    g_string_append_printf(((LogCatcher *)self)->text, "%d:%s\n", (int)level, line);
}

static void test_log(void **state)
{
    LogCatcher log = {{LOG_LEVEL_INFO, catch_line}, g_string_new(NULL)};
    log_info(NULL, "dropped %d", 1);
    log_debug(&log.base, "below the level");
    log_warn(&log.base, "worker %d lost after %d ms", 7, 3000);
    log_error(&log.base, "a name with\na new line");
    assert_string_equal(log.text->str, "2:worker 7 lost after 3000 ms\n3:a name with a new line\n");
    g_string_free(log.text, TRUE);
    assert_non_null(log_stderr());
}

/* ---- fail points ------------------------------------------------------------------------------
 */

static char *failpoint_file; /* named by the environment that main() sets */

static void test_failpoints(void **state)
{
#ifdef WEFT_FAILPOINTS
    int64_t arg = 9;
    assert_false(failpoint("nothing", &arg));
    assert_int_equal(arg, 0);
    assert_true(failpoint("plain", NULL));
    assert_true(failpoint("number", &arg));
    assert_int_equal(arg, -17);
    assert_false(failpoint("switched", NULL));
    assert_true(g_file_set_contents(failpoint_file, "", 0, NULL));
    assert_true(failpoint("switched", NULL));
    g_unlink(failpoint_file);
    assert_false(failpoint("switched", NULL));
    failpoint_set("set", true, 5);
    assert_true(failpoint("set", &arg));
    assert_int_equal(arg, 5);
    failpoint_set("set", false, 0);
    assert_false(failpoint("set", NULL));
    failpoint_set("number", false, 0);
    assert_false(failpoint("number", NULL));
#else
    skip();
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_domain_of_many_threads),
        cmocka_unit_test(test_error_groups_and_exit_codes),
        cmocka_unit_test(test_error_survives_a_status),
        cmocka_unit_test(test_foreign_statuses),
        cmocka_unit_test(test_checked_arithmetic),
        cmocka_unit_test(test_alloc),
        cmocka_unit_test(test_nth_allocation_fails_once),
        cmocka_unit_test(test_map),
        cmocka_unit_test(test_byte_reader),
        cmocka_unit_test(test_byte_reader_stays_failed),
        cmocka_unit_test(test_hash_values),
        cmocka_unit_test(test_hash_streams),
        cmocka_unit_test(test_parse_size),
        cmocka_unit_test(test_parse_duration_and_count),
        cmocka_unit_test(test_format),
        cmocka_unit_test(test_random_seeded),
        cmocka_unit_test(test_random_system),
        cmocka_unit_test(test_log),
        cmocka_unit_test(test_failpoints),
    };
    g_autofree char *directory = g_dir_make_tmp("weft-base-XXXXXX", NULL);
    failpoint_file = g_build_filename(directory, "switch", NULL);
    g_autofree char *points = g_strdup_printf("plain,number=-17,switched=file:%s", failpoint_file);
    g_setenv("WEFT_FAILPOINT", points, TRUE);
    int failed = cmocka_run_group_tests_name("base", tests, NULL, NULL);
    g_rmdir(directory);
    g_free(failpoint_file);
    return failed;
}
