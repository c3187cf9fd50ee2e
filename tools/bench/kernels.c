/* bench-kernels: matmul speed by weight type. Columns: GOP/s with many rows (weights
 * in cache), the same beside the peak loop of its arithmetic, the best run beside the best peak (a
 * neighbour on the core's other thread takes from products more than from the loop), GB/s with few
 * rows over weights that do not fit the caches, the same beside a plain read loop over the same
 * buffer (medians of interleaved pairs), GB/s of packed bytes written from file rows in cache, and
 * the same beside copying packed bytes there. --limits prints the peaks alone. */
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "tools/bench/peaks.h"

#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static gchar *option_isa = "auto", *option_type = NULL;
static gint option_rows = 512, option_decode_rows = 1, option_size_mb = 192, option_n_in = 2048,
            option_cpu = 0, option_runs = 7, option_limits = 0, option_threads = 1;
static gboolean option_json = FALSE;

static const GOptionEntry options[] = {
    {"isa", 0, 0, G_OPTION_ARG_STRING, &option_isa, "auto, generic, avx2 or avx512", "ISA"},
    {"type", 0, 0, G_OPTION_ARG_STRING, &option_type, "only this weight type", "TYPE"},
    {"rows", 0, 0, G_OPTION_ARG_INT, &option_rows, "rows of the large product", "N"},
    {"decode-rows", 0, 0, G_OPTION_ARG_INT, &option_decode_rows, "rows of the product from memory",
     "N"},
    {"size-mb", 0, 0, G_OPTION_ARG_INT, &option_size_mb, "weights of the product from memory",
     "MB"},
    {"n-in", 0, 0, G_OPTION_ARG_INT, &option_n_in, "contraction length", "N"},
    {"cpu", 0, 0, G_OPTION_ARG_INT, &option_cpu, "first CPU to run on", "N"},
    {"threads", 0, 0, G_OPTION_ARG_INT, &option_threads, "threads, each on a CPU", "N"},
    {"runs", 0, 0, G_OPTION_ARG_INT, &option_runs, "measurements, of which the median counts", "N"},
    {"limits", 0, 0, G_OPTION_ARG_INT, &option_limits,
     "only what N threads can do at most: read, int8, f32", "N"},
    {"json", 0, 0, G_OPTION_ARG_NONE, &option_json, "limits as one JSON object", NULL},
    {NULL},
};

static void *alloc(size_t n)
{
    const size_t huge_page = 2u << 20;
    void *p = n < huge_page ? aligned_alloc(64, (n + 63) / 64 * 64)
                            : aligned_alloc(huge_page, (n + huge_page - 1) / huge_page * huge_page);
    if (p && n >= huge_page) {
        madvise(p, n, MADV_HUGEPAGE);
    }
    if (p == NULL) {
        fprintf(stderr, "no memory for %zu bytes: give a smaller --size-mb\n", n);
        exit(1);
    }
    memset(p, 0, (n + 63) / 64 * 64);
    return p;
}

static void pack_panels(PackedMatrix *m, const uint8_t *file, uint32_t first, uint32_t last)
{
    const DtypeInfo *info = dtype_info(m->type);
    const size_t row_bytes = (size_t)m->n_in / info->block * info->block_bytes;
    for (uint32_t panel = first; panel < last; panel++) {
        packed_put(m, file, row_bytes, panel * PANEL_ROWS, PANEL_ROWS, 0, m->n_in);
    }
}

/* A matrix of n_out rows, all from the same 16 file rows, which are returned. */
static uint8_t *make_matrix(Dtype type, uint32_t n_out, uint32_t n_in, PackedMatrix *m)
{
    const DtypeInfo *info = dtype_info(type);
    const size_t row_bytes = n_in / info->block * info->block_bytes;
    float *x = alloc(n_in * 4);
    uint8_t *file = alloc(16 * row_bytes);
    for (uint32_t r = 0; r < 16; r++) {
        for (uint32_t k = 0; k < n_in; k++) {
            x[k] = (float)((k * 2654435761u + r * 97) >> 16 & 0xffff) / 32768.0f - 1.0f;
        }
        quantise_row(type, x, n_in, file + r * row_bytes);
    }
    *m = (PackedMatrix){
        .type = type, .n_out = n_out, .n_in = n_in, .panel_bytes = packed_panel_bytes(type, n_in)};
    m->data = alloc((n_out + 15) / 16 * m->panel_bytes);
    pack_panels(m, file, 0, n_out / PANEL_ROWS);
    free(x);
    return file;
}

typedef struct Product {
    PackedMatrix w;
    uint8_t *file; /* PANEL_ROWS rows, from which each panel is packed */
    MatmulUnit unit;
    MatmulArgs args;
    MatmulFn fn;
} Product;

static void product_init(Product *p, const Kernels *k, Dtype type, uint32_t rows, uint32_t n_out,
                         uint32_t n_in)
{
    const ActKind kind = act_kind_of(type);
    p->file = make_matrix(type, n_out, n_in, &p->w);
    float *x = alloc((size_t)rows * n_in * 4);
    void *act = alloc(act_bytes(kind, rows, n_in));
    for (size_t i = 0; i < (size_t)rows * n_in; i++) {
        x[i] = (float)(i * 40503u >> 4 & 0xfff) / 2048.0f - 1.0f;
    }
    k->act_quantise[kind](x, n_in, rows, 0, rows, n_in, act);
    free(x);
    p->unit = (MatmulUnit){n_in, {0, 1}};
    p->args = (MatmulArgs){.w = &p->w,
                           .act = act,
                           .rows = rows,
                           .units = &p->unit,
                           .n_units = 1,
                           .out = alloc((size_t)rows * n_out * 4),
                           .ld = n_out,
                           .panel1 = (n_out + 15) / 16};
    p->fn = k->matmul[type];
}

static void product_clear(Product *p)
{
    free(p->w.data);
    free(p->file);
    free((void *)p->args.act);
    free(p->args.out);
}

/* ---- all threads at once, in step ---- */

typedef struct Bench {
    const Kernels *k;
    Pool *pool;
    Product p;
    Dtype type;
    volatile uint64_t sink;
} Bench;

typedef double (*WorkFn)(Bench *b, unsigned thread, unsigned n_threads); /* bytes or operations */

static double work_product(Bench *b, unsigned thread, unsigned n_threads)
{
    MatmulArgs args = b->p.args;
    pool_share(b->p.args.panel1, 1, thread, n_threads, &args.panel0, &args.panel1);
    b->p.fn(&args);
    return 2.0 * args.rows * (args.panel1 - args.panel0) * PANEL_ROWS * args.w->n_in;
}

static double work_read(Bench *b, unsigned thread, unsigned n_threads)
{
    uint32_t first, last;
    const PackedMatrix *w = &b->p.w;
    pool_share(b->p.args.panel1, 1, thread, n_threads, &first, &last);
    b->sink += peaks_read_loop(w->data + first * w->panel_bytes, (last - first) * w->panel_bytes);
    return (double)(last - first) * (double)w->panel_bytes;
}

static double work_pack(Bench *b, unsigned thread, unsigned n_threads)
{
    uint32_t first, last;
    pool_share(b->p.args.panel1, 1, thread, n_threads, &first, &last);
    pack_panels(&b->p.w, b->p.file, first, last);
    return (double)(last - first) * (double)b->p.w.panel_bytes;
}

/* What packing would be if it were for nothing: a thread's first panel to all of its others. */
static double work_copy(Bench *b, unsigned thread, unsigned n_threads)
{
    uint32_t first, last;
    const PackedMatrix *w = &b->p.w;
    pool_share(b->p.args.panel1, 1, thread, n_threads, &first, &last);
    for (uint32_t panel = first + 1; panel < last; panel++) {
        memcpy(w->data + panel * w->panel_bytes, w->data + first * w->panel_bytes, w->panel_bytes);
    }
    return (double)(last - first) * (double)w->panel_bytes;
}

/* The peak that bounds a product of this type. */
static double work_peak(Bench *b, unsigned thread, unsigned n_threads)
{
    const ActKind kind = act_kind_of(b->type);
    (void)thread;
    (void)n_threads;
    return kind == ACT_F32 || kind == ACT_BF16 ? peaks_f32_loop(b->k->isa)
                                               : peaks_int8_loop(b->k->isa);
}

/* Work of a thread over the seconds that all took. */
static double rate(Bench *b, WorkFn fn, unsigned thread, unsigned n_threads)
{
    pool_barrier(b->pool);
    const double start = peaks_now_s(), work = fn(b, thread, n_threads);
    pool_barrier(b->pool);
    return work / (peaks_now_s() - start);
}

static void bench_type(Bench *b, unsigned thread, unsigned n_threads)
{
    const uint32_t n_in = (uint32_t)option_n_in, n_large = 384 * n_threads;
    const size_t panel = packed_panel_bytes(b->type, n_in);
    const uint32_t n_out = (uint32_t)((size_t)option_size_mb * 1000000 / panel) * 16;
    double gops[64], of_peak[64], rates[64], ratios[64], packing[64], of_copy[64], best = 0,
                                                                                   best_peak = 0;
    if (thread == 0) {
        product_init(&b->p, b->k, b->type, (uint32_t)option_rows, n_large, n_in);
    }
    for (int i = 0; i < option_runs; i++) {
        const double peak = rate(b, work_peak, thread, n_threads);
        gops[i] = 1e-9 * n_threads * rate(b, work_product, thread, n_threads);
        of_peak[i] = 1e9 * gops[i] / (n_threads * peak);
        best = gops[i] > best ? gops[i] : best;
        best_peak = peak > best_peak ? peak : best_peak;
    }
    pool_barrier(b->pool);
    if (thread == 0) {
        product_clear(&b->p);
        product_init(&b->p, b->k, b->type, (uint32_t)option_decode_rows, n_out, n_in);
    }
    for (int i = 0; i < option_runs; i++) {
        const double read = rate(b, work_read, thread, n_threads),
                     ops = rate(b, work_product, thread, n_threads),
                     bytes = ops / (2.0 * option_decode_rows * PANEL_ROWS * n_in) * (double)panel;
        rates[i] = 1e-9 * n_threads * bytes;
        ratios[i] = bytes / read;
    }
    for (int i = 0; i < option_runs; i++) {
        const double copy = rate(b, work_copy, thread, n_threads);
        packing[i] = 1e-9 * n_threads * rate(b, work_pack, thread, n_threads);
        of_copy[i] = 1e9 * packing[i] / (n_threads * copy);
    }
    pool_barrier(b->pool);
    if (thread == 0) {
        product_clear(&b->p);
        printf("%-6s %12.0f %7.0f%% %7.0f%% %12.1f %7.0f%% %10.2f %7.0f%%\n",
               dtype_info(b->type)->name, peaks_median(gops, option_runs),
               100 * peaks_median(of_peak, option_runs), 1e11 * best / (n_threads * best_peak),
               peaks_median(rates, option_runs), 100 * peaks_median(ratios, option_runs),
               peaks_median(packing, option_runs), 100 * peaks_median(of_copy, option_runs));
        fflush(stdout);
    }
}

static void bench(void *user, unsigned thread, unsigned n_threads)
{
    Bench *b = user;
    for (uint32_t type = 0; type < DTYPE_LIMIT; type++) {
        if (!b->k->matmul[type] ||
            (option_type && strcmp(option_type, dtype_info(type)->name) != 0)) {
            continue;
        }
        if (thread == 0) {
            b->type = (Dtype)type;
        }
        pool_barrier(b->pool);
        bench_type(b, thread, n_threads);
        pool_barrier(b->pool);
    }
}

/* A pool whose threads are pinned to CPUs from option_cpu on. */
static Pool *pinned_pool(unsigned n_threads)
{
    int cpus[256];
    for (unsigned i = 0; i < n_threads; i++) {
        cpus[i] = option_cpu + (int)i;
    }
    return pool_new(n_threads, cpus, true, 1000000);
}

static int print_limits(KernelIsa isa)
{
    Peaks peaks;
    const unsigned n = (unsigned)MIN(option_limits, 256);
    Pool *pool = pinned_pool(n);
    const bool ok = pool != NULL && peaks_measure(pool, isa, &peaks);
    pool_free(pool);
    if (!ok) {
        fprintf(stderr, "no memory or threads to measure with\n");
        return 1;
    }
    if (option_json) {
        printf("{\"threads\": %u, \"isa\": \"%s\", \"read_bytes_per_s\": %.0f, "
               "\"int8_ops_per_s\": %.0f, \"f32_ops_per_s\": %.0f}\n",
               n, kernels_isa_name(isa), peaks.read_bytes_per_s, peaks.int8_ops_per_s,
               peaks.f32_ops_per_s);
    } else {
        printf("%u threads, %s: read %.1f GB/s, int8 %.0f GOP/s, f32 %.0f GOP/s\n", n,
               kernels_isa_name(isa), 1e-9 * peaks.read_bytes_per_s, 1e-9 * peaks.int8_ops_per_s,
               1e-9 * peaks.f32_ops_per_s);
    }
    return 0;
}

int main(int argc, char **argv)
{
    g_autoptr(GOptionContext) context = g_option_context_new("- speed of the matmul kernels");
    g_autoptr(GError) error = NULL;
    KernelIsa isa;
    g_option_context_add_main_entries(context, options, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &error)) {
        fprintf(stderr, "%s\n", error->message);
        return 2;
    }
    if (!kernels_parse_isa(option_isa, &isa)) {
        fprintf(stderr, "isa %s is not known or not on this CPU: give auto or one up to %s\n",
                option_isa, kernels_isa_name(kernels_best_isa()));
        return 2;
    }
    if (option_rows < 1 || option_decode_rows < 1 || option_size_mb < 1 || option_n_in < 256 ||
        option_n_in % 256 != 0 || option_runs < 1 || option_runs > 64 || option_threads < 1 ||
        option_threads > 256) {
        fprintf(stderr,
                "n-in must be a multiple of 256, runs 1 to 64, the other numbers positive\n");
        return 2;
    }
    if (option_limits > 0) {
        return print_limits(isa);
    }
    Bench b = {.k = kernels_get(isa), .pool = pinned_pool((unsigned)option_threads)};
    if (b.pool == NULL) {
        fprintf(stderr, "no %d threads to measure with\n", option_threads);
        return 1;
    }
    printf("isa %s, n_in %d, %d threads from CPU %d\n%-6s %12s %8s %8s %12s %8s %10s "
           "%8s\n",
           kernels_isa_name(isa), option_n_in, option_threads, option_cpu, "type", "GOP/s large",
           "of peak", "best", "GB/s memory", "of read", "GB/s pack", "of copy");
    pool_run(b.pool, bench, &b);
    pool_free(b.pool);
    return 0;
}
