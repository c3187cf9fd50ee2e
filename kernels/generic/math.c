/* exp, log, pow, sin and cos in double from +, -, *, /, fma, sqrt and rint alone (NUMERICS 7):
 * glibc picks its variants by CPU, these give the same bits on every one. Series are Taylor's, cut
 * where the next term is below 2^-60 of the sum; arguments are reduced with Cody and Waite's split
 * constants, whose product with the count an fma keeps exact. One implementation, off the hot path.
 */
#include "kernels/ops/act.h"

#include <math.h>
#include <string.h>

#define LN2_HI 0x1.62e42fefa39efp-1
#define LN2_LO 0x1.abc9e3b39803fp-56
#define HALF_PI_HI 0x1.921fb54442d18p+0
#define HALF_PI_LO 0x1.1a62633145c07p-54

static uint64_t double_bits(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static double double_of_bits(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* x * 2^n, -2100 < n < 2100, in two steps so that a subnormal result is rounded once. */
static double scale_by_power(double x, int n)
{
    const int half = n / 2;
    return x * double_of_bits((uint64_t)(1023 + half) << 52) *
           double_of_bits((uint64_t)(1023 + n - half) << 52);
}

/* exp(hi + lo), |lo| small beside 1. */
static double exp_sum(double hi, double lo)
{
    if (!(hi < 710.0)) {
        return hi >= 710.0 ? (double)INFINITY : hi;
    }
    if (hi < -746.0) {
        return 0.0;
    }
    const double n = rint(hi * 0x1.71547652b82fep+0);
    const double r = fma(-n, LN2_LO, fma(-n, LN2_HI, hi)) + lo;
    double p = 1.0 / 6227020800.0; /* 1/13! */
    static const double factorial[] = {479001600.0, 39916800.0, 3628800.0, 362880.0,
                                       40320.0,     5040.0,     720.0,     120.0,
                                       24.0,        6.0,        2.0};
    for (unsigned i = 0; i < sizeof factorial / sizeof factorial[0]; i++) {
        p = fma(p, r, 1.0 / factorial[i]);
    }
    p = fma(p, r * r, r) + 1.0;
    return scale_by_power(p, (int)n);
}

double det_exp(double x)
{
    return exp_sum(x, 0.0);
}

/* log(x) = *hi + *lo to about 2^-100 + 2^-60 |m's own share|, x > 0 and finite. */
static void log_pair(double x, double *hi, double *lo)
{
    int64_t e = 0;
    uint64_t bits = double_bits(x);
    if (bits < 0x0010000000000000u) { /* subnormal */
        bits = double_bits(x * 0x1p54);
        e = -54;
    }
    const int64_t k =
        (int64_t)(bits - 0x3fe6a09e667f3bcdu) >> 52; /* mantissa in [sqrt(1/2), sqrt(2)) */
    const double m = double_of_bits(bits - ((uint64_t)k << 52));
    const double n = (double)(e + k);
    /* log m = 2 atanh(s), s = f / (m + 1) as a pair of doubles */
    const double f = m - 1.0, t = m + 1.0, t_lo = (1.0 - t) + m;
    const double s = f / t, s_lo = (fma(-s, t, f) - s * t_lo) / t;
    const double z = s * s;
    double p = 1.0 / 23.0;
    for (int i = 21; i >= 3; i -= 2) {
        p = fma(p, z, 1.0 / (double)i);
    }
    const double tail = 2.0 * (s * z * p + s_lo);
    /* n ln 2 as a pair, then the sum as a pair */
    const double a = n * LN2_HI, a_lo = fma(n, LN2_HI, -a) + n * LN2_LO;
    const double b = 2.0 * s;
    const double sum = a + b, part = sum - a, rest = (a - (sum - part)) + (b - part);
    const double low = rest + (a_lo + tail);
    *hi = sum + low;
    *lo = low - (*hi - sum);
}

double det_log(double x)
{
    if (!(x > 0.0)) {
        return x == 0.0 ? -(double)INFINITY : (double)NAN;
    }
    if (x > 0x1.fffffffffffffp+1023) {
        return x;
    }
    double hi, lo;
    log_pair(x, &hi, &lo);
    return hi + lo;
}

double det_pow(double x, double y)
{
    if (!(x > 0.0) || x > 0x1.fffffffffffffp+1023) {
        return x > 0.0 ? (y > 0.0 ? x : (y < 0.0 ? 0.0 : 1.0)) : (double)NAN;
    }
    double hi, lo;
    log_pair(x, &hi, &lo);
    const double p = y * hi;
    if (!(fabs(p) < 800.0)) {
        return exp_sum(p, 0.0);
    }
    return exp_sum(p, fma(y, hi, -p) + y * lo);
}

static double sine_series(double r)
{
    const double z = r * r;
    double p = -1.0 / 121645100408832000.0; /* 1/19! */
    p = fma(p, z, 1.0 / 355687428096000.0);
    p = fma(p, z, -1.0 / 1307674368000.0);
    p = fma(p, z, 1.0 / 6227020800.0);
    p = fma(p, z, -1.0 / 39916800.0);
    p = fma(p, z, 1.0 / 362880.0);
    p = fma(p, z, -1.0 / 5040.0);
    p = fma(p, z, 1.0 / 120.0);
    p = fma(p, z, -1.0 / 6.0);
    return fma(p * z, r, r);
}

static double cosine_series(double r)
{
    const double z = r * r;
    double p = 1.0 / 2432902008176640000.0; /* 1/20! */
    p = fma(p, z, -1.0 / 6402373705728000.0);
    p = fma(p, z, 1.0 / 20922789888000.0);
    p = fma(p, z, -1.0 / 87178291200.0);
    p = fma(p, z, 1.0 / 479001600.0);
    p = fma(p, z, -1.0 / 3628800.0);
    p = fma(p, z, 1.0 / 40320.0);
    p = fma(p, z, -1.0 / 720.0);
    p = fma(p, z, 1.0 / 24.0);
    p = fma(p, z, -0.5);
    return fma(p, z, 1.0);
}

/* sin(x + quarter * pi/2) */
static double circle(double x, int64_t quarter)
{
    if (!(fabs(x) < 0x1p31)) {
        return (double)NAN;
    }
    const double n = rint(x * 0x1.45f306dc9c883p-1);
    const double r = fma(-n, HALF_PI_LO, fma(-n, HALF_PI_HI, x));
    quarter += (int64_t)n;
    const double y = (quarter & 1) != 0 ? cosine_series(r) : sine_series(r);
    return (quarter & 2) != 0 ? -y : y;
}

double det_sin(double x)
{
    return circle(x, 0);
}

double det_cos(double x)
{
    return circle(x, 1);
}
