/* Statements, and the two functions of a ChatTemplate that the parser fills: its memory and its
 * names. */
#include "proto/text/template_parser.h"

#include "proto/base/error.h"

#include <string.h>

enum { SOURCE_MAX = 4 << 20 };

GError *template_error(unsigned line, char *what)
{
    g_autofree char *shown = g_utf8_make_valid(what, -1);
    for (char *c = shown; *c != '\0'; c++) {
        *c = g_ascii_iscntrl(*c) ? ' ' : *c;
    }
    g_free(what);
    return g_error_new(WEFT_ERROR, WEFT_ERROR_INVALID, "chat template line %u: %s", line, shown);
}

void *template_alloc(ChatTemplate *t, size_t n, size_t size)
{
    void *memory = g_malloc0_n(n, size);
    g_ptr_array_add(t->memory, memory);
    return memory;
}

const char *template_intern(ChatTemplate *t, const char *name, size_t length)
{
    g_autofree char *copy = g_strndup(name, length);
    char *known = g_hash_table_lookup(t->names, copy);
    if (known == NULL) {
        known = template_alloc(t, length + 1, 1);
        memcpy(known, name, length);
        g_hash_table_add(t->names, known);
    }
    return known;
}

static void *statements_copy(Parser *p, GArray *array)
{
    size_t size = g_array_get_element_size(array);
    void *copy = template_alloc(p->owner, MAX(array->len, 1), size);
    if (array->len > 0) {
        memcpy(copy, array->data, array->len * size);
    }
    g_array_free(array, TRUE);
    return copy;
}

static Statement *statement_new(Parser *p, StatementKind kind)
{
    Statement *s = template_alloc(p->owner, 1, sizeof *s);
    s->kind = kind;
    s->line = parser_peek(p)->line;
    return s;
}

static void statement_room(Parser *p, Statement *s, unsigned n_expressions, unsigned n_blocks)
{
    s->n_expressions = n_expressions;
    s->n_blocks = n_blocks;
    s->expressions =
        n_expressions > 0 ? template_alloc(p->owner, n_expressions, sizeof *s->expressions) : NULL;
    s->blocks = n_blocks > 0 ? template_alloc(p->owner, n_blocks, sizeof *s->blocks) : NULL;
}

static bool parser_expect_block_end(Parser *p)
{
    if (parser_peek(p)->type != TOKEN_BLOCK_END) {
        return parser_fail(p, "the end of the block %%} is missing");
    }
    p->at++;
    return true;
}

static Statement *parse_block_statement(Parser *p);

/* Statements up to "{% one of ends": the parser then stands at that name. ends: NULL-terminated;
 * NULL: the end of the template. */
static bool parse_body(Parser *p, const char *const *ends, Block *out)
{
    GArray *statements = g_array_new(FALSE, FALSE, sizeof(Statement *));
    bool done = false;
    if (!parser_enter(p)) {
        done = true;
    }
    while (!done && !p->failed) {
        const Token *token = parser_peek(p);
        Statement *s = NULL;
        if (token->type == TOKEN_DATA) {
            s = statement_new(p, STATEMENT_TEXT);
            s->text = token->text;
            p->at++;
        } else if (token->type == TOKEN_OUTPUT_BEGIN) {
            p->at++;
            s = statement_new(p, STATEMENT_OUTPUT);
            statement_room(p, s, 1, 0);
            s->expressions[0] = parse_expressions(p, true);
            if (!p->failed && parser_peek(p)->type != TOKEN_OUTPUT_END) {
                parser_fail(p, "the end of the expression }} is missing");
            }
            p->at += !p->failed;
        } else if (token->type == TOKEN_BLOCK_BEGIN) {
            p->at++;
            for (unsigned i = 0; ends != NULL && ends[i] != NULL && !done; i++) {
                done = parser_is_name(p, ends[i]);
            }
            s = done ? NULL : parse_block_statement(p);
        } else {
            done = true;
            if (ends != NULL) {
                parser_fail(p, "{%% %s %%} is missing", ends[0]);
            }
        }
        if (s != NULL) {
            g_array_append_val(statements, s);
        }
    }
    parser_leave(p);
    out->n = statements->len;
    out->statements = statements_copy(p, statements);
    return !p->failed;
}

/* A body and its closing tag. */
static bool parse_body_to(Parser *p, const char *end, Block *out)
{
    const char *const ends[] = {end, NULL};
    if (!parse_body(p, ends, out)) {
        return false;
    }
    p->at++;
    return true;
}

static Statement *parse_if(Parser *p)
{
    static const char *const ends[] = {"endif", "elif", "else", NULL};
    Statement *s = statement_new(p, STATEMENT_IF);
    GArray *conditions = g_array_new(FALSE, FALSE, sizeof(Expression *)),
           *blocks = g_array_new(FALSE, FALSE, sizeof(Block));
    bool has_else = false;
    do {
        if (!has_else) {
            Expression *condition = parse_expressions(p, false);
            g_array_append_val(conditions, condition);
        }
        Block block = {0};
        if (p->failed || !parser_expect_block_end(p) || !parse_body(p, ends, &block)) {
            break;
        }
        g_array_append_val(blocks, block);
        if (has_else && !parser_is_name(p, "endif")) {
            parser_fail(p, "endif is missing after else");
            break;
        }
        has_else = parser_is_name(p, "else");
        if (parser_take_name(p, "endif")) {
            break;
        }
        p->at++;
    } while (!p->failed);
    s->n_expressions = conditions->len;
    s->n_blocks = blocks->len;
    s->expressions = statements_copy(p, conditions);
    s->blocks = statements_copy(p, blocks);
    return s;
}

/* A name, ns.attribute or, with commas or parentheses, several. */
static bool parse_target(Parser *p, bool attributes, Target *out);

static bool parse_target_part(Parser *p, bool attributes, Target *out)
{
    *out = (Target){0};
    if (parser_take_op(p, OP('('))) {
        bool ok =
            parser_enter(p) && parse_target(p, attributes, out) && parser_expect_op(p, OP(')'));
        parser_leave(p);
        return ok;
    }
    out->name = parser_expect_identifier(p);
    if (out->name != NULL && attributes && parser_take_op(p, OP('.'))) {
        out->attribute = parser_expect_identifier(p);
    }
    return !p->failed;
}

static bool parse_target(Parser *p, bool attributes, Target *out)
{
    Target first;
    if (!parse_target_part(p, attributes, &first)) {
        return false;
    }
    if (!parser_is_op(p, OP(','))) {
        *out = first;
        return true;
    }
    GArray *parts = g_array_new(FALSE, FALSE, sizeof(Target));
    g_array_append_val(parts, first);
    while (!p->failed && parser_take_op(p, OP(',')) &&
           (parser_peek(p)->type == TOKEN_NAME || parser_is_op(p, OP('('))) &&
           !parser_is_name(p, "in")) {
        Target next;
        parse_target_part(p, attributes, &next);
        g_array_append_val(parts, next);
    }
    *out = (Target){.n_parts = parts->len};
    out->parts = statements_copy(p, parts);
    return !p->failed;
}

static void statement_targets(Parser *p, Statement *s, unsigned n)
{
    s->n_targets = n;
    s->targets = template_alloc(p->owner, n, sizeof *s->targets);
}

static Statement *parse_for(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_FOR);
    statement_room(p, s, 2, 2);
    statement_targets(p, s, 1);
    if (!parse_target(p, false, &s->targets[0])) {
        return s;
    }
    if (!parser_take_name(p, "in")) {
        parser_fail(p, "'in' is missing");
        return s;
    }
    s->expressions[0] = parse_expressions(p, false);
    if (!p->failed && parser_take_name(p, "if")) {
        s->expressions[1] = parse_expression(p, true);
    }
    if (parser_is_name(p, "recursive")) {
        parser_fail(p, "recursive loops are not supported");
    }
    static const char *const ends[] = {"endfor", "else", NULL};
    p->loops++;
    bool ok = !p->failed && parser_expect_block_end(p) && parse_body(p, ends, &s->blocks[0]);
    p->loops--;
    if (ok && parser_take_name(p, "else")) {
        ok = parser_expect_block_end(p) && parse_body_to(p, "endfor", &s->blocks[1]);
    } else if (ok) {
        p->at++;
    }
    return s;
}

static Statement *parse_set(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_SET);
    statement_targets(p, s, 1);
    if (!parse_target(p, true, &s->targets[0])) {
        return s;
    }
    if (parser_take_op(p, OP('='))) {
        statement_room(p, s, 1, 0);
        s->expressions[0] = parse_expressions(p, true);
        return s;
    }
    s->kind = STATEMENT_CAPTURE;
    statement_room(p, s, 0, 1);
    if (parse_filters(p, true, &s->filters, &s->n_filters) && parser_expect_block_end(p)) {
        parse_body_to(p, "endset", &s->blocks[0]);
    }
    return s;
}

static Statement *parse_filter_block(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_FILTER);
    statement_room(p, s, 0, 1);
    if (parse_filters(p, false, &s->filters, &s->n_filters) && parser_expect_block_end(p)) {
        parse_body_to(p, "endfilter", &s->blocks[0]);
    }
    return s;
}

static Statement *parse_with(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_WITH);
    GArray *targets = g_array_new(FALSE, FALSE, sizeof(Target)),
           *values = g_array_new(FALSE, FALSE, sizeof(Expression *));
    Block body = {0};
    while (!p->failed && parser_peek(p)->type != TOKEN_BLOCK_END) {
        Target target;
        if ((targets->len > 0 && !parser_expect_op(p, OP(','))) ||
            !parse_target_part(p, false, &target) || !parser_expect_op(p, OP('='))) {
            break;
        }
        Expression *value = parse_expression(p, true);
        g_array_append_val(targets, target);
        g_array_append_val(values, value);
    }
    if (!p->failed && parser_expect_block_end(p)) {
        parse_body_to(p, "endwith", &body);
    }
    s->n_targets = targets->len;
    s->n_expressions = values->len;
    s->targets = statements_copy(p, targets);
    s->expressions = statements_copy(p, values);
    s->n_blocks = 1;
    s->blocks = template_alloc(p->owner, 1, sizeof *s->blocks);
    s->blocks[0] = body;
    return s;
}

static bool parse_parameters(Parser *p, Statement *s)
{
    GArray *parameters = g_array_new(FALSE, FALSE, sizeof(Parameter));
    while (!p->failed && !parser_take_op(p, OP(')'))) {
        Parameter parameter = {.name = parser_expect_identifier(p)};
        bool had_default =
            parameters->len > 0 &&
            g_array_index(parameters, Parameter, parameters->len - 1).fallback != NULL;
        if (!p->failed && parser_take_op(p, OP('='))) {
            parameter.fallback = parse_expression(p, true);
        } else if (had_default) {
            parser_fail(p, "parameter without a default after one with a default");
        }
        g_array_append_val(parameters, parameter);
        if (!p->failed && !parser_is_op(p, OP(')'))) {
            parser_expect_op(p, OP(','));
        }
    }
    s->n_parameters = parameters->len;
    s->parameters = statements_copy(p, parameters);
    return !p->failed;
}

static Statement *parse_macro(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_MACRO);
    statement_room(p, s, 0, 1);
    s->name = parser_expect_identifier(p);
    unsigned loops = p->loops;
    p->loops = 0;
    if (!p->failed && parser_expect_op(p, OP('(')) && parse_parameters(p, s) &&
        parser_expect_block_end(p)) {
        parse_body_to(p, "endmacro", &s->blocks[0]);
    }
    p->loops = loops;
    return s;
}

static Statement *parse_jump(Parser *p, StatementKind kind)
{
    if (p->loops == 0) {
        parser_fail(p, "break or continue outside of a loop");
    }
    return statement_new(p, kind);
}

static Statement *parse_generation(Parser *p)
{
    Statement *s = statement_new(p, STATEMENT_BLOCK);
    statement_room(p, s, 0, 1);
    if (parser_expect_block_end(p)) {
        parse_body_to(p, "endgeneration", &s->blocks[0]);
    }
    return s;
}

/* Behind "{%": one statement up to the end of its last tag. */
static Statement *parse_block_statement(Parser *p)
{
    Statement *s = NULL;
    if (parser_take_name(p, "if")) {
        s = parse_if(p);
    } else if (parser_take_name(p, "for")) {
        s = parse_for(p);
    } else if (parser_take_name(p, "set")) {
        s = parse_set(p);
    } else if (parser_take_name(p, "macro")) {
        s = parse_macro(p);
    } else if (parser_take_name(p, "filter")) {
        s = parse_filter_block(p);
    } else if (parser_take_name(p, "with")) {
        s = parse_with(p);
    } else if (parser_take_name(p, "generation")) {
        s = parse_generation(p);
    } else if (parser_take_name(p, "break")) {
        s = parse_jump(p, STATEMENT_BREAK);
    } else if (parser_take_name(p, "continue")) {
        s = parse_jump(p, STATEMENT_CONTINUE);
    } else {
        Text name = parser_peek(p)->type == TOKEN_NAME ? parser_peek(p)->text : TEXT("(nothing)");
        parser_fail(p, "statement \"%.*s\" is not supported here", (int)MIN(name.length, 32),
                    name.data);
    }
    return p->failed || !parser_expect_block_end(p) ? NULL : s;
}

ChatTemplate *chat_template_parse(const char *source, size_t length, GError **error)
{
    if (length > SOURCE_MAX) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "chat template of %zu bytes is too long; at most %d", length, SOURCE_MAX);
        return NULL;
    }
    g_autoptr(ChatTemplate) t = g_new0(ChatTemplate, 1);
    t->memory = g_ptr_array_new_with_free_func(g_free);
    t->names = g_hash_table_new(g_str_hash, g_str_equal);
    GArray *tokens = template_lex(t, source, length, error);
    if (tokens == NULL) {
        return NULL;
    }
    Parser parser = {.owner = t, .tokens = (const Token *)(void *)tokens->data, .error = error};
    bool ok = parse_body(&parser, NULL, &t->body);
    g_array_free(tokens, TRUE);
    return ok ? g_steal_pointer(&t) : NULL;
}

void chat_template_free(ChatTemplate *t)
{
    if (t == NULL) {
        return;
    }
    g_hash_table_destroy(t->names);
    g_ptr_array_unref(t->memory);
    g_free(t);
}
