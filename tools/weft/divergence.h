/* Divergence: how far the distributions of one model are from those of another over the same
 * tokens of a text, from the raw logits of both. Everything is computed in double.
 *
 * Of a row with logits z of the reference and y of this model, p = softmax(z), q = softmax(y):
 * KL(p || q) = sum p (log p - log q), in nats. Equal logits give 0 exactly, since each term is. */
#pragma once

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct Divergence Divergence;

Divergence *divergence_new(uint64_t n_rows, uint32_t vocab_size);
void divergence_free(Divergence *divergence); /* NULL-safe */
/* A row, each once, in any order; the result does not depend on it. target: the token that came.
 * false: a logit is not finite. */
bool divergence_add(Divergence *divergence, uint64_t row, const float *reference,
                    const float *logits, uint32_t target);

typedef struct DivergenceSummary {
    double kl_mean, kl_standard_error; /* of the mean: sample deviation / sqrt(rows); one row: 0 */
    double kl_median, kl_p99, kl_max;  /* order statistics, linear between neighbours */
    double same_top; /* share of rows with the same most likely id (the lowest of equals) */
    double reference_perplexity;
    double perplexity_ratio; /* this model's by the reference's */
} DivergenceSummary;
/* After all rows; sums are taken in order of rows. */
void divergence_summary(Divergence *divergence, DivergenceSummary *out);
