#include "coordinator/train/train_log.h"

#include "proto/base/error.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define FAST_LOSS 0.05f    /* of a loss: how far class fast may be off when a step is repeated */
#define UNKNOWN UINT32_MAX /* a NaN, which no told loss is */

#define RECENT_STEPS 20u
#define OWNER "submitted_us" /* the first line's only member: when its job was submitted */

struct TrainLog {
    char *path; /* NULL: memory only */
    int64_t submitted_us;
    gsize whole; /* bytes that were read and stay */
    FILE *file;  /* NULL: not begun, or memory only */
    GPtrArray *lines;
    GArray *losses; /* float's bits, by step */
    GArray *points; /* of TrainPoint */
    NumericsClass numerics;
    char *definition; /* or NULL */
    bool begun;       /* a line says of which class */
    bool ended;
    GError *failure;
    uint64_t steps;
    double share; /* train_log_set_course() */
};

static double number_in(const json_t *object, const char *name)
{
    const json_t *value = json_object_get(object, name);
    return json_is_number(value) ? json_number_value(value) : (double)NAN;
}

static void add_point(TrainLog *l, const json_t *object)
{
    const TrainPoint point = {
        .step = (uint64_t)json_integer_value(json_object_get(object, "step")),
        .loss = number_in(object, "loss"),
        .validation = number_in(object, "validation_loss"),
        .rate = number_in(object, "lr"),
        .tokens_per_s = number_in(object, "tokens_per_s"),
    };
    g_array_append_val(l->points, point);
}

/* The loss of step `step` (from 0), the first that is not known yet: those between, of a checkpoint
 * that came without its log, stay unknown. */
static void add_loss(TrainLog *l, uint64_t step, uint32_t bits)
{
    const uint32_t unknown = UNKNOWN;
    while (l->losses->len < step) {
        g_array_append_val(l->losses, unknown);
    }
    g_array_append_val(l->losses, bits);
}

/* The job's last line is no line of its steps. False: it is another. */
static bool take_failure(TrainLog *l, const json_t *object)
{
    const char *message = json_string_value(json_object_get(object, "failed"));
    if (message == NULL) {
        return false;
    }
    const int code = (int)json_integer_value(json_object_get(object, "code"));
    g_clear_error(&l->failure);
    l->failure = g_error_new_literal(WEFT_ERROR, code > 0 ? code : WEFT_ERROR_FAILED, message);
    return true;
}

static void take_line(TrainLog *l, char *line /* taken */)
{
    json_t *object = json_loads(line, 0, NULL);
    const json_t *loss = json_object_get(object, "loss_bits");
    const char *numerics = json_string_value(json_object_get(object, "numerics"));
    if (numerics != NULL) {
        l->begun = true;
        const bool fast = strcmp(numerics, numerics_name(NUMERICS_FAST)) == 0;
        l->numerics = fast ? NUMERICS_FAST : NUMERICS_EXACT;
    }
    const json_int_t step = json_integer_value(json_object_get(object, "step"));
    if (loss != NULL && step > 0 && (uint64_t)step > l->losses->len) {
        add_loss(l, (uint64_t)step - 1, (uint32_t)json_integer_value(loss));
        add_point(l, object);
    }
    l->ended = l->ended || json_object_get(object, "weights_digest") != NULL;
    if (take_failure(l, object) || json_object_get(object, OWNER) != NULL) {
        g_free(line);
    } else {
        g_ptr_array_add(l->lines, line);
    }
    json_decref(object);
}

static void take_lines(TrainLog *l, const char *text, size_t length, size_t *whole)
{
    *whole = 0;
    while (*whole < length) {
        const char *begin = text + *whole, *end = memchr(begin, '\n', length - *whole);
        if (end == NULL) {
            return; /* torn */
        }
        take_line(l, g_strndup(begin, (gsize)(end - begin)));
        *whole = (size_t)(end - text) + 1;
    }
}

/* Of a job of the same name before this one: its row went, and the coordinator ended before the log
 * did. A log of a release that wrote no owner is ours. */
static bool is_of_another(const char *text, size_t length, int64_t submitted_us)
{
    const char *end = memchr(text, '\n', length);
    json_t *first = end != NULL ? json_loadb(text, (size_t)(end - text), 0, NULL) : NULL;
    const json_t *owner = json_object_get(first, OWNER);
    const bool another = owner != NULL && json_integer_value(owner) != submitted_us;
    json_decref(first);
    return another;
}

/* Object is taken. Returned: free(). */
static char *write_line(TrainLog *l, json_t *object)
{
    char *text = json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(object);
    if (l->file != NULL) { /* a full disk loses lines, not the job */
        fprintf(l->file, "%s\n", text);
        fflush(l->file);
    }
    return text;
}

TrainLog *train_log_read(const char *path, int64_t submitted_us, GError **error)
{
    TrainLog *l = g_new0(TrainLog, 1);
    g_autofree char *text = NULL;
    g_autoptr(GError) unread = NULL;
    gsize length = 0;
    l->path = g_strdup(path);
    l->submitted_us = submitted_us;
    l->lines = g_ptr_array_new_with_free_func(g_free);
    l->losses = g_array_new(FALSE, FALSE, sizeof(uint32_t));
    l->points = g_array_new(FALSE, FALSE, sizeof(TrainPoint));
    if (path == NULL) {
        return l;
    }
    if (g_file_get_contents(path, &text, &length, &unread)) {
        if (!is_of_another(text, length, submitted_us)) {
            take_lines(l, text, length, &l->whole);
        }
    } else if (!g_error_matches(unread, G_FILE_ERROR, G_FILE_ERROR_NOENT)) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "the job's log cannot be read: %s",
                    unread->message);
        train_log_free(l);
        return NULL;
    }
    return l;
}

bool train_log_begin(TrainLog *l, GError **error)
{
    if (l->path == NULL) {
        return true;
    }
    l->file = fopen(l->path, "a");
    if (l->file == NULL || ftruncate(fileno(l->file), (off_t)l->whole) != 0) {
        g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "%s cannot be written: %s", l->path,
                    g_strerror(errno));
        return false;
    }
    if (l->whole == 0) {
        free(write_line(l,
                        json_pack("{s:i,s:I}", "version", 1, OWNER, (json_int_t)l->submitted_us)));
    }
    return true;
}

void train_log_free(TrainLog *l)
{
    if (l == NULL) {
        return;
    }
    if (l->file != NULL) {
        fclose(l->file);
    }
    g_ptr_array_unref(l->lines);
    g_array_unref(l->losses);
    g_array_unref(l->points);
    g_free(l->path);
    g_free(l->definition);
    g_clear_error(&l->failure);
    g_free(l);
}

const GPtrArray *train_log_lines(const TrainLog *l)
{
    return l->lines;
}

uint64_t train_log_steps(const TrainLog *l)
{
    return l->losses->len;
}

const GArray *train_log_points(const TrainLog *l)
{
    return l->points;
}

bool train_log_ended(const TrainLog *l)
{
    return l->ended;
}

const GError *train_log_failure(const TrainLog *l)
{
    return l->failure;
}

/* Object is taken. */
static const char *append(TrainLog *l, json_t *object)
{
    char *text = write_line(l, object);
    g_ptr_array_add(l->lines, g_strdup(text));
    free(text);
    return l->lines->pdata[l->lines->len - 1];
}

static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

/* Of numerics class fast: another device or layout rounds otherwise, and that grows with steps. */
static bool is_close(uint32_t before, float now)
{
    float then;
    memcpy(&then, &before, sizeof then);
    return isfinite(then) && isfinite(now) ? fabsf(now - then) <= FAST_LOSS * fabsf(then)
                                           : !isfinite(then) && !isfinite(now);
}

void train_log_set_class(TrainLog *l, NumericsClass numerics)
{
    l->numerics = numerics;
}

void train_log_set_definition(TrainLog *l, const char *definition)
{
    g_free(l->definition);
    l->definition = g_strdup(definition);
}

/* What every line that holds a result says of it. */
static void add_definition(const TrainLog *l, json_t *object)
{
    json_object_set_new(object, "numerics", json_string(numerics_name(l->numerics)));
    if (l->definition != NULL) {
        json_object_set_new(object, "definition", json_string(l->definition));
    }
}

void train_log_set_course(TrainLog *l, uint64_t steps, double share)
{
    l->steps = steps;
    l->share = share;
}

/* Tokens of the last steps, which are alike, over their time. */
double train_log_speed(const GArray *points)
{
    double seconds = 0; /* of a token */
    guint n = 0;
    for (guint i = points->len; i > 0 && n < RECENT_STEPS; i--) {
        const double speed = g_array_index(points, TrainPoint, i - 1).tokens_per_s;
        if (isfinite(speed) && speed > 0) {
            seconds += 1 / speed;
            n++;
        }
    }
    return seconds > 0 ? n / seconds : 0;
}

/* What is left, at the speed of the last steps, and the share of the workers' rate. */
static void add_course(const TrainLog *l, json_t *object, uint64_t done, uint64_t batch_tokens)
{
    const double now = number_in(object, "tokens_per_s"), speed = train_log_speed(l->points);
    if (l->share > 0 && isfinite(now)) {
        json_object_set_new(object, "mfu", json_real(now * l->share));
    }
    if (l->steps >= done && speed > 0) {
        json_object_set_new(object, "eta_s",
                            json_real((double)((l->steps - done) * batch_tokens) / speed));
    }
}

bool train_log_class(const TrainLog *l, NumericsClass *out)
{
    *out = l->numerics;
    return l->begun;
}

const char *train_log_step(TrainLog *l, const Weft__V1__TrainProgress *s, uint64_t batch_tokens,
                           const char *sample, GError **error)
{
    uint32_t bits;
    memcpy(&bits, &s->loss, sizeof bits);
    if (s->step < l->losses->len) {
        const uint32_t before = g_array_index(l->losses, uint32_t, s->step);
        const bool same =
            before == bits || (l->numerics == NUMERICS_FAST && is_close(before, s->loss));
        if (before != UNKNOWN && !same) {
            g_set_error(error, WEFT_ERROR, WEFT_ERROR_NUMERICS,
                        "step %" G_GUINT64_FORMAT
                        " had another loss before it was repeated (now %.9g): a worker computes "
                        "wrongly or the data changed",
                        s->step + 1, (double)s->loss);
        }
        return NULL;
    }
    add_loss(l, s->step, bits);
    json_t *object = json_object();
    json_object_set_new(object, "version", json_integer(1));
    json_object_set_new(object, "step", json_integer((json_int_t)s->step + 1));
    json_object_set_new(object, "loss", number((double)s->loss));
    json_object_set_new(object, "loss_bits", json_integer(bits));
    json_object_set_new(object, "lr", number((double)s->rate));
    json_object_set_new(object, "grad_norm", number((double)s->gradient_norm));
    json_object_set_new(object, "scale", number((double)s->scale));
    json_object_set_new(object, "tokens_per_s",
                        number(s->seconds > 0 ? (double)batch_tokens / s->seconds : 0));
    json_object_set_new(object, "samples_seen", json_integer((json_int_t)s->samples_seen));
    json_object_set_new(object, "waited_s", number(s->waited));
    if (s->skipped) {
        json_object_set_new(object, "skipped", json_true());
    }
    if (s->validated) {
        json_object_set_new(object, "validation_loss", number((double)s->validation));
    }
    add_definition(l, object);
    if (sample != NULL) {
        json_object_set_new(object, "sample", json_string(sample));
    }
    add_point(l, object);
    add_course(l, object, s->step + 1, batch_tokens);
    return append(l, object);
}

static json_t *text_or_null(const char *text)
{
    return text != NULL ? json_string(text) : json_null();
}

const char *train_log_end(TrainLog *l, const TrainEnd *end)
{
    json_t *object = json_object();
    l->ended = true;
    json_object_set_new(object, "version", json_integer(1));
    json_object_set_new(object, "steps", json_integer(l->losses->len));
    json_object_set_new(object, "checkpoint", text_or_null(end->checkpoint));
    json_object_set_new(object, "curves", text_or_null(end->curves));
    json_object_set_new(object, "weights_digest", json_string(end->digest));
    json_object_set_new(object, "layout", json_string(end->layout));
    json_object_set_new(object, "step_s", number(end->measured_s > 0 ? end->measured_s : NAN));
    json_object_set_new(object, "predicted_step_s",
                        number(end->predicted_s > 0 ? end->predicted_s : NAN));
    add_definition(l, object);
    return append(l, object);
}

bool train_log_sync(TrainLog *l, GError **error)
{
    if (l->file == NULL || (!ferror(l->file) && fdatasync(fileno(l->file)) == 0)) {
        return true;
    }
    g_set_error(error, WEFT_ERROR, WEFT_ERROR_IO, "the job's log was not written whole: %s",
                ferror(l->file) ? "the disk may be full" : g_strerror(errno));
    return false;
}

void train_log_fail(TrainLog *l, const GError *why)
{
    const bool known = why->domain == WEFT_ERROR;
    g_autofree char *message = g_utf8_make_valid(why->message, -1);
    json_t *object = json_object();
    g_clear_error(&l->failure);
    l->failure = g_error_copy(why);
    json_object_set_new(object, "version", json_integer(1));
    json_object_set_new(object, "failed", json_string(message));
    json_object_set_new(object, "code", json_integer(known ? why->code : WEFT_ERROR_FAILED));
    free(write_line(l, object));
}
