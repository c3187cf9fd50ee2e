/* Taking a cluster's CA certificate from a server that nobody vouches for yet (DESIGN 7.5): the
 * only trust is the hash of the CA's public key, which the operator carried over. The handshake
 * checks nothing; what is returned is checked against it. */
#include "transport/crypto/x509.h"

#include "proto/base/error.h"

#include <errno.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct Fetch {
    const char *address;
    int fd;
    int64_t deadline_us; /* boot_us(): this call blocks and lives on no Loop */
    SSL_CTX *context;
    SSL *ssl;
} Fetch;

static int64_t boot_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void fetch_clear(Fetch *fetch)
{
    SSL_free(fetch->ssl);
    SSL_CTX_free(fetch->context);
    if (fetch->fd >= 0) {
        close(fetch->fd);
    }
}

static bool unreachable(const Fetch *fetch, const char *why, GError **error)
{
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_UNREACHABLE,
                "cannot get the CA certificate from %s: %s; is it the join address of a running "
                "coordinator?",
                fetch->address, why);
    return false;
}

/* 0 once the socket is ready, else an errno. */
static int wait_ready(const Fetch *fetch, short events)
{
    for (;;) {
        int64_t left_ms = (fetch->deadline_us - boot_us()) / 1000;
        struct pollfd poller = {.fd = fetch->fd, .events = events};
        int n = left_ms > 0 ? poll(&poller, 1, (int)MIN(left_ms, G_MAXINT)) : 0;
        if (n > 0) {
            return 0;
        }
        if (n == 0) {
            return ETIMEDOUT;
        }
        if (errno != EINTR) {
            return errno;
        }
    }
}

static int connect_one(Fetch *fetch, const struct addrinfo *to)
{
    fetch->fd = socket(to->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fetch->fd < 0) {
        return errno;
    }
    int failure = connect(fetch->fd, to->ai_addr, to->ai_addrlen) == 0 ? 0 : errno;
    if (failure == EINPROGRESS) {
        failure = wait_ready(fetch, POLLOUT);
        socklen_t size = sizeof failure;
        if (failure == 0) {
            getsockopt(fetch->fd, SOL_SOCKET, SO_ERROR, &failure, &size);
        }
    }
    if (failure != 0) {
        close(fetch->fd);
        fetch->fd = -1;
    }
    return failure;
}

static bool split_address(const char *address, char **host, char **port)
{
    const char *colon = strrchr(address, ':');
    if (!colon || colon == address || !colon[1]) {
        return false;
    }
    bool bracketed = address[0] == '[' && colon[-1] == ']';
    *host = bracketed ? g_strndup(address + 1, (gsize)(colon - address - 2))
                      : g_strndup(address, (gsize)(colon - address));
    *port = g_strdup(colon + 1);
    return true;
}

static bool connect_any(Fetch *fetch, GError **error)
{
    g_autofree char *host = NULL, *port = NULL;
    if (!split_address(fetch->address, &host, &port)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID, "\"%s\" is no address; write host:port",
                    fetch->address);
        return false;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *list = NULL;
    int failure = getaddrinfo(host, port, &hints, &list);
    if (failure != 0) {
        return unreachable(fetch, gai_strerror(failure), error);
    }
    for (struct addrinfo *to = list; to && fetch->fd < 0; to = to->ai_next) {
        failure = connect_one(fetch, to);
    }
    freeaddrinfo(list);
    return fetch->fd >= 0 || unreachable(fetch, g_strerror(failure), error);
}

static bool shake_hands(Fetch *fetch, GError **error)
{
    static const unsigned char alpn[] = {2, 'h', '2'};
    fetch->context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_min_proto_version(fetch->context, TLS1_2_VERSION);
    SSL_CTX_set_verify(fetch->context, SSL_VERIFY_NONE, NULL);
    fetch->ssl = SSL_new(fetch->context);
    SSL_set_alpn_protos(fetch->ssl, alpn, sizeof alpn);
    SSL_set_fd(fetch->ssl, fetch->fd);
    for (;;) {
        int result = SSL_connect(fetch->ssl);
        if (result == 1) {
            return true;
        }
        int wants = SSL_get_error(fetch->ssl, result);
        if (wants != SSL_ERROR_WANT_READ && wants != SSL_ERROR_WANT_WRITE) {
            ERR_clear_error();
            return unreachable(fetch, "no TLS there", error);
        }
        int failure = wait_ready(fetch, wants == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT);
        if (failure != 0) {
            return unreachable(fetch, g_strerror(failure), error);
        }
    }
}

static char *pem_of(X509 *certificate)
{
    BIO *bio = BIO_new(BIO_s_mem());
    char *data = NULL, *pem = NULL;
    if (PEM_write_bio_X509(bio, certificate)) {
        long size = BIO_get_mem_data(bio, &data);
        pem = g_strndup(data, (gsize)MAX(size, 0));
    }
    BIO_free(bio);
    return pem;
}

static char *find_in_chain(const Fetch *fetch, const uint8_t hash[32])
{
    STACK_OF(X509) *chain = SSL_get_peer_cert_chain(fetch->ssl);
    for (int i = 0; i < sk_X509_num(chain); i++) {
        X509 *certificate = sk_X509_value(chain, i);
        uint8_t found[32];
        g_autofree char *pem = pem_of(certificate);
        if (X509_check_ca(certificate) > 0 && pem && x509_public_key_hash(pem, found, NULL) &&
            memcmp(found, hash, sizeof found) == 0) {
            return g_steal_pointer(&pem);
        }
    }
    return NULL;
}

char *x509_fetch_ca(const char *address, const uint8_t hash[32], int timeout_ms, GError **error)
{
    Fetch fetch = {.address = address, .fd = -1};
    fetch.deadline_us = boot_us() + (int64_t)timeout_ms * 1000;
    char *pem = NULL;
    if (connect_any(&fetch, error) && shake_hands(&fetch, error)) {
        pem = find_in_chain(&fetch, hash);
        if (!pem) {
            g_autofree char *wanted = x509_format_hash(hash);
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_DENIED,
                        "the server at %s is not of the cluster with CA hash %s; check the address "
                        "and the hash",
                        address, wanted);
        }
    }
    fetch_clear(&fetch);
    return pem;
}
