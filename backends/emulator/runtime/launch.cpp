#include "launch.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "findings.h"
#include "shadow.h"
#include "threads.h"
#include "traffic.h"
#include "watch.h"

// The address of a thread-local variable: where the C library keeps the static shared memory of a library.
extern "C" void* __tls_get_addr(void*);

namespace emulator {

Launch launch;
std::vector<Module> modules;
std::vector<Kernel> kernels;

namespace {

// Static `__shared__` variables are compiled as thread-local: since all fibers run on one thread of the operating
// system, the thread-local block of the library is exactly its static shared memory.
struct TlsIndex {
    unsigned long module;
    unsigned long offset;
};

struct Search {
    std::string path;
    Module module;
    bool found;
};

int visit_library(dl_phdr_info* library, size_t, void* argument) {
    auto& search = *static_cast<Search*>(argument);
    if (search.path != library->dlpi_name) {
        return 0;
    }
    search.found = true;
    Module& module = search.module;
    module.begin = ~uintptr_t(0);
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const auto& segment = library->dlpi_phdr[i];
        const uintptr_t begin = library->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD) {
            module.begin = std::min(module.begin, begin);
            module.end = std::max(module.end, begin + segment.p_memsz);
            if (segment.p_flags & PF_W) {
                module.data = begin;
                module.data_bytes = segment.p_memsz;
            }
        } else if (segment.p_type == PT_TLS) {
            TlsIndex index{library->dlpi_tls_modid, 0};
            module.shared = reinterpret_cast<uintptr_t>(__tls_get_addr(&index));
            module.shared_bytes = segment.p_memsz;
        }
    }
    return 1;
}

// Static shared memory and variables of the library that the kernel is from.
void watch_module(const Module& module) {
    make_space(static_space, "shared", module.shared, module.shared_bytes, true);
    make_space(module_space, "global", module.data / 64 * 64, module.data_bytes + module.data % 64);
    set_bytes(module_space, 0, module_space.bytes, true, true);
}

void watch_shared() {
    static uint32_t dynamic_bytes = 0;  // of the last block
    static bool mapped = false;
    if (!mapped) {
        void* wanted = reinterpret_cast<void*>(cuda_emulator::dynamic_shared_address);
        void* memory = mmap(wanted, 2 * cuda_emulator::shared_bytes_limit, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (memory != wanted) {
            std::perror("no memory for the emulator's shared memory");
            std::exit(1);
        }
        make_space(dynamic_space, "shared", cuda_emulator::dynamic_shared_address,
                   2 * cuda_emulator::shared_bytes_limit, true);
        mapped = true;
    }
    const Module& module = modules[launch.kernel->module];
    set_bytes(dynamic_space, 0, dynamic_bytes, false, false);
    dynamic_bytes = launch.shared_bytes;
    set_bytes(dynamic_space, 0, dynamic_bytes, true, false);
    set_bytes(static_space, 0, static_space.bytes, false, false);
    for (const SharedVariable& variable : launch.kernel->shared) {
        set_bytes(static_space, variable.offset, variable.bytes, true, variable.is_guard());
    }
    std::memset(reinterpret_cast<void*>(dynamic_space.base), 0xff, dynamic_bytes);
    std::memset(reinterpret_cast<void*>(module.shared), 0xff, module.shared_bytes);
}

std::string refusal() {
    char text[200] = "";
    const Extent& grid = launch.grid;
    const Extent& block = launch.block;
    const size_t shared = launch.shared_bytes + launch.kernel->shared_bytes;
    if (block.count() < 1 || block.count() > most_threads || block.z > 64) {
        std::snprintf(text, sizeof text, "a block of %u x %u x %u threads: expected 1 to 1024, at most 64 along z",
                      block.x, block.y, block.z);
    } else if (grid.count() < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        std::snprintf(text, sizeof text, "a grid of %u x %u x %u blocks: expected 1 to 2147483647, 65535, 65535",
                      grid.x, grid.y, grid.z);
    } else if (shared > cuda_emulator::shared_bytes_limit) {
        std::snprintf(text, sizeof text, "%zu bytes of shared memory: a block has at most %zu", shared,
                      cuda_emulator::shared_bytes_limit);
    } else if (launch.kernel->shared_bytes > 48 * 1024) {
        std::snprintf(text, sizeof text, "%zu bytes of static shared memory: at most 49152, more only as dynamic",
                      launch.kernel->shared_bytes);
    }
    return text;
}

// A library's kernels share one block of static memory; each may use its own variables and those of no kernel.
void find_shared_variables(const std::string& path, size_t first) {
    for (const SharedVariable& variable : shared_variables(path)) {
        const auto owns = [&](const Kernel& kernel) { return is_local_to(variable, kernel.name); };
        const bool owned = std::any_of(kernels.begin() + long(first), kernels.end(), owns);
        for (size_t id = first; id < kernels.size(); id++) {
            if (!owned || owns(kernels[id])) {
                kernels[id].shared.push_back(variable);
                kernels[id].shared_bytes += variable.is_guard() ? 0 : variable.bytes;
            }
        }
    }
}

std::vector<uint32_t> block_order(uint64_t count) {
    std::vector<uint32_t> order(count);
    for (uint64_t i = 0; i < count; i++) {
        order[i] = uint32_t(launch.schedule == Schedule::reverse ? count - 1 - i : i);
    }
    if (launch.schedule == Schedule::random) {
        for (uint64_t i = count; i > 1; i--) {
            std::swap(order[i - 1], order[next_random() % i]);
        }
    }
    return order;
}

}  // namespace

bool Kernel::owns_guard(size_t offset) const {
    const auto guards = [&](const SharedVariable& variable) { return variable.is_guard() && variable.offset == offset; };
    return std::any_of(shared.begin(), shared.end(), guards);
}

std::string load_module(const std::string& path) {
    const size_t before = kernels.size();
    modules.emplace_back();
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
        modules.pop_back();
        kernels.resize(before);
        return dlerror();
    }
    Search search{path, {}, false};
    dl_iterate_phdr(visit_library, &search);
    if (!search.found) {
        return "the loaded library " + path + " is not to be found in memory";
    }
    modules.back() = search.module;
    find_shared_variables(path, before);
    return "";
}

std::string run_launch() {
    static size_t watched = ~size_t(0);
    const std::string refused = refusal();
    if (!refused.empty()) {
        return refused;
    }
    seed_random(launch.seed);
    prepare_threads();
    begin_launch_intervals();
    if (watched != launch.kernel->module) {
        watch_module(modules[launch.kernel->module]);
        watched = launch.kernel->module;
    }
    watching = launch.sanitise || launch.traffic;
    for (const uint32_t block : block_order(launch.grid.count())) {
        begin_block_interval(block);
        watch_shared();
        run_block(block);
        if (launch.traffic) {
            finish_block_traffic();
        }
        if (abandoned()) {
            break;
        }
        launch.blocks_ended++;
    }
    finish_watching();
    return "";
}

}  // namespace emulator

extern "C" {

void cuda_emulator_kernel(const char* name, cuda_emulator::KernelEntry entry) {
    emulator::kernels.push_back({name, entry, {}, emulator::modules.size() - 1});
}

void cuda_emulator_argument(const char* kind, const char* element, int is_const, unsigned bytes) {
    emulator::kernels.back().arguments.push_back({kind, element, is_const != 0, bytes});
}
}
