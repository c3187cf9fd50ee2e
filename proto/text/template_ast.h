/* A parsed template. Immutable; owned by the ChatTemplate's arena of small allocations. */
#pragma once

#include "proto/text/template_value.h"

typedef struct Expression Expression;
typedef struct Statement Statement;

typedef enum ExpressionKind {
    EXPRESSION_CONSTANT,
    EXPRESSION_NAME,
    EXPRESSION_LIST,
    EXPRESSION_TUPLE,
    EXPRESSION_DICT, /* operands: key, value, key, value, ... */
    EXPRESSION_NOT,
    EXPRESSION_NEGATE,
    EXPRESSION_PLUS,
    EXPRESSION_CHAIN, /* operands[0] operators[0] operands[1] ...: arithmetic of one precedence,
                         left to right */
    EXPRESSION_CONCAT,
    EXPRESSION_AND,
    EXPRESSION_OR,
    EXPRESSION_COMPARE,   /* a < b <= c as in Python */
    EXPRESSION_CONDITION, /* operands: condition, then, else (may be NULL) */
    EXPRESSION_POSTFIX,   /* operands[0] followed by steps */
} ExpressionKind;

typedef enum Operator {
    OPERATOR_ADD,
    OPERATOR_SUBTRACT,
    OPERATOR_MULTIPLY,
    OPERATOR_DIVIDE,
    OPERATOR_FLOOR_DIVIDE,
    OPERATOR_MODULO,
    OPERATOR_POWER,
    OPERATOR_EQUAL,
    OPERATOR_NOT_EQUAL,
    OPERATOR_LESS,
    OPERATOR_LESS_EQUAL,
    OPERATOR_GREATER,
    OPERATOR_GREATER_EQUAL,
    OPERATOR_IN,
    OPERATOR_NOT_IN,
} Operator;

typedef struct CallExpressions {
    Expression **positional;
    const char **names;
    Expression **named;
    unsigned n_positional, n_named;
} CallExpressions;

typedef enum StepKind {
    STEP_ATTRIBUTE,
    STEP_ELEMENT,
    STEP_SLICE,
    STEP_CALL,
    STEP_FILTER,
    STEP_TEST
} StepKind;

typedef struct PostfixStep {
    StepKind kind;
    bool negated;              /* is not */
    Text name;                 /* attribute, filter, test */
    Expression *operands[3];   /* element; start, stop, step of a slice (each may be NULL) */
    CallExpressions arguments; /* call, filter, test */
} PostfixStep;

struct Expression {
    ExpressionKind kind;
    unsigned line;
    unsigned n_operands, n_steps;
    Expression **operands;
    Operator *operators; /* chain, compare: n_operands - 1 */
    PostfixStep *steps;
    const char *name; /* interned */
    Value constant;
};

typedef struct Block {
    Statement **statements;
    unsigned n;
} Block;

/* Where an assignment goes: a name, an attribute of a namespace, or a tuple of targets. */
typedef struct Target {
    const char *name, *attribute; /* interned; attribute may be NULL */
    struct Target *parts;
    unsigned n_parts; /* > 0: a tuple */
} Target;

typedef struct Parameter {
    const char *name;
    Expression *fallback; /* may be NULL */
} Parameter;

typedef enum StatementKind {
    STATEMENT_TEXT,
    STATEMENT_OUTPUT,
    STATEMENT_IF,      /* expressions[i] guards blocks[i]; one block more is the else */
    STATEMENT_FOR,     /* expressions: iterable, condition or NULL; blocks: body, else */
    STATEMENT_SET,     /* targets[i] = expressions[i] (one) */
    STATEMENT_CAPTURE, /* set x (| filter)* ... endset: expression is a postfix of filters on a name
                          or NULL */
    STATEMENT_FILTER,  /* filter f ... endfilter */
    STATEMENT_WITH,    /* targets[i] = expressions[i], body */
    STATEMENT_MACRO,
    STATEMENT_BLOCK, /* generation ... endgeneration: only its body */
    STATEMENT_BREAK,
    STATEMENT_CONTINUE,
} StatementKind;

struct Statement {
    StatementKind kind;
    unsigned line;
    Text text;
    unsigned n_expressions, n_blocks, n_targets, n_parameters, n_filters;
    Expression **expressions;
    Block *blocks;
    Target *targets;
    const char *name; /* macro */
    Parameter *parameters;
    PostfixStep *filters; /* capture, filter */
};

struct ChatTemplate {
    GPtrArray *memory; /* everything above */
    GHashTable *names; /* interned */
    Block body;
};

/* INVALID with the line; the message is one line of well-formed UTF-8 whatever the template put
 * into it. Takes `what` always. */
GError *template_error(unsigned line, char *what);
/* Zeroed memory that lives as long as the template. */
void *template_alloc(ChatTemplate *t, size_t n, size_t size);
const char *template_intern(ChatTemplate *t, const char *name, size_t length);
