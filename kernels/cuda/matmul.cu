/* Products: which kernel does which. */
#include "kernels/cuda/matmul.h"

/* Rows from which on 16-bit matrix instructions win by estimate (kernels.md): those of float
 * weights soon, for their other kernels read the weights again for every 8 rows (F8_E4M3: 32, with
 * two instructions for one). */
enum { HALF_ROWS = 256, HALF_ROWS_OF_FLOATS = 33 };

static bool takes_half(Dtype weight, uint32_t rows, bool fast)
{
    const bool floats = weight == DTYPE_BF16 || weight == DTYPE_F16 || weight == DTYPE_F8_E4M3;
    return fast && weight != DTYPE_F32 && rows >= (floats ? HALF_ROWS_OF_FLOATS : HALF_ROWS);
}

extern "C" Dtype weft_cuda_activation_type(Dtype weight, uint32_t rows, bool fast)
{
    return takes_half(weight, rows, fast) ? DTYPE_BF16 : weight;
}

/* The spans of the units; false for more than fit. */
static bool cut_units(const CudaMatmul *m, MatmulCut *cut)
{
    const MatmulUnit whole = {m->w->n_in, {0, 1}};
    const MatmulUnit *units = m->n_units == 0 ? &whole : m->units;
    cut->n_units = m->n_units == 0 ? 1 : m->n_units;
    if (cut->n_units > MATMUL_UNITS_LIMIT) {
        return false;
    }
    uint32_t k = 0, span = 0;
    for (uint32_t u = 0; u < cut->n_units; u++) {
        cut->span_begin[u] = (uint16_t)span;
        cut->k_begin[u] = k;
        cut->step[u] = units[u].step;
        span += blocks_of(units[u].n_in, SPAN);
        k += units[u].n_in;
    }
    cut->span_begin[cut->n_units] = (uint16_t)span;
    cut->k_begin[cut->n_units] = k;
    cut->n_spans = span;
    return k == m->w->n_in && span > 0 && span <= UINT16_MAX;
}

extern "C" int weft_cuda_matmul(const CudaMatmul *m, WeftCudaStream stream)
{
    ProductArgs args = {};
    const RecordShape shape = packed_shape(m->w->type);
    if (shape.k == 0 || !cut_units(m, &args.cut) || (m->rows + 7) / 8 > 65535) {
        return (int)cudaErrorInvalidValue;
    }
    for (uint32_t u = 0; u < args.cut.n_units; u++) {
        if (args.cut.k_begin[u] % shape.k != 0) {
            return (int)cudaErrorInvalidValue;
        }
    }
    args.w = *m->w;
    const Dtype type = weft_cuda_activation_type(m->w->type, m->rows, m->fast);
    args.act = activations_at(type, m->activations, m->rows, m->w->n_in);
    args.x = m->x;
    args.x_ld = m->x_ld;
    args.act_ld = activation_row_elements(m->w->n_in);
    args.rows = m->rows;
    args.out = m->out;
    args.ld = m->ld;
    args.subtree_stride = m->subtree_stride;
    args.bias = m->bias;
    args.accumulate = m->accumulate;
    if (takes_half(m->w->type, m->rows, m->fast)) {
        return args.cut.n_units == 1 ? product_half(args, stream) : (int)cudaErrorInvalidValue;
    }
    if (shape.k <= 2) {
        return product_float(args, stream);
    }
    return shape.k == 32    ? product_q32(args, stream)
           : shape.k == 128 ? product_f8(args, stream)
                            : product_k(args, stream);
}
