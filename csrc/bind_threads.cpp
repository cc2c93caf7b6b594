// What `kvfold doctor` asks: the processor, the builds of the kernel, and how fast the threads wake up.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_features.hpp"
#include "thread_pool.hpp"
#include "variants.hpp"

namespace nb = nanobind;

namespace {

std::vector<std::pair<std::string, bool>> all_features() {
    size_t count = 0;
    const kvfold::Feature* known = kvfold::features(&count);
    std::vector<std::pair<std::string, bool>> found;
    for (size_t i = 0; i < count; ++i) found.emplace_back(known[i].name, known[i].here());
    return found;
}

std::vector<std::pair<std::string, std::string>> all_builds() {
    std::vector<std::pair<std::string, std::string>> found;
    for (const kvfold::Verdict& verdict : kvfold::verdicts()) found.emplace_back(verdict.build, verdict.missing);
    return found;
}

using Clock = std::chrono::steady_clock;

// A thread that is late has its task done by another, so every task waits until all have begun.
struct Meeting {
    std::atomic<int> here{0};
    int expected;
    Clock::time_point end;
};

void meet(void* context, size_t) {
    Meeting& meeting = *static_cast<Meeting*>(context);
    meeting.here.fetch_add(1);
    while (meeting.here.load() < meeting.expected && Clock::now() < meeting.end) std::this_thread::yield();
}

double wake_seconds(int threads, double pause_seconds) {
    if (threads < 1 || threads > 4096) throw nb::value_error("threads must be between 1 and 4096");
    if (!(pause_seconds >= 0.0 && pause_seconds <= 1.0)) throw nb::value_error("a pause is at most a second long");
    nb::gil_scoped_release unlocked;
    std::this_thread::sleep_for(std::chrono::duration<double>(pause_seconds));
    const auto begin = Clock::now();
    Meeting meeting{{}, threads, begin + std::chrono::milliseconds(100)};
    kvfold::ThreadPool::shared().run(threads, static_cast<size_t>(threads), meet, &meeting);
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

void bind_threads(nb::module_& m) {
    m.def("features", &all_features, "(name, whether it can be used here) of what a kernel may ask of the processor.");
    m.def("builds", &all_builds, "(name, features that it lacks here) of every build of the kernel, best first.");
    m.def("wake_seconds", &wake_seconds, nb::arg("threads"), nb::arg("pause_seconds"),
          "How long it takes from a call, after a pause, until `threads` threads have met; at most 0.1 seconds.");
}
