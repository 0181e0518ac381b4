// What was found wrong with a launch: one finding for each kind and pair of places, with the number of times.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

constexpr uint32_t nobody = ~0u;

// One access, or one thread's standing at a barrier: where in the code, by which block and thread.
struct Event {
    uintptr_t pc = 0;
    const char* access = "";  // "read", "write", "atomic write", or empty
    uint32_t block = nobody;
    uint32_t thread = nobody;
};

struct Finding {
    const char* kind;
    Event event;
    unsigned bytes = 0;
    const char* space = "";  // "global", "shared", or empty
    Event other = {};        // pc 0: there is none
    std::string detail = {};
};

void report(const Finding& finding);
void forget_findings();

// A JSON array; ends with `crash`, if there is one, so that a signal handler can hand over what is known.
std::string findings_json(const Finding* crash = nullptr);

// "path of the library+0x1234": what addr2line understands.
std::string place_text(uintptr_t pc);

std::string json_text(const std::string& text);

}  // namespace emulator
