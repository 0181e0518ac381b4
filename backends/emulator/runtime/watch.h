// Accesses that the runtime makes for a kernel are watched as the kernel's own.
#pragma once

#include <cstddef>

namespace emulator {

void watch_read(const void* address, size_t bytes, void* pc);
void watch_write(void* address, size_t bytes, void* pc);

// At the end of a launch: what its last writes did is told.
void finish_watching();

}  // namespace emulator
