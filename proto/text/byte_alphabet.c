#include "proto/text/byte_alphabet.h"

#include <stdbool.h>

static bool byte_alphabet_is_itself(uint32_t code)
{
    return (code >= 33 && code <= 126) || (code >= 161 && code <= 172) ||
           (code >= 174 && code <= 255);
}

/* The others are 0..32 (U+0100..U+0120), 127..160 (U+0121..U+0142) and 173 (U+0143). */
uint32_t byte_alphabet_char(uint8_t byte)
{
    if (byte_alphabet_is_itself(byte)) {
        return byte;
    }
    return byte <= 32 ? 0x100u + byte : byte <= 160 ? 0x121u + byte - 127u : 0x143u;
}

int byte_alphabet_byte(uint32_t code)
{
    if (byte_alphabet_is_itself(code)) {
        return (int)code;
    }
    if (code >= 0x100 && code <= 0x120) {
        return (int)code - 0x100;
    }
    if (code >= 0x121 && code <= 0x142) {
        return (int)code - 0x121 + 127;
    }
    return code == 0x143 ? 173 : -1;
}
