#include "threads.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "collectives.h"
#include "fiber.h"
#include "shadow.h"

// What kernels read as threadIdx and so on. To a kernel they are constants, since its thread never sees them change.
extern "C" {
emulator::Extent threadIdx;
emulator::Extent blockIdx;
emulator::Extent blockDim;
emulator::Extent gridDim;
}

namespace emulator {

Thread* current = nullptr;
Warp warps[most_warps];
uint32_t current_block = 0;
uintptr_t private_begin = 0;
size_t private_bytes = 0;

namespace {

constexpr size_t stack_bytes = 640 * 1024;  // for local arrays of 512 KiB, as on a GPU, and calls
constexpr size_t guard_bytes = 64 * 1024;

Thread threads[most_threads];
unsigned thread_count = 0;
unsigned warp_count = 0;
unsigned warp_order[most_warps];
void* scheduler_stack = nullptr;
bool given_up = false;
uint64_t random_state = 1;

void yield() {
    emulator_switch_fiber(&current->stack_pointer, scheduler_stack);
}

void run_thread() {
    launch.kernel->entry(launch.arguments.data());
    current->state = State::done;
    for (;;) {
        yield();
    }
}

unsigned choose_lane(uint32_t ready) {
    switch (launch.schedule) {
        case Schedule::forward:
            return __builtin_ctz(ready);
        case Schedule::reverse:
            return 31 - __builtin_clz(ready);
        case Schedule::random:
            for (unsigned skip = next_random() % __builtin_popcount(ready); skip > 0; skip--) {
                ready &= ready - 1;
            }
            return __builtin_ctz(ready);
    }
    return 0;
}

// Go on with a thread; returns when somebody goes on with what `left` keeps.
void go_on_with(Thread& thread, void** left) {
    current = &thread;
    threadIdx = thread.coordinates;
    stamp_thread();
    emulator_switch_fiber(left, thread.stack_pointer);
}

// Run the lanes of a warp until each waits or is done.
void run_warp(unsigned number) {
    Warp& warp = warps[number];
    while (warp.ready && !given_up) {
        go_on_with(threads[number * warp_lanes + choose_lane(warp.ready)], &scheduler_stack);
        if (given_up) {
            return;
        }
        Thread& last = *current;  // before it, others may have run
        if (last.state == State::done) {
            warp.ready &= ~(1u << last.lane);
            warp.done |= 1u << last.lane;
            drop_snapshot(last);
            release_any(number);  // those left may have waited for this lane only
        }
    }
}

void start_block(uint32_t block) {
    blockIdx = launch.grid.at(block);
    current_block = block;
    std::memset(warps, 0, warp_count * sizeof(Warp));
    for (unsigned index = 0; index < thread_count; index++) {
        Thread& thread = threads[index];
        thread.state = State::ready;
        thread.index = index;
        thread.warp = index / warp_lanes;
        thread.lane = index % warp_lanes;
        thread.coordinates = launch.block.at(index);
        thread.snapshot = nullptr;
        thread.copies.clear();
        thread.groups.clear();
        // Not at the same offset of every stack: all their tops would share a few lines of the cache.
        const size_t unused = index * 448 % (32 * 1024);
        thread.stack_pointer = prepare_fiber(thread.stack, stack_bytes - unused, run_thread);
        warps[thread.warp].exist |= 1u << thread.lane;
    }
    for (unsigned number = 0; number < warp_count; number++) {
        warps[number].ready = warps[number].exist;
        warps[number].meet_all();
        warp_order[number] = launch.schedule == Schedule::reverse ? warp_count - 1 - number : number;
    }
}

void release_barrier() {
    begin_interval();
    for (unsigned number = 0; number < warp_count; number++) {
        warps[number].epoch = 0;
        warps[number].meet_all();
    }
    for (unsigned index = 0; index < thread_count; index++) {
        if (threads[index].state == State::at_barrier) {
            threads[index].state = State::ready;
            warps[threads[index].warp].ready |= 1u << threads[index].lane;
        }
    }
}

}  // namespace

bool stack_is_full(uintptr_t address) {
    const auto stack = reinterpret_cast<uintptr_t>(current == nullptr ? nullptr : current->stack);
    return address < stack && address >= stack - guard_bytes;
}

void prepare_threads() {
    thread_count = launch.block.count();
    warp_count = (thread_count + warp_lanes - 1) / warp_lanes;
    blockDim = launch.block;
    gridDim = launch.grid;
    given_up = false;
    if (private_begin == 0) {
        const size_t stacks = most_threads * (stack_bytes + guard_bytes);
        private_bytes = stacks + snapshot_pool_bytes();
        void* memory = mmap(nullptr, private_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("no memory for the stacks of the emulated threads");
            std::exit(1);
        }
        private_begin = reinterpret_cast<uintptr_t>(memory);
        for (unsigned index = 0; index < most_threads; index++) {
            char* guard = static_cast<char*>(memory) + index * (stack_bytes + guard_bytes);
            mprotect(guard, guard_bytes, PROT_NONE);
            threads[index].stack = guard + guard_bytes;
        }
        keep_snapshots_in(static_cast<char*>(memory) + stacks);
    }
}

void run_block(uint32_t block) {
    start_block(block);
    for (;;) {
        if (launch.schedule == Schedule::random) {
            for (unsigned i = warp_count; i > 1; i--) {
                std::swap(warp_order[i - 1], warp_order[next_random() % i]);
            }
        }
        for (unsigned i = 0; i < warp_count && !given_up; i++) {
            run_warp(warp_order[i]);
        }
        current = nullptr;
        if (given_up || !all_at_barrier(threads, thread_count)) {
            return;
        }
        release_barrier();
    }
}

const Thread* block_threads(unsigned& count) {
    count = thread_count;
    return threads;
}

// The next lane is entered from here: it mostly stands at the same call, which processors predict well.
void wait_for_others(State state) {
    Thread& self = *current;
    self.state = state;
    Warp& warp = warps[self.warp];
    warp.ready &= ~(1u << self.lane);
    if (warp.ready) {
        go_on_with(threads[self.warp * warp_lanes + choose_lane(warp.ready)], &self.stack_pointer);
    } else {
        yield();
    }
}

bool abandoned() {
    return given_up;
}

void abandon_launch() {
    given_up = true;
    for (;;) {
        yield();
    }
}

Event here(uintptr_t pc, const char* access) {
    return {pc, access, current_block, current ? current->index : nobody};
}

bool own_variable(uintptr_t address) {
    for (const Extent* variable : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
        if (address - reinterpret_cast<uintptr_t>(variable) < sizeof(Extent)) {
            return true;
        }
    }
    return false;
}

uint64_t next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void seed_random(uint64_t seed) {
    random_state = (seed + 1) * 0x9e3779b97f4a7c15 | 1;
}

void Warp::meet_all() {
    epoch++;
    uniform = true;
}

void Warp::meet(uint32_t lanes) {
    if (lanes == exist) {
        if (!uniform) {
            for (unsigned lane = 0; lane < warp_lanes; lane++) {
                epoch = lane_epoch[lane] > epoch ? lane_epoch[lane] : epoch;
            }
        }
        meet_all();
        return;
    }
    if (uniform) {
        for (unsigned lane = 0; lane < warp_lanes; lane++) {
            lane_epoch[lane] = epoch;
            for (unsigned other = 0; other < warp_lanes; other++) {
                known[lane][other] = epoch - 1;
            }
        }
        uniform = false;
    }
    uint32_t all[warp_lanes] = {};
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (lanes >> lane & 1) {
            for (unsigned other = 0; other < warp_lanes; other++) {
                all[other] = known[lane][other] > all[other] ? known[lane][other] : all[other];
            }
        }
    }
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (lanes >> lane & 1) {
            all[lane] = lane_epoch[lane] > all[lane] ? lane_epoch[lane] : all[lane];
            lane_epoch[lane]++;
        }
    }
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (lanes >> lane & 1) {
            std::memcpy(known[lane], all, sizeof all);
        }
    }
}

}  // namespace emulator
