#include "proto/text/utf8.h"

/* Table 3-7 of the Unicode standard: the length of a character and the range of its second byte
 * follow from the first. */
static int utf8_lead(uint8_t lead, uint8_t *low, uint8_t *high)
{
    *low = 0x80;
    *high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        return 2;
    }
    if (lead >= 0xE0 && lead <= 0xEF) {
        *low = lead == 0xE0 ? 0xA0 : 0x80;
        *high = lead == 0xED ? 0x9F : 0xBF;
        return 3;
    }
    if (lead >= 0xF0 && lead <= 0xF4) {
        *low = lead == 0xF0 ? 0x90 : 0x80;
        *high = lead == 0xF4 ? 0x8F : 0xBF;
        return 4;
    }
    return 0;
}

int utf8_decode(const char *s, size_t n, uint32_t *code_out)
{
    if (n == 0) {
        return 0;
    }
    uint8_t lead = (uint8_t)s[0];
    if (lead < 0x80) {
        *code_out = lead;
        return 1;
    }
    uint8_t low, high;
    int length = utf8_lead(lead, &low, &high);
    if (length == 0) {
        return -1;
    }
    uint32_t code = lead & (0x7Fu >> length);
    for (int i = 1; i < length; i++) {
        if ((size_t)i == n) {
            return 0;
        }
        uint8_t byte = (uint8_t)s[i];
        if (byte < low || byte > high) {
            return -i;
        }
        code = code << 6 | (byte & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *code_out = code;
    return length;
}

size_t utf8_encode(uint32_t code, char out[4])
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code & 0x3F));
        code >>= 6;
    }
    static const uint8_t mark[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    out[0] = (char)(mark[length] | code);
    return length;
}

size_t utf8_valid_run(const char *s, size_t n)
{
    size_t at = 0;
    uint32_t code;
    while (at < n) {
        int length = utf8_decode(s + at, n - at, &code);
        if (length <= 0) {
            break;
        }
        at += (size_t)length;
    }
    return at;
}

bool utf8_is_space(uint32_t code)
{
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}
