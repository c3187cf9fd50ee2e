/* Reading of tests/golden/text: lines of fields separated by one space, texts as hex. */
#pragma once

#include <glib.h>
#include <stdint.h>
#include <string.h>

static inline GBytes *golden_hex(const char *hex, size_t length)
{
    g_assert(length % 2 == 0);
    guint8 *bytes = g_malloc(length / 2 + 1);
    for (size_t i = 0; i < length / 2; i++) {
        bytes[i] =
            (guint8)(g_ascii_xdigit_value(hex[2 * i]) * 16 + g_ascii_xdigit_value(hex[2 * i + 1]));
    }
    return g_bytes_new_take(bytes, length / 2);
}

/* The whole file; the test fails if it is not there. */
static inline char *golden_read(const char *name)
{
    g_autofree char *path = g_build_filename(GOLDEN_DIR, name, NULL);
    char *text = NULL;
    g_autoptr(GError) error = NULL;
    if (!g_file_get_contents(path, &text, NULL, &error)) {
        g_error("%s", error->message);
    }
    return text;
}

/* Space-separated decimal numbers. */
static inline GArray *golden_numbers(const char *text)
{
    GArray *numbers = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    while (*text != '\0') {
        char *end;
        uint32_t value = (uint32_t)strtoul(text, &end, 10);
        g_assert(end != text);
        g_array_append_val(numbers, value);
        text = *end == ' ' ? end + 1 : end;
    }
    return numbers;
}
