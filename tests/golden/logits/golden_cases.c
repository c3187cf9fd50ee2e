#include "tests/golden/logits/golden_cases.h"

/* The seeds of quantised models are such that no activation lies so near the half of a quant that
 * float32 and float64 round it to different sides: the comparison with defined roundings can then
 * be as tight as that of float types. */
typedef struct TypeRow {
    Dtype type;
    uint64_t seed;
} TypeRow;

static const TypeRow TYPES[] = {
    {DTYPE_F32, 1000},  {DTYPE_F16, 1001},  {DTYPE_BF16, 1002}, {DTYPE_Q8_0, 2003},
    {DTYPE_Q4_0, 1004}, {DTYPE_Q4_1, 3005}, {DTYPE_Q5_0, 5006}, {DTYPE_Q5_1, 1007},
    {DTYPE_Q4_K, 1008}, {DTYPE_Q5_K, 1009}, {DTYPE_Q6_K, 2010},
};
#define N_TYPES G_N_ELEMENTS(TYPES)

typedef struct Shape {
    const char *name;
    void (*change)(GoldenCase *c);
} Shape;

static void cache_f16(GoldenCase *c)
{
    c->kv_type = KV_F16;
}

static void cache_bf16(GoldenCase *c)
{
    c->kv_type = KV_BF16;
}

/* Every query head has its own keys; separate output; rows that are no multiple of a vector or a
 * panel. */
static void multi_head(GoldenCase *c)
{
    c->config.width = 90;
    c->config.n_heads = c->config.n_kv_heads = 3;
    c->config.head_size = 30;
    c->config.ffn_width = 147;
    c->config.tied = false;
    c->config.vocab_size = 301;
}

/* One KV head for all, heads wider than width / heads, three vocabulary chunks. */
static void one_kv_head(GoldenCase *c)
{
    c->config.width = 96;
    c->config.n_heads = 6;
    c->config.n_kv_heads = 1;
    c->config.head_size = 48;
    c->config.ffn_width = 320;
    c->config.vocab_size = 2500;
    c->config.n_layers = 1;
}

static void biases(GoldenCase *c)
{
    c->config.qkv_bias = true;
}

static void rope_linear(GoldenCase *c)
{
    c->config.rope_scaling = "linear";
    c->config.rope_factor = 4;
}

static void rope_yarn(GoldenCase *c)
{
    c->config.rope_scaling = "yarn";
    c->config.rope_factor = 8;
    c->config.rope_original_context = 64;
    c->config.rope_base = 500;
}

static void rope_factors(GoldenCase *c)
{
    c->config.rope_factors = true;
    c->config.rope_base = 500000;
}

/* As files are really mixed: 4-bit matrices, a finer value and down projection, another head. */
static void mixed_k(GoldenCase *c)
{
    gguf_builder_set_type(&c->config, DTYPE_Q4_K);
    c->config.type[ROLE_ATTN_V] = c->config.type[ROLE_FFN_DOWN] = c->config.type[ROLE_OUTPUT] =
        DTYPE_Q6_K;
    c->config.type[ROLE_TOKEN_EMBD] = DTYPE_Q5_0;
    c->config.tied = false;
    c->config.n_layers = 3;
    c->config.ffn_width = 768;
}

/* The proportions of SmolLM2: 9 heads on 3, units of one head, an FFN unit that is shorter. */
static void nine_heads(GoldenCase *c)
{
    gguf_builder_set_type(&c->config, DTYPE_Q4_1);
    c->config.width = 288;
    c->config.n_heads = 9;
    c->config.n_kv_heads = 3;
    c->config.ffn_width = 736;
    c->config.seed = 4020;
    c->config.n_layers = 3;
}

/* GPT-2, whose width is shared by its heads. */
static void gpt2(GoldenCase *c)
{
    c->config.family = FAMILY_GPT2;
    c->config.n_kv_heads = c->config.n_heads;
}

static void gpt2_f16(GoldenCase *c)
{
    gpt2(c);
    gguf_builder_set_type(&c->config, DTYPE_F16);
}

static void gpt2_bf16(GoldenCase *c)
{
    gpt2(c);
    gguf_builder_set_type(&c->config, DTYPE_BF16);
}

static void gpt2_q8(GoldenCase *c)
{
    gpt2(c);
    gguf_builder_set_type(&c->config, DTYPE_Q8_0);
    c->config.seed = 7003;
}

static void gpt2_q4(GoldenCase *c)
{
    gpt2(c);
    gguf_builder_set_type(&c->config, DTYPE_Q4_1);
    c->config.type[ROLE_POSITION_EMBD] = DTYPE_F32;
    c->config.seed = 7505;
}

static void gpt2_mixed_k(GoldenCase *c)
{
    gpt2(c);
    gguf_builder_set_type(&c->config, DTYPE_Q4_K);
    c->config.type[ROLE_POSITION_EMBD] = DTYPE_F32;
    c->config.type[ROLE_ATTN_Q] = DTYPE_Q5_K;
    c->config.type[ROLE_TOKEN_EMBD] = c->config.type[ROLE_FFN_DOWN] = DTYPE_Q6_K;
    c->config.ffn_width = 768;
    c->config.seed = 7506;
}

/* Rows that are no multiple of a vector or a panel, a head of its own, three vocabulary chunks. */
static void gpt2_odd(GoldenCase *c)
{
    gpt2(c);
    c->config.width = 90;
    c->config.n_heads = c->config.n_kv_heads = 3;
    c->config.ffn_width = 147;
    c->config.tied = false;
    c->config.vocab_size = 2500;
    c->config.n_layers = 3;
}

static const Shape SHAPES[] = {
    {"cache-f16", cache_f16},
    {"cache-bf16", cache_bf16},
    {"multi-head", multi_head},
    {"one-kv-head", one_kv_head},
    {"biases", biases},
    {"rope-linear", rope_linear},
    {"rope-yarn", rope_yarn},
    {"rope-factors", rope_factors},
    {"mixed-k", mixed_k},
    {"nine-heads", nine_heads},
    {"gpt2", gpt2},
    {"gpt2-F16", gpt2_f16},
    {"gpt2-BF16", gpt2_bf16},
    {"gpt2-Q8_0", gpt2_q8},
    {"gpt2-Q4_1", gpt2_q4},
    {"gpt2-mixed-k", gpt2_mixed_k},
    {"gpt2-odd", gpt2_odd},
};

unsigned golden_case_count(void)
{
    return N_TYPES + G_N_ELEMENTS(SHAPES);
}

void golden_case(unsigned index, GoldenCase *out)
{
    const bool is_type = index < N_TYPES;
    *out = (GoldenCase){.name = is_type ? dtype_info(TYPES[index].type)->name
                                        : SHAPES[index - N_TYPES].name,
                        .kv_type = KV_F32};
    GgufBuilderConfig *c = &out->config;
    gguf_builder_defaults(c);
    gguf_builder_set_type(c, is_type ? TYPES[index].type : DTYPE_F32);
    c->name = out->name;
    c->width = 256;
    c->n_heads = 4;
    c->n_kv_heads = 2;
    c->ffn_width = 512;
    c->vocab_size = 320;
    c->seed = is_type ? TYPES[index].seed : 1000 + index;
    if (!is_type) {
        SHAPES[index - N_TYPES].change(out);
    }
}
