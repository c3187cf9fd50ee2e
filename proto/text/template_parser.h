/* Recursive descent over the tokens, with a bound on nesting. Private to the two parser files. */
#pragma once

#include "proto/text/template_lexer.h"

/* Far above what people write; keeps the stack of parser and evaluator small. */
enum { PARSE_DEPTH_MAX = 100 };

typedef struct Parser {
    ChatTemplate *owner;
    const Token *tokens; /* TOKEN_END last */
    size_t at;
    unsigned depth, loops; /* open brackets and blocks; open for bodies */
    GError **error;
    bool failed;
} Parser;

static inline const Token *parser_peek(const Parser *p)
{
    return &p->tokens[p->at];
}
/* Sets the error once; returns false for the caller to return. */
bool parser_fail(Parser *p, const char *format, ...) G_GNUC_PRINTF(2, 3);
bool parser_enter(Parser *p);
void parser_leave(Parser *p);
bool parser_is_op(const Parser *p, uint16_t op);
bool parser_is_name(const Parser *p, const char *name);
/* Takes the token if it is this one. */
bool parser_take_op(Parser *p, uint16_t op);
bool parser_take_name(Parser *p, const char *name);
bool parser_expect_op(Parser *p, uint16_t op);
/* An identifier, interned; NULL after failing. */
const char *parser_expect_identifier(Parser *p);

/* NULL after failing. With `conditional`, "a if b else c" is allowed. */
Expression *parse_expression(Parser *p, bool conditional);
/* One expression, or a tuple if commas follow. */
Expression *parse_expressions(Parser *p, bool conditional);
/* Filters "| f(x) | g" as steps; false after failing. */
bool parse_filters(Parser *p, bool first_bar, PostfixStep **steps_out, unsigned *n_out);
