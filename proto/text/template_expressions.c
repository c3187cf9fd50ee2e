/* Expressions, in Jinja's order of precedence: if-else, or, and, not, comparison, + -, ~, * / // %,
 * **, unary, postfix. */
#include "proto/text/template_parser.h"

#include <string.h>

bool parser_fail(Parser *p, const char *format, ...)
{
    if (!p->failed) {
        va_list arguments;
        va_start(arguments, format);
        g_propagate_error(
            p->error, template_error(parser_peek(p)->line, g_strdup_vprintf(format, arguments)));
        va_end(arguments);
    }
    p->failed = true;
    return false;
}

bool parser_enter(Parser *p)
{
    return ++p->depth <= PARSE_DEPTH_MAX ||
           parser_fail(p, "nested deeper than %d levels", PARSE_DEPTH_MAX);
}

void parser_leave(Parser *p)
{
    p->depth--;
}

bool parser_is_op(const Parser *p, uint16_t op)
{
    return parser_peek(p)->type == TOKEN_OPERATOR && parser_peek(p)->op == op;
}

bool parser_is_name(const Parser *p, const char *name)
{
    const Token *token = parser_peek(p);
    return token->type == TOKEN_NAME && token->text.length == strlen(name) &&
           memcmp(token->text.data, name, token->text.length) == 0;
}

bool parser_take_op(Parser *p, uint16_t op)
{
    bool is = parser_is_op(p, op);
    p->at += is;
    return is;
}

bool parser_take_name(Parser *p, const char *name)
{
    bool is = parser_is_name(p, name);
    p->at += is;
    return is;
}

bool parser_expect_op(Parser *p, uint16_t op)
{
    return parser_take_op(p, op) || parser_fail(p, "'%c' is missing", op & 0xFF);
}

const char *parser_expect_identifier(Parser *p)
{
    const Token *token = parser_peek(p);
    if (token->type != TOKEN_NAME) {
        parser_fail(p, "a name is missing");
        return NULL;
    }
    p->at++;
    return template_intern(p->owner, token->text.data, token->text.length);
}

static void *parser_copy(Parser *p, GArray *array)
{
    size_t size = g_array_get_element_size(array);
    void *copy = template_alloc(p->owner, MAX(array->len, 1), size);
    if (array->len > 0) {
        memcpy(copy, array->data, array->len * size);
    }
    g_array_free(array, TRUE);
    return copy;
}

static Expression *expression_new(Parser *p, ExpressionKind kind, unsigned n_operands)
{
    Expression *e = template_alloc(p->owner, 1, sizeof *e);
    e->kind = kind;
    e->line = parser_peek(p)->line;
    e->n_operands = n_operands;
    e->operands = n_operands > 0 ? template_alloc(p->owner, n_operands, sizeof *e->operands) : NULL;
    return e;
}

static Expression *expression_constant(Parser *p, Value value)
{
    Expression *e = expression_new(p, EXPRESSION_CONSTANT, 0);
    e->constant = value;
    return e;
}

/* Takes the array of operands always. */
static Expression *expression_of(Parser *p, ExpressionKind kind, GArray *operands)
{
    Expression *e = expression_new(p, kind, 0);
    e->n_operands = operands->len;
    e->operands = parser_copy(p, operands);
    return p->failed ? NULL : e;
}

static GArray *operands_new(void)
{
    return g_array_new(FALSE, FALSE, sizeof(Expression *));
}

/* Elements up to a closing bracket, separated by commas; a comma at the end is allowed. */
static Expression *parse_list(Parser *p)
{
    GArray *items = operands_new();
    while (!p->failed && !parser_take_op(p, OP(']'))) {
        Expression *item = parse_expression(p, true);
        g_array_append_val(items, item);
        if (!p->failed && !parser_is_op(p, OP(']'))) {
            parser_expect_op(p, OP(','));
        }
    }
    return expression_of(p, EXPRESSION_LIST, items);
}

static Expression *parse_dict(Parser *p)
{
    GArray *items = operands_new();
    while (!p->failed && !parser_take_op(p, OP('}'))) {
        Expression *key = parse_expression(p, true);
        g_array_append_val(items, key);
        if (p->failed || !parser_expect_op(p, OP(':'))) {
            break;
        }
        Expression *value = parse_expression(p, true);
        g_array_append_val(items, value);
        if (!p->failed && !parser_is_op(p, OP('}'))) {
            parser_expect_op(p, OP(','));
        }
    }
    return expression_of(p, EXPRESSION_DICT, items);
}

static Expression *parse_parentheses(Parser *p)
{
    if (parser_take_op(p, OP(')'))) {
        return expression_of(p, EXPRESSION_TUPLE, operands_new());
    }
    Expression *e = parse_expressions(p, true);
    return e != NULL && parser_expect_op(p, OP(')')) ? e : NULL;
}

static Expression *parse_name(Parser *p)
{
    static const struct {
        const char *spelling;
        int value; /* 0, 1, -1: none */
    } constants[] = {{"true", 1},  {"True", 1},  {"false", 0},
                     {"False", 0}, {"none", -1}, {"None", -1}};
    for (size_t i = 0; i < G_N_ELEMENTS(constants); i++) {
        if (parser_take_name(p, constants[i].spelling)) {
            return expression_constant(
                p, constants[i].value < 0 ? value_none() : value_bool(constants[i].value == 1));
        }
    }
    Expression *e = expression_new(p, EXPRESSION_NAME, 0);
    e->name = parser_expect_identifier(p);
    return e;
}

/* Adjacent string literals are one. */
static Expression *parse_string(Parser *p)
{
    g_autoptr(GString) joined = g_string_new(NULL);
    for (; parser_peek(p)->type == TOKEN_STRING; p->at++) {
        g_string_append_len(joined, parser_peek(p)->text.data, (gssize)parser_peek(p)->text.length);
    }
    char *copy = template_alloc(p->owner, joined->len + 1, 1);
    memcpy(copy, joined->str, joined->len);
    return expression_constant(p, value_text((Text){copy, joined->len}));
}

static Expression *parse_primary(Parser *p)
{
    const Token *token = parser_peek(p);
    switch (token->type) {
    case TOKEN_NAME:
        return parse_name(p);
    case TOKEN_STRING:
        return parse_string(p);
    case TOKEN_INTEGER:
        p->at++;
        return expression_constant(p, value_int(token->integer));
    case TOKEN_FLOAT:
        p->at++;
        return expression_constant(p, value_float(token->real));
    default:
        break;
    }
    if (parser_take_op(p, OP('('))) {
        return parse_parentheses(p);
    }
    if (parser_take_op(p, OP('['))) {
        return parse_list(p);
    }
    if (parser_take_op(p, OP('{'))) {
        return parse_dict(p);
    }
    parser_fail(p, "an expression is missing");
    return NULL;
}

/* Behind the opening parenthesis. */
static bool parse_arguments(Parser *p, CallExpressions *out)
{
    GArray *positional = operands_new(), *named = operands_new(),
           *names = g_array_new(FALSE, FALSE, sizeof(const char *));
    while (!p->failed && !parser_take_op(p, OP(')'))) {
        if (parser_is_op(p, OP('*')) || parser_is_op(p, OP2('*', '*'))) {
            parser_fail(p, "*args and **kwargs are not supported");
            break;
        }
        bool is_named = parser_peek(p)->type == TOKEN_NAME &&
                        p->tokens[p->at + 1].type == TOKEN_OPERATOR &&
                        p->tokens[p->at + 1].op == OP('=');
        if (is_named) {
            const char *name = parser_expect_identifier(p);
            p->at++;
            g_array_append_val(names, name);
        } else if (named->len > 0) {
            parser_fail(p, "positional argument after a named one");
            break;
        }
        Expression *value = parse_expression(p, true);
        g_array_append_val(is_named ? named : positional, value);
        if (!p->failed && !parser_is_op(p, OP(')'))) {
            parser_expect_op(p, OP(','));
        }
    }
    out->n_positional = positional->len;
    out->n_named = names->len;
    out->positional = parser_copy(p, positional);
    out->named = parser_copy(p, named);
    out->names = parser_copy(p, names);
    return !p->failed;
}

/* Behind the opening bracket: an element or a slice. */
static bool parse_subscript(Parser *p, PostfixStep *step)
{
    step->kind = STEP_ELEMENT;
    for (unsigned part = 0; part < 3; part++) {
        if (!parser_is_op(p, OP(':')) && !parser_is_op(p, OP(']'))) {
            step->operands[part] = parse_expression(p, true);
            if (p->failed) {
                return false;
            }
        }
        if (part == 2 || !parser_take_op(p, OP(':'))) {
            break;
        }
        step->kind = STEP_SLICE;
    }
    if (step->kind == STEP_ELEMENT && step->operands[0] == NULL) {
        return parser_fail(p, "a subscript is missing");
    }
    return parser_expect_op(p, OP(']'));
}

static bool parse_attribute(Parser *p, PostfixStep *step)
{
    const Token *token = parser_peek(p);
    p->at++;
    if (token->type == TOKEN_INTEGER) {
        step->kind = STEP_ELEMENT;
        step->operands[0] = expression_constant(p, value_int(token->integer));
        return true;
    }
    if (token->type != TOKEN_NAME) {
        p->at--;
        return parser_fail(p, "a name after '.' is missing");
    }
    step->kind = STEP_ATTRIBUTE;
    step->name = token->text;
    return true;
}

static bool parse_filter(Parser *p, PostfixStep *step)
{
    const Token *token = parser_peek(p);
    if (token->type != TOKEN_NAME) {
        return parser_fail(p, "the name of a filter is missing");
    }
    p->at++;
    step->kind = STEP_FILTER;
    step->name = token->text;
    return !parser_take_op(p, OP('(')) || parse_arguments(p, &step->arguments);
}

static Expression *parse_postfix(Parser *p, Expression *base, bool tests_and_filters);

/* Whether the token can begin the argument of a test written without parentheses: "is divisibleby
 * 3". */
static bool parser_at_test_argument(const Parser *p)
{
    const Token *token = parser_peek(p);
    if (token->type == TOKEN_NAME) {
        return !parser_is_name(p, "else") && !parser_is_name(p, "or") && !parser_is_name(p, "and");
    }
    return token->type == TOKEN_STRING || token->type == TOKEN_INTEGER ||
           token->type == TOKEN_FLOAT || parser_is_op(p, OP('[')) || parser_is_op(p, OP('{'));
}

static bool parse_test(Parser *p, PostfixStep *step)
{
    step->kind = STEP_TEST;
    step->negated = parser_take_name(p, "not");
    const Token *token = parser_peek(p);
    if (token->type != TOKEN_NAME) {
        return parser_fail(p, "the name of a test is missing");
    }
    p->at++;
    step->name = token->text;
    if (parser_take_op(p, OP('('))) {
        return parse_arguments(p, &step->arguments);
    }
    if (!parser_at_test_argument(p)) {
        return true;
    }
    if (parser_is_name(p, "is")) {
        return parser_fail(p, "tests cannot be chained with is");
    }
    if (!parser_enter(p)) {
        return false;
    }
    Expression *primary = parse_primary(p),
               *argument = primary != NULL ? parse_postfix(p, primary, false) : NULL;
    parser_leave(p);
    step->arguments.positional = template_alloc(p->owner, 1, sizeof(Expression *));
    step->arguments.positional[0] = argument;
    step->arguments.n_positional = 1;
    return !p->failed;
}

/* The next step; false if there is none (or after failing). */
static bool parse_step(Parser *p, bool tests_and_filters, PostfixStep *step)
{
    *step = (PostfixStep){0};
    if (parser_take_op(p, OP('.'))) {
        return parse_attribute(p, step);
    }
    if (parser_take_op(p, OP('['))) {
        return parse_subscript(p, step);
    }
    if (parser_take_op(p, OP('('))) {
        step->kind = STEP_CALL;
        return parse_arguments(p, &step->arguments);
    }
    if (tests_and_filters && parser_take_op(p, OP('|'))) {
        return parse_filter(p, step);
    }
    return tests_and_filters && parser_take_name(p, "is") && parse_test(p, step);
}

static Expression *parse_postfix(Parser *p, Expression *base, bool tests_and_filters)
{
    GArray *steps = g_array_new(FALSE, FALSE, sizeof(PostfixStep));
    PostfixStep step;
    while (parse_step(p, tests_and_filters, &step)) {
        g_array_append_val(steps, step);
    }
    if (p->failed || steps->len == 0) {
        g_array_free(steps, TRUE);
        return p->failed ? NULL : base;
    }
    Expression *e = expression_new(p, EXPRESSION_POSTFIX, 1);
    e->operands[0] = base;
    e->n_steps = steps->len;
    e->steps = parser_copy(p, steps);
    return e;
}

bool parse_filters(Parser *p, bool first_bar, PostfixStep **steps_out, unsigned *n_out)
{
    GArray *steps = g_array_new(FALSE, FALSE, sizeof(PostfixStep));
    while (!p->failed && ((steps->len == 0 && !first_bar) || parser_take_op(p, OP('|')))) {
        PostfixStep step = {0};
        parse_filter(p, &step);
        g_array_append_val(steps, step);
    }
    *n_out = steps->len;
    *steps_out = parser_copy(p, steps);
    return !p->failed;
}

static Expression *parse_unary(Parser *p, bool tests_and_filters)
{
    ExpressionKind kind = parser_is_op(p, OP('-')) ? EXPRESSION_NEGATE : EXPRESSION_PLUS;
    Expression *e;
    if (parser_take_op(p, OP('-')) || parser_take_op(p, OP('+'))) {
        if (!parser_enter(p)) {
            return NULL;
        }
        Expression *operand = parse_unary(p, false);
        parser_leave(p);
        e = expression_new(p, kind, 1);
        e->operands[0] = operand;
    } else {
        e = parse_primary(p);
    }
    return p->failed ? NULL : parse_postfix(p, e, tests_and_filters);
}

typedef struct OperatorToken {
    uint16_t token;
    Operator op;
} OperatorToken;

static bool parser_take_operator(Parser *p, const OperatorToken *table, size_t n, Operator *out)
{
    for (size_t i = 0; i < n; i++) {
        if (parser_take_op(p, table[i].token)) {
            *out = table[i].op;
            return true;
        }
    }
    return false;
}

/* Operands of one precedence with the operators between them, evaluated from left to right without
 * recursion. */
static Expression *parse_chain(Parser *p, const OperatorToken *table, size_t n,
                               Expression *(*operand)(Parser *))
{
    Expression *first = operand(p);
    Operator op;
    if (p->failed || !parser_take_operator(p, table, n, &op)) {
        return first;
    }
    GArray *operands = operands_new(), *operators = g_array_new(FALSE, FALSE, sizeof(Operator));
    g_array_append_val(operands, first);
    do {
        Expression *next = operand(p);
        g_array_append_val(operators, op);
        g_array_append_val(operands, next);
    } while (!p->failed && parser_take_operator(p, table, n, &op));
    Operator *copied = parser_copy(p, operators);
    Expression *e = expression_of(p, EXPRESSION_CHAIN, operands);
    if (e != NULL) {
        e->operators = copied;
    }
    return e;
}

static Expression *parse_unary_filtered(Parser *p)
{
    return parse_unary(p, true);
}

static Expression *parse_power(Parser *p)
{
    static const OperatorToken table[] = {{OP2('*', '*'), OPERATOR_POWER}};
    return parse_chain(p, table, G_N_ELEMENTS(table), parse_unary_filtered);
}

static Expression *parse_product(Parser *p)
{
    static const OperatorToken table[] = {{OP('*'), OPERATOR_MULTIPLY},
                                          {OP('/'), OPERATOR_DIVIDE},
                                          {OP2('/', '/'), OPERATOR_FLOOR_DIVIDE},
                                          {OP('%'), OPERATOR_MODULO}};
    return parse_chain(p, table, G_N_ELEMENTS(table), parse_power);
}

/* Operands between fixed separators: ~, and, or. */
static Expression *parse_separated(Parser *p, ExpressionKind kind, uint16_t op, const char *word,
                                   Expression *(*operand)(Parser *))
{
    Expression *first = operand(p);
    if (p->failed || !(word != NULL ? parser_take_name(p, word) : parser_take_op(p, op))) {
        return first;
    }
    GArray *operands = operands_new();
    g_array_append_val(operands, first);
    do {
        Expression *next = operand(p);
        g_array_append_val(operands, next);
    } while (!p->failed && (word != NULL ? parser_take_name(p, word) : parser_take_op(p, op)));
    return expression_of(p, kind, operands);
}

static Expression *parse_concat(Parser *p)
{
    return parse_separated(p, EXPRESSION_CONCAT, OP('~'), NULL, parse_product);
}

static Expression *parse_sum(Parser *p)
{
    static const OperatorToken table[] = {{OP('+'), OPERATOR_ADD}, {OP('-'), OPERATOR_SUBTRACT}};
    return parse_chain(p, table, G_N_ELEMENTS(table), parse_concat);
}

static bool parser_take_comparison(Parser *p, Operator *out)
{
    static const OperatorToken table[] = {{OP2('=', '='), OPERATOR_EQUAL},
                                          {OP2('!', '='), OPERATOR_NOT_EQUAL},
                                          {OP2('<', '='), OPERATOR_LESS_EQUAL},
                                          {OP2('>', '='), OPERATOR_GREATER_EQUAL},
                                          {OP('<'), OPERATOR_LESS},
                                          {OP('>'), OPERATOR_GREATER}};
    if (parser_take_operator(p, table, G_N_ELEMENTS(table), out)) {
        return true;
    }
    if (parser_take_name(p, "in")) {
        *out = OPERATOR_IN;
        return true;
    }
    if (parser_is_name(p, "not") && p->tokens[p->at + 1].type == TOKEN_NAME) {
        p->at++;
        if (parser_take_name(p, "in")) {
            *out = OPERATOR_NOT_IN;
            return true;
        }
        p->at--;
    }
    return false;
}

static Expression *parse_comparison(Parser *p)
{
    Expression *first = parse_sum(p);
    Operator op;
    if (p->failed || !parser_take_comparison(p, &op)) {
        return first;
    }
    GArray *operands = operands_new(), *operators = g_array_new(FALSE, FALSE, sizeof(Operator));
    g_array_append_val(operands, first);
    do {
        Expression *next = parse_sum(p);
        g_array_append_val(operators, op);
        g_array_append_val(operands, next);
    } while (!p->failed && parser_take_comparison(p, &op));
    Operator *copied = parser_copy(p, operators);
    Expression *e = expression_of(p, EXPRESSION_COMPARE, operands);
    if (e != NULL) {
        e->operators = copied;
    }
    return e;
}

static Expression *parse_not(Parser *p)
{
    if (!parser_take_name(p, "not")) {
        return parse_comparison(p);
    }
    if (!parser_enter(p)) {
        return NULL;
    }
    Expression *operand = parse_not(p), *e = expression_new(p, EXPRESSION_NOT, 1);
    parser_leave(p);
    e->operands[0] = operand;
    return p->failed ? NULL : e;
}

static Expression *parse_and(Parser *p)
{
    return parse_separated(p, EXPRESSION_AND, 0, "and", parse_not);
}

static Expression *parse_or(Parser *p)
{
    return parse_separated(p, EXPRESSION_OR, 0, "or", parse_and);
}

static Expression *parse_condition(Parser *p)
{
    Expression *e = parse_or(p);
    while (!p->failed && parser_take_name(p, "if")) {
        Expression *condition = parse_or(p), *otherwise = NULL;
        if (!p->failed && parser_take_name(p, "else")) {
            otherwise = parse_expression(p, true);
        }
        Expression *whole = expression_new(p, EXPRESSION_CONDITION, 3);
        whole->operands[0] = condition;
        whole->operands[1] = e;
        whole->operands[2] = otherwise;
        e = whole;
    }
    return p->failed ? NULL : e;
}

Expression *parse_expression(Parser *p, bool conditional)
{
    if (!parser_enter(p)) {
        return NULL;
    }
    Expression *e = conditional ? parse_condition(p) : parse_or(p);
    parser_leave(p);
    return p->failed ? NULL : e;
}

/* What ends a tuple without parentheses. */
static bool parser_at_tuple_end(const Parser *p)
{
    TokenType type = parser_peek(p)->type;
    return type == TOKEN_OUTPUT_END || type == TOKEN_BLOCK_END || type == TOKEN_END ||
           parser_is_op(p, OP(')')) || parser_is_name(p, "recursive");
}

Expression *parse_expressions(Parser *p, bool conditional)
{
    Expression *first = parse_expression(p, conditional);
    if (p->failed || !parser_is_op(p, OP(','))) {
        return first;
    }
    GArray *items = operands_new();
    g_array_append_val(items, first);
    while (!p->failed && parser_take_op(p, OP(',')) && !parser_at_tuple_end(p)) {
        Expression *item = parse_expression(p, conditional);
        g_array_append_val(items, item);
    }
    return expression_of(p, EXPRESSION_TUPLE, items);
}
