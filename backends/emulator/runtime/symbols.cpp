#include "symbols.h"

#include <elf.h>
#include <link.h>

#include <fstream>
#include <iterator>

namespace emulator {

// Thread-local symbols of an ELF file: their values are offsets into the thread-local block.
std::vector<SharedVariable> shared_variables(const std::string& library) {
    std::ifstream file(library, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    std::vector<SharedVariable> found;
    if (bytes.size() < sizeof(ElfW(Ehdr))) {
        return found;
    }
    const char* start = bytes.data();
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(start);
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(start + header->e_shoff);
    for (unsigned i = 0; i < header->e_shnum; i++) {
        const ElfW(Shdr)& table = sections[i];
        if (table.sh_type != SHT_SYMTAB) {
            continue;
        }
        const char* names = start + sections[table.sh_link].sh_offset;
        const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(start + table.sh_offset);
        for (size_t number = 0; number < table.sh_size / sizeof(ElfW(Sym)); number++) {
            const ElfW(Sym)& symbol = symbols[number];
            if ((symbol.st_info & 0xf) == STT_TLS && symbol.st_shndx != SHN_UNDEF && symbol.st_size > 0) {
                found.push_back({names + symbol.st_name, size_t(symbol.st_value), size_t(symbol.st_size)});
            }
        }
    }
    return found;
}

bool is_local_to(const SharedVariable& variable, const std::string& function) {
    const std::string prefix = "_ZZ" + std::to_string(function.size()) + function + "E";
    return variable.name.compare(0, prefix.size(), prefix) == 0;
}

}  // namespace emulator
