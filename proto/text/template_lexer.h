/* The tokens of a template. White space control is done here, as Jinja does it with trim_blocks and
 * lstrip_blocks (which model makers assume): a newline right after a block or comment goes, and so
 * do blanks between the start of a line and a block or comment. */
#pragma once

#include "proto/text/template_ast.h"

typedef enum TokenType {
    TOKEN_DATA, /* text outside of tags */
    TOKEN_OUTPUT_BEGIN,
    TOKEN_OUTPUT_END,
    TOKEN_BLOCK_BEGIN,
    TOKEN_BLOCK_END,
    TOKEN_NAME,
    TOKEN_STRING, /* text: escapes resolved */
    TOKEN_INTEGER,
    TOKEN_FLOAT,
    TOKEN_OPERATOR, /* op */
    TOKEN_END,
} TokenType;

/* One or two characters. */
#define OP(a) ((uint16_t)(a))
#define OP2(a, b) ((uint16_t)((a) | (b) << 8))

typedef struct Token {
    TokenType type;
    unsigned line;
    uint16_t op;
    Text text; /* into the template's own memory */
    int64_t integer;
    double real;
} Token;

/* Tokens with TOKEN_END last, NULL + INVALID with the line. The array is the caller's; what it
 * refers to is the template's. */
GArray *template_lex(ChatTemplate *t, const char *source, size_t length, GError **error);
