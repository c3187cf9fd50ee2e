#include "proto/model/model_config.h"

#include "proto/base/checked.h"
#include "proto/base/error.h"

#include <math.h>

typedef struct Wanted {
    TensorRole role;
    const char *name; /* of layer tensors what follows "blk.N." */
} Wanted;

static const Wanted gpt2_layer[] = {
    {ROLE_ATTN_NORM, "attn_norm.weight"},  {ROLE_ATTN_NORM_BIAS, "attn_norm.bias"},
    {ROLE_ATTN_Q, "attn_q.weight"},        {ROLE_ATTN_K, "attn_k.weight"},
    {ROLE_ATTN_V, "attn_v.weight"},        {ROLE_ATTN_Q_BIAS, "attn_q.bias"},
    {ROLE_ATTN_K_BIAS, "attn_k.bias"},     {ROLE_ATTN_V_BIAS, "attn_v.bias"},
    {ROLE_ATTN_OUT, "attn_output.weight"}, {ROLE_ATTN_OUT_BIAS, "attn_output.bias"},
    {ROLE_FFN_NORM, "ffn_norm.weight"},    {ROLE_FFN_NORM_BIAS, "ffn_norm.bias"},
    {ROLE_FFN_UP, "ffn_up.weight"},        {ROLE_FFN_UP_BIAS, "ffn_up.bias"},
    {ROLE_FFN_DOWN, "ffn_down.weight"},    {ROLE_FFN_DOWN_BIAS, "ffn_down.bias"},
};
static const Wanted gpt2_global[] = {
    {ROLE_TOKEN_EMBD, "token_embd.weight"},
    {ROLE_POSITION_EMBD, "position_embd.weight"},
    {ROLE_OUTPUT_NORM, "output_norm.weight"},
    {ROLE_OUTPUT_NORM_BIAS, "output_norm.bias"},
};
static const Wanted llama_layer[] = {
    {ROLE_ATTN_NORM, "attn_norm.weight"},  {ROLE_ATTN_Q, "attn_q.weight"},
    {ROLE_ATTN_K, "attn_k.weight"},        {ROLE_ATTN_V, "attn_v.weight"},
    {ROLE_ATTN_OUT, "attn_output.weight"}, {ROLE_FFN_NORM, "ffn_norm.weight"},
    {ROLE_FFN_GATE, "ffn_gate.weight"},    {ROLE_FFN_UP, "ffn_up.weight"},
    {ROLE_FFN_DOWN, "ffn_down.weight"},
};
static const Wanted llama_biases[] = {
    {ROLE_ATTN_Q_BIAS, "attn_q.bias"},
    {ROLE_ATTN_K_BIAS, "attn_k.bias"},
    {ROLE_ATTN_V_BIAS, "attn_v.bias"},
};
static const Wanted llama_global[] = {
    {ROLE_TOKEN_EMBD, "token_embd.weight"},
    {ROLE_OUTPUT_NORM, "output_norm.weight"},
};

/* The next tensor, behind the others in an imagined file: no two share a byte. */
static void add(ModelSpec *spec, const Wanted *wanted, int32_t layer)
{
    TensorSpec *t = &spec->tensors[spec->n_tensors];
    t->role = wanted->role;
    t->layer = layer;
    t->type = DTYPE_F32;
    t->name =
        layer < 0 ? g_strdup(wanted->name) : g_strdup_printf("blk.%d.%s", layer, wanted->name);
    model_spec_shape(spec, wanted->role, &t->rows, &t->columns);
    t->size_bytes = (uint64_t)t->rows * t->columns * sizeof(float);
    t->offset = spec->n_tensors == 0 ? 0 : t[-1].offset + t[-1].size_bytes;
    spec->n_tensors++;
}

static bool fill_dimensions(ModelSpec *spec, const ModelConfig *c, GError **error)
{
    const struct {
        const char *name;
        uint32_t value, limit;
    } counts[] = {{"layers", c->layers, 4096},         {"width", c->width, 1u << 20},
                  {"heads", c->heads, 4096},           {"kv_heads", c->kv_heads + 1, 4097},
                  {"ffn", c->ffn_width + 1, 1u << 22}, {"vocabulary", c->vocabulary, 1u << 24},
                  {"context", c->context, 1u << 28}};
    for (size_t i = 0; i < G_N_ELEMENTS(counts); i++) {
        if (counts[i].value < 1 || counts[i].value > counts[i].limit) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                        "model config: %s is missing or out of range; give 1 to %u", counts[i].name,
                        counts[i].limit);
            return false;
        }
    }
    const bool llama = c->family == FAMILY_LLAMA;
    if (c->head_size == 0 &&
        (c->width % c->heads != 0 || (llama && c->width / c->heads % 2 != 0))) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model config: width %u does not give %u heads of %s elements; choose a "
                    "multiple of %u",
                    c->width, c->heads, llama ? "an even number of" : "whole",
                    llama ? 2 * c->heads : c->heads);
        return false;
    }
    spec->n_layers = c->layers;
    spec->width = c->width;
    spec->n_heads = c->heads;
    spec->n_kv_heads = c->kv_heads != 0 ? c->kv_heads : c->heads;
    spec->head_size = c->head_size != 0 ? c->head_size : c->width / c->heads;
    spec->ffn_width = c->ffn_width != 0 ? c->ffn_width
                      : llama           ? (c->width * 8 / 3 + 31) / 32 * 32
                                        : 4 * c->width;
    spec->vocab_size = c->vocabulary;
    spec->context = c->context;
    spec->norm_eps = c->norm_eps > 0.0f ? c->norm_eps : 1e-5f;
    spec->attention_scale =
        c->attention_scale > 0.0f ? c->attention_scale : 1.0f / sqrtf((float)spec->head_size);
    spec->tied_output = !c->untied;
    spec->rope.factor = 1.0;
    if (llama && c->rope.dims != 0) {
        spec->rope = c->rope;
    } else if (llama) {
        spec->rope.pairing = ROPE_ADJACENT;
        spec->rope.dims = spec->head_size;
        spec->rope.freq_base = c->rope_base > 0.0 ? c->rope_base : 10000.0;
    }
    return true;
}

ModelSpec *model_spec_from_config(const ModelConfig *config, GError **error)
{
    const bool gpt2 = config->family == FAMILY_GPT2;
    if (!gpt2 && config->family != FAMILY_LLAMA) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_INVALID,
                    "model config: family %u is unknown; choose gpt2 or llama",
                    (unsigned)config->family);
        return NULL;
    }
    g_autoptr(ModelSpec) spec = g_new0(ModelSpec, 1);
    spec->family = config->family;
    spec->name = g_strdup(config->name != NULL ? config->name : gpt2 ? "gpt2" : "llama");
    if (!fill_dimensions(spec, config, error)) {
        return NULL;
    }
    const Wanted *layer = gpt2 ? gpt2_layer : llama_layer,
                 *global = gpt2 ? gpt2_global : llama_global;
    const size_t n_layer = gpt2 ? G_N_ELEMENTS(gpt2_layer) : G_N_ELEMENTS(llama_layer);
    const size_t n_global = gpt2 ? G_N_ELEMENTS(gpt2_global) : G_N_ELEMENTS(llama_global);
    const size_t n_biases = !gpt2 && config->qkv_bias ? G_N_ELEMENTS(llama_biases) : 0;
    spec->tensors = weft_alloc(n_global + 2 + (n_layer + n_biases) * config->layers,
                               sizeof *spec->tensors, "the tensors of a model", error);
    if (spec->tensors == NULL) {
        return NULL;
    }
    for (size_t i = 0; i < n_global; i++) {
        add(spec, &global[i], -1);
    }
    for (uint32_t l = 0; l < config->layers; l++) {
        for (size_t i = 0; i < n_layer; i++) {
            add(spec, &layer[i], (int32_t)l);
        }
        for (size_t i = 0; i < n_biases; i++) {
            add(spec, &llama_biases[i], (int32_t)l);
        }
    }
    if (spec->rope.scaling == ROPE_SCALING_FACTORS) {
        add(spec, &(const Wanted){ROLE_ROPE_FACTORS, "rope_freqs.weight"}, -1);
    }
    if (config->untied) {
        add(spec, &(const Wanted){ROLE_OUTPUT, "output.weight"}, -1);
    }
    return model_spec_finish(spec, error) ? g_steal_pointer(&spec) : NULL;
}
