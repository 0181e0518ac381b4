// The emulator's process: takes requests from Python over a socket, runs kernels, answers in JSON.
//
// Request: u32 opcode, u32 payload bytes, payload. Reply: u32 status (0: done, 1: refused), u32 bytes, text.
#include <signal.h>
#include <sys/socket.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_emulator_interface.h"
#include "endless.h"
#include "findings.h"
#include "launch.h"
#include "regions.h"
#include "threads.h"
#include "traffic.h"
#include "watch.h"

namespace emulator {
namespace {

enum class Opcode : uint32_t { load, launch, region, quit };

struct Refused {
    std::string message;
};

int channel = -1;

bool receive(void* to, size_t bytes) {
    auto* at = static_cast<char*>(to);
    while (bytes > 0) {
        const ssize_t got = read(channel, at, bytes);
        if (got <= 0) {
            return false;
        }
        at += got;
        bytes -= size_t(got);
    }
    return true;
}

void answer(uint32_t status, const std::string& text) {
    const uint32_t head[2] = {status, uint32_t(text.size())};
    std::string message(reinterpret_cast<const char*>(head), sizeof head);
    message += text;
    for (size_t sent = 0; sent < message.size();) {
        const ssize_t count = send(channel, message.data() + sent, message.size() - sent, MSG_NOSIGNAL);
        if (count <= 0) {
            _exit(0);  // Python is gone
        }
        sent += size_t(count);
    }
}

// Takes a payload apart.
class Reader {
  public:
    explicit Reader(const std::vector<char>& bytes) : bytes_(bytes) {}

    template <class Value>
    Value take() {
        Value value;
        std::memcpy(&value, take_bytes(sizeof value), sizeof value);
        return value;
    }

    const char* take_bytes(size_t count) {
        if (count > bytes_.size() - at_) {
            throw Refused{"a request is shorter than its fields"};
        }
        at_ += count;
        return bytes_.data() + at_ - count;
    }

    bool at_end() const { return at_ == bytes_.size(); }

  private:
    const std::vector<char>& bytes_;
    size_t at_ = 0;
};

std::string argument_json(const Argument& argument) {
    std::string text = "{\"kind\":" + json_text(argument.kind) + ",\"bytes\":" + std::to_string(argument.bytes);
    if (argument.kind == "pointer") {
        text += ",\"element\":" + json_text(argument.element);
        text += std::string(",\"const\":") + (argument.is_const ? "true" : "false");
    }
    return text + "}";
}

std::string load(const std::vector<char>& payload) {
    const size_t before = kernels.size();
    const std::string error = load_module(std::string(payload.begin(), payload.end()));
    if (!error.empty()) {
        throw Refused{error};
    }
    std::string list;
    for (size_t id = before; id < kernels.size(); id++) {
        std::string arguments;
        for (const Argument& argument : kernels[id].arguments) {
            arguments += (arguments.empty() ? "" : ",") + argument_json(argument);
        }
        list += (list.empty() ? "" : ",") + std::string("{\"id\":") + std::to_string(id) +
                ",\"name\":" + json_text(kernels[id].name) + ",\"arguments\":[" + arguments + "]}";
    }
    return "{\"kernels\":[" + list + "]}";
}

Extent take_extent(Reader& reader) {
    const auto x = reader.take<uint32_t>();
    const auto y = reader.take<uint32_t>();
    const auto z = reader.take<uint32_t>();
    return {x, y, z};
}

std::string run(const std::vector<char>& payload) {
    Reader reader(payload);
    const auto id = reader.take<uint32_t>();
    if (id >= kernels.size()) {
        throw Refused{"no kernel has this number"};
    }
    launch = {};
    launch.kernel = &kernels[id];
    launch.grid = take_extent(reader);
    launch.block = take_extent(reader);
    launch.shared_bytes = reader.take<uint32_t>();
    const auto flags = reader.take<uint32_t>();
    launch.sanitise = flags & 1;
    launch.traffic = flags & 2;
    launch.schedule = reader.take<Schedule>();
    launch.seed = reader.take<uint64_t>();
    const auto limit = reader.take<uint32_t>();
    const auto& expected = launch.kernel->arguments;
    const auto count = reader.take<uint32_t>();
    if (count != expected.size()) {
        throw Refused{launch.kernel->name + " takes " + std::to_string(expected.size()) + " arguments, got " +
                      std::to_string(count)};
    }
    std::vector<std::vector<char>> values(count);
    for (uint32_t i = 0; i < count; i++) {
        const auto bytes = reader.take<uint32_t>();
        if (bytes != expected[i].bytes) {
            throw Refused{"argument " + std::to_string(i) + " of " + launch.kernel->name + " has " +
                          std::to_string(expected[i].bytes) + " bytes, got " + std::to_string(bytes)};
        }
        const char* value = reader.take_bytes(bytes);
        values[i].assign(value, value + bytes);
        launch.arguments.push_back(values[i].data());
    }
    forget_findings();
    forget_traffic();
    limit_time(limit, [](const std::string& reply) { answer(0, reply); });
    const std::string error = run_launch();
    end_time_limit();
    std::fflush(stdout);
    if (!error.empty()) {
        throw Refused{error};
    }
    return "{\"findings\":" + findings_json() + ",\"traffic\":" + traffic_json() + "}";
}

std::string set_regions(const std::vector<char>& payload) {
    Reader reader(payload);
    while (!reader.at_end()) {
        const auto address = reader.take<uint64_t>();
        const auto bytes = reader.take<uint64_t>();
        const std::string error = set_region(address, bytes, reader.take<RegionState>());
        if (!error.empty()) {
            throw Refused{error};
        }
    }
    return "{}";
}

uintptr_t pc_of(const void* context) {
    const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    return uintptr_t(machine.gregs[REG_RIP]);
#elif defined(__aarch64__)
    return uintptr_t(machine.pc);
#else
    (void)machine;
    return 0;
#endif
}

// The last reply of this process: what is known, and where it died.
void crash(int signal, siginfo_t* info, void* context) {
    char detail[200];
    const bool memory = signal == SIGSEGV || signal == SIGBUS;
    std::snprintf(detail, sizeof detail, "%s", strsignal(signal));
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (memory && stack_is_full(address)) {
        std::snprintf(detail, sizeof detail,
                      "recursion without end, or local arrays beyond the 512 KiB that a thread of a GPU has");
    } else if (memory) {
        std::snprintf(detail, sizeof detail, "%s at address 0x%zx", strsignal(signal), address);
    } else if (signal == SIGFPE) {
        std::snprintf(detail, sizeof detail, "integer division by zero");
    }
    finish_watching();
    Finding finding{"crash", here(pc_of(context) + 1)};
    finding.detail = detail;
    answer(0, "{\"crash\":true,\"findings\":" + findings_json(&finding) + ",\"traffic\":[]}");
    _exit(1);
}

void catch_crashes() {
    static char stack[256 * 1024];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action {};
    action.sa_sigaction = crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) {
        sigaction(signal, &action, nullptr);
    }
}

void serve() {
    for (;;) {
        uint32_t head[2];
        if (!receive(head, sizeof head)) {
            return;
        }
        std::vector<char> payload(head[1]);
        if (!receive(payload.data(), payload.size())) {
            return;
        }
        try {
            switch (Opcode(head[0])) {
                case Opcode::load:
                    answer(0, load(payload));
                    break;
                case Opcode::launch:
                    answer(0, run(payload));
                    break;
                case Opcode::region:
                    answer(0, set_regions(payload));
                    break;
                case Opcode::quit:
                    return;
                default:
                    answer(1, "no such request");
            }
        } catch (const Refused& refused) {
            answer(1, refused.message);
        }
    }
}

}  // namespace
}  // namespace emulator

int main(int count, char** arguments) {
    int memory_fd = -1;
    size_t memory_bytes = 0;
    for (int i = 1; i + 1 < count; i += 2) {
        const std::string name = arguments[i];
        if (name == "--memory-fd") {
            memory_fd = std::atoi(arguments[i + 1]);
        } else if (name == "--memory-bytes") {
            memory_bytes = std::strtoull(arguments[i + 1], nullptr, 10);
        } else if (name == "--channel-fd") {
            emulator::channel = std::atoi(arguments[i + 1]);
        }
    }
    if (memory_fd < 0 || memory_bytes == 0 || emulator::channel < 0) {
        std::fprintf(stderr, "usage: emulator --memory-fd N --memory-bytes B --channel-fd M\n");
        return 2;
    }
    signal(SIGINT, SIG_IGN);  // Python decides what an interrupt means
    emulator::map_arena(memory_fd, memory_bytes);
    emulator::catch_crashes();
    emulator::prepare_time_limit();
    emulator::serve();
    _exit(0);  // a kernel may have spoiled what destructors would look at
}
