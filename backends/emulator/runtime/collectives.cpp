#include "collectives.h"

#include <cstdio>
#include <cstring>
#include <string>

#include "shadow.h"

namespace emulator {
namespace {

using cuda_emulator::Barrier;
using cuda_emulator::Collective;
using cuda_emulator::Reduce;
using cuda_emulator::Shuffle;

constexpr unsigned snapshot_count = most_threads + 1;  // each thread keeps one at most

Snapshot* snapshots = nullptr;
unsigned next_snapshot = 0;
int barrier_result = 0;

template <class... Values>
std::string text(const char* format, Values... values) {
    char line[400];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

bool same_place(const Request& one, const Request& other) {
    return one.line == other.line && (one.file == other.file || std::strcmp(one.file, other.file) == 0);
}

Event event_of(const Thread& thread) {
    return {thread.request.pc, "", current_block, thread.index};
}

Snapshot* free_snapshot() {
    while (snapshots[next_snapshot].holders) {
        next_snapshot = (next_snapshot + 1) % snapshot_count;
    }
    return &snapshots[next_snapshot];
}

void check_source(const Thread& thread, unsigned source, uint32_t taking_part) {
    if (!(taking_part >> source & 1)) {
        report({"shuffle from an inactive lane", event_of(thread), 0, "", {},
                text("lane %u reads lane %u, which takes no part (mask 0x%08x, taking part 0x%08x)", thread.lane,
                     source, thread.request.mask, taking_part)});
    }
}

// The lane that a shuffle reads: PTX ISA, shfl.sync. Past the end of its segment a lane reads itself.
unsigned shuffle_source(const Thread& thread) {
    const Request& request = thread.request;
    const int lane = thread.lane;
    const int first = lane & ~(request.width - 1);
    int source = lane;
    switch (request.shuffle) {
        case Shuffle::indexed:
            source = first + (request.operand & (request.width - 1));
            break;
        case Shuffle::up:
            source = lane - request.operand < first ? lane : lane - request.operand;
            break;
        case Shuffle::down:
            source = lane + request.operand >= first + request.width ? lane : lane + request.operand;
            break;
        case Shuffle::exclusive_or:
            source = (lane ^ request.operand) >= first + request.width ? lane : lane ^ request.operand;
            break;
    }
    return source & (warp_lanes - 1);
}

uint32_t combine(Reduce operation, uint32_t a, uint32_t b) {
    switch (operation) {
        case Reduce::add:
            return a + b;
        case Reduce::minimum:
            return int32_t(a) < int32_t(b) ? a : b;
        case Reduce::maximum:
            return int32_t(a) > int32_t(b) ? a : b;
        case Reduce::minimum_unsigned:
            return a < b ? a : b;
        case Reduce::maximum_unsigned:
            return a > b ? a : b;
        case Reduce::all:
            return a & b;
        case Reduce::any:
            return a | b;
        case Reduce::exclusive_or:
            return a ^ b;
        case Reduce::none:
            break;
    }
    return a;
}

// Every lane's result, from what all of them brought.
void compute_results(Thread* lanes, uint32_t taking_part) {
    const Request& first = lanes[__builtin_ctz(taking_part)].request;
    Snapshot* snapshot = first.collective == Collective::exchange ? free_snapshot() : nullptr;
    uint32_t ballot = 0;
    uint32_t reduced = uint32_t(first.value);
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (taking_part >> lane & 1) {
            const Request& request = lanes[lane].request;
            ballot |= uint32_t(request.value != 0) << lane;
            if (&request != &first) {
                reduced = combine(first.reduce, reduced, uint32_t(request.value));
            }
            if (snapshot) {
                std::memcpy(snapshot->values + lane * request.bytes, request.exchanged, request.bytes);
            }
        }
    }
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (!(taking_part >> lane & 1)) {
            continue;
        }
        Thread& thread = lanes[lane];
        switch (first.collective) {
            case Collective::shuffle: {
                const unsigned source = shuffle_source(thread);
                check_source(thread, source, taking_part);
                thread.result = lanes[source].request.value;
                break;
            }
            case Collective::ballot:
                thread.result = ballot;
                break;
            case Collective::reduce:
                thread.result = reduced;
                break;
            case Collective::match:
                thread.result = 0;
                for (unsigned other = 0; other < warp_lanes; other++) {
                    const bool equal = lanes[other].request.value == thread.request.value;
                    thread.result |= uint64_t(equal && (taking_part >> other & 1)) << other;
                }
                break;
            case Collective::exchange:
                thread.snapshot = snapshot;
                snapshot->holders++;
                break;
            case Collective::synchronise:
                break;
        }
    }
}

void check_meeting(Thread* lanes, const Warp& warp, uint32_t taking_part) {
    Thread* first = &lanes[__builtin_ctz(taking_part)];
    const uint32_t mask = first->request.mask;
    if (taking_part != mask) {
        report({"wrong warp mask", event_of(*first), 0, "", {},
                text("mask 0x%08x names lanes that %s", mask,
                     (mask & ~warp.exist) ? "the block does not have" : "have exited")});
    }
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (taking_part >> lane & 1 && !same_place(lanes[lane].request, first->request)) {
            report({"divergent warp collective", event_of(*first), 0, "", event_of(lanes[lane]),
                    "lanes of one mask meet at different places"});
        }
    }
}

// Complete the collective that this lane waits in, if every lane named that is left has come to it.
bool release(unsigned number, Thread& waiting) {
    Warp& warp = warps[number];
    const uint32_t taking_part = waiting.request.mask & warp.exist & ~warp.done;
    if ((warp.waiting & taking_part) != taking_part) {
        return false;
    }
    Thread* lanes = &waiting - waiting.lane;
    for (uint32_t left = taking_part; left; left &= left - 1) {
        const Request& request = lanes[__builtin_ctz(left)].request;
        if (request.mask != waiting.request.mask || request.collective != waiting.request.collective) {
            return false;
        }
    }
    check_meeting(lanes, warp, taking_part);
    compute_results(lanes, taking_part);
    if (waiting.request.collective == Collective::synchronise) {
        warp.meet(taking_part);  // CUDA C++ guide: shuffles, votes and matches order no memory
    }
    if (warp.epoch_of(waiting.lane) >= most_epochs) {
        begin_interval();  // the counter is full: what lies before is taken for ordered
        for (Warp& other : warps) {
            other.epoch = 0;
            other.meet_all();
        }
    }
    warp.waiting &= ~taking_part;
    warp.ready |= taking_part;
    for (uint32_t left = taking_part; left; left &= left - 1) {
        lanes[__builtin_ctz(left)].state = State::ready;
    }
    return true;
}

// The running thread comes to a warp collective; returns when it is complete.
uint64_t join(const Request& request) {
    Warp& warp = warps[current->warp];
    const uint32_t self = 1u << current->lane;
    drop_snapshot(*current);
    current->request = request;
    if (!(request.mask & self)) {
        report({"wrong warp mask", event_of(*current), 0, "", {},
                text("lane %u calls with mask 0x%08x, which does not name it", current->lane, request.mask)});
        current->request.mask |= self;
    }
    current->state = State::in_collective;
    warp.waiting |= self;
    warp.ready &= ~self;
    if (!release(current->warp, *current)) {
        wait_for_others(State::in_collective);
    }
    stamp_thread();
    return current->result;
}

void report_deadlock(Thread* threads, unsigned count, Thread& waiting) {
    Thread* lanes = &waiting - waiting.lane;
    for (unsigned lane = 0; lane < warp_lanes && lanes + lane < threads + count; lane++) {
        const Thread& missing = lanes[lane];
        const bool named = waiting.request.mask >> lane & 1;
        const bool same = missing.state == State::in_collective && missing.request.mask == waiting.request.mask &&
                          missing.request.collective == waiting.request.collective;
        if (named && !same && missing.state != State::done) {
            report({"deadlock", event_of(waiting), 0, "", event_of(missing),
                    text("lane %u waits in a warp collective with mask 0x%08x for lane %u, which waits %s",
                         waiting.lane, waiting.request.mask, lane,
                         missing.state == State::at_barrier ? "at a barrier" : "in another collective")});
            return;
        }
    }
}

}  // namespace

void release_any(unsigned number) {
    for (bool again = true; again;) {
        again = false;
        for (uint32_t left = warps[number].waiting; left && !again; left &= left - 1) {
            Thread& waiting = *(current - current->lane + __builtin_ctz(left));
            again = release(number, waiting);
        }
    }
}

bool all_at_barrier(Thread* threads, unsigned count) {
    const Thread* first = nullptr;
    const Thread* gone = nullptr;
    bool stuck = false;
    int any = 0;
    int all = 1;
    int sum = 0;
    for (unsigned index = 0; index < count; index++) {
        Thread& thread = threads[index];
        if (thread.state == State::done) {
            gone = &thread;
        } else if (thread.state == State::in_collective) {
            report_deadlock(threads, count, thread);
            stuck = true;
        } else {
            first = first ? first : &thread;
            if (!same_place(thread.request, first->request)) {
                report({"divergent barrier", event_of(*first), 0, "", event_of(thread),
                        "threads of one block wait at different __syncthreads"});
            }
            any |= int(thread.request.value);
            all &= int(thread.request.value);
            sum += int(thread.request.value);
        }
    }
    if (stuck || !first) {
        return false;
    }
    if (gone) {
        report({"exited before barrier", event_of(*first), 0, "", {},
                text("thread %u of the block has returned and does not come to this __syncthreads", gone->index)});
    }
    const Barrier kind = first->request.barrier;
    barrier_result = kind == Barrier::any ? any : kind == Barrier::all ? all : kind == Barrier::count ? sum : 0;
    return true;
}

void drop_snapshot(Thread& thread) {
    if (thread.snapshot) {
        thread.snapshot->holders--;
        thread.snapshot = nullptr;
    }
}

size_t snapshot_pool_bytes() {
    return snapshot_count * sizeof(Snapshot);
}

void keep_snapshots_in(char* memory) {
    snapshots = reinterpret_cast<Snapshot*>(memory);
}

}  // namespace emulator

using emulator::current;
using emulator::Request;

namespace {

Request request_at(cuda_emulator::Collective collective, uint32_t mask, const char* file, int line, void* pc) {
    Request request{};
    request.collective = collective;
    request.mask = mask;
    request.file = file;
    request.line = line;
    request.pc = reinterpret_cast<uintptr_t>(pc);
    return request;
}

}  // namespace

using cuda_emulator::Collective;

extern "C" {

int cuda_emulator_barrier(cuda_emulator::Barrier kind, int predicate, const char* file, int line) {
    emulator::drop_snapshot(*current);
    current->request = request_at(Collective::synchronise, 0, file, line, __builtin_return_address(0));
    current->request.barrier = kind;
    current->request.value = predicate != 0;
    emulator::wait_for_others(emulator::State::at_barrier);
    return emulator::barrier_result;
}

uint64_t cuda_emulator_shuffle(uint64_t value, uint32_t mask, cuda_emulator::Shuffle mode, int operand, int width,
                               const char* file, int line) {
    Request request = request_at(Collective::shuffle, mask, file, line, __builtin_return_address(0));
    request.value = value;
    request.shuffle = mode;
    request.operand = operand;
    request.width = width;
    return emulator::join(request);
}

uint32_t cuda_emulator_ballot(uint32_t mask, int predicate, const char* file, int line) {
    Request request = request_at(Collective::ballot, mask, file, line, __builtin_return_address(0));
    request.value = predicate != 0;
    return uint32_t(emulator::join(request));
}

uint32_t cuda_emulator_reduce(uint32_t mask, uint32_t value, cuda_emulator::Reduce operation, const char* file,
                              int line) {
    Request request = request_at(Collective::reduce, mask, file, line, __builtin_return_address(0));
    request.value = value;
    request.reduce = operation;
    return uint32_t(emulator::join(request));
}

uint32_t cuda_emulator_match(uint32_t mask, uint64_t value, const char* file, int line) {
    Request request = request_at(Collective::match, mask, file, line, __builtin_return_address(0));
    request.value = value;
    return uint32_t(emulator::join(request));
}

void cuda_emulator_synchronise_warp(uint32_t mask, const char* file, int line) {
    emulator::join(request_at(Collective::synchronise, mask, file, line, __builtin_return_address(0)));
}

const void* cuda_emulator_exchange(uint32_t mask, const void* value, unsigned bytes, const char* file, int line) {
    Request request = request_at(Collective::exchange, mask, file, line, __builtin_return_address(0));
    request.exchanged = value;
    request.bytes = bytes;
    emulator::join(request);
    return current->snapshot->values;
}

unsigned cuda_emulator_lane() {
    return current->lane;
}
}
