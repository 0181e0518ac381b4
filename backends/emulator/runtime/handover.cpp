#include "handover.h"

#include <algorithm>
#include <bitset>
#include <memory>
#include <unordered_map>
#include <vector>

#include "ordering.h"
#include "threads.h"

namespace emulator {
namespace {

using Threads = std::bitset<most_threads>;

// Threads of this block that have called a fence between two of its barriers.
struct Fences {
    uint32_t interval = 0;
    Threads threads;
};

// What an atomic gives to those who come to its place later: all that its block did in [first, below), what some
// threads did in the interval `below`, and what the thread itself did in `own`.
struct Gift {
    uint32_t first;
    uint32_t below;
    uint32_t own;
    uint32_t thread;
    bool for_device;
    std::shared_ptr<const Threads> fenced;
};

// The first `count` gifts of a place, taken by a thread of the running block.
struct Taken {
    const std::vector<Gift>* gifts;
    size_t count;
    uint32_t thread;
    uint32_t interval;
};

std::unordered_map<uintptr_t, std::vector<Gift>> places;
std::vector<Taken> taken;  // by the running block
Fences fences[2][2];       // for the block, for the device: the latest interval with a fence, and the one before
uint32_t first_of_block = 0;

uint32_t interval_of(uint64_t record) {
    return uint32_t(record >> interval_shift);
}

uint32_t thread_of(uint64_t record) {
    return uint32_t(record >> thread_shift) % most_threads;
}

void give(std::vector<Gift>& gifts, bool for_device) {
    const uint32_t interval = interval_of(now.interval_floor);
    const uint32_t thread = current->index;
    for (const Fences& fenced : fences[for_device]) {
        if (fenced.interval == 0) {
            return;
        }
        Threads threads = fenced.threads;
        if (fenced.interval == interval) {  // no barrier since: only what its own warp has fenced
            for (uint32_t other = 0; other < most_threads; other++) {
                threads[other] = threads[other] && other / warp_lanes == thread / warp_lanes;
            }
        }
        if (threads.any()) {
            gifts.push_back({first_of_block, fenced.interval, interval, thread, for_device,
                             std::make_shared<const Threads>(threads)});
            return;
        }
    }
}

bool includes(const Gift& gift, uint64_t record) {
    const uint32_t interval = interval_of(record);
    const bool same_block = record >= now.block_floor;
    return interval >= gift.first && (gift.for_device || same_block) &&
           (interval < gift.below || (interval == gift.below && (*gift.fenced)[thread_of(record)]) ||
            (interval == gift.own && thread_of(record) == gift.thread));
}

}  // namespace

void forget_handovers() {
    places.clear();
    begin_block_handovers();
}

void begin_block_handovers() {
    taken.clear();
    first_of_block = interval_of(now.block_floor);
    for (auto& of_scope : fences) {
        for (Fences& fenced : of_scope) {
            fenced.interval = 0;
        }
    }
}

void fence(bool for_device) {
    const uint32_t interval = interval_of(now.interval_floor);
    for (int scope = 0; scope <= int(for_device); scope++) {
        Fences(&of_scope)[2] = fences[scope];
        if (of_scope[0].interval != interval) {
            of_scope[1] = of_scope[0];
            of_scope[0] = {interval, {}};
        }
        of_scope[0].threads.set(current->index);
    }
}

void meet_at(uintptr_t place) {
    const auto known = places.find(place);
    if (known != places.end()) {
        const Taken now_taken{&known->second, known->second.size(), current->index, interval_of(now.interval_floor)};
        const bool again = !taken.empty() && taken.back().gifts == now_taken.gifts &&
                           taken.back().thread == now_taken.thread && taken.back().interval == now_taken.interval;
        if (again) {
            taken.pop_back();
        }
        taken.push_back(now_taken);
    }
    if (fences[0][0].interval) {
        std::vector<Gift>& gifts = places[place];
        give(gifts, true);
        if (fences[0][0].interval != fences[1][0].interval || fences[0][0].threads != fences[1][0].threads) {
            give(gifts, false);
        }
    }
}

bool handed_over(uint64_t record) {
    const uint32_t interval = interval_of(now.interval_floor);
    const auto later = [](uint32_t in, const Gift& gift) { return in < gift.first; };
    for (const Taken& one : taken) {
        if (one.interval == interval && one.thread / warp_lanes != current->index / warp_lanes) {
            continue;  // no barrier since another warp took it
        }
        // Gifts lie in the order of their blocks: those of the record's are the last that begin before it.
        const auto begin = one.gifts->begin();
        auto gift = std::upper_bound(begin, begin + long(one.count), interval_of(record), later);
        for (const uint32_t first = gift == begin ? 0 : (gift - 1)->first; gift != begin && (gift - 1)->first == first;) {
            if (includes(*--gift, record)) {
                return true;
            }
        }
    }
    return false;
}

}  // namespace emulator
