#include "findings.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <tuple>
#include <vector>

#include "launch.h"

namespace emulator {
namespace {

using Key = std::tuple<std::string, uintptr_t, uintptr_t>;

constexpr size_t most_findings = 1000;

struct Counted {
    Finding finding;
    uint64_t count;
};

std::vector<Counted> found;
std::map<Key, size_t> numbers;

std::string coordinates(uint32_t index, const Extent& extent) {
    if (index == nobody) {
        return "null";
    }
    char text[64];
    std::snprintf(text, sizeof text, "[%u,%u,%u]", index % extent.x, index / extent.x % extent.y,
                  index / extent.x / extent.y);
    return text;
}

std::string event_json(const Event& event) {
    return "\"pc\":" + json_text(place_text(event.pc)) + ",\"access\":" + json_text(event.access) +
           ",\"block\":" + coordinates(event.block, launch.grid) +
           ",\"thread\":" + coordinates(event.thread, launch.block);
}

std::string finding_json(const Finding& finding, uint64_t count) {
    std::string other = finding.other.pc ? "{" + event_json(finding.other) + "}" : "null";
    return "{\"kind\":" + json_text(finding.kind) + "," + event_json(finding.event) +
           ",\"bytes\":" + std::to_string(finding.bytes) + ",\"space\":" + json_text(finding.space) +
           ",\"other\":" + other + ",\"detail\":" + json_text(finding.detail) +
           ",\"count\":" + std::to_string(count) + "}";
}

}  // namespace

void report(const Finding& finding) {
    const Key key{finding.kind, finding.event.pc, finding.other.pc};
    const auto known = numbers.find(key);
    if (known != numbers.end()) {
        found[known->second].count++;
    } else if (found.size() < most_findings) {
        numbers[key] = found.size();
        found.push_back({finding, 1});
    }
}

void forget_findings() {
    found.clear();
    numbers.clear();
}

std::string findings_json(const Finding* crash) {
    std::string list;
    for (const Counted& counted : found) {
        list += (list.empty() ? "" : ",") + finding_json(counted.finding, counted.count);
    }
    if (crash) {
        list += (list.empty() ? "" : ",") + finding_json(*crash, 1);
    }
    return "[" + list + "]";
}

std::string place_text(uintptr_t pc) {
    Dl_info library;
    if (pc == 0 || dladdr(reinterpret_cast<void*>(pc), &library) == 0 || library.dli_fname == nullptr) {
        return "";
    }
    char offset[32];
    std::snprintf(offset, sizeof offset, "+0x%zx", size_t(pc - reinterpret_cast<uintptr_t>(library.dli_fbase)));
    return library.dli_fname + std::string(offset);
}

std::string json_text(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            quoted += '\\';
        }
        if (static_cast<unsigned char>(c) >= ' ') {
            quoted += c;
        } else {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
            quoted += escaped;
        }
    }
    return quoted + "\"";
}

}  // namespace emulator
