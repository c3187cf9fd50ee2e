/* Fail points of test builds (meson option failpoints): WEFT_FAILPOINT="name=arg,name2" in the
 * environment or failpoint_set(). Without the option every test is a constant false. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef WEFT_FAILPOINTS
/* True while the point is set; *arg_out (may be NULL) gets its argument or 0. The environment value
 * "name=file:PATH" is set exactly while PATH exists, so that a test can switch it in a live daemon.
 */
bool failpoint(const char *name, int64_t *arg_out);
void failpoint_set(const char *name, bool on, int64_t arg);
#else
static inline bool failpoint(const char *name, int64_t *arg_out)
{
    (void)name;
    (void)arg_out;
    return false;
}
#endif
