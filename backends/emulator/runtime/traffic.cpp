#include "traffic.h"

namespace emulator {

void count_access(const Space&, uintptr_t, unsigned, bool, uintptr_t) {}
void finish_block_traffic() {}
void forget_traffic() {}
std::string traffic_json() {
    return "[]";
}

}  // namespace emulator
