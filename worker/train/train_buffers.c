#include "worker/train/train_buffers.h"

#include "transport/group/group.h"
#include "worker/train/gradient_stream.h"

#include "proto/plan/tree.h"

size_t train_tied_floats(const Ownership *reduced, const ModelSpec *spec)
{
    const TrainPosition *p = &reduced->position;
    const bool apart = spec->tied_output && p->pp > 1 && (p->stage == 0 || p->stage + 1 == p->pp);
    size_t most = 0;
    for (uint32_t b = 0; apart && b < reduced->buckets->len; b++) {
        const Bucket *bucket = &g_array_index(reduced->buckets, Bucket, b);
        for (uint32_t d = 0; d < p->dp && bucket->is_embedding; d++) {
            most = MAX(most, bucket->first[d + 1] - bucket->first[d]);
        }
    }
    return most;
}

/* ---- the checkpoint ---- */

/* TrainSnapshot: weights and moments whose word counts here. */
static uint64_t checkpoint_bytes(const TrainBuffersOptions *o)
{
    uint64_t n = 0;
    for (guint i = 0; i < o->stepped->pieces->len; i++) {
        const OwnedPiece *piece = &g_array_index(o->stepped->pieces, OwnedPiece, i);
        n += piece->counts ? piece->n : 0;
    }
    return o->saves ? (1 + o->moments) * n * sizeof(float) : 0;
}

/* ---- between ranks ---- */

/* Partial sums of tensor ranks: of the cut that brings most. */
static uint64_t tensor_bytes(const TrainBuffersOptions *o)
{
    const Holding *h = o->holding;
    const ModelSpec *spec = h->spec;
    const size_t n = o->rows * spec->width;
    const GroupCut cuts[] = {
        {h->tp, h->rank, spec->n_attn_units, 0, h->attn_cuts},
        {h->tp, h->rank, spec->n_ffn_units, 0, h->ffn_cuts},
        {h->tp, h->rank, spec->n_vocab_chunks, 0, h->vocab_cuts},
    };
    uint64_t most = 0;
    for (size_t i = 0; i < (h->is_last ? 3 : 2); i++) {
        most = MAX(most, group_all_reduce_bytes(&cuts[i], n, TRAIN_TWO_SHOT_BYTES));
    }
    return most;
}

/* Pieces of gradients of the replicas, also of those that are ahead: GradientStream. */
static uint64_t data_bytes(const TrainBuffersOptions *o)
{
    const TrainPosition *p = &o->reduced->position;
    const GroupCut cut = {p->dp, p->replica, o->leaves->n_leaves, o->leaves->missing,
                          o->leaves->cuts};
    uint64_t most = 0;
    for (uint32_t b = 0; b < o->reduced->buckets->len; b++) {
        const Bucket *bucket = &g_array_index(o->reduced->buckets, Bucket, b);
        most = MAX(most, group_scatter_bytes(&cut, bucket->first, STREAM_WINDOW));
    }
    return most;
}

/* What the libraries of a rank take, measured (tests/system/test_train_memory.py): threads, UCX's
 * worker and messages to the coordinator; where there are other ranks, what comes through shared
 * memory; of each that vectors go to (replicas, tensor ranks, neighbours of a stage), what goes
 * there. */
static uint64_t library_bytes(const TrainPosition *p)
{
    enum { RANK_MIB = 11, PORT_MIB = 7, PEER_MIB = 3 };
    const uint64_t peers = (p->dp - 1) + (p->tp - 1) + MIN(p->pp - 1, 2);
    return (RANK_MIB + (peers > 0 ? PORT_MIB : 0) + PEER_MIB * peers) << 20;
}

/* Activations and their gradients: one of each comes before it is waited for. */
static uint64_t pipeline_bytes(const TrainBuffersOptions *o)
{
    const TrainPosition *p = &o->reduced->position;
    const uint64_t stream = o->rows * o->holding->spec->width * sizeof(float);
    const uint32_t n = (p->stage > 0 || p->chunks > 1) + (p->stage + 1 < p->pp || p->chunks > 1);
    return p->pp > 1 ? n * group_message_bytes(stream) : 0;
}

uint64_t train_buffers_bytes(const TrainBuffersOptions *o)
{
    const TrainPosition *p = &o->reduced->position;
    const uint64_t tied = train_tied_floats(o->reduced, o->holding->spec) * sizeof(float);
    const uint64_t small = o->reduced->tiles->len * sizeof(float) + o->sequences * sizeof(float);
    return library_bytes(p) + checkpoint_bytes(o) + o->data_bytes + small + tied +
           group_message_bytes(tied) + (p->tp > 1 ? tensor_bytes(o) : 0) +
           (p->dp > 1 ? data_bytes(o) : 0) + pipeline_bytes(o);
}
