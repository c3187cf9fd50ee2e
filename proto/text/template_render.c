/* Statements and scopes. Names are looked up from the innermost scope outwards; loops, macros,
 * captures and with open a scope, if does not. Every expression and statement counts a step, work
 * on long values counts more; memory is bounded by the output limit, the C stack by depth. */
#include "proto/text/template_render.h"

#include <string.h>

/* Intermediate values may take this many times the output limit. */
enum { ARENA_PER_OUTPUT = 16, ARENA_BLOCK = 64 * 1024 };

void render_fail(Render *r, const char *format, ...)
{
    if (render_failed(r)) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    r->error = template_error(r->line, g_strdup_vprintf(format, arguments));
    va_end(arguments);
}

void render_fail_undefined(Render *r, Value v)
{
    int length = (int)MIN(v.text.length, 64);
    if (v.text.length == 0) {
        render_fail(r, "a value is undefined");
    } else {
        render_fail(r, "%s%.*s is undefined", v.of_attribute ? "element " : "", length,
                    v.text.data);
    }
}

bool render_step(Render *r, size_t n)
{
    if (render_failed(r)) {
        return false;
    }
    if (n > r->limits.steps - r->steps) {
        render_fail(r, "more than %zu steps", r->limits.steps);
        return false;
    }
    r->steps += n;
    return true;
}

void *render_alloc(Render *r, size_t n, size_t size)
{
    size_t bytes, rounded;
    size_t limit = ARENA_PER_OUTPUT * MIN(r->limits.output_bytes, SIZE_MAX / ARENA_PER_OUTPUT / 2) +
                   ARENA_BLOCK;
    if (render_failed(r)) {
        return NULL;
    }
    if (__builtin_mul_overflow(n, size, &bytes) || __builtin_add_overflow(bytes, 15, &rounded) ||
        rounded > limit - r->arena_bytes) {
        render_fail(r, "more than %zu bytes of memory", limit);
        return NULL;
    }
    rounded &= ~(size_t)15;
    r->arena_bytes += rounded;
    if (rounded > ARENA_BLOCK / 4) {
        void *own = g_malloc0(MAX(rounded, 1));
        g_ptr_array_add(r->blocks, own);
        return own;
    }
    if (rounded > r->free_bytes) {
        r->free_at = g_malloc0(ARENA_BLOCK);
        r->free_bytes = ARENA_BLOCK;
        g_ptr_array_add(r->blocks, r->free_at);
    }
    void *memory = r->free_at;
    r->free_at += rounded;
    r->free_bytes -= rounded;
    return memory;
}

void render_append(Render *r, GString *out, const char *data, size_t length)
{
    if (render_failed(r) || !render_step(r, length / 64)) {
        return;
    }
    if (length > r->limits.output_bytes - MIN(out->len, r->limits.output_bytes)) {
        render_fail(r, "more than %zu bytes of output", r->limits.output_bytes);
        return;
    }
    g_string_append_len(out, data, (gssize)length);
}

static Scope *scope_new(Render *r, Scope *parent)
{
    Scope *scope = render_alloc(r, 1, sizeof *scope);
    if (scope != NULL) {
        scope->parent = parent;
    }
    return scope;
}

void render_set(Render *r, const char *name, Value value)
{
    Scope *scope = r->scope;
    for (unsigned i = 0; i < scope->n; i++) {
        if (scope->variables[i].name == name) {
            scope->variables[i].value = value;
            return;
        }
    }
    if (scope->n == scope->capacity) {
        unsigned capacity = MAX(4, 2 * scope->capacity);
        Variable *variables = render_alloc(r, capacity, sizeof *variables);
        if (variables == NULL) {
            return;
        }
        if (scope->n > 0) {
            memcpy(variables, scope->variables, scope->n * sizeof *variables);
        }
        scope->variables = variables;
        scope->capacity = capacity;
    }
    scope->variables[scope->n++] = (Variable){.name = name, .value = value};
}

typedef enum Flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE } Flow;

static Flow render_block(Render *r, const Block *block);

const Value *render_find(const Render *r, const char *name)
{
    for (const Scope *scope = r->scope; scope != NULL; scope = scope->parent) {
        for (unsigned i = 0; i < scope->n; i++) {
            if (scope->variables[i].name == name) {
                return &scope->variables[i].value;
            }
        }
    }
    return NULL;
}

static void assign(Render *r, const Target *target, Value value);

static void assign_parts(Render *r, const Target *target, Value value)
{
    const ValueList *items = value_iterate(r, value);
    if (items == NULL) {
        return;
    }
    if (items->n != target->n_parts) {
        render_fail(r, "%zu values for %u names", items->n, target->n_parts);
        return;
    }
    for (unsigned i = 0; i < target->n_parts; i++) {
        assign(r, &target->parts[i], items->items[i]);
    }
}

static void assign(Render *r, const Target *target, Value value)
{
    if (render_failed(r)) {
        return;
    }
    if (target->n_parts > 0) {
        assign_parts(r, target, value);
    } else if (target->attribute == NULL) {
        render_set(r, target->name, value);
    } else {
        const Value *space = render_find(r, target->name);
        if (space == NULL || space->kind != VALUE_NAMESPACE) {
            render_fail(r, "attribute of %.64s cannot be set: it is no namespace", target->name);
            return;
        }
        value_dict_put(r, space->dict,
                       value_text((Text){target->attribute, strlen(target->attribute)}), value);
    }
}

/* Output of a block as text. */
static Value render_captured(Render *r, const Block *block)
{
    GString *outer = r->out;
    r->out = g_string_new(NULL);
    render_block(r, block);
    GString *inner = r->out;
    r->out = outer;
    return value_take_buffer(r, inner);
}

static Value apply_filters(Render *r, const PostfixStep *filters, unsigned n, Value value)
{
    for (unsigned i = 0; i < n && !render_failed(r); i++) {
        Arguments arguments = render_arguments(r, &filters[i].arguments);
        if (!render_failed(r)) {
            value = render_apply_filter(r, filters[i].name, value, &arguments);
        }
    }
    return value;
}

static void render_output(Render *r, Value value)
{
    if (render_failed(r)) {
        return;
    }
    if (value.kind == VALUE_STRING) {
        render_append(r, r->out, value.text.data, value.text.length);
    } else {
        value_append_repr(r, r->out, value, 0);
    }
}

static Flow render_if(Render *r, const Statement *s)
{
    for (unsigned i = 0; i < s->n_blocks; i++) {
        if (i >= s->n_expressions || value_truth(render_expression(r, s->expressions[i]))) {
            return render_failed(r) ? FLOW_ON : render_block(r, &s->blocks[i]);
        }
    }
    return FLOW_ON;
}

/* The elements that pass the loop's own "if", which sees the targets but not `loop`. */
static const ValueList *loop_select(Render *r, const Statement *s, const ValueList *items)
{
    Scope *outer = r->scope;
    ValueList *kept = value_list_new(r, LIST_LIST, items->n);
    size_t n = 0;
    for (size_t i = 0; i < items->n && !render_failed(r); i++) {
        r->scope = scope_new(r, outer);
        if (r->scope != NULL) {
            assign(r, &s->targets[0], items->items[i]);
            if (value_truth(render_expression(r, s->expressions[1])) && !render_failed(r)) {
                kept->items[n++] = items->items[i];
            }
        }
        r->scope = outer;
    }
    if (kept != NULL) {
        kept->n = n;
    }
    return kept;
}

/* The else part is for loops of which no iteration came to its end: none was there, or each met
 * break or continue, as in Jinja. */
static void render_for(Render *r, const Statement *s)
{
    const ValueList *items = value_iterate(r, render_expression(r, s->expressions[0]));
    if (items != NULL && s->expressions[1] != NULL) {
        items = loop_select(r, s, items);
    }
    LoopState *loop = items != NULL ? render_alloc(r, 1, sizeof *loop) : NULL;
    if (loop == NULL) {
        return;
    }
    const char *loop_name = g_hash_table_lookup(r->source->names, "loop");
    Scope *outer = r->scope;
    loop->items = items;
    Flow flow = FLOW_ON;
    bool completed = false;
    for (; loop->index < items->n && flow != FLOW_BREAK && !render_failed(r); loop->index++) {
        r->scope = scope_new(r, outer);
        if (r->scope == NULL) {
            break;
        }
        if (loop_name != NULL) {
            render_set(r, loop_name, (Value){.kind = VALUE_LOOP, .loop = loop});
        }
        assign(r, &s->targets[0], items->items[loop->index]);
        flow = render_block(r, &s->blocks[0]);
        completed |= flow == FLOW_ON;
    }
    r->scope = outer;
    if (!completed && !render_failed(r)) {
        render_block(r, &s->blocks[1]);
    }
}

/* with: values are computed outside, then bound inside. */
static Flow render_with(Render *r, const Statement *s)
{
    Scope *outer = r->scope, *inner = scope_new(r, outer);
    for (unsigned i = 0; i < s->n_targets && !render_failed(r); i++) {
        Value value = render_expression(r, s->expressions[i]);
        r->scope = inner;
        assign(r, &s->targets[i], value);
        r->scope = outer;
    }
    Flow flow = FLOW_ON;
    if (!render_failed(r)) {
        r->scope = inner;
        flow = render_block(r, &s->blocks[0]);
        r->scope = outer;
    }
    return flow;
}

static Value render_capture(Render *r, const Statement *s)
{
    Scope *outer = r->scope;
    r->scope = scope_new(r, outer);
    Value value = r->scope != NULL ? render_captured(r, &s->blocks[0]) : value_none();
    r->scope = outer;
    return apply_filters(r, s->filters, s->n_filters, value);
}

static void define_macro(Render *r, const Statement *s)
{
    MacroValue *macro = render_alloc(r, 1, sizeof *macro);
    if (macro != NULL) {
        *macro = (MacroValue){.definition = s, .scope = r->scope};
        render_set(r, s->name, (Value){.kind = VALUE_MACRO, .macro = macro});
    }
}

static Flow render_statement(Render *r, const Statement *s)
{
    r->line = s->line;
    switch (s->kind) {
    case STATEMENT_TEXT:
        render_append(r, r->out, s->text.data, s->text.length);
        return FLOW_ON;
    case STATEMENT_OUTPUT:
        render_output(r, render_expression(r, s->expressions[0]));
        return FLOW_ON;
    case STATEMENT_IF:
        return render_if(r, s);
    case STATEMENT_FOR:
        render_for(r, s);
        return FLOW_ON;
    case STATEMENT_SET:
        assign(r, &s->targets[0], render_expression(r, s->expressions[0]));
        return FLOW_ON;
    case STATEMENT_CAPTURE:
        assign(r, &s->targets[0], render_capture(r, s));
        return FLOW_ON;
    case STATEMENT_FILTER:
        render_output(r, render_capture(r, s));
        return FLOW_ON;
    case STATEMENT_WITH:
        return render_with(r, s);
    case STATEMENT_MACRO:
        define_macro(r, s);
        return FLOW_ON;
    case STATEMENT_BLOCK:
        return render_block(r, &s->blocks[0]);
    case STATEMENT_BREAK:
        return FLOW_BREAK;
    case STATEMENT_CONTINUE:
        return FLOW_CONTINUE;
    }
    return FLOW_ON;
}

static Flow render_block(Render *r, const Block *block)
{
    if (r->block_depth >= r->limits.depth) {
        render_fail(r, "blocks and macros are nested deeper than %u levels", r->limits.depth);
        return FLOW_ON;
    }
    r->block_depth++;
    Flow flow = FLOW_ON;
    for (unsigned i = 0; i < block->n && flow == FLOW_ON && render_step(r, 1); i++) {
        flow = render_statement(r, block->statements[i]);
    }
    r->block_depth--;
    return flow;
}

void render_statements(Render *r, const Block *block)
{
    render_block(r, block);
}

static gssize macro_parameter(const Statement *s, const char *name)
{
    for (unsigned i = 0; i < s->n_parameters; i++) {
        if (s->parameters[i].name == name) {
            return (gssize)i;
        }
    }
    return -1;
}

/* Binds arguments in the macro's own scope; defaults are computed there, from left to right. */
static void macro_bind(Render *r, const Statement *s, const Arguments *arguments)
{
    if (arguments->n_positional > s->n_parameters) {
        render_fail(r, "macro %.64s takes %u arguments, not %u", s->name, s->n_parameters,
                    arguments->n_positional);
        return;
    }
    bool *bound = render_alloc(r, MAX(s->n_parameters, 1), sizeof *bound);
    if (bound == NULL) {
        return;
    }
    for (unsigned i = 0; i < arguments->n_positional; i++) {
        render_set(r, s->parameters[i].name, arguments->positional[i]);
        bound[i] = true;
    }
    for (unsigned i = 0; i < arguments->n_named; i++) {
        gssize at = macro_parameter(s, arguments->names[i]);
        if (at < 0 || bound[at]) {
            render_fail(r, "macro %.64s has no free parameter %.64s", s->name, arguments->names[i]);
            return;
        }
        render_set(r, s->parameters[at].name, arguments->named[i]);
        bound[at] = true;
    }
    for (unsigned i = 0; i < s->n_parameters && !render_failed(r); i++) {
        const Parameter *parameter = &s->parameters[i];
        if (!bound[i]) {
            Value missing = value_undefined((Text){parameter->name, strlen(parameter->name)});
            render_set(r, parameter->name,
                       parameter->fallback != NULL ? render_expression(r, parameter->fallback)
                                                   : missing);
        }
    }
}

Value render_macro(Render *r, const MacroValue *macro, const Arguments *arguments)
{
    const Statement *s = macro->definition;
    Scope *caller = r->scope;
    r->scope = scope_new(r, macro->scope);
    Value value = value_none();
    if (r->scope != NULL) {
        macro_bind(r, s, arguments);
        if (!render_failed(r)) {
            value = render_captured(r, &s->blocks[0]);
        }
    }
    r->scope = caller;
    return value;
}
