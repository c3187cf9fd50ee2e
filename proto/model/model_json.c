#include "proto/model/model_json.h"

#include "proto/base/error.h"

/* What gives a spec of these dimensions. */
static ModelConfig model_config_of(const ModelSpec *spec)
{
    return (ModelConfig){
        .family = spec->family,
        .layers = spec->n_layers,
        .width = spec->width,
        .heads = spec->n_heads,
        .kv_heads = spec->n_kv_heads,
        .head_size = spec->head_size,
        .ffn_width = spec->ffn_width,
        .vocabulary = spec->vocab_size,
        .context = spec->context,
        .untied = !spec->tied_output,
        .qkv_bias =
            spec->family == FAMILY_LLAMA && model_spec_tensor(spec, ROLE_ATTN_Q_BIAS, 0) != NULL,
        .norm_eps = spec->norm_eps,
        .attention_scale = spec->attention_scale,
        .rope = spec->rope,
        .name = spec->name,
    };
}

static json_t *rope_to_json(const RopeSpec *r)
{
    return json_pack("{s:i,s:i,s:i,s:f,s:f,s:i,s:f,s:f,s:f,s:f}", "pairing", (int)r->pairing,
                     "scaling", (int)r->scaling, "dims", (int)r->dims, "base", r->freq_base,
                     "factor", r->factor, "original_context", (int)r->original_context, "ext",
                     r->yarn_ext_factor, "attn", r->yarn_attn_factor, "fast", r->yarn_beta_fast,
                     "slow", r->yarn_beta_slow);
}

json_t *model_to_json(const ModelSpec *spec)
{
    const ModelConfig c = model_config_of(spec);
    json_t *o = json_pack("{s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:b,s:b,s:f,s:f}", "family",
                          c.family == FAMILY_GPT2 ? "gpt2" : "llama", "name", spec->name, "layers",
                          (int)c.layers, "width", (int)c.width, "heads", (int)c.heads, "kv_heads",
                          (int)c.kv_heads, "head_size", (int)c.head_size, "ffn", (int)c.ffn_width,
                          "vocabulary", (int)c.vocabulary, "context", (int)c.context, "untied",
                          (int)c.untied, "qkv_bias", (int)c.qkv_bias, "norm_eps",
                          (double)c.norm_eps, "attention_scale", (double)c.attention_scale);
    if (c.family == FAMILY_LLAMA) {
        json_object_set_new(o, "rope", rope_to_json(&c.rope));
    }
    return o;
}

static uint32_t count(const json_t *o, const char *key)
{
    const json_int_t n = json_integer_value(json_object_get(o, key));
    return n >= 0 && n <= G_MAXUINT32 ? (uint32_t)n : 0;
}

static double real(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

ModelSpec *model_from_json(const json_t *o, GError **error)
{
    const char *family = json_string_value(json_object_get(o, "family"));
    const json_t *rope = json_object_get(o, "rope");
    const ModelConfig c = {
        .family = g_strcmp0(family, "gpt2") == 0    ? FAMILY_GPT2
                  : g_strcmp0(family, "llama") == 0 ? FAMILY_LLAMA
                                                    : 0,
        .layers = count(o, "layers"),
        .width = count(o, "width"),
        .heads = count(o, "heads"),
        .kv_heads = count(o, "kv_heads"),
        .head_size = count(o, "head_size"),
        .ffn_width = count(o, "ffn"),
        .vocabulary = count(o, "vocabulary"),
        .context = count(o, "context"),
        .untied = json_is_true(json_object_get(o, "untied")),
        .qkv_bias = json_is_true(json_object_get(o, "qkv_bias")),
        .norm_eps = (float)real(o, "norm_eps"),
        .attention_scale = (float)real(o, "attention_scale"),
        .name = json_string_value(json_object_get(o, "name")),
        .rope = {.pairing = (RopePairing)count(rope, "pairing"),
                 .scaling = (RopeScaling)count(rope, "scaling"),
                 .dims = count(rope, "dims"),
                 .freq_base = real(rope, "base"),
                 .factor = real(rope, "factor"),
                 .original_context = count(rope, "original_context"),
                 .yarn_ext_factor = real(rope, "ext"),
                 .yarn_attn_factor = real(rope, "attn"),
                 .yarn_beta_fast = real(rope, "fast"),
                 .yarn_beta_slow = real(rope, "slow")},
    };
    return model_spec_from_config(&c, error);
}
