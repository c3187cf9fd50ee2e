/* Identity: who this worker is in its cluster, kept in the state directory: key, certificate, the
 * cluster's CA, and where the coordinator is.
 *
 * Files (all 0600, each written aside and renamed): `ca.pem`, `node.conf` (cluster, name, control
 * address), and last `node.pem` (key and certificate in one file, so that a renewed pair changes at
 * once). A directory with node.pem has joined. */
#pragma once

#include <glib.h>
#include <stdbool.h>

typedef struct Identity {
    char *cluster, *name;
    char *control_address; /* host:port of the coordinator's mutual TLS listener */
    char *ca_pem, *certificate_pem, *key_pem;
} Identity;

void identity_clear(Identity *identity); /* erases the key */
void identity_copy(const Identity *from, Identity *to);

/* False + NOT_FOUND when the directory never joined; INVALID naming the file when one is damaged.
 */
bool identity_load(const char *state_dir, Identity *out, GError **error);
bool identity_save(const char *state_dir, const Identity *identity, GError **error);

/* Makes the directory (0700) and takes it for this process; a descriptor that holds the lock, or -1
 * + INVALID when another worker has it. */
int identity_lock(const char *state_dir, GError **error);
