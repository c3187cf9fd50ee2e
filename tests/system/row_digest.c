/* row-digest FILE VOCABULARY: the digest of NUMERICS 13 from the rows that `weft run --logits`
 * wrote, by xxHash alone (nothing of weft's is linked): each row's chunks of 1,024 logits are
 * hashed, the row hash is the hash of the chunk hashes, the digest the hash of the row hashes;
 * hashes count in canonical (big endian) bytes. */
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

enum { CHUNK = 1024, MAX_VOCABULARY = 1 << 20 };

static XXH128_canonical_t canonical(XXH128_hash_t hash)
{
    XXH128_canonical_t bytes;
    XXH128_canonicalFromHash(&bytes, hash);
    return bytes;
}

/* row: n float32 as they lie in the file. */
static XXH128_canonical_t hash_row(const float *row, size_t n)
{
    static XXH128_canonical_t chunks[MAX_VOCABULARY / CHUNK];
    size_t n_chunks = 0;
    for (size_t first = 0; first < n; first += CHUNK) {
        const size_t length = n - first < CHUNK ? n - first : CHUNK;
        chunks[n_chunks++] = canonical(XXH3_128bits(row + first, length * sizeof *row));
    }
    return canonical(XXH3_128bits(chunks, n_chunks * sizeof *chunks));
}

int main(int argc, char **argv)
{
    static float row[MAX_VOCABULARY];
    const size_t n = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    XXH3_state_t *state = XXH3_createState();
    if (file == NULL || n == 0 || n > MAX_VOCABULARY || state == NULL) {
        fprintf(stderr, "usage: row-digest FILE VOCABULARY\n");
        return 2;
    }
    XXH3_128bits_reset(state);
    size_t got, n_rows = 0;
    while ((got = fread(row, sizeof *row, n, file)) == n) {
        const XXH128_canonical_t hash = hash_row(row, n);
        XXH3_128bits_update(state, &hash, sizeof hash);
        n_rows++;
    }
    fclose(file);
    if (got != 0 || n_rows == 0) {
        fprintf(stderr, "row-digest: %s does not hold whole rows of %zu\n", argv[1], n);
        return 1;
    }
    const XXH128_canonical_t digest = canonical(XXH3_128bits_digest(state));
    for (size_t i = 0; i < sizeof digest.digest; i++) {
        printf("%02x", digest.digest[i]);
    }
    printf("\n");
    XXH3_freeState(state);
    return 0;
}
