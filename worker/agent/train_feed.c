#include "worker/agent/train_feed.h"

#include "proto/base/error.h"
#include "proto/plan/train_limits.h"

#include <pthread.h>
#include <string.h>

struct TrainFeedPipe {
    Loop *loop;
    void (*ask)(const Weft__V1__TrainWant *want, void *user);
    void *user;
    pthread_mutex_t mutex;
    pthread_cond_t answered;
    /* under the mutex */
    uint64_t id;   /* of the open question */
    uint32_t *out; /* NULL: none is open */
    size_t n_rows, n_cols, ld;
    bool closed;
};

typedef struct Question {
    TrainFeedPipe *pipe;
    Weft__V1__TrainWant want;
    Weft__V1__TrainRect rect;
    char *tensor;
} Question;

TrainFeedPipe *train_feed_pipe_new(Loop *loop,
                                   void (*ask)(const Weft__V1__TrainWant *want, void *user),
                                   void *user)
{
    TrainFeedPipe *p = g_new0(TrainFeedPipe, 1);
    p->loop = loop;
    p->ask = ask;
    p->user = user;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->answered, NULL);
    return p;
}

void train_feed_pipe_free(TrainFeedPipe *p)
{
    if (p == NULL) {
        return;
    }
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->answered);
    g_free(p);
}

static void question_deliver(void *user)
{
    Question *q = user;
    q->pipe->ask(&q->want, q->pipe->user);
    g_free(q->tensor);
    g_free(q);
}

/* Posts the question and waits for its answer: n_rows rows of n_cols elements. Takes it. */
static bool ask_and_wait(TrainFeedPipe *p, Question *q, uint32_t *out, size_t n_rows, size_t n_cols,
                         size_t ld, GError **error)
{
    pthread_mutex_lock(&p->mutex);
    q->pipe = p;
    q->want.id = ++p->id;
    p->out = out;
    p->n_rows = n_rows;
    p->n_cols = n_cols;
    p->ld = ld;
    loop_post(p->loop, question_deliver, q);
    while (p->out != NULL && !p->closed) {
        pthread_cond_wait(&p->answered, &p->mutex);
    }
    const bool ok = p->out == NULL;
    p->out = NULL;
    pthread_mutex_unlock(&p->mutex);
    if (!ok) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_CANCELLED, "training ended while it was loaded");
    }
    return ok;
}

static Question *question_new(void)
{
    Question *q = g_new0(Question, 1);
    weft__v1__train_want__init(&q->want);
    weft__v1__train_rect__init(&q->rect);
    return q;
}

static bool read_tokens(void *user, bool validation, uint64_t first, uint64_t n, uint32_t *out,
                        GError **error)
{
    for (uint64_t at = 0; at < n;) {
        const uint64_t chunk = MIN(n - at, TRAIN_WANT_LIMIT);
        Question *q = question_new();
        q->want.validation = validation;
        q->want.first = first + at;
        q->want.n = chunk;
        if (!ask_and_wait(user, q, out + at, 1, chunk, chunk, error)) {
            return false;
        }
        at += chunk;
    }
    return true;
}

static bool read_rect(TrainFeedPipe *p, const char *tensor, SliceRect rect, float *out, size_t ld,
                      GError **error)
{
    Question *q = question_new();
    q->tensor = g_strdup(tensor);
    q->want.tensor = q->tensor;
    q->want.n = (uint64_t)rect.n_rows * rect.n_cols;
    q->want.rect = &q->rect;
    q->rect.row0 = rect.row0;
    q->rect.n_rows = rect.n_rows;
    q->rect.col0 = rect.col0;
    q->rect.n_cols = rect.n_cols;
    return ask_and_wait(p, q, (uint32_t *)(void *)out, rect.n_rows, rect.n_cols, ld, error);
}

/* In rectangles of as many rows, or of one row as many columns, as a question may have. */
static bool read_floats(void *user, const char *tensor, SliceRect rect, float *out, size_t ld,
                        GError **error)
{
    const uint32_t cols = MIN(rect.n_cols, (uint32_t)TRAIN_WANT_LIMIT),
                   rows = MAX((uint32_t)TRAIN_WANT_LIMIT / MAX(cols, 1u), 1u);
    for (uint32_t r = 0; r < rect.n_rows; r += rows) {
        for (uint32_t c = 0; c < rect.n_cols; c += cols) {
            const SliceRect part = {rect.row0 + r, MIN(rows, rect.n_rows - r), rect.col0 + c,
                                    MIN(cols, rect.n_cols - c)};
            if (!read_rect(user, tensor, part, out + (size_t)r * ld + c, ld, error)) {
                return false;
            }
        }
    }
    return true;
}

TrainFeed train_feed_pipe_feed(TrainFeedPipe *p)
{
    return (TrainFeed){read_tokens, read_floats, p};
}

bool train_feed_pipe_answer(TrainFeedPipe *p, const Weft__V1__TrainBytes *bytes, GError **error)
{
    bool ok = true;
    pthread_mutex_lock(&p->mutex);
    if (!p->closed) {
        const size_t row = p->n_cols * sizeof *p->out;
        ok = p->out != NULL && bytes->want == p->id && bytes->data.len == p->n_rows * row;
        for (size_t r = 0; ok && r < p->n_rows; r++) {
            memcpy(p->out + r * p->ld, bytes->data.data + r * row, row);
        }
        p->out = ok ? NULL : p->out;
        pthread_cond_signal(&p->answered);
    }
    pthread_mutex_unlock(&p->mutex);
    if (!ok) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_PROTOCOL,
                    "an answer of %zu bytes to question %" G_GUINT64_FORMAT " that was not asked",
                    bytes->data.len, bytes->want);
    }
    return ok;
}

void train_feed_pipe_close(TrainFeedPipe *p)
{
    pthread_mutex_lock(&p->mutex);
    p->closed = true;
    pthread_cond_signal(&p->answered);
    pthread_mutex_unlock(&p->mutex);
}
