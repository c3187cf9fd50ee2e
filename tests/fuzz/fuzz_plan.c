/* Any bytes as a plan from a peer: refused, or a plan that can be checked against a model, and
 * whose slices lie inside it. */
#include "proto/base/checked.h"
#include "proto/plan/plan_message.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define N_LAYERS 3u

/* Three layers, 6 heads over 3 KV heads, 10 FFN units, 2 vocabulary chunks. */
static ModelSpec *model(void)
{
    static const struct {
        TensorRole role;
        uint32_t rows, columns;
    } layer_tensors[] = {
        {ROLE_ATTN_NORM, 1, 48},  {ROLE_ATTN_Q, 48, 48},   {ROLE_ATTN_K, 24, 48},
        {ROLE_ATTN_V, 24, 48},    {ROLE_ATTN_OUT, 48, 48}, {ROLE_FFN_NORM, 1, 48},
        {ROLE_FFN_GATE, 320, 48}, {ROLE_FFN_UP, 320, 48},  {ROLE_FFN_DOWN, 48, 320},
    };
    ModelSpec *spec = g_new0(ModelSpec, 1);
    *spec = (ModelSpec){.family = FAMILY_LLAMA,
                        .n_layers = N_LAYERS,
                        .width = 48,
                        .n_heads = 6,
                        .n_kv_heads = 3,
                        .head_size = 8,
                        .ffn_width = 320,
                        .vocab_size = 1500,
                        .context = 128,
                        .norm_eps = 1e-5f,
                        .attention_scale = 0.35f,
                        .rope = {.dims = 8, .freq_base = 10000, .factor = 1},
                        .tied_output = true};
    spec->name = g_strdup("fuzz");
    spec->tensors = weft_alloc(64, sizeof *spec->tensors, "tensors", NULL);
    uint64_t offset = 0;
    for (uint32_t layer = 0; layer < N_LAYERS + 1; layer++) {
        for (size_t i = 0; i < G_N_ELEMENTS(layer_tensors); i++) {
            bool is_global = layer == N_LAYERS;
            TensorSpec t = {.role = layer_tensors[i].role,
                            .layer = (int32_t)layer,
                            .rows = layer_tensors[i].rows,
                            .columns = layer_tensors[i].columns,
                            .offset = offset};
            if (is_global) {
                t.role = i == 0 ? ROLE_TOKEN_EMBD : ROLE_OUTPUT_NORM;
                t.layer = -1;
                t.rows = i == 0 ? 1500 : 1;
                t.columns = 48;
            }
            if (is_global && i > 1) {
                break;
            }
            t.name = g_strdup_printf("t%u.%zu", layer, i);
            t.size_bytes = 4ull * t.rows * t.columns;
            offset += t.size_bytes;
            spec->tensors[spec->n_tensors++] = t;
        }
    }
    g_assert(model_spec_finish(spec, NULL));
    return spec;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static ModelSpec *spec;
    static PlanMember members[4];
    static const char *const names[4] = {"w0", "w1", "w2", "w3"};
    if (spec == NULL) {
        spec = model();
        for (int i = 0; i < 4; i++) {
            members[i] = (PlanMember){.worker = names[i],
                                      .memory_bytes = 1ull << 30,
                                      .numerics_version = 1,
                                      .numerics_classes = 1,
                                      .packed_block_bytes = {[DTYPE_F32] = 4},
                                      .usable = true};
        }
    }
    g_autoptr(GError) error = NULL;
    Weft__V1__Plan *m = weft__v1__plan__unpack(NULL, size, data);
    if (m == NULL) {
        return 0;
    }
    g_autoptr(Plan) plan = plan_from_message(m, &error);
    weft__v1__plan__free_unpacked(m, NULL);
    g_assert((plan == NULL) == (error != NULL));
    if (plan == NULL) {
        return 0;
    }
    g_autoptr(GPtrArray) found = plan_check(plan, spec, members, 4);
    g_autofree char *text = plan_layout_text(plan);
    for (uint32_t s = 0; s < plan->replicas[0].n_stages; s++) {
        g_autoptr(GArray) slices = plan_rank_slices(plan, spec, 0, s, 0);
        for (guint i = 0; i < slices->len; i++) {
            SliceRef ref = g_array_index(slices, SliceRef, i);
            g_assert(ref.tensor < spec->n_tensors &&
                     ref.slice < spec->tensors[ref.tensor].n_slices);
        }
    }
    Weft__V1__Plan *back = plan_to_message(plan);
    g_autoptr(Plan) again = plan_from_message(back, &error);
    g_assert(again != NULL && again->n_replicas == plan->n_replicas);
    weft__v1__plan__free_unpacked(back, NULL);
    return 0;
}
