#include "regions.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "shadow.h"

namespace emulator {
namespace {

const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));

struct Region {
    uint64_t bytes;
    bool live;
};

std::map<uintptr_t, Region> regions;  // freed ones too, until their place is taken

uintptr_t page_of(uintptr_t address) {
    return address / page * page;
}

// The last live region that begins at or before an address.
std::map<uintptr_t, Region>::iterator live_before(uintptr_t address) {
    auto place = regions.upper_bound(address);
    while (place != regions.begin()) {
        --place;
        if (place->second.live) {
            return place;
        }
    }
    return regions.end();
}

bool any_live(uintptr_t begin, uintptr_t end) {
    const auto place = live_before(end - 1);
    return place != regions.end() && place->first + place->second.bytes > begin;
}

bool within_live(uintptr_t address, uint64_t bytes) {
    const auto place = live_before(address);
    return place != regions.end() && place->first + place->second.bytes >= address + bytes;
}

void forget_overlapped(uintptr_t begin, uintptr_t end) {
    auto place = regions.upper_bound(begin);
    if (place != regions.begin() && std::prev(place)->first + std::prev(place)->second.bytes > begin) {
        --place;
    }
    while (place != regions.end() && place->first < end) {
        place = regions.erase(place);
    }
}

void allocate(uintptr_t address, uint64_t bytes, bool written) {
    const auto known = regions.find(address);
    if (known == regions.end() || !known->second.live || known->second.bytes != bytes) {
        forget_overlapped(address, address + bytes);
        regions[address] = {bytes, true};
        const uintptr_t first = page_of(address);
        mprotect(reinterpret_cast<void*>(first), page_of(address + bytes - 1) + page - first, PROT_READ | PROT_WRITE);
    }
    set_bytes(global_space, address - arena_address, bytes, true, written);
}

void free_region(uintptr_t address, uint64_t bytes) {
    const auto known = regions.find(address);
    if (known != regions.end()) {
        known->second.live = false;
    }
    set_bytes(global_space, address - arena_address, bytes, false, false);
    uintptr_t first = page_of(address);
    uintptr_t end = page_of(address + bytes - 1) + page;
    if (any_live(first, first + page)) {
        first += page;
    }
    if (end > first && any_live(end - page, end)) {
        end -= page;
    }
    if (end > first) {
        mprotect(reinterpret_cast<void*>(first), end - first, PROT_NONE);
    }
}

}  // namespace

void map_arena(int memory_fd, size_t bytes) {
    void* wanted = reinterpret_cast<void*>(arena_address);
    void* memory = mmap(wanted, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED_NOREPLACE, memory_fd, 0);
    if (memory != wanted) {
        std::perror("the emulator's device memory cannot be mapped");
        std::exit(1);
    }
    make_space(global_space, "global", arena_address, bytes);
}

std::string set_region(uint64_t address, uint64_t bytes, RegionState state) {
    if (bytes == 0) {
        return "";
    }
    if (address < arena_address || address - arena_address + bytes > global_space.bytes) {
        return "a region must lie in the arena";
    }
    if (state == RegionState::written && within_live(address, bytes)) {
        set_bytes(global_space, address - arena_address, bytes, true, true);
        return "";
    }
    if (address % 256) {
        return "a region must begin at a multiple of 256 bytes";
    }
    if (state == RegionState::freed) {
        free_region(address, bytes);
    } else {
        allocate(address, bytes, state == RegionState::written);
    }
    return "";
}

Neighbour nearest_region(uintptr_t address, unsigned bytes) {
    char text[200];
    auto after = regions.lower_bound(address + 1);
    if (after != regions.begin()) {
        const auto before = std::prev(after);
        if (!before->second.live && address < before->first + before->second.bytes) {
            std::snprintf(text, sizeof text, "byte %zu of %zu bytes that have been freed",
                          size_t(address - before->first), size_t(before->second.bytes));
            return {true, text};
        }
    }
    while (after != regions.end() && !after->second.live) {
        ++after;
    }
    const auto before = live_before(address);
    const bool has_before = before != regions.end();
    const size_t past = has_before ? address + bytes - (before->first + before->second.bytes) : 0;
    const size_t ahead = after != regions.end() ? after->first - address : 0;
    if (has_before && (ahead == 0 || past <= ahead)) {
        std::snprintf(text, sizeof text, "ends %zu bytes past the end of an array of %zu bytes", past,
                      size_t(before->second.bytes));
    } else if (ahead) {
        std::snprintf(text, sizeof text, "%zu bytes before the beginning of an array of %zu bytes", ahead,
                      size_t(after->second.bytes));
    } else {
        std::snprintf(text, sizeof text, "no array is allocated");
    }
    return {false, text};
}

bool pages_accessible(uintptr_t address, unsigned bytes) {
    const uintptr_t last = address + bytes - 1;
    return any_live(page_of(address), page_of(address) + page) && any_live(page_of(last), page_of(last) + page);
}

}  // namespace emulator
