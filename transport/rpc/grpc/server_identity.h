/* What a TLS server shows to new connections: certificate, key and the CA of its clients, exchanged
 * while it runs. gRPC asks for it in each handshake, on its own threads. */
#pragma once

#include "transport/rpc/grpc/args.h"

typedef struct ServerIdentity ServerIdentity;

/* Texts are copied. NULL + INVALID naming the part that cannot be used. */
ServerIdentity *server_identity_new(const RpcCredentials *credentials, GError **error);
/* What they must be for it to be used: as in new; nothing changes on false. Any thread. */
bool server_identity_set(ServerIdentity *identity, const RpcCredentials *credentials,
                         GError **error);
/* The identity must outlive the server that they are given to. Returned. */
grpc_server_credentials *server_identity_credentials(ServerIdentity *identity);
void server_identity_free(ServerIdentity *identity); /* NULL-safe; erases the key */
