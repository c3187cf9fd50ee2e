/* weft: the operator's and user's command. One verb a file; the verb table below feeds the parser,
 * --help and completion. */
#include "tools/weft/cli.h"
#include "tools/weft/load.h"

#include "proto/base/error.h"

#include <stdio.h>
#include <string.h>

static void print_overview(FILE *out)
{
    fprintf(out, "usage: weft VERB [options] [arguments]\n\n");
    for (const Verb *const *v = VERBS; *v != NULL; v++) {
        fprintf(out, "  %-12s %s\n", (*v)->name, (*v)->summary);
    }
    fprintf(out, "\n`weft VERB --help` has the options; --version the release.\n");
}

static void print_verb(const Verb *verb)
{
    g_autoptr(GString) text = g_string_new(NULL);
    options_help(verb->options, text);
    printf("usage: weft %s %s\n%s\n\n%s", verb->name, verb->arguments, verb->summary, text->str);
}

static const Verb *find_name(const char *name)
{
    for (const Verb *const *v = VERBS; *v != NULL; v++) {
        if (strcmp((*v)->name, name) == 0) {
            return *v;
        }
    }
    return NULL;
}

/* A verb of two words goes before one of its first; *n_words: how many it took. */
static const Verb *find_verb(int argc, char **argv, int *n_words)
{
    g_autofree char *two = argc > 2 ? g_strjoin(" ", argv[1], argv[2], NULL) : NULL;
    const Verb *verb = two != NULL ? find_name(two) : NULL;
    *n_words = verb != NULL ? 2 : 1;
    return verb != NULL ? verb : find_name(argv[1]);
}

static int unknown_verb(const char *name)
{
    g_autoptr(GPtrArray) names = g_ptr_array_new();
    for (const Verb *const *v = VERBS; *v != NULL; v++) {
        g_ptr_array_add(names, (gpointer)(*v)->name);
    }
    g_ptr_array_add(names, NULL);
    const char *near = options_nearest(name, (const char *const *)names->pdata);
    if (near != NULL) {
        fprintf(stderr, "weft: unknown verb '%s': did you mean '%s'?\n", name, near);
    } else {
        fprintf(stderr, "weft: unknown verb '%s': `weft --help` lists them\n", name);
    }
    return 2;
}

static int run_verb(const Verb *verb, int argc, char **argv)
{
    g_autofree char *values =
        g_malloc0(verb->values_size); /* the verb's structure, CommonOptions first */
    g_autoptr(GPtrArray) rest = g_ptr_array_new();
    GError *error = NULL;
    bool help = false;
    int code = 0;
    if (verb->defaults != NULL) {
        verb->defaults(values);
    }
    if (!options_parse(verb->options, values, argc, argv, rest, &help, &error)) {
        code = cli_fail(error);
    } else if (help) {
        print_verb(verb);
    } else {
        code = verb->run(verb, values, rest);
    }
    options_clear(verb->options, values);
    return code;
}

int main(int argc, char **argv)
{
    daemon_prepare();
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_overview(argc < 2 ? stderr : stdout);
        return argc < 2 ? 2 : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        g_autofree char *rpc = rpc_libraries(), *load = load_library(),
                        *libraries =
                            g_strdup_printf("%s, jansson %s, %s", rpc, jansson_version_str(), load);
        daemon_print_version("weft", libraries);
        return 0;
    }
    int n_words;
    const Verb *verb = find_verb(argc, argv, &n_words);
    return verb != NULL ? run_verb(verb, argc - n_words, argv + n_words) : unknown_verb(argv[1]);
}
