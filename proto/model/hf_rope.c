#include "proto/model/hf_rope.h"

#include "proto/model/hf_config.h"

#include <math.h>

#define BASE_DEFAULT 10000.0
#define TURN 6.283185307179586

typedef struct Llama3 {
    double factor, low, high, context;
} Llama3;

static bool lacks_numbers(const char *directory, GError **error, const char *type)
{
    return hf_fail(
        directory, error,
        "config.json: numbers of rope_type '%s' are missing or out of range; get it again", type);
}

/* The n-th root of x >= 1 by +, -, *, / and sqrt alone, so that every host has the same bits
 * (NUMERICS 7): Newton's steps from above, which shrink until they no longer do. */
static double root(double x, uint32_t n)
{
    double r = x;
    for (uint32_t k = n; k > 1; k /= 2) {
        r = sqrt(r);
    }
    for (double before = INFINITY; r < before;) {
        double power = 1.0; /* r^(n - 1) */
        for (uint32_t k = 1; k < n; k++) {
            power *= r;
        }
        before = r;
        r -= (r * power - x) / (n * power);
    }
    return r;
}

/* Long waves are stretched by the factor, short ones stay, those between pass over. */
static double divisor(const Llama3 *l, double wave_length)
{
    const double turns = l->context / wave_length; /* over the original context */
    if (turns < l->low) {
        return l->factor;
    }
    if (turns > l->high) {
        return 1.0;
    }
    const double smooth = (turns - l->low) / (l->high - l->low);
    return 1.0 / ((1.0 - smooth) / l->factor + smooth);
}

static float *llama3_factors(const Llama3 *l, double base, uint32_t n)
{
    float *factors = g_new(float, n);
    const double step = root(base, n);
    double wave_length = TURN;
    for (uint32_t i = 0; i < n; i++, wave_length *= step) {
        factors[i] = (float)divisor(l, wave_length);
    }
    return factors;
}

static bool read_llama3(const char *directory, const json_t *scaling, RopeSpec *rope,
                        float **factors, GError **error)
{
    const Llama3 l = {hf_number(scaling, "factor", 0), hf_number(scaling, "low_freq_factor", 0),
                      hf_number(scaling, "high_freq_factor", 0),
                      hf_number(scaling, "original_max_position_embeddings", 0)};
    if (!(l.factor >= 1 && l.factor <= 1e6 && l.low > 0 && l.high > l.low && l.high <= 1e6 &&
          l.context >= 1 && l.context <= 1e9 && rope->freq_base >= 1 && rope->freq_base <= 1e12)) {
        return lacks_numbers(directory, error, "llama3");
    }
    rope->scaling = ROPE_SCALING_FACTORS;
    *factors = llama3_factors(&l, rope->freq_base, rope->dims / 2);
    return true;
}

bool hf_rope_read(const char *directory, const json_t *config, uint32_t head_size, RopeSpec *rope,
                  float **factors, GError **error)
{
    const json_t *parameters = json_object_get(config, "rope_parameters"),
                 *scaling = json_object_get(config, "rope_scaling");
    if (!json_is_object(scaling)) {
        scaling = parameters;
    }
    const json_t *named = json_object_get(scaling, "rope_type");
    if (named == NULL) {
        named = json_object_get(scaling, "type");
    }
    const char *type = json_is_string(named) ? json_string_value(named) : "default";
    *factors = NULL;
    *rope = (RopeSpec){.pairing = ROPE_ADJACENT,
                       .dims = head_size,
                       .factor = 1.0,
                       .freq_base = hf_number(parameters, "rope_theta",
                                              hf_number(config, "rope_theta", BASE_DEFAULT))};
    if (g_str_equal(type, "llama3")) {
        return read_llama3(directory, scaling, rope, factors, error);
    }
    if (g_str_equal(type, "linear")) {
        rope->scaling = ROPE_SCALING_LINEAR;
        rope->factor = hf_number(scaling, "factor", 0);
        return rope->factor >= 1 || lacks_numbers(directory, error, type);
    }
    return g_str_equal(type, "default") ||
           hf_fail(
               directory, error,
               "rope_type '%.40s' is not supported; default, linear and llama3 are: take a GGUF "
               "file of the model",
               type);
}
