#include "transport/rpc/grpc/server_identity.h"

#include "proto/base/error.h"
#include "transport/crypto/x509.h"

#include <string.h>

struct ServerIdentity {
    GMutex lock;
    char *ca_pem, *certificate_pem, *key_pem;
    bool require_client_certificate;
    bool taken; /* gRPC has what is here */
};

ServerIdentity *server_identity_new(const RpcCredentials *credentials, GError **error)
{
    ServerIdentity *identity = g_new0(ServerIdentity, 1);
    g_mutex_init(&identity->lock);
    identity->require_client_certificate = credentials->require_client_certificate;
    if (!server_identity_set(identity, credentials, error)) {
        server_identity_free(identity);
        return NULL;
    }
    return identity;
}

bool server_identity_set(ServerIdentity *identity, const RpcCredentials *credentials,
                         GError **error)
{
    if (!credentials_check(credentials, error)) {
        return false;
    }
    if (credentials->certificate_pem == NULL) {
        g_set_error_literal(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                            "a TLS server takes a certificate and its key");
        return false;
    }
    char *ca = g_strdup(credentials->ca_pem);
    char *certificate = g_strdup(credentials->certificate_pem);
    char *key = g_strdup(credentials->key_pem);
    g_mutex_lock(&identity->lock);
    char *old_ca = identity->ca_pem, *old_certificate = identity->certificate_pem,
         *old_key = identity->key_pem;
    identity->ca_pem = ca;
    identity->certificate_pem = certificate;
    identity->key_pem = key;
    identity->taken = false;
    g_mutex_unlock(&identity->lock);
    g_free(old_ca);
    g_free(old_certificate);
    x509_free_key(old_key);
    return true;
}

/* Called by gRPC for the first time while the port is bound, then in each handshake. */
static grpc_ssl_certificate_config_reload_status fetch(void *user,
                                                       grpc_ssl_server_certificate_config **config)
{
    ServerIdentity *identity = user;
    g_mutex_lock(&identity->lock);
    const bool fresh = !identity->taken;
    if (fresh) {
        grpc_ssl_pem_key_cert_pair pair = {identity->key_pem, identity->certificate_pem};
        *config = grpc_ssl_server_certificate_config_create(identity->ca_pem, &pair, 1);
        identity->taken = true;
    }
    g_mutex_unlock(&identity->lock);
    return fresh ? GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW
                 : GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
}

grpc_server_credentials *server_identity_credentials(ServerIdentity *identity)
{
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            identity->require_client_certificate
                ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            fetch, identity));
}

void server_identity_free(ServerIdentity *identity)
{
    if (identity == NULL) {
        return;
    }
    g_mutex_clear(&identity->lock);
    g_free(identity->ca_pem);
    g_free(identity->certificate_pem);
    x509_free_key(identity->key_pem);
    g_free(identity);
}
