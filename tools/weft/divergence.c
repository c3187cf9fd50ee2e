#include "tools/weft/divergence.h"

#include <math.h>
#include <stdlib.h>

typedef struct Row {
    double kl, nll_reference, nll; /* nll: of the token that came */
    bool same_top;
} Row;

struct Divergence {
    Row *rows;
    uint64_t n_rows, n_added;
    uint32_t vocab_size;
    double *terms; /* exp(z - max) of the reference's row */
};

Divergence *divergence_new(uint64_t n_rows, uint32_t vocab_size)
{
    Divergence *d = g_new0(Divergence, 1);
    d->rows = g_new0(Row, n_rows);
    d->terms = g_new0(double, vocab_size);
    d->n_rows = n_rows;
    d->vocab_size = vocab_size;
    return d;
}

void divergence_free(Divergence *d)
{
    if (d != NULL) {
        g_free(d->rows);
        g_free(d->terms);
        g_free(d);
    }
}

/* What is needed of one row of logits. */
typedef struct Softmax {
    double max, sum; /* of exp(z - max) */
    uint32_t top;
} Softmax;

/* terms: the addends of the sum, or NULL. */
static Softmax softmax_of(const float *z, uint32_t n, double *terms)
{
    Softmax s = {.max = (double)z[0]};
    for (uint32_t i = 1; i < n; i++) {
        if ((double)z[i] > s.max) {
            s.max = (double)z[i];
            s.top = i;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        const double term = exp((double)z[i] - s.max);
        s.sum += term;
        if (terms != NULL) {
            terms[i] = term;
        }
    }
    return s;
}

bool divergence_add(Divergence *d, uint64_t row, const float *reference, const float *logits,
                    uint32_t target)
{
    const Softmax p = softmax_of(reference, d->vocab_size, d->terms),
                  q = softmax_of(logits, d->vocab_size, NULL);
    const double log_p = p.max + log(p.sum), log_q = q.max + log(q.sum);
    double kl = 0;
    for (uint32_t i = 0; i < d->vocab_size; i++) {
        kl += d->terms[i] * (((double)reference[i] - log_p) - ((double)logits[i] - log_q));
    }
    g_assert(row < d->n_rows && target < d->vocab_size);
    d->rows[row] = (Row){.kl = fmax(kl / p.sum, 0), /* below 0 only by rounding */
                         .nll_reference = log_p - (double)reference[target],
                         .nll = log_q - (double)logits[target],
                         .same_top = p.top == q.top};
    d->n_added++;
    return isfinite(p.max) && isfinite(q.max) && isfinite(kl);
}

/* ---- all rows ---- */

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(const double *sorted, uint64_t n, double share)
{
    const double at = share * (double)(n - 1);
    const uint64_t below = (uint64_t)at, above = MIN(below + 1, n - 1);
    return sorted[below] + (at - (double)below) * (sorted[above] - sorted[below]);
}

static double standard_error(const double *values, uint64_t n, double mean)
{
    double squares = 0;
    for (uint64_t i = 0; i < n; i++) {
        squares += (values[i] - mean) * (values[i] - mean);
    }
    return n > 1 ? sqrt(squares / (double)(n - 1) / (double)n) : 0;
}

void divergence_summary(Divergence *d, DivergenceSummary *out)
{
    const uint64_t n = d->n_rows;
    g_autofree double *kl = g_new(double, n);
    double sum = 0, nll_reference = 0, nll_more = 0, same = 0;
    g_assert(n > 0 && d->n_added == n);
    for (uint64_t i = 0; i < n; i++) {
        const Row *r = &d->rows[i];
        kl[i] = r->kl;
        sum += r->kl;
        nll_reference += r->nll_reference;
        nll_more += r->nll - r->nll_reference;
        same += r->same_top;
    }
    const double rows = (double)n, mean = sum / rows;
    *out = (DivergenceSummary){.kl_mean = mean,
                               .kl_standard_error = standard_error(kl, n, mean),
                               .same_top = same / rows,
                               .reference_perplexity = exp(nll_reference / rows),
                               .perplexity_ratio = exp(nll_more / rows)};
    qsort(kl, n, sizeof *kl, by_value);
    out->kl_median = quantile(kl, n, 0.5);
    out->kl_p99 = quantile(kl, n, 0.99);
    out->kl_max = kl[n - 1];
}
