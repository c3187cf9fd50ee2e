/* A small but whole GGUF file: two Llama layers of random F32 weights, a byte-level vocabulary, a
 * chat template. */
#pragma once

#define TINY_GGUF_CONTEXT 64u
#define TINY_GGUF_VOCAB 258u /* 256 bytes, <|im_start|>, <|im_end|> */

void tiny_gguf_write(const char *path);
