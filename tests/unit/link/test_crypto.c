/* Keys and AEAD against values from Python's hmac and `cryptography` (an independent HKDF and
 * another binding), and the two AEAD implementations against each other. */
#include "transport/crypto/aead.h"
#include "transport/crypto/keys.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static const KeyScope scope = {
    .generation = 0x1122334455667788u, .epoch = 9, .job = "job-7", .replica = 2};

static void fill_counting(uint8_t *out, size_t n, uint8_t first)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = (uint8_t)(first + i);
    }
}

static void keys_are_hkdf_sha256(void **state)
{
    static const uint8_t expected[32] = {0x18, 0xb1, 0x0b, 0x7c, 0x06, 0x4c, 0x84, 0x7d,
                                         0xef, 0x57, 0x2c, 0x18, 0x0c, 0x4e, 0x75, 0x30,
                                         0x81, 0x34, 0x72, 0x04, 0xcb, 0x0a, 0x05, 0x71,
                                         0x88, 0x78, 0xcc, 0x19, 0xf3, 0x78, 0xa1, 0x96};
    uint8_t secret[EPOCH_SECRET_BYTES], sender[BOOT_ID_BYTES], receiver[BOOT_ID_BYTES], key[32];
    fill_counting(secret, sizeof secret, 0);
    fill_counting(sender, sizeof sender, 0x40);
    fill_counting(receiver, sizeof receiver, 0x80);
    keys_derive(secret, &scope, sender, receiver, 1, 3, key);
    assert_memory_equal(key, expected, sizeof key);
    assert_true(keys_handle(secret, &scope, 1, 3) == 0x30baebf47283c0d0u);
}

static void keys_differ_by_every_input(void **state)
{
    uint8_t secret[EPOCH_SECRET_BYTES], boot[2][BOOT_ID_BYTES], base[32], key[32];
    fill_counting(secret, sizeof secret, 0);
    fill_counting(boot[0], BOOT_ID_BYTES, 0x40);
    fill_counting(boot[1], BOOT_ID_BYTES, 0x80);
    keys_derive(secret, &scope, boot[0], boot[1], 0, 1, base);
    KeyScope scopes[] = {scope, scope, scope, scope};
    scopes[0].generation++;
    scopes[1].epoch++;
    scopes[2].job = "job-8";
    scopes[3].replica++;
    uint64_t handle = keys_handle(secret, &scope, 0, 1);
    for (size_t i = 0; i < G_N_ELEMENTS(scopes); i++) {
        keys_derive(secret, &scopes[i], boot[0], boot[1], 0, 1, key);
        assert_memory_not_equal(key, base, sizeof key);
        assert_true(keys_handle(secret, &scopes[i], 0, 1) != handle);
    }
    keys_derive(secret, &scope, boot[1], boot[0], 0, 1, key);
    assert_memory_not_equal(key, base, sizeof key);
    keys_derive(secret, &scope, boot[0], boot[1], 1, 0, key);
    assert_memory_not_equal(key, base, sizeof key);
    assert_true(keys_handle(secret, &scope, 1, 0) == handle);
    assert_true(keys_handle(secret, &scope, 0, 2) != handle);
    secret[31] ^= 1;
    keys_derive(secret, &scope, boot[0], boot[1], 0, 1, key);
    assert_memory_not_equal(key, base, sizeof key);
    keys_erase(key, sizeof key);
    uint8_t zero[32] = {0};
    assert_memory_equal(key, zero, sizeof key);
}

/* The implementations that run here. */
static unsigned kinds(AeadKind out[2])
{
    uint8_t key[AEAD_KEY_BYTES] = {0};
    unsigned n = 0;
    out[n++] = AEAD_OPENSSL;
    g_autoptr(AeadKey) ipsec = aead_key_new(key, AEAD_IPSEC_MB, NULL);
    if (ipsec != NULL) {
        out[n++] = AEAD_IPSEC_MB;
    } else {
        print_message("# ipsec-mb not checked: this CPU lacks AES, PCLMULQDQ or AVX\n");
    }
    return n;
}

static void aead_equals_a_known_vector(void **state)
{
    static const uint8_t expected[37 + 16] = {
        0x1d, 0xf0, 0xf0, 0x53, 0x7f, 0x0b, 0xe3, 0x7c, 0xac, 0x33, 0xb9, 0x7d, 0xcb, 0x72,
        0x59, 0xc0, 0xcc, 0x8d, 0x48, 0x4e, 0xd5, 0x20, 0xb2, 0xea, 0x00, 0xd4, 0x67, 0x0e,
        0xbb, 0xc4, 0x50, 0xfe, 0xe9, 0xb1, 0xc0, 0x89, 0xf5, 0xd5, 0xfc, 0x55, 0xb6, 0xe7,
        0x9c, 0xab, 0x25, 0x63, 0x41, 0x60, 0x17, 0xf7, 0x55, 0x62, 0xc4};
    uint8_t bytes[AEAD_KEY_BYTES], associated[32], plain[37], out[37], tag[AEAD_TAG_BYTES];
    fill_counting(bytes, sizeof bytes, 0);
    fill_counting(associated, sizeof associated, 0xa0);
    for (unsigned i = 0; i < sizeof plain; i++) {
        plain[i] = (uint8_t)(i * 7 + 1);
    }
    AeadKind all[2];
    for (unsigned n = kinds(all); n-- > 0;) {
        g_autoptr(AeadKey) key = aead_key_new(bytes, all[n], NULL);
        AeadPart part = {plain, sizeof plain};
        aead_seal(key, 0x0102030405060708u, associated, sizeof associated, &part, 1, out, tag);
        assert_memory_equal(out, expected, 37);
        assert_memory_equal(tag, expected + 37, 16);
    }
}

/* Any implementation opens what any other sealed from parts, and nothing that was touched. */
static void aead_round_trip(const uint8_t *bytes, AeadKind sealer, AeadKind opener, size_t size)
{
    g_autoptr(AeadKey) seal = aead_key_new(bytes, sealer, NULL);
    g_autoptr(AeadKey) open = aead_key_new(bytes, opener, NULL);
    g_autofree uint8_t *plain = g_malloc(size + 1), *wire = g_malloc(size + 1),
                       *back = g_malloc(size + 1);
    uint8_t tag[AEAD_TAG_BYTES], associated[32];
    fill_counting(associated, sizeof associated, 3);
    for (size_t i = 0; i < size; i++) {
        plain[i] = (uint8_t)(i * 31 + (i >> 8));
    }
    AeadPart parts[] = {{plain, size / 3}, {NULL, 0}, {plain + size / 3, size - size / 3}};
    aead_seal(seal, size, associated, sizeof associated, parts, 3, wire, tag);
    assert_true(aead_open(open, size, associated, sizeof associated, wire, size, back, tag));
    assert_memory_equal(back, plain, size);
    assert_false(aead_open(open, size + 1, associated, sizeof associated, wire, size, back, tag));
    associated[31] ^= 1;
    assert_false(aead_open(open, size, associated, sizeof associated, wire, size, back, tag));
    associated[31] ^= 1;
    tag[15] ^= 0x80;
    assert_false(aead_open(open, size, associated, sizeof associated, wire, size, back, tag));
    tag[15] ^= 0x80;
    if (size > 0) {
        wire[size / 2] ^= 4;
        assert_false(aead_open(open, size, associated, sizeof associated, wire, size, back, tag));
        wire[size / 2] ^= 4;
    }
    assert_true(
        aead_open(open, size, associated, sizeof associated, wire, size, wire, tag)); /* in place */
    assert_memory_equal(wire, plain, size);
}

static void aead_implementations_agree(void **state)
{
    static const size_t sizes[] = {0, 1, 15, 16, 17, 255, 2304, 8192, 100003};
    uint8_t bytes[AEAD_KEY_BYTES];
    fill_counting(bytes, sizeof bytes, 0x77);
    AeadKind all[2];
    unsigned n = kinds(all);
    for (unsigned i = 0; i < n * n * G_N_ELEMENTS(sizes); i++) {
        aead_round_trip(bytes, all[i % n], all[i / n % n], sizes[i / n / n]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_are_hkdf_sha256),
        cmocka_unit_test(keys_differ_by_every_input),
        cmocka_unit_test(aead_equals_a_known_vector),
        cmocka_unit_test(aead_implementations_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
