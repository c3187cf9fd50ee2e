/* Stand-ins for transport/crypto/x509 in the coordinator's hands (`--wrap`): the rpc of a simulated
 * cluster knows peers by the text of rpc_inproc_certificate(), and real signatures would take a
 * third of a seed's time. */
#include "transport/crypto/x509.h"
#include "transport/rpc/inproc/inproc.h"
#include "tests/sim/whole.h"

#include <string.h>

char *__wrap_x509_new_key(GError **error);
char *__wrap_x509_new_ca(const char *ca_key_pem, const char *cluster, int64_t now_us,
                         GError **error);
char *__wrap_x509_new_request(const char *key_pem, const char *wished_name, GError **error);
char *__wrap_x509_sign(const char *ca_pem, const char *ca_key_pem, const char *request_pem,
                       const X509Grant *grant, char **serial_hex_out, GError **error);
bool __wrap_x509_public_key_hash(const char *certificate_pem, uint8_t out[32], GError **error);

char *__wrap_x509_new_key(GError **error)
{
    return g_strdup("key");
}

char *__wrap_x509_new_ca(const char *ca_key_pem, const char *cluster, int64_t now_us,
                         GError **error)
{
    return g_strdup(WHOLE_CA);
}

char *__wrap_x509_new_request(const char *key_pem, const char *wished_name, GError **error)
{
    return g_strdup("request");
}

char *__wrap_x509_sign(const char *ca_pem, const char *ca_key_pem, const char *request_pem,
                       const X509Grant *grant, char **serial_hex_out, GError **error)
{
    static unsigned n;
    g_autofree char *serial = g_strdup_printf("%08x", ++n);
    g_autofree char *text = rpc_inproc_certificate(grant->name, grant->role, serial);
    if (serial_hex_out) {
        *serial_hex_out = g_steal_pointer(&serial);
    }
    return g_strconcat(text, "\n", NULL);
}

bool __wrap_x509_public_key_hash(const char *certificate_pem, uint8_t out[32], GError **error)
{
    memset(out, 0, 32);
    return true;
}
