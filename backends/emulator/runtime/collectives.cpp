#include "collectives.h"

#include <cstring>
#include <string>

#include "shadow.h"
#include "warp_results.h"

namespace emulator {
namespace {

using cuda_emulator::Barrier;
using cuda_emulator::Collective;

int barrier_result = 0;

bool same_place(const Request& one, const Request& other) {
    return one.line == other.line && (one.file == other.file || std::strcmp(one.file, other.file) == 0);
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
    if (release(current->warp, *current)) {
        stamp_thread();
    } else {
        wait_for_others(State::in_collective);
    }
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
    if (width < 1 || width > 32 || (width & (width - 1))) {
        emulator::report({"wrong shuffle width", emulator::here(request.pc), 0, "", {},
                          emulator::text("width %d is no power of two up to 32", width)});
        request.width = 32;
    }
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
