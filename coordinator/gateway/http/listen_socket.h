/* A listening TCP socket from an address as people write it. Inside http/ only. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <sys/socket.h>

/* "HOST:PORT", "[V6]:PORT"; port 0 = any free. Returns the descriptor (non-blocking, close-on-exec)
 * or -1 + INVALID or IO naming the address. *bound_out: "host:port" as bound, returned on success
 * and failure. */
int listen_socket_open(const char *address, char **bound_out, bool *loopback_out, GError **error);
/* "192.0.2.1" or "2001:db8::1"; returned. */
char *socket_address_text(const struct sockaddr *address);
