// How bounds are split over threads, and the choice of the greatest.
#include "bound_pages.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "bound_rows.hpp"
#include "thread_pool.hpp"
#include "thread_scratch.hpp"

namespace kvfold {
namespace {

// A thread is worth waking for about this many products of a query's number with a page's.
constexpr int64_t kProductsPerThread = 1 << 19;
constexpr int64_t kPagesPerSpan = 64;

int64_t padded(int64_t count) { return (count + kMostLanes - 1) / kMostLanes * kMostLanes; }

struct Job {
    const BoundsCall& call;
    BoundRows bound_rows;
    int64_t spans, stride;
    float* bounds;  // [n, heads, per_list]
    std::atomic<bool> out_of_memory{false};
};

// From products to logits.
void finish(const BoundsCall& call, const float* bias, int64_t first, int64_t last, float* bounds) {
    for (int64_t i = first; i < last; ++i) {
        if (bounds[i] == -std::numeric_limits<float>::infinity()) continue;
        float logit = bounds[i] * call.scale;
        if (call.softcap != 0.0F) logit = call.softcap * std::tanh(logit / call.softcap);
        bounds[i] = bias == nullptr ? logit : logit + bias[i];
    }
}

// Bounds in an order of integers: the greater, and of equal ones the first, is the greater integer.
uint64_t rank_of(float bound, int64_t place) {
    uint32_t bits = 0;
    const float plain = bound + 0.0F;  // no negative zero
    std::memcpy(&bits, &plain, sizeof bits);
    bits = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
    return (static_cast<uint64_t>(bits) << 32) | (0xFFFFFFFFU - static_cast<uint32_t>(place));
}

void choose(const BoundsCall& call, const float* bounds, std::vector<uint64_t>& ranks, int64_t* chosen) {
    ranks.clear();
    for (int64_t i = 0; i < call.per_list; ++i) {
        if (bounds[i] != -std::numeric_limits<float>::infinity()) ranks.push_back(rank_of(bounds[i], i));
    }
    const auto there = static_cast<int64_t>(ranks.size());
    uint64_t least = 0;
    if (there > call.count && call.count > 0) {
        const auto last = ranks.begin() + (call.count - 1);
        std::nth_element(ranks.begin(), last, ranks.end(), [](uint64_t a, uint64_t b) { return a > b; });
        least = *last;
    }
    int64_t found = 0;
    for (int64_t i = 0; i < call.per_list && found < call.count; ++i) {
        if (bounds[i] == -std::numeric_limits<float>::infinity()) continue;
        if (rank_of(bounds[i], i) >= least) chosen[found++] = i;
    }
    std::fill(chosen + found, chosen + call.count, -1);
}

bool choose_of_unit(const Job& job, int64_t unit) {
    const BoundsCall& call = job.call;
    try {
        std::vector<uint64_t> ranks;
        ranks.reserve(static_cast<size_t>(call.per_list));
        choose(call, job.bounds + unit * call.per_list, ranks, call.chosen + unit * call.count);
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

void run_task(void* context, size_t task) {
    Job& job = *static_cast<Job*>(context);
    const BoundsCall& call = job.call;
    const int64_t unit = static_cast<int64_t>(task) / job.spans, span = static_cast<int64_t>(task) % job.spans;
    auto* const q = static_cast<float*>(thread_scratch(static_cast<size_t>(call.rows * job.stride) * sizeof(float)));
    if (q == nullptr) {
        job.out_of_memory.store(true);
        return;
    }
    const float* from = call.q + unit * call.rows * call.dims;
    for (int64_t r = 0; r < call.rows; ++r, from += call.dims) {
        float* const row = q + r * job.stride;
        for (int64_t d = 0; d < call.dims; ++d) {
            row[d] = from[d] > 0.0F ? 0.0F : from[d];  // NaN on both sides
            row[call.dims + d] = from[d] < 0.0F ? 0.0F : from[d];
        }
        std::fill(row + 2 * call.dims, row + job.stride, 0.0F);
    }
    const int64_t at = unit * call.per_list;
    const int64_t first = call.per_list * span / job.spans, last = call.per_list * (span + 1) / job.spans;
    const PageRows rows{q, call.arena + call.shift + call.summary, call.pages + at, call.rows, 2 * call.dims, job.stride};
    job.bound_rows(rows, first, last, job.bounds + at);
    finish(call, call.bias == nullptr ? nullptr : call.bias + at, first, last, job.bounds + at);
    if (job.spans == 1 && call.chosen != nullptr && !choose_of_unit(job, unit)) job.out_of_memory.store(true);
}

BoundRows build_of(const Variant& variant) {
#ifdef KVFOLD_X86
    if (&variant == &amx::variant) return amx::bound_rows;
    if (&variant == &avx512::variant) return avx512::bound_rows;
    if (&variant == &avx2::variant) return avx2::bound_rows;
#endif
    (void)variant;
    return baseline::bound_rows;
}

}  // namespace

bool bound_pages(const BoundsCall& call, const Variant& variant, int threads) {
    const int64_t units = call.n * call.heads;
    if (units * call.per_list == 0) {
        if (call.chosen != nullptr) std::fill(call.chosen, call.chosen + units * call.count, -1);
        return true;
    }
    const int64_t products = units * call.per_list * call.rows * call.dims * 2;
    threads = static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, std::max(1, threads)));
    const int64_t spans = std::clamp<int64_t>((threads + units - 1) / units, 1,
                                              std::max<int64_t>(1, call.per_list / kPagesPerSpan));
    Job job{call, build_of(variant), spans, padded(2 * call.dims), call.bounds};
    std::vector<float> bounds;
    if (job.bounds == nullptr) {
        bounds.resize(static_cast<size_t>(units * call.per_list));
        job.bounds = bounds.data();
    }
    const auto tasks = static_cast<size_t>(units * spans);
    if (threads > 1) {
        ThreadPool::shared().run(threads, tasks, run_task, &job);
    } else {
        for (size_t i = 0; i < tasks; ++i) run_task(&job, i);
    }
    bool done = !job.out_of_memory.load();
    if (spans > 1 && call.chosen != nullptr) {
        for (int64_t unit = 0; unit < units; ++unit) done = done && choose_of_unit(job, unit);
    }
    return done;
}

}  // namespace kvfold
