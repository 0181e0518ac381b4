#include "endless.h"

#include <execinfo.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>

#include "findings.h"
#include "launch.h"
#include "threads.h"
#include "watch.h"

namespace emulator {
namespace {

constexpr unsigned wanted_samples = 16;  // of where the running thread is: enough to see the lines of its loop
constexpr unsigned sample_milliseconds = 2;
constexpr int most_frames = 64;

struct Sample {
    void* frames[most_frames];
    int count;
};

Sample samples[wanted_samples];
unsigned sample_count = 0;
void (*tell_reply)(const std::string&) = nullptr;

void set_timer(uint32_t milliseconds) {
    itimerval timer{};
    timer.it_value = {milliseconds / 1000, milliseconds % 1000 * 1000};
    setitimer(ITIMER_PROF, &timer, nullptr);  // counts what this process computes, however busy the machine is
}

std::string frames_json(const Sample& sample) {
    const Module& module = modules[launch.kernel->module];
    std::string list;
    for (int i = 0; i < sample.count; i++) {
        const auto pc = reinterpret_cast<uintptr_t>(sample.frames[i]);
        if (pc - module.begin < module.end - module.begin) {
            list += (list.empty() ? "" : ",") + json_text(place_text(pc));
        }
    }
    return "[" + list + "]";
}

std::string standing_of(const Thread& thread) {
    const Request& request = thread.request;
    switch (thread.state) {
        case State::ready:
            return "\"state\":\"ready\"";
        case State::done:
            return "\"state\":\"done\"";
        case State::at_barrier:
        case State::in_collective:
            return std::string("\"state\":\"") + (thread.state == State::at_barrier ? "barrier" : "warp") +
                   "\",\"file\":" + json_text(request.file) + ",\"line\":" + std::to_string(request.line);
    }
    return "";
}

// The other threads of the block; neighbours that stand alike are told together.
std::string others_json() {
    unsigned count = 0;
    const Thread* threads = block_threads(count);
    std::string list;
    for (unsigned first = 0; first < count;) {
        if (&threads[first] == current) {
            first++;
            continue;
        }
        const std::string standing = standing_of(threads[first]);
        unsigned end = first + 1;
        while (end < count && &threads[end] != current && standing_of(threads[end]) == standing) {
            end++;
        }
        list += (list.empty() ? "" : ",") + std::string("{\"first\":") + std::to_string(first) + ",\"last\":" +
                std::to_string(end - 1) + "," + standing + "}";
        first = end;
    }
    return "[" + list + "]";
}

[[noreturn]] void give_up() {
    finish_watching();
    std::string stacks;
    for (const Sample& sample : samples) {
        stacks += (stacks.empty() ? "" : ",") + frames_json(sample);
    }
    Finding finding{"no end", here(0)};
    tell_reply("{\"endless\":{\"stacks\":[" + stacks + "],\"others\":" + others_json() +
               ",\"blocks\":" + std::to_string(launch.grid.count()) +
               ",\"ended\":" + std::to_string(launch.blocks_ended) + "},\"findings\":" + findings_json(&finding) +
               ",\"traffic\":[]}");
    _exit(1);
}

// The pc that a signal interrupted is no return address: those are one further, as place names expect.
void expired(int, siginfo_t*, void*) {
    Sample& sample = samples[std::min(sample_count, wanted_samples - 1)];
    sample.count = backtrace(sample.frames, most_frames);
    const Module& module = modules[launch.kernel->module];
    const auto inside = [&](void* frame) {
        return reinterpret_cast<uintptr_t>(frame) - module.begin < module.end - module.begin;
    };
    const bool in_kernel = sample.count > 2 && inside(sample.frames[2]);  // below this handler and the signal's frame
    if (in_kernel) {
        sample.frames[2] = static_cast<char*>(sample.frames[2]) + 1;
    }
    const bool known = current && std::any_of(sample.frames, sample.frames + sample.count, inside);
    sample_count += known;
    // The reply is put together where nothing that it needs is half done: in the kernel's own code.
    if (sample_count >= wanted_samples && (in_kernel || sample_count > 10 * wanted_samples)) {
        give_up();
    }
    set_timer(sample_milliseconds);
}

}  // namespace

void prepare_time_limit() {
    void* frames[4];
    backtrace(frames, 4);  // the first call loads a library: not in a signal handler
    struct sigaction action {};
    action.sa_sigaction = expired;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigaction(SIGPROF, &action, nullptr);
}

void limit_time(uint32_t milliseconds, void (*tell)(const std::string& reply)) {
    sample_count = 0;
    tell_reply = tell;
    if (milliseconds) {
        set_timer(milliseconds);
    }
}

void end_time_limit() {
    set_timer(0);
}

}  // namespace emulator
