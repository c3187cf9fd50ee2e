/* Any bytes as a job file: refused with a message of one line, or a job that prints as a file of
 * which the same is true. */
#include "proto/config/job_spec.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autoptr(GError) error = NULL;
    g_autoptr(JobSpec) spec = job_spec_parse((const char *)data, size, "job", &error);
    g_assert((spec == NULL) == (error != NULL));
    if (spec == NULL) {
        g_assert(strchr(error->message, '\n') == NULL);
        g_assert(g_utf8_validate(error->message, -1, NULL));
        return 0;
    }
    g_autoptr(GString) printed = g_string_new(NULL);
    job_spec_print(spec, printed);
    g_autoptr(JobSpec) again = job_spec_parse(printed->str, printed->len, "printed", &error);
    g_assert_no_error(error);
    g_autoptr(GString) twice = g_string_new(NULL);
    job_spec_print(again, twice);
    g_assert_cmpstr(printed->str, ==, twice->str);
    return 0;
}
