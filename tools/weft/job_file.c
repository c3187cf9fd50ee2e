#include "tools/weft/job_file.h"

JobSpec *job_file_read(const char *path, GError **error)
{
    g_autoptr(JobSpec) spec = job_spec_load(path, error);
    if (spec == NULL) {
        return NULL;
    }
    g_autofree char *as_written = g_strdup(spec->model.from);
    g_autofree char *whole = g_canonicalize_filename(path, NULL);
    g_autofree char *directory = g_path_get_dirname(whole);
    job_spec_resolve(spec, directory);
    if (spec->model.from != NULL && !g_file_test(spec->model.from, G_FILE_TEST_EXISTS)) {
        g_free(spec->model.from);
        spec->model.from = g_steal_pointer(&as_written);
    }
    return g_steal_pointer(&spec);
}
