// The threads of the block that runs: one fiber each, in warps of 32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "findings.h"
#include "launch.h"

namespace emulator {

constexpr unsigned most_threads = 1024;
constexpr unsigned warp_lanes = 32;
constexpr unsigned most_warps = most_threads / warp_lanes;
constexpr size_t exchange_bytes = 64;  // the most that one lane gives away in a collective

enum class State { ready, in_collective, at_barrier, done };

// What the lanes of one exchange gave, lane by lane; kept until every lane has gone on to something else.
struct Snapshot {
    alignas(64) char values[warp_lanes * exchange_bytes];
    unsigned holders = 0;
};

struct AsyncCopy {
    void* to;
    const void* from;
    unsigned bytes;
    unsigned zeros;  // bytes at the end that become 0 instead
    void* pc;
};

// What a thread waits for.
struct Request {
    cuda_emulator::Collective collective;
    cuda_emulator::Shuffle shuffle;
    cuda_emulator::Reduce reduce;
    cuda_emulator::Barrier barrier;
    uint32_t mask;
    uint64_t value;
    int operand;
    int width;
    const void* exchanged;
    unsigned bytes;
    const char* file;
    int line;
    uintptr_t pc;
};

struct Thread {
    void* stack_pointer;
    char* stack;
    State state;
    uint32_t index;
    uint32_t warp;
    uint32_t lane;
    Extent coordinates;
    Request request;
    uint64_t result;
    Snapshot* snapshot;
    std::vector<AsyncCopy> copies;
    std::vector<std::vector<AsyncCopy>> groups;
};

// A lane's epoch counts its collectives since the last barrier of the block. `known[i][j]` is the last epoch of lane j
// that lies before what lane i does now; while all lanes meet in every collective (`uniform`) no table is needed.
struct Warp {
    uint32_t ready;
    uint32_t waiting;  // in a collective
    uint32_t done;
    uint32_t exist;
    bool uniform;
    uint32_t epoch;
    uint32_t lane_epoch[warp_lanes];
    uint32_t known[warp_lanes][warp_lanes];

    uint32_t epoch_of(uint32_t lane) const { return uniform ? epoch : lane_epoch[lane]; }
    uint32_t known_to(uint32_t lane, uint32_t other) const { return uniform ? epoch - 1 : known[lane][other]; }
    void meet(uint32_t lanes);
    void meet_all();
};

extern Thread* current;  // null outside of kernels
extern Warp warps[most_warps];
extern uint32_t current_block;
extern uintptr_t private_begin;  // stacks and snapshots: a thread's own, not watched
extern size_t private_bytes;

void prepare_threads();
bool stack_is_full(uintptr_t address);  // whether the running thread has come to the end of its stack there
void run_block(uint32_t block);
const Thread* block_threads(unsigned& count);  // of the block that runs
bool abandoned();

// Leave the running thread, and give the launch up.
[[noreturn]] void abandon_launch();

// An event of the running thread.
Event here(uintptr_t pc, const char* access = "");

// Whether an address is in threadIdx, blockIdx, blockDim or gridDim.
bool own_variable(uintptr_t address);

// Numbers for the random schedule; the same for the same seed.
uint64_t next_random();
void seed_random(uint64_t seed);

}  // namespace emulator
