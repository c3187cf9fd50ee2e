/* TrainSettings as they arrive, checked: a worker believes no number that it is sent. */
#pragma once

#include "weft/v1/train.pb-c.h"
#include "worker/train/train_engine.h"

/* PROTOCOL names the field that is out of its range. out->sample.prompt borrows the message. */
bool train_settings_read(const Weft__V1__TrainSettings *message, const ModelSpec *spec,
                         TrainWork *out, GError **error);
