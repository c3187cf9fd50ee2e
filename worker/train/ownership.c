#include "worker/train/ownership.h"

/* The tiles of one row block that a rank holds, or one tile of a vector: what is never cut. */
typedef struct Block {
    uint32_t first_tile, last_tile; /* inclusive */
    size_t at;                      /* in the arena */
} Block;

static const Tile *tile_at(const GArray *tiles, uint32_t i)
{
    return &g_array_index(tiles, Tile, i);
}

/* The blocks of a rank in the arena's order, and one behind the last, which begins at its end. */
static GArray *blocks_of(const Holding *h, const GArray *tiles)
{
    GArray *blocks = g_array_new(FALSE, FALSE, sizeof(Block));
    for (uint32_t i = 0; i < tiles->len; i++) {
        const Tile *tile = tile_at(tiles, i);
        if (!holding_covers(h, tile->tensor, &tile->rect)) {
            continue;
        }
        Block *last = blocks->len > 0 ? &g_array_index(blocks, Block, blocks->len - 1) : NULL;
        const Tile *before = last != NULL ? tile_at(tiles, last->last_tile) : NULL;
        if (before != NULL && before->tensor == tile->tensor &&
            h->spec->tensors[tile->tensor].rows > 1 && before->rect.row0 == tile->rect.row0) {
            last->last_tile = i;
            continue;
        }
        const Block block = {i, i, holding_at(h, tile->tensor, tile->rect.row0, tile->rect.col0)};
        g_array_append_val(blocks, block);
    }
    const Block end = {tiles->len, tiles->len, h->n_floats};
    g_array_append_val(blocks, end);
    return blocks;
}

/* What each replica lacks of an even share once `len` more floats are given out; their sum. */
static uint64_t needs(const uint64_t *owned, uint32_t dp, size_t len, uint64_t *need)
{
    uint64_t total = len, sum = 0;
    for (uint32_t d = 0; d < dp; d++) {
        total += owned[d];
    }
    for (uint32_t d = 0; d < dp; d++) {
        const uint64_t share = total / dp + 1;
        need[d] = share > owned[d] ? share - owned[d] : 0;
        sum += need[d];
    }
    return sum;
}

/* Blocks [from, to) as a bucket, cut where they come nearest to what each replica lacks so far;
 * owned: floats of each replica in earlier buckets and then in this one too. */
static void add_bucket(GArray *buckets, const GArray *blocks, uint32_t from, uint32_t to,
                       uint32_t dp, bool is_embedding, uint64_t *owned)
{
    const size_t begin = g_array_index(blocks, Block, from).at,
                 end = g_array_index(blocks, Block, to).at;
    uint64_t need[PLAN_RANKS_LIMIT], before = 0;
    const uint64_t sum = needs(owned, dp, end - begin, need);
    Bucket bucket = {.is_embedding = is_embedding};
    uint32_t block = from;
    for (uint32_t d = 0; d < dp; d++) {
        const size_t share = begin + (size_t)((double)(end - begin) * (double)before / (double)sum);
        while (block < to &&
               g_array_index(blocks, Block, block).at + g_array_index(blocks, Block, block + 1).at <
                   2 * share) {
            block++;
        }
        bucket.first[d] = g_array_index(blocks, Block, block).at;
        before += need[d];
    }
    bucket.first[dp] = end;
    for (uint32_t d = 0; d < dp; d++) {
        owned[d] += bucket.first[d + 1] - bucket.first[d];
    }
    g_array_append_val(buckets, bucket);
}

static GArray *buckets_of(const Holding *h, const GArray *tiles, const GArray *blocks, uint32_t dp,
                          size_t bucket_floats)
{
    GArray *buckets = g_array_new(FALSE, FALSE, sizeof(Bucket));
    uint64_t owned[PLAN_RANKS_LIMIT] = {0};
    uint32_t from = 0;
    for (uint32_t i = 1; i < blocks->len; i++) {
        const Block *first = &g_array_index(blocks, Block, from),
                    *block = &g_array_index(blocks, Block, i);
        const bool end = i + 1 == blocks->len;
        const TensorRole role = h->spec->tensors[tile_at(tiles, first->first_tile)->tensor].role;
        const bool leaves_embedding =
            role == ROLE_TOKEN_EMBD &&
            (end || h->spec->tensors[tile_at(tiles, block->first_tile)->tensor].role != role);
        if (end || leaves_embedding || block->at - first->at >= bucket_floats) {
            add_bucket(buckets, blocks, from, i, dp, role == ROLE_TOKEN_EMBD, owned);
            from = i;
        }
    }
    return buckets;
}

/* The replica that owns what begins at `at`. */
static uint32_t owner_of(const GArray *buckets, uint32_t dp, size_t at)
{
    uint32_t first = 0, last = buckets->len; /* the bucket lies in [first, last) */
    while (last - first > 1) {
        const uint32_t middle = first + (last - first) / 2;
        const bool before = at < g_array_index(buckets, Bucket, middle).first[0];
        first = before ? first : middle;
        last = before ? middle : last;
    }
    const Bucket *bucket = &g_array_index(buckets, Bucket, first);
    uint32_t d = 0;
    while (d + 1 < dp && at >= bucket->first[d + 1]) {
        d++;
    }
    return d;
}

static const uint16_t nobody = UINT16_MAX;

/* The first (stage, tensor rank) that holds a tile counts; of its replicas, the owner. */
static void count_for(Ownership *o, const Holding *h, uint32_t stage, uint32_t rank,
                      size_t bucket_floats)
{
    const TrainPosition *p = &o->position;
    g_autoptr(GArray) blocks = blocks_of(h, o->tiles);
    g_autoptr(GArray) buckets = buckets_of(h, o->tiles, blocks, p->dp, bucket_floats);
    for (uint32_t i = 0; i + 1 < blocks->len; i++) {
        const Block *block = &g_array_index(blocks, Block, i);
        const uint16_t owner =
            (uint16_t)train_global(p, owner_of(buckets, p->dp, block->at), stage, rank);
        for (uint32_t t = block->first_tile; t <= block->last_tile; t++) {
            if (o->counted_by[t] == nobody) {
                o->counted_by[t] = owner;
            }
        }
    }
}

static void count(Ownership *o, const ModelSpec *spec, const Plan *plan, size_t bucket_floats)
{
    o->counted_by = g_new(uint16_t, o->tiles->len);
    for (uint32_t t = 0; t < o->tiles->len; t++) {
        o->counted_by[t] = nobody;
    }
    for (uint32_t s = 0; s < o->position.pp; s++) {
        for (uint32_t r = 0; r < o->position.tp; r++) {
            g_autoptr(Holding) h = holding_new(spec, plan, 0, s, r);
            count_for(o, h, s, r, bucket_floats);
        }
    }
    for (uint32_t t = 0; t < o->tiles->len; t++) {
        g_assert(o->counted_by[t] != nobody);
    }
}

/* Where the block ends among its tensor's floats: the padding behind the tensor belongs to none. */
static SliceRect block_rect(const Ownership *o, const Holding *h, const Block *block)
{
    const Tile *first = tile_at(o->tiles, block->first_tile),
               *last = tile_at(o->tiles, block->last_tile);
    SliceRect rect = first->rect;
    rect.n_cols = last->rect.col0 + last->rect.n_cols - rect.col0;
    g_assert(rect.n_rows == 1 || rect.n_cols == h->rects[first->tensor].n_cols);
    return rect;
}

/* Another block of a tensor goes on with the piece before it. */
static bool joins(const OwnedPiece *piece, uint32_t tensor, size_t at, bool counts)
{
    return piece->tensor == tensor && piece->at + piece->n == at && piece->counts == counts;
}

static void add_block(Ownership *o, const Holding *h, const Block *block)
{
    const uint32_t tensor = tile_at(o->tiles, block->first_tile)->tensor;
    const SliceRect rect = block_rect(o, h, block);
    const size_t n = (size_t)rect.n_rows * rect.n_cols;
    const bool counts = ownership_counts(o, block->first_tile);
    OwnedPiece *last =
        o->pieces->len > 0 ? &g_array_index(o->pieces, OwnedPiece, o->pieces->len - 1) : NULL;
    if (last != NULL && joins(last, tensor, block->at, counts)) {
        last->n += n;
        if (h->spec->tensors[tensor].rows > 1) {
            last->rect.n_rows += rect.n_rows;
        } else {
            last->rect.n_cols += rect.n_cols;
        }
    } else {
        const OwnedPiece piece = {tensor, rect, block->at, n, o->n_owned, counts};
        g_array_append_val(o->pieces, piece);
    }
    o->n_owned += n;
}

Ownership *ownership_new(const ModelSpec *spec, const Plan *plan, const TrainPosition *position,
                         const Holding *holding, bool sharded, size_t bucket_floats)
{
    Ownership *o = g_new0(Ownership, 1);
    o->position = *position;
    o->tiles = tiles_of(spec);
    count(o, spec, plan, bucket_floats);
    g_autoptr(GArray) blocks = blocks_of(holding, o->tiles);
    o->buckets = buckets_of(holding, o->tiles, blocks, position->dp, bucket_floats);
    o->pieces = g_array_new(FALSE, FALSE, sizeof(OwnedPiece));
    for (uint32_t i = 0; i + 1 < blocks->len; i++) {
        const Block *block = &g_array_index(blocks, Block, i);
        if (!sharded || owner_of(o->buckets, position->dp, block->at) == position->replica) {
            add_block(o, holding, block);
        }
    }
    return o;
}

void ownership_free(Ownership *o)
{
    if (o != NULL) {
        g_array_unref(o->tiles);
        g_free(o->counted_by);
        g_array_unref(o->buckets);
        g_array_unref(o->pieces);
        g_free(o);
    }
}
