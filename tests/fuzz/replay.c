/* Feeds every file of its arguments (files, or folders of files) to a fuzz target once: how the
 * committed corpus runs in every test run. */
#include <glib.h>
#include <stdint.h>
#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Further inputs made from this one, where the target has such (without_fields.c); their number. */
unsigned replay_variants(const uint8_t *data, size_t size) __attribute__((weak));

static unsigned replay_file(const char *path)
{
    g_autofree char *data = NULL;
    gsize size;
    g_autoptr(GError) error = NULL;
    if (!g_file_get_contents(path, &data, &size, &error)) {
        g_error("%s", error->message);
    }
    /* An exact copy, so that a checker sees every byte read past the end. */
    uint8_t *copy = g_memdup2(data, size);
    LLVMFuzzerTestOneInput(copy, size);
    const unsigned n_variants = replay_variants != NULL ? replay_variants(copy, size) : 0;
    g_free(copy);
    return 1 + n_variants;
}

static unsigned replay(const char *path)
{
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    if (dir == NULL) {
        return replay_file(path);
    }
    unsigned n = 0;
    for (const char *name; (name = g_dir_read_name(dir)) != NULL;) {
        g_autofree char *child = g_build_filename(path, name, NULL);
        n += replay(child);
    }
    return n;
}

int main(int argc, char **argv)
{
    unsigned n = 0;
    for (int i = 1; i < argc; i++) {
        n += replay(argv[i]);
    }
    printf("%u inputs replayed\n", n);
    return n > 0 ? 0 : 1;
}
