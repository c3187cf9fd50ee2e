#include "coordinator/gateway/openai/json_text.h"

#include "proto/text/utf8.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void put_ascii(GString *out, char c)
{
    switch (c) {
    case '"':
        g_string_append(out, "\\\"");
        break;
    case '\\':
        g_string_append(out, "\\\\");
        break;
    case '\n':
        g_string_append(out, "\\n");
        break;
    case '\r':
        g_string_append(out, "\\r");
        break;
    case '\t':
        g_string_append(out, "\\t");
        break;
    default:
        if ((unsigned char)c < ' ' || c == 0x7f) {
            g_string_append_printf(out, "\\u%04x", (unsigned)(unsigned char)c);
        } else {
            g_string_append_c(out, c);
        }
    }
}

void json_text_bytes(GString *out, const char *text, size_t length)
{
    g_string_append_c(out, '"');
    for (size_t i = 0; i < length;) {
        uint32_t code;
        int n = utf8_decode(text + i, length - i, &code);
        if (n == 1) {
            put_ascii(out, text[i]);
            i++;
        } else if (n > 1) {
            g_string_append_len(out, text + i, n);
            i += (size_t)n;
        } else {
            g_string_append(out, "\xef\xbf\xbd");
            i += n < 0 ? (size_t)-n : length - i; /* 0: the text ends within a character */
        }
    }
    g_string_append_c(out, '"');
}

void json_text_string(GString *out, const char *text)
{
    if (text == NULL) {
        g_string_append(out, "null");
    } else {
        json_text_bytes(out, text, strlen(text));
    }
}

void json_text_float(GString *out, float value)
{
    char text[G_ASCII_DTOSTR_BUF_SIZE];
    if (!isfinite(value)) {
        g_string_append(out, "null");
        return;
    }
    g_ascii_formatd(text, sizeof text, "%.9g", (double)value);
    g_string_append(out, text);
}
