/* Text that others said (a server, a file, a worker), made fit to be printed. */
#pragma once

#include <glib.h>

/* One line of valid UTF-8 without control characters, at most `most` characters and "..." if more
 * was said. length < 0: NUL-ended. Returned. */
char *shown_line(const char *text, gssize length, glong most);
