// The variables of a library that are static shared memory, read from its symbol table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace emulator {

struct SharedVariable {
    std::string name;  // mangled: _ZZ<length><function>E<length><variable> for one of an extern "C" function
    size_t offset;
    size_t bytes;

    // Not the kernel's, but the compiler's: whether a variable of a class type has been initialised. Poison says yes.
    bool is_guard() const { return name.compare(0, 4, "_ZGV") == 0; }
};

std::vector<SharedVariable> shared_variables(const std::string& library);

// Whether a variable is local to this extern "C" function.
bool is_local_to(const SharedVariable& variable, const std::string& function);

}  // namespace emulator
