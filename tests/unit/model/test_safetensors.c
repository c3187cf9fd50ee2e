/* Safetensors: what a file says is what is read; every way in which a header can lie is refused;
 * what is written reads as the same tensors. */
#include "proto/base/error.h"
#include "proto/model/safetensors.h"

#include <glib/gstdio.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

/* A file of this header and n bytes of data; returned. */
static GByteArray *file_of(const char *header, size_t n_data)
{
    GByteArray *file = g_byte_array_new();
    const uint64_t length = GUINT64_TO_LE((uint64_t)strlen(header));
    g_byte_array_append(file, (const guint8 *)&length, sizeof length);
    g_byte_array_append(file, (const guint8 *)header, (guint)strlen(header));
    for (size_t i = 0; i < n_data; i++) {
        const guint8 byte = (guint8)i;
        g_byte_array_append(file, &byte, 1);
    }
    return file;
}

static void test_reads(void **state)
{
    g_autoptr(GByteArray) file =
        file_of("{\"b\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_offsets\":[8,20]},"
                "\"__metadata__\":{\"format\":\"pt\"},"
                "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                "\"mask\":{\"dtype\":\"BOOL\",\"shape\":[1,1,2,2],\"data_offsets\":[20,24]},"
                "\"none\":{\"dtype\":\"BF16\",\"shape\":[0,7],\"data_offsets\":[20,20]},"
                "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[24,32]}}   ",
                32);
    g_autoptr(GError) error = NULL;
    g_autoptr(Safetensors) s = safetensors_parse(file->data, file->len, &error);
    assert_non_null(s);
    assert_int_equal(safetensors_n(s), 5);
    assert_string_equal(safetensors_at(s, 0)->name, "a");
    const SafetensorsTensor *b = safetensors_find(s, "b");
    assert_int_equal(b->type, DTYPE_F16);
    assert_int_equal(b->n_dims, 2);
    assert_int_equal(b->dims[1], 3);
    assert_int_equal(b->data[0], 8);
    assert_int_equal(safetensors_find(s, "mask")->type, DTYPE_LIMIT);
    assert_int_equal(safetensors_find(s, "none")->size_bytes, 0);
    assert_int_equal(safetensors_find(s, "scalar")->size_bytes, 8);
    assert_null(safetensors_find(s, "c"));
}

#define A(dtype, shape, offsets)                                                                   \
    "{\"a\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void test_refuses(void **state)
{
    static const char *const headers[][2] = {
        {"", "does not begin with '{'"},
        {" {}", "does not begin with '{'"},
        {"[]", "does not begin with '{'"},
        {"{", "no JSON object"},
        {"{\"a\":1}", "is not described"},
        {"{\"__metadata__\":{\"k\":1}}", "is no text"},
        {"{\"__metadata__\":[]}", "__metadata__ is no object"},
        {A("\"F31\"", "[2]", "[0,8]"), "unknown type 'F31'"},
        {A("7", "[2]", "[0,8]"), "unknown type 'none'"},
        {A("\"F32\"", "[3]", "[0,8]"), "its shape takes 12 bytes"},
        {A("\"F32\"", "[-2]", "[0,8]"), "no count that fits"},
        {A("\"F32\"", "[2.0]", "[0,8]"), "no count that fits"},
        {A("\"F32\"", "[4294967296,4294967296,4]", "[0,8]"), "no count that fits"},
        {A("\"F32\"", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), "at most 8 dimensions"},
        {A("\"F32\"", "{}", "[0,8]"), "no shape"},
        {A("\"F32\"", "[2]", "[0]"), "no two data_offsets"},
        {A("\"F32\"", "[2]", "[8,0]"), "lies at 8 to 0"},
        {A("\"F32\"", "[2]", "[4,12]"), "lies at 4 to 12"},
        {A("\"F32\"", "[2]", "[9223372036854775800,9223372036854775807]"), "lies at"},
        {A("\"F32\"", "[1]", "[0,4]"), "the tensors end at 4, the data at 8"},
        {A("\"F32\"", "[1]", "[4,8]"), "begins at 4, not behind"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
         "no JSON object"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         "begins at"},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(headers); i++) {
        g_autoptr(GByteArray) file = file_of(headers[i][0], 8);
        g_autoptr(GError) error = NULL;
        assert_null(safetensors_parse(file->data, file->len, &error));
        assert_int_equal(error->code, WEFT_ERROR_INVALID);
        if (strstr(error->message, headers[i][1]) == NULL) {
            fail_msg("%s gives: %s", headers[i][0], error->message);
        }
    }
    static const uint8_t lengths[][9] = {
        {0}, {1}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, {2, 0, 0, 0, 0, 0, 0, 0, '{'}};
    for (size_t i = 0; i < G_N_ELEMENTS(lengths); i++) {
        for (size_t size = 0; size <= 9; size++) {
            assert_null(safetensors_parse(lengths[i], size, NULL));
        }
    }
}

static void test_written_reads(void **state)
{
    const SafetensorsEntry entries[] = {{"z", DTYPE_F32, 2, {3, 5}},
                                        {"a \"quoted\"", DTYPE_BF16, 1, {7}},
                                        {"m", DTYPE_F16, 3, {2, 1, 4}}};
    const char *const metadata[] = {"format", "pt", NULL};
    g_autoptr(GError) error = NULL;
    g_autoptr(GBytes) header = safetensors_header(entries, 3, metadata, &error);
    assert_non_null(header);
    assert_int_equal(g_bytes_get_size(header) % 64, 0);
    const char *json = (const char *)g_bytes_get_data(header, NULL) + sizeof(uint64_t);
    assert_non_null(g_strstr_len(json, (gssize)(g_bytes_get_size(header) - sizeof(uint64_t)),
                                 "\"__metadata__\":{\"format\":\"pt\"}"));
    g_autoptr(GByteArray) file = g_byte_array_new();
    g_byte_array_append(file, g_bytes_get_data(header, NULL), (guint)g_bytes_get_size(header));
    guint8 data[60 + 14 + 16];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (guint8)i;
    }
    g_byte_array_append(file, data, sizeof data);
    g_autofree char *path = NULL;
    const int fd = g_file_open_tmp("weft-safetensors-XXXXXX", &path, NULL);
    assert_true(g_close(fd, NULL));
    assert_true(g_file_set_contents(path, (const char *)file->data, (gssize)file->len, NULL));
    g_autoptr(Safetensors) s = safetensors_open(path, &error);
    assert_non_null(s);
    assert_int_equal(safetensors_n(s), 3);
    assert_int_equal(safetensors_find(s, "a \"quoted\"")->data[0], 60);
    assert_int_equal(safetensors_find(s, "m")->dims[2], 4);
    g_unlink(path);
    const SafetensorsEntry large = {"x", DTYPE_F32, 2, {UINT64_C(1) << 40, UINT64_C(1) << 40}};
    assert_null(safetensors_header(&large, 1, NULL, NULL));
    assert_null(safetensors_open("/nonexistent/x.safetensors", &error));
    assert_int_equal(error->code, WEFT_ERROR_NOT_FOUND);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_reads), cmocka_unit_test(test_refuses),
                                       cmocka_unit_test(test_written_reads)};
    return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
