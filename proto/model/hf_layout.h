/* Where the elements of a logical tensor lie in a Hugging Face directory: names, GPT-2's transposed
 * and joined projections (Conv1D), Llama's rows of Q and K in another order. One description, for
 * reading and writing. */
#pragma once

#include "proto/model/model_spec.h"

typedef enum HfForm {
    HF_ROWS,    /* element (r, c) at (r, first + c) */
    HF_COLUMNS, /* at (c, first + r) */
    HF_HEADS,   /* at (row of the other order, c); vectors: (0, it) */
} HfForm;

typedef struct HfPlace {
    char name[96];
    HfForm form;
    uint32_t rows, columns; /* of the file's tensor; rows = 1 for vectors */
    uint32_t first;
    uint32_t head_size; /* HF_HEADS */
} HfPlace;

/* The place of a tensor of a gpt2 or llama spec. */
HfPlace hf_place(const ModelSpec *spec, const TensorSpec *tensor);
/* Adjacent rope pairs here, halves there: element 2p + part of a head is theirs part * half + p. */
uint32_t hf_head_row(uint32_t row, uint32_t head_size);
