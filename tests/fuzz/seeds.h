/* What the makers of seeds share: records to a seed, a seed to its file. One seed at a time. */
#pragma once
#include <protobuf-c/protobuf-c.h>
#include <stdint.h>

extern const uint8_t SIXTEEN[16];

/* Appends a message, one byte or nothing as a record of the kind. */
void seed_add(uint8_t kind, const void *message);
void seed_add_byte(uint8_t kind, uint8_t byte);
void seed_add_empty(uint8_t kind);
/* Writes CORPUS/target/name and begins anew; ends the program where it cannot. */
void seed_write(const char *dir, const char *target, const char *name);

/* A view, valid as long as `data` is. */
ProtobufCBinaryData binary(const void *data, size_t size);

/* Seeds of fuzz_train and fuzz_trainer. */
void make_train_seeds(const char *dir);
