#include "traffic.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "findings.h"
#include "threads.h"

namespace emulator {
namespace {

constexpr uintptr_t sector_bytes = 32;
constexpr unsigned banks = 32;
constexpr uintptr_t bank_bytes = 4;

// One request of a warp: what each lane that takes part asks for.
struct WarpRequest {
    uint32_t lanes = 0;
    unsigned bytes = 0;  // for each lane
    uintptr_t addresses[warp_lanes];
};

struct PlaceTraffic {
    uintptr_t pc;
    const char* space;
    bool shared;
    bool writes;
    uint32_t visits[most_threads] = {};  // by each thread of the block, so far
    std::vector<WarpRequest> pending[most_warps];
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t sectors = 0;
    uint64_t ideal_sectors = 0;
    uint64_t passes = 0;
    uint64_t ideal_passes = 0;
};

std::unique_ptr<PlaceTraffic> places[most_places];
std::vector<uint32_t> used;  // numbers of places, in the order of their first access

uint64_t distinct_bytes(const std::vector<uintptr_t>& sorted, unsigned bytes) {
    uint64_t sum = 0;
    for (size_t i = 0; i < sorted.size(); i++) {
        sum += i + 1 < sorted.size() ? std::min<uintptr_t>(bytes, sorted[i + 1] - sorted[i]) : bytes;
    }
    return sum;
}

uint64_t distinct_sectors(const std::vector<uintptr_t>& sorted, unsigned bytes) {
    uint64_t sum = 0;
    uintptr_t next = 0;  // the first sector not counted yet
    for (const uintptr_t address : sorted) {
        const uintptr_t first = std::max(next, address / sector_bytes);
        const uintptr_t end = (address + bytes - 1) / sector_bytes + 1;
        sum += end > first ? end - first : 0;
        next = std::max(next, end);
    }
    return sum;
}

// Passes over the banks for lanes that are served together: each bank gives one word in a pass.
unsigned passes_of(const uintptr_t* addresses, unsigned count, unsigned bytes) {
    std::vector<uintptr_t> words;
    for (unsigned i = 0; i < count; i++) {
        for (uintptr_t word = addresses[i] / bank_bytes; word <= (addresses[i] + bytes - 1) / bank_bytes; word++) {
            words.push_back(word);
        }
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned asked[banks] = {};
    unsigned most = 0;
    for (const uintptr_t word : words) {
        most = std::max(most, ++asked[word % banks]);
    }
    return most;
}

// A warp's 8-byte accesses are served in two halves, its 16-byte accesses in four quarters.
void count_banks(PlaceTraffic& place, const WarpRequest& request) {
    const unsigned together = request.bytes <= 4 ? warp_lanes : warp_lanes * 4 / request.bytes;
    for (unsigned first = 0; first < warp_lanes; first += together) {
        uintptr_t addresses[warp_lanes];
        unsigned count = 0;
        for (unsigned lane = first; lane < first + together; lane++) {
            if (request.lanes >> lane & 1) {
                addresses[count++] = request.addresses[lane];
            }
        }
        if (count) {
            place.passes += passes_of(addresses, count, request.bytes);
            place.ideal_passes++;
        }
    }
}

void add_request(PlaceTraffic& place, const WarpRequest& request) {
    std::vector<uintptr_t> sorted;
    for (unsigned lane = 0; lane < warp_lanes; lane++) {
        if (request.lanes >> lane & 1) {
            sorted.push_back(request.addresses[lane]);
        }
    }
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    const uint64_t bytes = distinct_bytes(sorted, request.bytes);
    place.requests++;
    place.bytes += bytes;
    if (place.shared) {
        count_banks(place, request);
    } else {
        place.sectors += distinct_sectors(sorted, request.bytes);
        place.ideal_sectors += (bytes + sector_bytes - 1) / sector_bytes;
    }
}

}  // namespace

void count_access(const Space& space, uintptr_t address, unsigned bytes, bool writes, uintptr_t pc) {
    const uint32_t number = place_of(pc);
    std::unique_ptr<PlaceTraffic>& place = places[number];
    if (!place) {
        place = std::make_unique<PlaceTraffic>();
        place->pc = pc;
        place->space = space.name;
        place->shared = space.of_block;
        place->writes = writes;
        used.push_back(number);
    }
    std::vector<WarpRequest>& pending = place->pending[current->warp];
    const uint32_t visit = place->visits[current->index]++;
    if (pending.size() <= visit) {
        pending.resize(visit + 1);
    }
    WarpRequest& request = pending[visit];
    request.lanes |= 1u << current->lane;
    request.bytes = bytes;
    request.addresses[current->lane] = address;
}

void finish_block_traffic() {
    for (const uint32_t number : used) {
        PlaceTraffic& place = *places[number];
        for (std::vector<WarpRequest>& pending : place.pending) {
            for (const WarpRequest& request : pending) {
                add_request(place, request);
            }
            pending.clear();
        }
        std::fill(std::begin(place.visits), std::end(place.visits), 0);
    }
}

void forget_traffic() {
    for (const uint32_t number : used) {
        places[number].reset();
    }
    used.clear();
}

std::string traffic_json() {
    std::string list;
    for (const uint32_t number : used) {
        const PlaceTraffic& place = *places[number];
        list += (list.empty() ? "{\"pc\":" : ",{\"pc\":") + json_text(place_text(place.pc)) +
                ",\"space\":" + json_text(place.space) + ",\"access\":\"" + (place.writes ? "write" : "read") +
                "\",\"requests\":" + std::to_string(place.requests) + ",\"bytes\":" + std::to_string(place.bytes) +
                ",\"sectors\":" + std::to_string(place.sectors) +
                ",\"ideal_sectors\":" + std::to_string(place.ideal_sectors) +
                ",\"passes\":" + std::to_string(place.passes) +
                ",\"ideal_passes\":" + std::to_string(place.ideal_passes) + "}";
    }
    return "[" + list + "]";
}

}  // namespace emulator
