/* weights_digest (NUMERICS 13): each tile's f32 master bytes, hash of tile hashes per tensor, hash
 * of those in canonical order. Every rank hashes the tiles that count there. */
#pragma once

#include "proto/base/hash.h"
#include "worker/train/gradient_exchange.h"

/* Collective over the world (links NULL: one rank); all ranks get the same. */
bool weights_digest(TrainLinks *l, const Ownership *o, const Parameters *weights, Hash128 *out,
                    GError **error);
