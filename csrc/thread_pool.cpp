#include "thread_pool.hpp"

#include <sched.h>

#include <chrono>
#include <system_error>
#include <thread>

namespace kvfold {
namespace {

// How long a thread looks for work, or for the end of others' work, before it sleeps: the price of a wake-up. The calls
// of a step follow each other that closely only where little lies between them; longer would burn time that torch's
// threads need.
constexpr std::chrono::microseconds kSpin{100};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `done()` came true within kSpin.
template <typename Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

std::atomic<ThreadPool*>& slot() {
    static std::atomic<ThreadPool*> pool{nullptr};
    return pool;
}

}  // namespace

ThreadPool& ThreadPool::shared() {
    ThreadPool* pool = slot().load(std::memory_order_acquire);
    if (pool != nullptr) return *pool;
    auto* made = new ThreadPool;
    if (!slot().compare_exchange_strong(pool, made, std::memory_order_acq_rel)) {
        delete made;  // another thread was first
        return *pool;
    }
    pthread_atfork(nullptr, nullptr, [] { slot().store(nullptr, std::memory_order_release); });
    return *made;
}

void ThreadPool::run(int threads, size_t tasks, Task task, void* context) {
    std::unique_lock<std::mutex> job(job_mutex_, std::defer_lock);
    if (threads <= 1 || tasks <= 1 || !job.try_lock()) {
        for (size_t i = 0; i < tasks; ++i) task(context, i);
        return;
    }
    start(threads - 1);
    keep_off_this_cpu();
    int asleep = 0;
    {
        std::lock_guard<std::mutex> guard(mutex_);
        task_ = task;
        context_ = context;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        seats_ = threads - 1;
        asleep = asleep_;
        generation_.fetch_add(1, std::memory_order_release);
    }
    if (asleep > 0) wake_.notify_all();
    drain(task, context, tasks);
    wait_for_workers();
}

// Only workers that have joined are waited for: one that wakes up late finds no seat and sleeps on.
void ThreadPool::wait_for_workers() {
    {
        std::lock_guard<std::mutex> guard(mutex_);
        seats_ = 0;
    }
    if (spin_until([this] { return active_.load(std::memory_order_acquire) == 0; })) return;
    std::unique_lock<std::mutex> guard(mutex_);
    idle_.wait(guard, [this] { return active_.load(std::memory_order_relaxed) == 0; });
}

void ThreadPool::start(int wanted) {
    workers_.reserve(static_cast<size_t>(wanted));
    while (static_cast<int>(workers_.size()) < wanted) {
        try {
            std::thread worker([this] { work(); });
            workers_.push_back(worker.native_handle());
            worker.detach();
        } catch (const std::system_error&) {
            return;  // the machine gives no more threads: those that run, and the caller, do the work
        }
        avoided_cpu_ = -1;
    }
}

// A scheduler may put a thread that wakes up beside the one that woke it (small virtual machines do, to leave their host
// a core), and there they take turns for milliseconds. The workers may run anywhere but there.
void ThreadPool::keep_off_this_cpu() {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0 || here == avoided_cpu_) return;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more processors than such a set can name
    CPU_CLR(here, &allowed);
    if (CPU_COUNT(&allowed) == 0) return;
    for (const pthread_t worker : workers_) pthread_setaffinity_np(worker, sizeof allowed, &allowed);
    avoided_cpu_ = here;
#endif
}

void ThreadPool::drain(Task task, void* context, size_t tasks) {
    for (size_t i = next_.fetch_add(1); i < tasks; i = next_.fetch_add(1)) task(context, i);
}

void ThreadPool::work() {
    uint64_t seen = 0;
    const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    for (;;) {
        spin_until(called);
        std::unique_lock<std::mutex> guard(mutex_);
        ++asleep_;
        wake_.wait(guard, called);
        --asleep_;
        seen = generation_.load(std::memory_order_relaxed);
        if (seats_ == 0) continue;
        --seats_;
        active_.fetch_add(1, std::memory_order_relaxed);
        const Task task = task_;
        void* const context = context_;
        const size_t tasks = tasks_;
        guard.unlock();
        drain(task, context, tasks);
        guard.lock();
        if (active_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
    }
}

}  // namespace kvfold
