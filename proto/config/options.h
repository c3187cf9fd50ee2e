/* Options: one table a program or verb, read by the parser, --help, the configuration file and
 * shell completion (CONTRACT). Precedence: command line > environment > configuration file > the
 * default that is in the structure already. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum OptionType {
    OPTION_FLAG,     /* bool */
    OPTION_STRING,   /* char *, owned by the structure (options_clear) */
    OPTION_STRINGS,  /* GPtrArray of char *; may be repeated */
    OPTION_COUNT,    /* uint64_t, "32k" */
    OPTION_SIZE,     /* uint64_t bytes, "8G" */
    OPTION_DURATION, /* int64_t us, "5s" */
    OPTION_NUMBER,   /* double */
    OPTION_CHOICE,   /* uint32_t: the place of the value among `choices` */
} OptionType;

typedef struct Option {
    const char *name; /* long name without dashes; also the key in the configuration file */
    char letter;      /* 0 = none */
    OptionType type;
    size_t offset;        /* of the field in the structure */
    const char *argument; /* "FILE", shown by --help */
    const char *help;
    const char *environment; /* variable, or NULL */
    double least, most;      /* for COUNT and NUMBER, inclusive; both 0 = any */
    const char *choices;     /* "auto|generic|avx2", or NULL */
    bool defines_result;     /* part of the definition (NUMERICS, "Definition") */
} Option;

/* Parses argv[1..) up to `--`; words that are no options are left, in order, in *rest (char *,
 * borrowed from argv). Reads the environment first and, where the table has an option "config"
 * (OPTION_STRING) and it was given, that YAML file before it. All errors of a YAML file are
 * reported at once, with lines and near names. *help_out: --help or -h was there (nothing else is
 * checked then). */
bool options_parse(const Option *table, void *values, int argc, char **argv, GPtrArray *rest,
                   bool *help_out, GError **error);
/* Sets one field from a text; INVALID names the option, the text and what it may be. */
bool options_set(const Option *option, void *values, const char *text, GError **error);
void options_clear(const Option *table, void *values);
/* Appends the options' lines of a help text. */
void options_help(const Option *table, GString *out);
/* The nearest name within a third of its length, or NULL. names: NULL-ended. */
const char *options_nearest(const char *word, const char *const *names);
