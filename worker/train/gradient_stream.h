/* GradientStream: the reduce-scatter of a rank's gradients over the replicas, bucket by bucket from
 * the arena's end on, each as soon as it is final: a backward pass ends the last layer's gradients
 * first, so most of the exchange runs beside it. One thread, that of the rank's links.
 *
 * Wire: of S bytes of gradients, O of them its own, a rank that hands over s subtrees sends
 * s x (S - O) (FORMULAS 7a), however many buckets they are. It is at most STREAM_WINDOW buckets
 * ahead of what it has received: so much, times peers and their subtrees, may lie in the links. */
#pragma once

#include "worker/train/gradient_exchange.h"

enum { STREAM_WINDOW = 4 };

typedef struct GradientStream GradientStream;

/* All borrowed. links->data has more than one rank. Returned. */
GradientStream *gradient_stream_new(TrainLinks *links, const Ownership *ownership,
                                    const LeafCuts *leaves);
void gradient_stream_free(GradientStream *s); /* NULL-safe */

/* A step. subtrees: this rank's sets of gradients that are there, in leaf order, borrowed until the
 * stream is finished. out: receives the root in what this rank owns, lookup part included; may be
 * one of them. Nothing of them is final yet. */
void gradient_stream_begin(GradientStream *s, Parameters *const *subtrees, uint32_t n,
                           Parameters *out);
bool gradient_stream_has_begun(const GradientStream *s);
/* Floats from `from` on (that only falls) are final in all sets: goes on as far as it can without
 * waiting. */
void gradient_stream_final(GradientStream *s, size_t from);
/* Everything is final; collective. */
bool gradient_stream_finish(GradientStream *s, GError **error);
/* Pieces of the last exchange that were sent before it was waited for. */
uint32_t gradient_stream_early(const GradientStream *s);
