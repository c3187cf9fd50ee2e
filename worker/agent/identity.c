#include "worker/agent/identity.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define GROUP "node"
#define BEGIN_CERTIFICATE "-----BEGIN CERTIFICATE-----"

void identity_clear(Identity *identity)
{
    g_free(identity->cluster);
    g_free(identity->name);
    g_free(identity->control_address);
    g_free(identity->ca_pem);
    g_free(identity->certificate_pem);
    x509_free_key(identity->key_pem);
    *identity = (Identity){0};
}

void identity_copy(const Identity *from, Identity *to)
{
    *to = (Identity){g_strdup(from->cluster),         g_strdup(from->name),
                     g_strdup(from->control_address), g_strdup(from->ca_pem),
                     g_strdup(from->certificate_pem), g_strdup(from->key_pem)};
}

/* The node.pem text is key, then certificate. */
static bool split_pem(const char *path, const char *text, Identity *out, GError **error)
{
    const char *certificate = strstr(text, BEGIN_CERTIFICATE);
    X509Info info = {0};
    if (!certificate || certificate == text || !x509_parse(certificate, &info, NULL)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: no key with a certificate: remove it and join again", path);
        return false;
    }
    x509_info_clear(&info);
    out->key_pem = g_strndup(text, (gsize)(certificate - text));
    out->certificate_pem = g_strdup(certificate);
    return true;
}

static bool load_conf(const char *path, Identity *out, GError **error)
{
    g_autoptr(GKeyFile) file = g_key_file_new();
    g_autoptr(GError) why = NULL;
    if (g_key_file_load_from_file(file, path, G_KEY_FILE_NONE, &why)) {
        out->cluster = g_key_file_get_string(file, GROUP, "cluster", NULL);
        out->name = g_key_file_get_string(file, GROUP, "name", NULL);
        out->control_address = g_key_file_get_string(file, GROUP, "control_address", NULL);
    }
    if (!out->cluster || !out->name || !out->control_address) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: %s: remove the state directory's files and join again", path,
                    why ? why->message : "cluster, name or control_address is missing");
        return false;
    }
    return true;
}

static bool load_parts(const char *state_dir, const char *pem_path, const char *pem, Identity *out,
                       GError **error)
{
    g_autofree char *ca_path = g_build_filename(state_dir, "ca.pem", NULL);
    g_autofree char *conf_path = g_build_filename(state_dir, "node.conf", NULL);
    g_autoptr(GError) why = NULL;
    if (!g_file_get_contents(ca_path, &out->ca_pem, NULL, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "%s: %s: remove the state directory's files and join again", ca_path,
                    why->message);
        return false;
    }
    return split_pem(pem_path, pem, out, error) && load_conf(conf_path, out, error);
}

bool identity_load(const char *state_dir, Identity *out, GError **error)
{
    *out = (Identity){0};
    g_autofree char *path = g_build_filename(state_dir, "node.pem", NULL);
    char *pem = NULL;
    g_autoptr(GError) why = NULL;
    if (!g_file_get_contents(path, &pem, NULL, &why)) {
        bool absent = g_error_matches(why, G_FILE_ERROR, G_FILE_ERROR_NOENT);
        g_set_error(error, WEFT_ERROR, absent ? WEFT_ERROR_NOT_FOUND : WEFT_ERROR_IO, "%s: %s",
                    path, why->message);
        return false;
    }
    bool ok = load_parts(state_dir, path, pem, out, error);
    x509_free_key(pem);
    if (!ok) {
        identity_clear(out);
    }
    return ok;
}

static bool save(const char *state_dir, const char *name, const char *text, GError **error)
{
    g_autofree char *path = g_build_filename(state_dir, name, NULL);
    g_autoptr(GError) why = NULL;
    if (!g_file_set_contents_full(path, text, -1,
                                  G_FILE_SET_CONTENTS_CONSISTENT | G_FILE_SET_CONTENTS_DURABLE,
                                  0600, &why)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s: %s", path, why->message);
        return false;
    }
    return true;
}

bool identity_save(const char *state_dir, const Identity *identity, GError **error)
{
    g_autoptr(GKeyFile) file = g_key_file_new();
    g_key_file_set_string(file, GROUP, "cluster", identity->cluster);
    g_key_file_set_string(file, GROUP, "name", identity->name);
    g_key_file_set_string(file, GROUP, "control_address", identity->control_address);
    g_autofree char *conf = g_key_file_to_data(file, NULL, NULL);
    char *pem =
        g_strconcat(identity->key_pem, g_str_has_suffix(identity->key_pem, "\n") ? "" : "\n",
                    identity->certificate_pem, NULL);
    bool ok = save(state_dir, "ca.pem", identity->ca_pem, error) &&
              save(state_dir, "node.conf", conf, error) && save(state_dir, "node.pem", pem, error);
    x509_free_key(pem);
    return ok;
}

int identity_lock(const char *state_dir, GError **error)
{
    g_autofree char *path = g_build_filename(state_dir, "lock", NULL);
    if (g_mkdir_with_parents(state_dir, 0700) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "state directory %s: %s: give a writable --state", state_dir,
                    g_strerror(errno));
        return -1;
    }
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s: %s: give a writable --state", path,
                    g_strerror(errno));
        return -1;
    }
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        g_set_error(
            error, WEFT_ERROR, WEFT_ERROR_FAILED,
            "state directory %s is used by another weft-worker: stop it or give another --state",
            state_dir);
        close(fd);
        return -1;
    }
    return fd;
}
