/* The byte alphabet of byte-level BPE (GPT-2): each of the 256 bytes is written as one printable
 * character in vocabulary files. Bytes that are printable Latin-1 (33..126, 161..172, 174..255)
 * stand for themselves, the other 68 in ascending order for U+0100, U+0101, ... */
#pragma once

#include <stdint.h>

/* The character of a byte. */
uint32_t byte_alphabet_char(uint8_t byte);
/* The byte of a character, -1 if it is not in the alphabet. */
int byte_alphabet_byte(uint32_t code);
