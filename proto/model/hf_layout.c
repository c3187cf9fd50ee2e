#include "proto/model/hf_layout.h"

#include <stdio.h>
#include <string.h>

typedef struct HfName {
    TensorRole role;
    const char *name; /* %d: the layer */
} HfName;

static const HfName gpt2_names[] = {
    {ROLE_TOKEN_EMBD, "transformer.wte.weight"},
    {ROLE_POSITION_EMBD, "transformer.wpe.weight"},
    {ROLE_ATTN_NORM, "transformer.h.%d.ln_1.weight"},
    {ROLE_ATTN_NORM_BIAS, "transformer.h.%d.ln_1.bias"},
    {ROLE_ATTN_Q, "transformer.h.%d.attn.c_attn.weight"},
    {ROLE_ATTN_K, "transformer.h.%d.attn.c_attn.weight"},
    {ROLE_ATTN_V, "transformer.h.%d.attn.c_attn.weight"},
    {ROLE_ATTN_Q_BIAS, "transformer.h.%d.attn.c_attn.bias"},
    {ROLE_ATTN_K_BIAS, "transformer.h.%d.attn.c_attn.bias"},
    {ROLE_ATTN_V_BIAS, "transformer.h.%d.attn.c_attn.bias"},
    {ROLE_ATTN_OUT, "transformer.h.%d.attn.c_proj.weight"},
    {ROLE_ATTN_OUT_BIAS, "transformer.h.%d.attn.c_proj.bias"},
    {ROLE_FFN_NORM, "transformer.h.%d.ln_2.weight"},
    {ROLE_FFN_NORM_BIAS, "transformer.h.%d.ln_2.bias"},
    {ROLE_FFN_UP, "transformer.h.%d.mlp.c_fc.weight"},
    {ROLE_FFN_UP_BIAS, "transformer.h.%d.mlp.c_fc.bias"},
    {ROLE_FFN_DOWN, "transformer.h.%d.mlp.c_proj.weight"},
    {ROLE_FFN_DOWN_BIAS, "transformer.h.%d.mlp.c_proj.bias"},
    {ROLE_OUTPUT_NORM, "transformer.ln_f.weight"},
    {ROLE_OUTPUT_NORM_BIAS, "transformer.ln_f.bias"},
    {ROLE_OUTPUT, "lm_head.weight"},
    {ROLE_LIMIT, NULL},
};
static const HfName llama_names[] = {
    {ROLE_TOKEN_EMBD, "model.embed_tokens.weight"},
    {ROLE_ATTN_NORM, "model.layers.%d.input_layernorm.weight"},
    {ROLE_ATTN_Q, "model.layers.%d.self_attn.q_proj.weight"},
    {ROLE_ATTN_K, "model.layers.%d.self_attn.k_proj.weight"},
    {ROLE_ATTN_V, "model.layers.%d.self_attn.v_proj.weight"},
    {ROLE_ATTN_Q_BIAS, "model.layers.%d.self_attn.q_proj.bias"},
    {ROLE_ATTN_K_BIAS, "model.layers.%d.self_attn.k_proj.bias"},
    {ROLE_ATTN_V_BIAS, "model.layers.%d.self_attn.v_proj.bias"},
    {ROLE_ATTN_OUT, "model.layers.%d.self_attn.o_proj.weight"},
    {ROLE_FFN_NORM, "model.layers.%d.post_attention_layernorm.weight"},
    {ROLE_FFN_GATE, "model.layers.%d.mlp.gate_proj.weight"},
    {ROLE_FFN_UP, "model.layers.%d.mlp.up_proj.weight"},
    {ROLE_FFN_DOWN, "model.layers.%d.mlp.down_proj.weight"},
    {ROLE_OUTPUT_NORM, "model.norm.weight"},
    {ROLE_OUTPUT, "lm_head.weight"},
    {ROLE_LIMIT, NULL},
};

static void write_name(const HfName *names, const TensorSpec *t, char out[96])
{
    for (; names->name != NULL; names++) {
        if (names->role == t->role) {
            const char *layer = strstr(names->name, "%d");
            if (layer == NULL) {
                g_strlcpy(out, names->name, 96);
            } else {
                snprintf(out, 96, "%.*s%d%s", (int)(layer - names->name), names->name, t->layer,
                         layer + 2);
            }
            return;
        }
    }
    g_strlcpy(out, t->name, 96); /* rope factors: in no such directory */
}

/* Conv1D weights are [inputs][outputs]; Q, K and V stand side by side. */
static void place_gpt2(const ModelSpec *spec, const TensorSpec *t, HfPlace *p)
{
    const uint32_t third = t->role == ROLE_ATTN_K || t->role == ROLE_ATTN_K_BIAS   ? 1
                           : t->role == ROLE_ATTN_V || t->role == ROLE_ATTN_V_BIAS ? 2
                                                                                   : 0;
    switch (t->role) {
    case ROLE_ATTN_Q:
    case ROLE_ATTN_K:
    case ROLE_ATTN_V:
        *p = (HfPlace){.form = HF_COLUMNS,
                       .rows = t->columns,
                       .columns = 3 * spec->width,
                       .first = third * spec->width};
        break;
    case ROLE_ATTN_Q_BIAS:
    case ROLE_ATTN_K_BIAS:
    case ROLE_ATTN_V_BIAS:
        *p = (HfPlace){
            .form = HF_ROWS, .rows = 1, .columns = 3 * spec->width, .first = third * spec->width};
        break;
    case ROLE_ATTN_OUT:
    case ROLE_FFN_UP:
    case ROLE_FFN_DOWN:
        *p = (HfPlace){.form = HF_COLUMNS, .rows = t->columns, .columns = t->rows};
        break;
    default:
        break;
    }
}

HfPlace hf_place(const ModelSpec *spec, const TensorSpec *t)
{
    HfPlace p = {.form = HF_ROWS, .rows = t->rows, .columns = t->columns};
    const bool rotated = t->role == ROLE_ATTN_Q || t->role == ROLE_ATTN_K ||
                         t->role == ROLE_ATTN_Q_BIAS || t->role == ROLE_ATTN_K_BIAS;
    if (spec->family == FAMILY_GPT2) {
        place_gpt2(spec, t, &p);
    } else if (rotated && spec->rope.pairing == ROPE_ADJACENT) {
        p.form = HF_HEADS;
        p.head_size = spec->head_size;
    }
    write_name(spec->family == FAMILY_GPT2 ? gpt2_names : llama_names, t, p.name);
    return p;
}

uint32_t hf_head_row(uint32_t row, uint32_t head_size)
{
    const uint32_t head = row / head_size, at = row % head_size;
    return head * head_size + at % 2 * (head_size / 2) + at / 2;
}
