/* TrainRate: what share of the measured rate of f32 products whole passes reach here; norms,
 * attention, barriers and small matrices take the rest. Half, until a job's steps have shown it. */
#pragma once

#include <glib.h>
#include <stdint.h>

typedef struct TrainRate {
    double efficiency; /* 0: nothing was measured yet */
} TrainRate;

double train_rate_efficiency(const TrainRate *r); /* NULL: as if nothing was measured */
/* A job's steps took measured_s where predicted_s was said under the efficiency `used`; of that,
 * fixed_s (exchanges, update) have nothing to do with it. */
void train_rate_learn(TrainRate *r, double used, double predicted_s, double fixed_s,
                      double measured_s);

/* TrainPace: how long the steps of a job's epoch were said to take, and take. */
typedef struct TrainPace {
    TrainRate *rate;    /* borrowed, may be NULL: learns after the first steps, and at the end */
    double efficiency;  /* that the prediction took */
    double predicted_s; /* of a step; 0: nothing was predicted */
    double fixed_s;
    uint64_t first_step; /* of the epoch: it warms up, and does not count */
    GArray *seconds;     /* of double: of the other steps, as many as are kept */
} TrainPace;
void train_pace_init(TrainPace *p, TrainRate *rate);
void train_pace_clear(TrainPace *p);
void train_pace_predict(TrainPace *p, double efficiency, double predicted_s, double fixed_s);
void train_pace_begin(TrainPace *p, uint64_t first_step);
void train_pace_step(TrainPace *p, uint64_t step, double seconds);
double train_pace_measured_s(const TrainPace *p); /* the median step; 0: not known */
void train_pace_end(TrainPace *p);
