/* UTF-8 as the text room needs it: strict decoding (RFC 3629: no overlong forms, surrogates or
 * values above U+10FFFF) of bytes that may be anything. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decodes the character at s[0..n). Returns its length 1..4; 0 if s is a proper prefix of some
 * character (or n is 0); -k if the first k bytes (1..3) can never become one (the maximal subpart
 * of Unicode 3.9, D93b). */
int utf8_decode(const char *s, size_t n, uint32_t *code_out);
/* Writes the 1..4 bytes of a scalar value, which must be one; returns their number. */
size_t utf8_encode(uint32_t code, char out[4]);
/* Length of the longest well-formed prefix of s[0..n). */
size_t utf8_valid_run(const char *s, size_t n);
/* Unicode White_Space. */
bool utf8_is_space(uint32_t code);
