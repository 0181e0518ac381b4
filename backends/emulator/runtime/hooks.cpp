// What the compiler calls before every load and store of a kernel (-fsanitize=thread, linked to these functions).
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulator_interface.h"
#include "handover.h"
#include "ordering.h"
#include "regions.h"
#include "shadow.h"
#include "threads.h"
#include "traffic.h"
#include "watch.h"

namespace emulator {
namespace {

enum class Kind { read, write, atomic };

const char* name_of(Kind kind) {
    return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic write";
}

[[gnu::noinline, gnu::cold]] void report_race(const Space& space, uint64_t before, const char* access_before,
                                              Kind kind, unsigned bytes, uintptr_t pc) {
    if (before & atomic_bit) {
        access_before = "atomic write";
    }
    report({"race", here(pc, name_of(kind)), bytes, space.name, event_of_record(before, access_before), ""});
}

// A plain write after another that nothing orders before it. Whether it makes a difference is known once it is done.
struct SecondWrite {
    Finding finding;
    const void* address;
    char before[16];
};

std::vector<SecondWrite> second_writes;

[[gnu::noinline, gnu::cold]] void keep_second_write(const Space& space, uint64_t before, const void* address,
                                                    unsigned bytes, uintptr_t pc) {
    SecondWrite write{{"race", here(pc, "write"), bytes, space.name, event_of_record(before, "write"), ""}, address, {}};
    std::memcpy(write.before, address, bytes);
    second_writes.push_back(write);
}

[[gnu::noinline, gnu::cold]] void judge_second_writes() {
    for (SecondWrite& write : second_writes) {
        if (std::memcmp(write.before, write.address, write.finding.bytes) == 0) {
            write.finding.kind = "same value written";
            write.finding.detail = "in any order the result is the same";
        }
        report(write.finding);
    }
    second_writes.clear();
}

// When the kernel calls, its earlier writes are done.
inline void settle() {
    if (__builtin_expect(!second_writes.empty(), false)) {
        judge_second_writes();
    }
}

[[gnu::noinline, gnu::cold]] void report_access(const char* kind, const Space& space, Kind access, unsigned bytes,
                                                uintptr_t pc, const std::string& detail = "") {
    report({kind, here(pc, name_of(access)), bytes, space.name, {}, detail});
}

// Not every byte belongs to a region. What a launch would destroy by going on ends it.
[[gnu::noinline, gnu::cold]] void outside(const Space& space, uintptr_t address, Kind kind, unsigned bytes,
                                          uintptr_t pc) {
    if (&space == &global_space) {
        const Neighbour neighbour = nearest_region(address, bytes);
        report_access(neighbour.freed ? "use of freed memory" : "out of bounds", space, kind, bytes, pc,
                      neighbour.detail);
        if (kind != Kind::read || !pages_accessible(address, bytes)) {
            abandon_launch();
        }
        return;
    }
    const bool dynamic = &space == &dynamic_space;
    char detail[160] = "outside of every __shared__ variable of the kernel";
    if (dynamic) {
        std::snprintf(detail, sizeof detail, "byte %zu of %u bytes of dynamic shared memory",
                      size_t(address - space.base), launch.shared_bytes);
    }
    report_access("out of bounds", space, kind, bytes, pc, detail);
    if (!dynamic && kind != Kind::read) {
        abandon_launch();
    }
}

template <Kind kind>
inline void check_order(const Space& space, size_t offset, unsigned bytes, uintptr_t pc, uint64_t bytes_of_cell) {
    const uint64_t record = now.stamp | uint64_t(place_of(pc)) << place_shift |
                            (kind == Kind::atomic ? atomic_bit : 0) | bytes_of_cell;
    const uint64_t floor = space.of_block ? now.block_floor : now.launch_floor;
    Cell* const first = space.cells + offset / 2;
    Cell* const end = first + (bytes + 1) / 2;
    uint64_t conflict = 0;
    const char* access_before = "write";
    for (Cell* cell = first; cell < end; cell++) {
        if (races(cell->write, record, floor)) {
            conflict = cell->write;
        }
        if (kind == Kind::read) {
            const uint64_t last = cell->read;
            if ((last ^ record) >> thread_shift != 0 && last >= floor) {
                if (last < now.block_floor) {
                    cell->stranger = last;
                } else if (((last ^ record) >> (thread_shift + 5)) == 0) {
                    cell->sibling = last;
                } else if (cell->stranger < floor || cell->stranger >= now.block_floor) {
                    cell->stranger = last;
                }
            }
            cell->read = record;
        } else {
            for (const uint64_t read : {cell->stranger, cell->sibling, cell->read}) {
                if (races(read, record, floor)) {
                    conflict = read;
                    access_before = "read";
                }
            }
            cell->write = record;
            if (bytes_of_cell == both_bytes) {
                cell->read = cell->sibling = cell->stranger = 0;
            }
        }
    }
    if (__builtin_expect(conflict != 0, false)) {
        if (kind == Kind::write && *access_before == 'w' && !(conflict & atomic_bit)) {
            keep_second_write(space, conflict, reinterpret_cast<const void*>(space.base + offset), bytes, pc);
        } else {
            report_race(space, conflict, access_before, kind, bytes, pc);
        }
    }
}

// An access of 1, 2, 4, 8 or 16 bytes to a watched space, at a multiple of its size.
template <unsigned bytes, Kind kind>
inline void check(const Space& space, uintptr_t address, uintptr_t pc) {
    const size_t offset = address - space.base;
    uint16_t* const states = space.states + offset / 8;
    uint32_t written = ((1u << (bytes < 8 ? bytes : 8)) - 1) << offset % 8;
    uint32_t state = states[0];
    if (bytes == 16) {
        written |= written << 16;
        state |= uint32_t(states[1]) << 16;
    }
    if (__builtin_expect((state >> 8 & written) != written, false)) {
        outside(space, address, kind, bytes, pc);
        return;
    }
    if (kind != Kind::write && __builtin_expect((state & written) != written, false)) {
        report_access("uninitialised read", space, kind, bytes, pc);
    }
    if (kind != Kind::read) {
        states[0] |= uint16_t(written);
        if (bytes == 16) {
            states[1] |= uint16_t(written >> 16);
        }
    }
    check_order<kind>(space, offset, bytes, pc, bytes == 1 ? uint64_t(1) << offset % 2 : both_bytes);
}

inline bool holds(const Space& space, uintptr_t address) {
    return address - space.base < space.bytes;
}

[[gnu::noinline, gnu::cold]] void wild(uintptr_t address, Kind kind, unsigned bytes, uintptr_t pc) {
    const Module& module = modules[launch.kernel->module];
    if (address - module.begin < module.end - module.begin || own_variable(address)) {
        return;  // constants of the library
    }
    char detail[96];
    std::snprintf(detail, sizeof detail, "address 0x%zx is no device memory%s", size_t(address),
                  address < 4096 ? ": a null pointer" : "");
    report({"out of bounds", here(pc, name_of(kind)), bytes, "", {}, detail});
    abandon_launch();
}

// Where an address lies that is no thread's own; null: in no memory of the device.
inline const Space* space_of(uintptr_t address) {
    for (const Space* space : {&global_space, &dynamic_space, &static_space, &module_space}) {
        if (holds(*space, address)) {
            return space;
        }
    }
    return nullptr;
}

// An address that its type forbids: a GPU ends the launch there ("misaligned address"), and so does an SSE instruction.
[[noreturn, gnu::noinline, gnu::cold]] void misaligned(uintptr_t address, unsigned alignment, const char* access, uintptr_t pc) {
    const Space* space = space_of(address);
    char detail[80];
    std::snprintf(detail, sizeof detail, "the address is %zu bytes past a multiple of %u", size_t(address % alignment),
                  alignment);
    report({"misaligned access", here(pc, access), alignment, space ? space->name : "local", {}, detail});
    abandon_launch();
}

template <Kind kind>
void access_any(const volatile void* pointer, size_t bytes, void* pc);

template <unsigned bytes, Kind kind>
inline void access(const volatile void* pointer, void* return_address) {
    if (!watching) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - private_begin < private_bytes) {
        return;
    }
    const auto pc = reinterpret_cast<uintptr_t>(return_address);
    if (__builtin_expect(address % bytes != 0, false)) {  // what its type demands is looked at apart
        if (kind == Kind::atomic) {
            misaligned(address, bytes, name_of(kind), pc);
        }
        access_any<kind>(pointer, bytes, return_address);
        return;
    }
    const Space* const space = space_of(address);
    if (__builtin_expect(space == nullptr, false)) {
        wild(address, kind, bytes, pc);
        return;
    }
    if (launch.sanitise) {
        check<bytes, kind>(*space, address, pc);
    }
    if (launch.traffic && !(space == &static_space && launch.kernel->owns_guard(address - space->base))) {
        count_access(*space, address, bytes, kind != Kind::read, pc);
    }
}

template <Kind kind>
void access_any(const volatile void* pointer, size_t bytes, void* pc) {
    auto* at = static_cast<const volatile char*>(pointer);
    while (bytes > 0) {
        const auto address = reinterpret_cast<uintptr_t>(at);
        unsigned step = 1;
        if (bytes >= 8 && address % 8 == 0) {
            access<8, kind>(at, pc);
            step = 8;
        } else if (bytes >= 4 && address % 4 == 0) {
            access<4, kind>(at, pc);
            step = 4;
        } else if (bytes >= 2 && address % 2 == 0) {
            access<2, kind>(at, pc);
            step = 2;
        } else {
            access<1, kind>(at, pc);
        }
        at += step;
        bytes -= step;
    }
}

}  // namespace

void watch_read(const void* address, size_t bytes, void* pc) {
    access_any<Kind::read>(address, bytes, pc);
}

void watch_write(void* address, size_t bytes, void* pc) {
    access_any<Kind::write>(address, bytes, pc);
}

void finish_watching() {
    watching = false;
    settle();
}

}  // namespace emulator

using emulator::access;
using emulator::Kind;

#define CALLER __builtin_return_address(0)
#define HOOK(name, bytes, kind)                         \
    void __tsan_##name##bytes(void* address) {          \
        emulator::settle();                             \
        access<bytes, Kind::kind>(address, CALLER);     \
    }
#define HOOKS(bytes)                     \
    HOOK(read, bytes, read)              \
    HOOK(write, bytes, write)            \
    HOOK(unaligned_read, bytes, read)    \
    HOOK(unaligned_write, bytes, write)

extern "C" {

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_read_range(void* address, long bytes) {
    emulator::settle();
    emulator::access_any<Kind::read>(address, size_t(bytes), CALLER);
}

void __tsan_write_range(void* address, long bytes) {
    emulator::settle();
    emulator::access_any<Kind::write>(address, size_t(bytes), CALLER);
}

// -fsanitize=alignment: an object is used at an address that is no multiple of its type's alignment; and, without an
// alignment, -fsanitize=object-size: beyond the end of the array that a pointer is known to be into.
struct TypeMismatch {
    const char* file;
    uint32_t line;
    uint32_t column;
    const void* type;
    unsigned char log_alignment;
    unsigned char kind;  // 0: it is loaded, 1: stored, 3: a member of it is used; others: a reference to it is made
};

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* use, uintptr_t address) {
    using namespace emulator;
    const unsigned alignment = 1u << use->log_alignment;
    const bool own = address - private_begin < private_bytes;
    if (watching && alignment == 1) {
        report({"out of bounds", here(reinterpret_cast<uintptr_t>(CALLER)), 0, "", {},
                "beyond the array of the kernel that the pointer is into"});
        if (use->kind == 1) {
            abandon_launch();
        }
    }
    // A member is an access of its own. Of a thread's own arrays the compiler aligns those of 16 bytes and more as a
    // GPU's would, smaller ones not.
    if (watching && address % alignment != 0 && use->kind != 3 && !(own && alignment != 16)) {
        misaligned(address, alignment, use->kind == 1 ? "write" : "read", reinterpret_cast<uintptr_t>(CALLER));
    }
}

void cuda_emulator_atomic(const volatile void* address, unsigned bytes, void* pc) {
    emulator::settle();
    if (emulator::watching) {
        emulator::meet_at(reinterpret_cast<uintptr_t>(address));
    }
    switch (bytes) {
        case 2:
            return access<2, Kind::atomic>(address, pc);
        case 4:
            return access<4, Kind::atomic>(address, pc);
        default:
            return access<8, Kind::atomic>(address, pc);
    }
}

void cuda_emulator_fence(int for_device) {
    if (emulator::watching) {
        emulator::fence(for_device != 0);
    }
}

// Libraries are linked with --wrap=memcpy and so on: what the compiler left as a call is watched too.
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
    emulator::settle();
    emulator::access_any<Kind::read>(from, bytes, CALLER);
    emulator::access_any<Kind::write>(to, bytes, CALLER);
    return std::memmove(to, from, bytes);
}

void* __wrap_memmove(void* to, const void* from, size_t bytes) {
    emulator::settle();
    emulator::access_any<Kind::read>(from, bytes, CALLER);
    emulator::access_any<Kind::write>(to, bytes, CALLER);
    return std::memmove(to, from, bytes);
}

void* __wrap_memset(void* to, int value, size_t bytes) {
    emulator::settle();
    emulator::access_any<Kind::write>(to, bytes, CALLER);
    return std::memset(to, value, bytes);
}
}
