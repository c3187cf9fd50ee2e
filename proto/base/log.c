#include "proto/base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

void log_line(Log *log, LogLevel level, const char *format, ...)
{
    if (log == NULL || level < log->min_level) {
        return;
    }
    va_list args;
    va_start(args, format);
    g_autofree char *line = g_strdup_vprintf(format, args);
    va_end(args);
    /* One fact, one line: a newline inside a name or message must not forge a second record. */
    for (char *c = line; *c != '\0'; c++) {
        if ((unsigned char)*c < 0x20 || *c == 0x7f) {
            *c = ' ';
        }
    }
    log->write(log, level, line);
}

static void stderr_write(Log *self, LogLevel level, const char *line)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    static const int priorities[] = {7, 6, 4, 3}; /* sd-daemon(3) */
    g_autofree char *text = NULL;
    if (g_getenv("JOURNAL_STREAM") != NULL) {
        text = g_strdup_printf("<%d>%s\n", priorities[level], line);
    } else {
        struct timespec now;
        struct tm utc;
        char stamp[32];
        clock_gettime(CLOCK_REALTIME, &now);
        gmtime_r(&now.tv_sec, &utc);
        strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%S", &utc);
        text =
            g_strdup_printf("%s.%03ldZ %s: %s\n", stamp, now.tv_nsec / 1000000, names[level], line);
    }
    /* One write per line, so that lines of several threads do not mix. */
    fputs(text, stderr);
}

Log *log_stderr(void)
{
    static Log log = {.min_level = LOG_LEVEL_INFO, .write = stderr_write};
    return &log;
}
