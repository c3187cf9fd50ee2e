/* Log seam: libraries return errors, daemons log, once. A Log is passed to whoever may log.
 * Lines: lower case, one fact, value after its noun ("worker 7 lost after 3000 ms"). No prompt,
 * token or key is ever logged. */
#pragma once

#include <glib.h>

typedef enum LogLevel { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR } LogLevel;

typedef struct Log Log;
struct Log {
    LogLevel min_level;
    /* Any thread; `line` is borrowed, without newline. */
    void (*write)(Log *self, LogLevel level, const char *line);
};

void log_line(Log *log /* NULL: dropped */, LogLevel level, const char *format, ...)
    G_GNUC_PRINTF(3, 4);
#define log_info(log, ...) log_line((log), LOG_LEVEL_INFO, __VA_ARGS__)
#define log_warn(log, ...) log_line((log), LOG_LEVEL_WARN, __VA_ARGS__)
#define log_error(log, ...) log_line((log), LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_debug(log, ...) log_line((log), LOG_LEVEL_DEBUG, __VA_ARGS__)

/* Lines to stderr with time and level ("<6>" prefixes under systemd's journal). */
Log *log_stderr(void);
