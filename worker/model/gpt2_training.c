/* GPT-2 (Radford et al. 2019): layer norm, learned positions, GELU feed-forward, biases everywhere.
 * Forward and backward of the layers beside each other; what writes on the right of a barrier reads
 * what stands on its left. */
#include "worker/model/training_pass.h"

void gpt2_layer_forward(Pass *p, uint32_t l, float *out)
{
    Training *m = p->m;
    Tape *tape = &p->slot->tape[l];
    const uint32_t layer = p->layer_first + l;

    pass_norm(p, tape->x, weight(p, ROLE_ATTN_NORM, l), weight(p, ROLE_ATTN_NORM_BIAS, l),
              tape->attn_in);
    meet(p);
    pass_linear(p, tape->attn_in, m->width,
                (const Linear[]){{weight(p, ROLE_ATTN_Q, l), m->q_width, tape->q},
                                 {weight(p, ROLE_ATTN_K, l), m->kv_width, tape->k},
                                 {weight(p, ROLE_ATTN_V, l), m->kv_width, tape->v}},
                3);
    meet(p);
    pass_bias(p, tape->q, weight(p, ROLE_ATTN_Q_BIAS, l), m->q_width);
    pass_bias(p, tape->k, weight(p, ROLE_ATTN_K_BIAS, l), m->kv_width);
    pass_bias(p, tape->v, weight(p, ROLE_ATTN_V_BIAS, l), m->kv_width);
    meet(p);
    pass_attention(p, tape);
    meet(p);
    pass_linear_units(p, tape->attn, weight(p, ROLE_ATTN_OUT, l), m->q_width, &m->attn_units);
    for (uint32_t row = 0; pass_fold_take(p, &row);) {
        pass_residual(p, tape->x, weight(p, ROLE_ATTN_OUT_BIAS, l), dropout_site_attention(layer),
                      tape->mid);
        pass_norm(p, tape->mid, weight(p, ROLE_FFN_NORM, l), weight(p, ROLE_FFN_NORM_BIAS, l),
                  tape->ffn_in);
    }
    meet(p);
    pass_linear(p, tape->ffn_in, m->width,
                (const Linear[]){{weight(p, ROLE_FFN_UP, l), m->ffn_width, tape->up}}, 1);
    meet(p);
    pass_bias(p, tape->up, weight(p, ROLE_FFN_UP_BIAS, l), m->ffn_width);
    pass_gelu(p, tape->up, m->ffn_width, tape->act);
    meet(p);
    if (out == NULL) {
        return;
    }
    pass_linear_units(p, tape->act, weight(p, ROLE_FFN_DOWN, l), m->ffn_width, &m->ffn_units);
    for (uint32_t row = 0; pass_fold_take(p, &row);) {
        pass_residual(p, tape->mid, weight(p, ROLE_FFN_DOWN_BIAS, l), dropout_site_ffn(layer), out);
    }
    meet(p);
}

void gpt2_layer_again(Pass *p, uint32_t l)
{
    Tape *tape = &p->slot->tape[l];
    pass_norm(p, tape->x, weight(p, ROLE_ATTN_NORM, l), weight(p, ROLE_ATTN_NORM_BIAS, l),
              tape->attn_in);
    pass_attention(p, tape);
    pass_norm(p, tape->mid, weight(p, ROLE_FFN_NORM, l), weight(p, ROLE_FFN_NORM_BIAS, l),
              tape->ffn_in);
    pass_gelu(p, tape->up, p->m->ffn_width, tape->act);
}

/* Gradients of the feed-forward weights; dy: of its result. */
static void ffn_weights(Pass *p, uint32_t l, const float *dy)
{
    const Training *m = p->m;
    const Tape *tape = &p->slot->tape[l];
    pass_linear_dw(
        p,
        (const LinearGradient[]){
            {dy, m->width, tape->act, m->ffn_width, gradient(p, ROLE_FFN_DOWN, l)},
            {p->d->dact, m->ffn_width, tape->ffn_in, m->width, gradient(p, ROLE_FFN_UP, l)}},
        2);
    pass_bias_gradient(p, dy, m->width, gradient(p, ROLE_FFN_DOWN_BIAS, l));
    pass_bias_gradient(p, p->d->dact, m->ffn_width, gradient(p, ROLE_FFN_UP_BIAS, l));
}

/* Gradients of the attention weights; dy: of its result. */
static void attention_weights(Pass *p, uint32_t l, const float *dy)
{
    const Training *m = p->m;
    const Tape *tape = &p->slot->tape[l];
    const LayerGradients *d = p->d;
    pass_linear_dw(p,
                   (const LinearGradient[]){
                       {dy, m->width, tape->attn, m->q_width, gradient(p, ROLE_ATTN_OUT, l)},
                       {d->dq, m->q_width, tape->attn_in, m->width, gradient(p, ROLE_ATTN_Q, l)},
                       {d->dk, m->kv_width, tape->attn_in, m->width, gradient(p, ROLE_ATTN_K, l)},
                       {d->dv, m->kv_width, tape->attn_in, m->width, gradient(p, ROLE_ATTN_V, l)}},
                   4);
    pass_bias_gradient(p, dy, m->width, gradient(p, ROLE_ATTN_OUT_BIAS, l));
    pass_bias_gradient(p, d->dq, m->q_width, gradient(p, ROLE_ATTN_Q_BIAS, l));
    pass_bias_gradient(p, d->dk, m->kv_width, gradient(p, ROLE_ATTN_K_BIAS, l));
    pass_bias_gradient(p, d->dv, m->kv_width, gradient(p, ROLE_ATTN_V_BIAS, l));
}

void gpt2_layer_backward(Pass *p, uint32_t l)
{
    Training *m = p->m;
    Tape *tape = &p->slot->tape[l];
    const uint32_t layer = p->layer_first + l;

    /* feed-forward: dx is the gradient of its result and of mid */
    const float *dy = pass_result_gradient(p, dropout_site_ffn(layer), p->d->out);
    pass_linear_dx(p, dy, m->width, weight(p, ROLE_FFN_DOWN, l), m->ffn_width, p->d->dact);
    meet(p);
    pass_gelu_backward(p, tape->up, m->ffn_width, p->d->dact);
    meet(p);
    pass_units_dx(
        p,
        (const SpanDx[]){{p->d->dact, weight(p, ROLE_FFN_UP, l), m->ffn_width, m->ffn_units.first}},
        1, &m->ffn_units);
    if (!m->o.apart) {
        ffn_weights(p, l, dy);
    }
    pass_fold_end(p);
    pass_norm_backward(p, tape->mid, weight(p, ROLE_FFN_NORM, l), gradient(p, ROLE_FFN_NORM, l),
                       gradient(p, ROLE_FFN_NORM_BIAS, l));
    meet(p);

    /* attention: dx is the gradient of mid, thereby of attention's result and of x */
    dy = pass_result_gradient(p, dropout_site_attention(layer), p->d->mid);
    pass_linear_dx(p, dy, m->width, weight(p, ROLE_ATTN_OUT, l), m->q_width, p->d->dq);
    meet(p);
    pass_attention_backward(p, tape);
    pass_qkv_dx(p, l);
    if (!m->o.apart) {
        attention_weights(p, l, dy);
    }
    pass_fold_end(p);
    pass_norm_backward(p, tape->x, weight(p, ROLE_ATTN_NORM, l), gradient(p, ROLE_ATTN_NORM, l),
                       gradient(p, ROLE_ATTN_NORM_BIAS, l));
    meet(p);
}

void gpt2_layer_weights(Pass *p, uint32_t l)
{
    ffn_weights(p, l, p->d->out);
    attention_weights(p, l, p->d->mid);
}
