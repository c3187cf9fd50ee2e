/* cuBLASLt reads matrices column by column: our rows [n][k] are its columns k x n. So out^T (n_out
 * x rows) = W (n_out x n_in, transposed from its view) times x^T (n_in x rows), all in place. */
#include "kernels/cuda/dense.h"

#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

enum { ALGORITHMS = 64 };

/* What an algorithm was asked for. */
typedef struct Shape {
    Dtype type;
    bool w_by_in, x_by_in;
    uint32_t rows, n_out, n_in;
    size_t w_ld, x_ld, ld, workspace_bytes;
    cublasLtEpilogue_t epilogue;
} Shape;

struct CudaDense {
    cublasLtHandle_t handle;
    CudaDenseF8 f8;
    uint32_t n; /* kept so far; the oldest gives way */
    Shape shapes[ALGORITHMS];
    cublasLtMatmulAlgo_t algorithms[ALGORITHMS];
};

/* The library's descriptions of one product. */
typedef struct Descriptions {
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, out;
} Descriptions;

CudaDense *cuda_dense_new(int *status)
{
    CudaDense *dense = calloc(1, sizeof *dense);
    if (dense == NULL) {
        *status = (int)CUBLAS_STATUS_ALLOC_FAILED;
        return NULL;
    }
    *status = (int)cublasLtCreate(&dense->handle);
    if (*status != (int)CUBLAS_STATUS_SUCCESS) {
        free(dense);
        return NULL;
    }
    const char *said = getenv("WEFT_DEVICE_FP8_ACTIVATIONS");
    dense->f8.wanted = said != NULL && strcmp(said, "1") == 0;
    return dense;
}

CudaDenseF8 *cuda_dense_f8(CudaDense *dense)
{
    return &dense->f8;
}

void cuda_dense_free(CudaDense *dense)
{
    if (dense != NULL) {
        cublasLtDestroy(dense->handle);
        free(dense);
    }
}

static void descriptions_free(Descriptions *d)
{
    if (d->product != NULL) {
        cublasLtMatmulDescDestroy(d->product);
    }
    if (d->w != NULL) {
        cublasLtMatrixLayoutDestroy(d->w);
    }
    if (d->x != NULL) {
        cublasLtMatrixLayoutDestroy(d->x);
    }
    if (d->out != NULL) {
        cublasLtMatrixLayoutDestroy(d->out);
    }
}

static cublasLtEpilogue_t epilogue_of(const CudaDenseProduct *a)
{
    return a->gelu           ? CUBLASLT_EPILOGUE_GELU_BIAS
           : a->bias != NULL ? CUBLASLT_EPILOGUE_BIAS
                             : CUBLASLT_EPILOGUE_DEFAULT;
}

/* A number of each 128 elements of each row of both operands, rows adjacent ("128-element 1D block
 * scaling", cuBLAS 3.1.4.5). */
static cublasStatus_t describe_scales(const CudaDenseProduct *a, cublasLtMatmulDesc_t product)
{
#if CUBLAS_VERSION >= 120900
    const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
    const struct {
        cublasLtMatmulDescAttributes_t attribute;
        const void *value;
        size_t bytes;
    } settings[] = {
        {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode},
        {CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode},
        {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a->w_scales, sizeof a->w_scales},
        {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a->x_scales, sizeof a->x_scales},
    };
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (unsigned i = 0; i < 4 && status == CUBLAS_STATUS_SUCCESS; i++) {
        status = cublasLtMatmulDescSetAttribute(product, settings[i].attribute, settings[i].value,
                                                settings[i].bytes);
    }
    return status;
#else
    (void)a, (void)product;
    return CUBLAS_STATUS_NOT_SUPPORTED;
#endif
}

static cublasStatus_t describe_product(const CudaDenseProduct *a, cublasLtMatmulDesc_t product)
{
    const cublasOperation_t w = a->w_by_in ? CUBLAS_OP_N : CUBLAS_OP_T,
                            x = a->x_by_in ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = epilogue_of(a);
    cublasStatus_t status =
        cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &w, sizeof w);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &x, sizeof x);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                                sizeof epilogue);
    }
    if (status == CUBLAS_STATUS_SUCCESS && a->bias != NULL) {
        status = cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                &a->bias, sizeof a->bias);
    }
    return status == CUBLAS_STATUS_SUCCESS && a->type == DTYPE_F8_E4M3 ? describe_scales(a, product)
                                                                       : status;
}

static cudaDataType_t type_of(Dtype type)
{
    switch (type) {
    case DTYPE_BF16:
        return CUDA_R_16BF;
    case DTYPE_F16:
        return CUDA_R_16F;
    case DTYPE_F8_E4M3:
        return CUDA_R_8F_E4M3;
    default:
        return CUDA_R_32F;
    }
}

static cublasStatus_t describe(const CudaDenseProduct *a, Descriptions *d)
{
    const cudaDataType_t type = type_of(a->type);
    cublasStatus_t status = cublasLtMatmulDescCreate(&d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = describe_product(a, d->product);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatrixLayoutCreate(&d->w, type, a->w_by_in ? a->n_out : a->n_in,
                                            a->w_by_in ? a->n_in : a->n_out, (int64_t)a->w_ld);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatrixLayoutCreate(&d->x, type, a->x_by_in ? a->rows : a->n_in,
                                            a->x_by_in ? a->n_in : a->rows, (int64_t)a->x_ld);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatrixLayoutCreate(&d->out, CUDA_R_32F, a->n_out, a->rows, (int64_t)a->ld);
    }
    return status;
}

static bool same_shape(const Shape *a, const Shape *b)
{
    return a->type == b->type && a->w_by_in == b->w_by_in && a->x_by_in == b->x_by_in &&
           a->rows == b->rows && a->n_out == b->n_out && a->n_in == b->n_in && a->w_ld == b->w_ld &&
           a->x_ld == b->x_ld && a->ld == b->ld && a->workspace_bytes == b->workspace_bytes &&
           a->epilogue == b->epilogue;
}

static cublasStatus_t ask(CudaDense *dense, const Descriptions *d, size_t workspace_bytes,
                          cublasLtMatmulAlgo_t *out)
{
    cublasLtMatmulPreference_t preference;
    cublasStatus_t status = cublasLtMatmulPreferenceCreate(&preference);
    if (status != CUBLAS_STATUS_SUCCESS) {
        return status;
    }
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    status =
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace_bytes, sizeof workspace_bytes);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = cublasLtMatmulAlgoGetHeuristic(dense->handle, d->product, d->w, d->x, d->out,
                                                d->out, preference, 1, &found, &n_found);
    }
    cublasLtMatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_SUCCESS && n_found == 0) {
        status = CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        *out = found.algo;
    }
    return status;
}

/* The algorithm for this shape, asked for once. */
static cublasStatus_t algorithm(CudaDense *dense, const CudaDenseProduct *a, const Descriptions *d,
                                const cublasLtMatmulAlgo_t **out)
{
    const Shape shape = {a->type,       a->w_by_in, a->x_by_in, a->rows, a->n_out,
                         a->n_in,       a->w_ld,    a->x_ld,    a->ld,   a->workspace_bytes,
                         epilogue_of(a)};
    const uint32_t kept = dense->n < ALGORITHMS ? dense->n : ALGORITHMS;
    for (uint32_t i = 0; i < kept; i++) {
        if (same_shape(&shape, &dense->shapes[i])) {
            *out = &dense->algorithms[i];
            return CUBLAS_STATUS_SUCCESS;
        }
    }
    const uint32_t at = dense->n % ALGORITHMS;
    const cublasStatus_t status = ask(dense, d, a->workspace_bytes, &dense->algorithms[at]);
    if (status == CUBLAS_STATUS_SUCCESS) {
        dense->shapes[at] = shape;
        dense->n++;
        *out = &dense->algorithms[at];
    }
    return status;
}

static bool is_right(const CudaDenseProduct *a)
{
    if (a->type == DTYPE_F8_E4M3) {
        return !a->w_by_in && !a->x_by_in && a->bias == NULL && !a->gelu && a->rows % 4 == 0 &&
               a->n_out % 4 == 0 && a->n_in % 128 == 0;
    }
    return (a->type == DTYPE_BF16 || a->type == DTYPE_F16 || a->type == DTYPE_F32) &&
           !(a->gelu && a->bias == NULL) && !(a->gelu && a->accumulate);
}

int cuda_dense_product(CudaDense *dense, const CudaDenseProduct *a, WeftCudaStream stream)
{
    if (!is_right(a)) {
        return (int)CUBLAS_STATUS_INVALID_VALUE;
    }
    const float one = 1.0f, old = a->accumulate ? 1.0f : 0.0f;
    Descriptions d = {0};
    const cublasLtMatmulAlgo_t *chosen = NULL;
    cublasStatus_t status = describe(a, &d);
    if (status == CUBLAS_STATUS_SUCCESS) {
        status = algorithm(dense, a, &d, &chosen);
    }
    if (status == CUBLAS_STATUS_SUCCESS) {
        status =
            cublasLtMatmul(dense->handle, d.product, &one, a->w, d.w, a->x, d.x, &old, a->out,
                           d.out, a->out, d.out, chosen, a->workspace, a->workspace_bytes, stream);
    }
    descriptions_free(&d);
    return (int)status;
}
