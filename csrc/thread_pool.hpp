// A small pool: workers start when a job first needs them, sleep between jobs, and live until the process ends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include <pthread.h>

namespace kvfold {

class ThreadPool {
  public:
    using Task = void (*)(void* context, size_t task);

    // The pool of this process, made on first use. It is never destroyed: its sleeping workers may outlive static
    // destructors. A forked child has none of its parent's threads, so it forgets the pool and makes its own.
    static ThreadPool& shared();

    // Runs task(context, 0 .. tasks - 1) on the calling thread and at most `threads - 1` workers; returns when all are
    // done. A task must not throw. A second caller, while a job is running, does its tasks alone instead of waiting.
    void run(int threads, size_t tasks, Task task, void* context);

  private:
    void start(int wanted);
    void keep_off_this_cpu();
    void drain(Task task, void* context, size_t tasks);
    void wait_for_workers();
    void work();

    std::mutex job_mutex_;  // held for the length of a job
    std::mutex mutex_;      // guards what follows; atomics may be read without it
    std::condition_variable wake_, idle_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> active_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    size_t tasks_ = 0;
    int seats_ = 0, asleep_ = 0;

    std::atomic<size_t> next_{0};     // the first task that nobody has taken
    std::vector<pthread_t> workers_;  // touched by whoever holds a job
    int avoided_cpu_ = -1;            // the one that the workers stay away from
};

}  // namespace kvfold
