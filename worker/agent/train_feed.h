/* TrainFeed: how a training rank's thread gets tokens and state through the call that it lives in:
 * a question at a time, asked on the loop, answered by the coordinator. */
#pragma once

#include "proto/base/loop.h"
#include "weft/v1/train.pb-c.h"
#include "worker/train/train_engine.h"

typedef struct TrainFeedPipe TrainFeedPipe;

/* ask(want, user) on the loop: sends it. */
TrainFeedPipe *train_feed_pipe_new(Loop *loop,
                                   void (*ask)(const Weft__V1__TrainWant *want, void *user),
                                   void *user);
/* What the engine is given; borrows the pipe. */
TrainFeed train_feed_pipe_feed(TrainFeedPipe *p);
/* An answer came. PROTOCOL: not to the question, or not of its size. Loop thread. */
bool train_feed_pipe_answer(TrainFeedPipe *p, const Weft__V1__TrainBytes *bytes, GError **error);
/* Every question, open or new, fails from now on. Any thread. */
void train_feed_pipe_close(TrainFeedPipe *p);
/* After the engine is gone and its posts ran. NULL-safe. */
void train_feed_pipe_free(TrainFeedPipe *p);
