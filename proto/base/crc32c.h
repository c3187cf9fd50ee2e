/* CRC32C (Castagnoli; RFC 3720 appendix B.4), what guards a message whose payload is not sealed:
 * computed by the link, and by the device that a payload lies on. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* The checksum of the bytes so far (0 at the start) continued over size bytes. Any thread. */
uint32_t crc32c(uint32_t crc, const void *data, size_t size);
/* The same by tables, as on CPUs without SSE4.2: the reference for tests. */
uint32_t crc32c_generic(uint32_t crc, const void *data, size_t size);
