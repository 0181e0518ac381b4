#include "warp_results.h"

#include <cstring>

#include "collectives.h"

namespace emulator {
namespace {

using cuda_emulator::Collective;
using cuda_emulator::Reduce;
using cuda_emulator::Shuffle;

constexpr unsigned snapshot_count = most_threads + 1;  // each thread keeps one at most

Snapshot* snapshots = nullptr;
unsigned next_snapshot = 0;

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

}  // namespace

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
