/* RoPE (Su et al. 2021), linear interpolation (Chen et al. 2023), YaRN (Peng et al. 2023,
 * "NTK-by-parts" and the attention factor) with the conventions of GGUF files: pair i turns by
 * position * base^(-2i/dims). */
#include "kernels/generic/ops.h"

#include "kernels/ops/math.h"

/* The pair index at which a wavelength fits `turns` times into the original context (YaRN, eq. 17
 * solved for the dimension). */
static double yarn_dimension(const RopeSpec *spec, double turns)
{
    const double two_pi = 0x1.921fb54442d18p+2;
    return spec->dims * det_log(spec->original_context / (turns * two_pi)) /
           (2.0 * det_log(spec->freq_base));
}

/* Share of extrapolation (1: untouched frequency, 0: interpolated by 1/factor) of pair i. */
static double yarn_share(const RopeSpec *spec, uint32_t i)
{
    double low = floor(yarn_dimension(spec, spec->yarn_beta_fast));
    double high = ceil(yarn_dimension(spec, spec->yarn_beta_slow));
    low = low > 0.0 ? low : 0.0;
    high = high < spec->dims - 1.0 ? high : spec->dims - 1.0;
    const double width = high - low > 0.001 ? high - low : 0.001;
    const double ramp = (i - low) / width;
    return (1.0 - (ramp < 0.0 ? 0.0 : ramp > 1.0 ? 1.0 : ramp)) * spec->yarn_ext_factor;
}

/* Radians that pair i turns per position. */
static double pair_speed(const RopeSpec *spec, const float *factors, uint32_t i)
{
    double speed = det_pow(spec->freq_base, -2.0 * i / spec->dims);
    if (factors != NULL) {
        speed /= (double)factors[i];
    }
    switch (spec->scaling) {
    case ROPE_SCALING_LINEAR:
        return speed / spec->factor;
    case ROPE_SCALING_YARN: {
        const double share = yarn_share(spec, i);
        return speed / spec->factor * (1.0 - share) + speed * share;
    }
    case ROPE_SCALING_NONE:
    case ROPE_SCALING_FACTORS:
        break;
    }
    return speed;
}

/* What cos and sin are multiplied with. */
static double magnitude(const RopeSpec *spec)
{
    if (spec->scaling != ROPE_SCALING_YARN) {
        return 1.0;
    }
    const double stretch = spec->yarn_ext_factor != 0.0 ? 1.0 + 0.1 * det_log(spec->factor) : 1.0;
    return spec->yarn_attn_factor * stretch;
}

void rope_table(const RopeSpec *spec, const float *factors, uint32_t first_position,
                uint32_t n_positions, float *cos_out, float *sin_out)
{
    const uint32_t n_pairs = spec->dims / 2;
    const double length = magnitude(spec);
    for (uint32_t i = 0; i < n_pairs; i++) {
        const double speed = pair_speed(spec, factors, i);
        for (uint32_t p = 0; p < n_positions; p++) {
            const double angle = ((double)first_position + p) * speed;
            cos_out[(size_t)p * n_pairs + i] = (float)(det_cos(angle) * length);
            sin_out[(size_t)p * n_pairs + i] = (float)(det_sin(angle) * length);
        }
    }
}

void rope_apply_generic(float *x, uint32_t n_heads, uint32_t head_size, uint32_t dims,
                        RopePairing pairing, const float *cos, const float *sin)
{
    const uint32_t stride = pairing == ROPE_ADJACENT ? 2 : 1;
    const uint32_t apart = pairing == ROPE_ADJACENT ? 1 : dims / 2;
    for (uint32_t h = 0; h < n_heads; h++) {
        for (uint32_t i = 0; i < dims / 2; i++) {
            float *first = &x[(size_t)h * head_size + (size_t)i * stride];
            const float a = first[0], b = first[apart];
            first[0] = fmaf(a, cos[i], -(b * sin[i]));
            first[apart] = fmaf(a, sin[i], b * cos[i]);
        }
    }
}
