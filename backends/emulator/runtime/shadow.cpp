#include "shadow.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "handover.h"
#include "ordering.h"
#include "threads.h"

namespace emulator {

Space global_space;
Space dynamic_space;
Space static_space;
Space module_space;
bool watching = false;
Now now;

namespace {

struct FirstInterval {
    uint32_t interval;
    uint32_t block;
};

uint32_t interval = 0;
std::vector<FirstInterval> blocks_of_launch;
uintptr_t places[most_places];
uint32_t place_count = 0;

size_t cell_bytes(const Space& space) {
    return space.bytes / 2 * sizeof(Cell);
}

void* reserve(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::perror("no address space for the emulator's shadow memory");
        std::exit(1);
    }
    return memory;
}

void forget_accesses(Space& space) {
    if (space.cells) {
        madvise(space.cells, cell_bytes(space), MADV_DONTNEED);
    }
}

}  // namespace

void make_space(Space& space, const char* name, uintptr_t base, size_t bytes, bool of_block) {
    if (space.cells) {
        munmap(space.cells, cell_bytes(space));
        munmap(space.states, space.bytes / 4);
    }
    space = {base, (bytes + 63) / 64 * 64, nullptr, nullptr, name, of_block};
    if (space.bytes) {
        space.cells = static_cast<Cell*>(reserve(cell_bytes(space)));
        madvise(space.cells, cell_bytes(space), MADV_HUGEPAGE);
        space.states = static_cast<uint16_t*>(reserve(space.bytes / 4));
    }
}

void set_bytes(Space& space, size_t offset, size_t bytes, bool valid, bool written) {
    const uint16_t whole = (valid ? 0xff00 : 0) | (written ? 0x00ff : 0);
    size_t end = offset + bytes;
    while (offset < end && (offset % 8 || end - offset < 8)) {
        const unsigned bit = offset % 8;
        uint16_t& state = space.states[offset / 8];
        state = (state & ~(0x0101 << bit)) | (whole & (0x0101 << bit));
        offset++;
    }
    for (; end - offset >= 8; offset += 8) {
        space.states[offset / 8] = whole;
    }
    if (offset < end) {
        set_bytes(space, offset, end - offset, valid, written);
    }
}

void begin_interval() {
    if (interval >= most_intervals) {
        for (Space* space : {&global_space, &dynamic_space, &static_space, &module_space}) {
            forget_accesses(*space);
        }
        interval = 0;
        blocks_of_launch.clear();
        now.launch_floor = uint64_t(1) << interval_shift;
        now.block_floor = now.launch_floor;
        blocks_of_launch.push_back({1, current_block});
        forget_handovers();
    }
    interval++;
    now.interval_floor = uint64_t(interval) << interval_shift;
}

void begin_launch_intervals() {
    blocks_of_launch.clear();
    begin_interval();
    now.launch_floor = now.interval_floor;
    forget_handovers();
    if (place_count > most_places / 2) {  // records of earlier launches are not looked at: their places may go
        std::memset(places, 0, sizeof places);
        place_count = 0;
    }
}

void begin_block_interval(uint32_t block) {
    begin_interval();
    now.block_floor = now.interval_floor;
    begin_block_handovers();
    blocks_of_launch.push_back({interval, block});
}

void stamp_thread() {
    const uint64_t epoch = warps[current->warp].epoch_of(current->lane);
    now.stamp = now.interval_floor | uint64_t(current->index) << thread_shift | epoch << epoch_shift;
}

uint32_t place_of(uintptr_t pc) {
    uint32_t slot = uint32_t(pc * 0x9e3779b97f4a7c15 >> 51);
    while (places[slot] != pc || slot == 0) {
        if (slot != 0 && places[slot] == 0) {
            if (place_count > most_places * 7 / 8) {
                return 0;
            }
            place_count++;
            places[slot] = pc;
            return slot;
        }
        slot = (slot + 1) % most_places;
    }
    return slot;
}

uintptr_t pc_of_place(uint32_t place) {
    return places[place];
}

bool unordered(uint64_t before, uint64_t after) {
    if (!(before & after & both_bytes) || (before & after & atomic_bit) || handed_over(before)) {
        return false;
    }
    if (before < now.block_floor) {
        return true;  // another block of this launch
    }
    const uint32_t one = uint32_t(before >> thread_shift) % most_threads;
    const uint32_t other = uint32_t(after >> thread_shift) % most_threads;
    if (one / warp_lanes == other / warp_lanes) {
        const uint32_t epoch = uint32_t(before >> epoch_shift) & most_epochs;
        return epoch > warps[one / warp_lanes].known_to(other % warp_lanes, one % warp_lanes);
    }
    return true;
}

Event event_of_record(uint64_t record, const char* access) {
    const uint32_t in = uint32_t(record >> interval_shift);
    uint32_t block = nobody;
    for (size_t low = 0, high = blocks_of_launch.size(); low < high;) {
        const size_t middle = (low + high) / 2;
        if (blocks_of_launch[middle].interval <= in) {
            block = blocks_of_launch[middle].block;
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const uint32_t place = uint32_t(record >> place_shift) % most_places;
    return {pc_of_place(place), access, block, uint32_t(record >> thread_shift) % most_threads};
}

}  // namespace emulator
