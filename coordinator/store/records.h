/* Rows of the store as structures. Reading is strict: a row that is not exactly what its type says
 * is an IO error naming the row, never a guess. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct TokenRecord {
    char *role;
    int64_t expires_us; /* Unix time */
    uint32_t uses_left;
} TokenRecord;

typedef struct MemberRecord {
    int64_t joined_us;                /* Unix time */
    bool draining, revoked, attached; /* attached: when last heard of */
    char *reason;
} MemberRecord;

typedef struct CertificateRecord {
    char *name, *role;
    int64_t not_after_us;
    bool revoked;
} CertificateRecord;

typedef struct ApiKeyRecord {
    char *name;
    int64_t created_us; /* Unix time */
} ApiKeyRecord;

typedef struct SubmissionRecord {
    char *spec, *owner;   /* the job file; who submitted it */
    int64_t submitted_us; /* Unix time */
} SubmissionRecord;

#define JOB_RECORD_ANY_NUMERICS 2u /* none was asked: the plan has one */
/* A deployment: what it is keyed by and its plan as a packed weft.v1.Plan. */
typedef struct JobRecord {
    char *model; /* path as resolved */
    uint32_t dp, pp, tp, context;
    uint32_t numerics; /* NumericsClass, or JOB_RECORD_ANY_NUMERICS */
    uint8_t file_hash[16];
    GBytes *plan;
    uint64_t *epochs; /* of each replica */
    uint32_t n_epochs;
} JobRecord;

GBytes *token_record_pack(const TokenRecord *r);
bool token_record_read(const char *key, GBytes *bytes, TokenRecord *out, GError **error);
void token_record_clear(TokenRecord *r);

GBytes *api_key_record_pack(const ApiKeyRecord *r);
bool api_key_record_read(const char *key, GBytes *bytes, ApiKeyRecord *out, GError **error);
void api_key_record_clear(ApiKeyRecord *r);

GBytes *submission_record_pack(const SubmissionRecord *r);
bool submission_record_read(const char *key, GBytes *bytes, SubmissionRecord *out, GError **error);
void submission_record_clear(SubmissionRecord *r);

GBytes *member_record_pack(const MemberRecord *r);
bool member_record_read(const char *key, GBytes *bytes, MemberRecord *out, GError **error);
void member_record_clear(MemberRecord *r);

GBytes *certificate_record_pack(const CertificateRecord *r);
bool certificate_record_read(const char *key, GBytes *bytes, CertificateRecord *out,
                             GError **error);
void certificate_record_clear(CertificateRecord *r);

GBytes *job_record_pack(const JobRecord *r);
bool job_record_read(const char *key, GBytes *bytes, JobRecord *out, GError **error);
void job_record_clear(JobRecord *r);

GBytes *counter_record_pack(uint64_t value);
bool counter_record_read(const char *key, GBytes *bytes, uint64_t *out, GError **error);
