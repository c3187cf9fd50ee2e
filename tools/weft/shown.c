#include "tools/weft/shown.h"

char *shown_line(const char *text, gssize length, glong most)
{
    g_autofree char *valid = g_utf8_make_valid(text, length);
    GString *out = g_string_new(NULL);
    glong n = 0;
    for (const char *at = valid; *at != '\0'; at = g_utf8_next_char(at), n++) {
        const gunichar c = g_utf8_get_char(at);
        if (n == most) {
            g_string_append(out, "...");
            break;
        }
        g_string_append_unichar(out, g_unichar_iscntrl(c) ? ' ' : c);
    }
    return g_string_free(out, FALSE);
}
