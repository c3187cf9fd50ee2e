#include "coordinator/train/train_rate.h"

#define FIRST_STEPS 3u      /* show the rate */
#define SECONDS_LIMIT 1000u /* steps of an epoch that are measured */
#define EFFICIENCY_AT_FIRST 0.5
#define EFFICIENCY_LEAST 0.02 /* toys, whose steps are all overhead, do not spoil it for models */
#define EFFICIENCY_MOST 1.5   /* a worker's measure of its rate may have been disturbed */

double train_rate_efficiency(const TrainRate *r)
{
    return r != NULL && r->efficiency > 0 ? r->efficiency : EFFICIENCY_AT_FIRST;
}

void train_rate_learn(TrainRate *r, double used, double predicted_s, double fixed_s,
                      double measured_s)
{
    const double passes_s = predicted_s - fixed_s, took_s = measured_s - fixed_s;
    if (passes_s > 0 && took_s > 0) {
        r->efficiency = CLAMP(used * passes_s / took_s, EFFICIENCY_LEAST, EFFICIENCY_MOST);
    }
}

void train_pace_init(TrainPace *p, TrainRate *rate)
{
    *p = (TrainPace){.rate = rate, .seconds = g_array_new(FALSE, FALSE, sizeof(double))};
}

void train_pace_clear(TrainPace *p)
{
    g_clear_pointer(&p->seconds, g_array_unref);
}

void train_pace_predict(TrainPace *p, double efficiency, double predicted_s, double fixed_s)
{
    p->efficiency = efficiency;
    p->predicted_s = predicted_s;
    p->fixed_s = fixed_s;
}

void train_pace_begin(TrainPace *p, uint64_t first_step)
{
    p->first_step = first_step;
    g_array_set_size(p->seconds, 0);
}

void train_pace_step(TrainPace *p, uint64_t step, double seconds)
{
    if (step <= p->first_step || p->seconds->len == SECONDS_LIMIT) {
        return;
    }
    g_array_append_val(p->seconds, seconds);
    if (p->seconds->len == FIRST_STEPS) {
        train_pace_end(p);
    }
}

static int by_value(gconstpointer a, gconstpointer b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

double train_pace_measured_s(const TrainPace *p)
{
    g_autoptr(GArray) sorted = g_array_copy(p->seconds);
    g_array_sort(sorted, by_value);
    return sorted->len > 0 ? g_array_index(sorted, double, sorted->len / 2) : 0;
}

void train_pace_end(TrainPace *p)
{
    if (p->rate != NULL && p->seconds->len > 0) {
        train_rate_learn(p->rate, p->efficiency, p->predicted_s, p->fixed_s,
                         train_pace_measured_s(p));
    }
}
