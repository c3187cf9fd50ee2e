/* Rows are GVariants in little-endian order: a type string, a strict reader
 * (g_variant_is_normal_form) and no parser of our own. */
#include "coordinator/store/records.h"

#include "proto/base/error.h"

#include <string.h>

#define TOKEN_TYPE "(sxu)"
#define MEMBER_TYPE "(xbbbs)"
#define CERTIFICATE_TYPE "(ssxb)"
#define JOB_TYPE "(suuuuuayayat)"
#define COUNTER_TYPE "t"
#define API_KEY_TYPE "(sx)"
#define SUBMISSION_TYPE "(ssx)"

static GVariant *little_endian(GVariant *value /* taken */)
{
    if (G_BYTE_ORDER == G_LITTLE_ENDIAN) {
        return value;
    }
    GVariant *swapped = g_variant_byteswap(value);
    g_variant_unref(value);
    return swapped;
}

static GBytes *record_pack(GVariant *value /* floating */)
{
    g_autoptr(GVariant) stored = little_endian(g_variant_ref_sink(value));
    return g_variant_get_data_as_bytes(stored);
}

static GVariant *record_read(const char *key, GBytes *bytes, const char *type, GError **error)
{
    GVariant *value =
        g_variant_ref_sink(g_variant_new_from_bytes(G_VARIANT_TYPE(type), bytes, FALSE));
    if (!g_variant_is_normal_form(value)) {
        g_variant_unref(value);
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO,
                    "state row %s of %zu bytes is damaged (expected %s): restore the state "
                    "directory from a copy, or start with a new one",
                    key, g_bytes_get_size(bytes), type);
        return NULL;
    }
    return little_endian(value);
}

GBytes *token_record_pack(const TokenRecord *r)
{
    return record_pack(g_variant_new(TOKEN_TYPE, r->role, (gint64)r->expires_us, r->uses_left));
}

bool token_record_read(const char *key, GBytes *bytes, TokenRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, TOKEN_TYPE, error);
    if (value == NULL) {
        return false;
    }
    gint64 expires;
    g_variant_get(value, TOKEN_TYPE, &out->role, &expires, &out->uses_left);
    out->expires_us = expires;
    return true;
}

void token_record_clear(TokenRecord *r)
{
    g_clear_pointer(&r->role, g_free);
}

GBytes *api_key_record_pack(const ApiKeyRecord *r)
{
    return record_pack(g_variant_new(API_KEY_TYPE, r->name, (gint64)r->created_us));
}

bool api_key_record_read(const char *key, GBytes *bytes, ApiKeyRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, API_KEY_TYPE, error);
    if (value == NULL) {
        return false;
    }
    gint64 created;
    g_variant_get(value, API_KEY_TYPE, &out->name, &created);
    out->created_us = created;
    return true;
}

void api_key_record_clear(ApiKeyRecord *r)
{
    g_clear_pointer(&r->name, g_free);
}

GBytes *submission_record_pack(const SubmissionRecord *r)
{
    return record_pack(g_variant_new(SUBMISSION_TYPE, r->spec, r->owner, (gint64)r->submitted_us));
}

bool submission_record_read(const char *key, GBytes *bytes, SubmissionRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, SUBMISSION_TYPE, error);
    if (value == NULL) {
        return false;
    }
    gint64 submitted;
    g_variant_get(value, SUBMISSION_TYPE, &out->spec, &out->owner, &submitted);
    out->submitted_us = submitted;
    return true;
}

void submission_record_clear(SubmissionRecord *r)
{
    g_clear_pointer(&r->spec, g_free);
    g_clear_pointer(&r->owner, g_free);
}

GBytes *member_record_pack(const MemberRecord *r)
{
    return record_pack(g_variant_new(MEMBER_TYPE, (gint64)r->joined_us, (gboolean)r->draining,
                                     (gboolean)r->revoked, (gboolean)r->attached,
                                     r->reason != NULL ? r->reason : ""));
}

bool member_record_read(const char *key, GBytes *bytes, MemberRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, MEMBER_TYPE, error);
    if (value == NULL) {
        return false;
    }
    gint64 joined;
    gboolean draining, revoked, attached;
    g_variant_get(value, MEMBER_TYPE, &joined, &draining, &revoked, &attached, &out->reason);
    out->joined_us = joined;
    out->draining = draining;
    out->revoked = revoked;
    out->attached = attached;
    return true;
}

void member_record_clear(MemberRecord *r)
{
    g_clear_pointer(&r->reason, g_free);
}

GBytes *certificate_record_pack(const CertificateRecord *r)
{
    return record_pack(g_variant_new(CERTIFICATE_TYPE, r->name, r->role, (gint64)r->not_after_us,
                                     (gboolean)r->revoked));
}

bool certificate_record_read(const char *key, GBytes *bytes, CertificateRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, CERTIFICATE_TYPE, error);
    if (value == NULL) {
        return false;
    }
    gint64 not_after;
    gboolean revoked;
    g_variant_get(value, CERTIFICATE_TYPE, &out->name, &out->role, &not_after, &revoked);
    out->not_after_us = not_after;
    out->revoked = revoked;
    return true;
}

void certificate_record_clear(CertificateRecord *r)
{
    g_clear_pointer(&r->name, g_free);
    g_clear_pointer(&r->role, g_free);
}

static GVariant *byte_array(const void *data, gsize size)
{
    return g_variant_new_fixed_array(G_VARIANT_TYPE_BYTE, data, size, 1);
}

GBytes *job_record_pack(const JobRecord *r)
{
    gsize size;
    const void *plan = g_bytes_get_data(r->plan, &size);
    return record_pack(g_variant_new("(suuuuu@ay@ay@at)", r->model, r->dp, r->pp, r->tp, r->context,
                                     r->numerics, byte_array(r->file_hash, sizeof r->file_hash),
                                     byte_array(plan, size),
                                     g_variant_new_fixed_array(G_VARIANT_TYPE_UINT64, r->epochs,
                                                               r->n_epochs, sizeof(uint64_t))));
}

bool job_record_read(const char *key, GBytes *bytes, JobRecord *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, JOB_TYPE, error);
    if (value == NULL) {
        return false;
    }
    g_autoptr(GVariant) hash = NULL;
    g_autoptr(GVariant) plan = NULL;
    g_autoptr(GVariant) epochs = NULL;
    g_variant_get(value, "(suuuuu@ay@ay@at)", &out->model, &out->dp, &out->pp, &out->tp,
                  &out->context, &out->numerics, &hash, &plan, &epochs);
    gsize n;
    const void *data = g_variant_get_fixed_array(hash, &n, 1);
    if (n == sizeof out->file_hash) {
        memcpy(out->file_hash, data, n);
    }
    data = g_variant_get_fixed_array(plan, &n, 1);
    out->plan = g_bytes_new(data, n);
    data = g_variant_get_fixed_array(epochs, &n, sizeof(uint64_t));
    out->epochs = g_memdup2(data, n * sizeof(uint64_t));
    out->n_epochs = (uint32_t)n;
    return true;
}

void job_record_clear(JobRecord *r)
{
    g_clear_pointer(&r->model, g_free);
    g_clear_pointer(&r->plan, g_bytes_unref);
    g_clear_pointer(&r->epochs, g_free);
}

GBytes *counter_record_pack(uint64_t value)
{
    return record_pack(g_variant_new(COUNTER_TYPE, (guint64)value));
}

bool counter_record_read(const char *key, GBytes *bytes, uint64_t *out, GError **error)
{
    g_autoptr(GVariant) value = record_read(key, bytes, COUNTER_TYPE, error);
    if (value == NULL) {
        return false;
    }
    *out = g_variant_get_uint64(value);
    return true;
}
