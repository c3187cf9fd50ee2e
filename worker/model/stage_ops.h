/* The pieces of a serving pass, inside a pool region: a family's layer (llama_serving.c,
 * gpt2_serving.c) is a list of them. Internal to worker/model.
 *
 * Every op is a phase: threads share its outputs, then meet at a barrier (stage_end). Thread 0
 * alone talks (group, links), between barriers. A thread never splits a sum: sums are lanes, units
 * and the tree (NUMERICS 1-3), so thread counts change no bit. Rows of norms, residual sums and
 * quantisation are shared alike, so that none of these needs a barrier before the next. */
#pragma once

#include "worker/model/stage.h"

/* One thread's view of a pass through the stage's layers. */
typedef struct StagePass {
    Stage *s;
    const StageRun *run; /* NULL for logits */
    uint32_t rows;
    unsigned t, n_threads;
} StagePass;

/* One matrix of a phase and its result [rows][ld]; several share the phase's panels so that all
 * threads end together. */
typedef struct Product {
    const PackedMatrix *w;
    float *out;
    size_t ld;
} Product;

/* A layer of the stage over s->x, in place; false: the group failed (s->status). */
typedef bool (*StageLayerFn)(StagePass *p, uint32_t layer);
bool llama_serving_layer(StagePass *p, uint32_t layer);
bool gpt2_serving_layer(StagePass *p, uint32_t layer);

/* Barriers; the second ends an op, whose time thread 0 takes. */
void stage_meet(StagePass *p);
void stage_end(StagePass *p, StageOp op);
/* Thread 0 lets the links progress. */
void stage_progress(StagePass *p);

/* This thread's rows [*first, *last) of what is shared by rows. */
void stage_own_rows(const StagePass *p, uint32_t *first, uint32_t *last);
/* out = norm(x) of a row: layer norm where there is a bias, else RMS norm. */
void stage_norm_row(const StagePass *p, const float *x, const float *weight, const float *bias,
                    float *out);
/* s->h = norm(s->x) on own rows. */
void stage_norm(StagePass *p, const float *weight, const float *bias);
/* Own rows of x [rows][n_in] for every kind of activation that the matrices read. */
void stage_quantise(StagePass *p, const float *x, uint32_t n_in, const PackedMatrix *const *users,
                    unsigned n_users);
/* Products of the quantised rows with matrices that are not cut. */
void stage_products(StagePass *p, const Product *list, unsigned n);
/* s->partial = the product with a matrix whose contraction is cut, unit by unit. */
void stage_product_units(StagePass *p, const PackedMatrix *w, const StageUnits *units);
/* Each of n_rows rows of n floats += bias; bias may be NULL. */
void stage_add_bias(const StagePass *p, float *rows, const float *bias, uint32_t n,
                    uint32_t n_rows);
/* Completes the unit tree over the tensor ranks: partial[0] becomes the root. false: the group
 * failed. */
bool stage_reduce(StagePass *p, const StageUnits *units, uint16_t site, const char *operation);
/* s->x += partial[0] + bias on own rows; bias may be NULL. */
void stage_add_residual(StagePass *p, const float *bias);
/* x is complete after a sub-layer: own rows are hashed if they are traced. */
void stage_trace(StagePass *p, uint32_t site);
/* Adds biases to q, k, v of own rows, rotates q and k where the model has RoPE, and writes k and v
 * to their pages. */
void stage_store_keys(StagePass *p, uint32_t layer);
/* s->attn from s->q and the pages. */
void stage_attend(StagePass *p, uint32_t layer);
/* Fail point: a wrong bit in s->x, if the run asks for one after this layer. */
void stage_flip_bit(StagePass *p, uint32_t layer);
