#include "proto/text/nfc.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"
#include "proto/text/utf8.h"

#include <utf8proc.h>

/* Nothing below U+0300 composes with what stands before it, and all of it is its own normal form.
 */
static bool nfc_is_trivial(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        if ((uint8_t)text[i] >= 0xCC) {
            return false;
        }
    }
    return true;
}

/* Stable counting sort of one run of combining marks by their class (1..254). */
static void nfc_sort_marks(utf8proc_int32_t *marks, size_t n, utf8proc_int32_t *scratch)
{
    size_t start[257] = {0};
    for (size_t i = 0; i < n; i++) {
        start[(uint8_t)utf8proc_get_property(marks[i])->combining_class + 1u]++;
    }
    for (unsigned c = 1; c < 257; c++) {
        start[c] += start[c - 1];
    }
    for (size_t i = 0; i < n; i++) {
        scratch[start[(uint8_t)utf8proc_get_property(marks[i])->combining_class]++] = marks[i];
    }
    memcpy(marks, scratch, n * sizeof *marks);
}

/* Canonical ordering (UAX 15, D109). utf8proc's own sorts by exchange, which is quadratic in the
 * length of a run. */
static void nfc_order(utf8proc_int32_t *codes, size_t n, utf8proc_int32_t *scratch)
{
    for (size_t at = 0; at < n;) {
        size_t end = at;
        while (end < n && utf8proc_get_property(codes[end])->combining_class != 0) {
            end++;
        }
        if (end - at > 1) {
            nfc_sort_marks(codes + at, end - at, scratch);
        }
        at = end > at ? end : at + 1;
    }
}

/* Code points per byte of input: ASCII stays one, 2 bytes become at most 3, 3 or 4 bytes at most 4.
 */
enum { EXPANSION = 2 };

bool nfc_append(const char *text, size_t length, GString *out, GError **error)
{
    if (nfc_is_trivial(text, length)) {
        g_string_append_len(out, text, (gssize)length);
        return true;
    }
    size_t room = 0;
    utf8proc_int32_t *codes = NULL;
    if (sz_mul(length, EXPANSION, &room)) {
        codes = weft_alloc(room, 2 * sizeof *codes, "normalized text", error);
    }
    if (codes == NULL) {
        return false;
    }
    size_t n = 0;
    for (size_t at = 0; at < length;) {
        uint32_t code = 0;
        int step = utf8_decode(text + at, length - at, &code);
        g_assert(step > 0);
        at += (size_t)step;
        int boundary = 0;
        utf8proc_ssize_t got =
            utf8proc_decompose_char((utf8proc_int32_t)code, codes + n, (utf8proc_ssize_t)(room - n),
                                    UTF8PROC_STABLE | UTF8PROC_COMPOSE, &boundary);
        g_assert(got > 0 && (size_t)got <= room - n);
        n += (size_t)got;
    }
    nfc_order(codes, n, codes + room);
    utf8proc_ssize_t composed =
        utf8proc_normalize_utf32(codes, (utf8proc_ssize_t)n, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    for (utf8proc_ssize_t i = 0; i < composed; i++) {
        char bytes[4];
        g_string_append_len(out, bytes, (gssize)utf8_encode((uint32_t)codes[i], bytes));
    }
    weft_free(codes);
    return true;
}
