// A small pool: workers start when a job first needs them, sleep between jobs, and live until the process ends.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace kvfold {

class ThreadPool {
  public:
    using Task = void (*)(void* context, size_t task);

    // The pool of this process, made on first use. It is never destroyed: its sleeping workers may outlive static
    // destructors. A forked child has none of its parent's threads, so it forgets the pool and makes its own.
    static ThreadPool& shared() {
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

    // Runs task(context, 0 .. tasks - 1) on the calling thread and at most `threads - 1` workers; returns when all are
    // done. A task must not throw. A second caller, while a job is running, does its tasks alone instead of waiting.
    void run(int threads, size_t tasks, Task task, void* context) {
        std::unique_lock<std::mutex> job(job_mutex_, std::defer_lock);
        if (threads <= 1 || tasks <= 1 || !job.try_lock()) {
            for (size_t i = 0; i < tasks; ++i) task(context, i);
            return;
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            start(threads - 1);
            task_ = task;
            context_ = context;
            tasks_ = tasks;
            next_.store(0, std::memory_order_relaxed);
            seats_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        drain(task, context, tasks);
        // Only workers that have joined are waited for: one that wakes up late finds no seat and sleeps on.
        std::unique_lock<std::mutex> guard(mutex_);
        seats_ = 0;
        idle_.wait(guard, [this] { return active_ == 0; });
    }

  private:
    static std::atomic<ThreadPool*>& slot() {
        static std::atomic<ThreadPool*> pool{nullptr};
        return pool;
    }

    void start(int wanted) {
        while (started_ < wanted) {
            try {
                std::thread([this] { work(); }).detach();
            } catch (const std::system_error&) {
                return;  // the machine gives no more threads: those that run, and the caller, do the work
            }
            ++started_;
        }
    }

    void drain(Task task, void* context, size_t tasks) {
        for (size_t i = next_.fetch_add(1); i < tasks; i = next_.fetch_add(1)) task(context, i);
    }

    void work() {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            wake_.wait(guard, [&] { return generation_ != seen; });
            seen = generation_;
            if (seats_ == 0) continue;
            --seats_;
            ++active_;
            const Task task = task_;
            void* const context = context_;
            const size_t tasks = tasks_;
            guard.unlock();
            drain(task, context, tasks);
            guard.lock();
            if (--active_ == 0) idle_.notify_one();
        }
    }

    std::mutex job_mutex_;  // held for the length of a job
    std::mutex mutex_;      // guards everything below
    std::condition_variable wake_, idle_;
    std::atomic<size_t> next_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    size_t tasks_ = 0;
    uint64_t generation_ = 0;
    int started_ = 0, seats_ = 0, active_ = 0;
};

}  // namespace kvfold
