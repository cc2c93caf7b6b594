// How the work of a call is split over threads, and how split results are merged.
#include "attend_pages.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "thread_pool.hpp"
#include "thread_scratch.hpp"

namespace kvfold {
namespace {

// A thread is worth waking for about this many bytes of pages (some ten microseconds of work).
constexpr int64_t kBytesPerThread = 128 << 10;
constexpr int64_t kPagesPerSpan = 8;  // no finer: each span costs a merge, and a start without anything fetched ahead
constexpr int64_t kTasksPerThread = 4;

struct Job {
    const Call& call;
    const Variant& variant;
    int64_t spans, slices, groups;  // of the pages, the query rows and the heads
    float *out, *lse;       // [units, spans, rows, value.dim], [units, spans, rows]
    size_t scratch;
    std::atomic<bool> out_of_memory{false};
};

void run_task(void* context, size_t task) {
    Job& job = *static_cast<Job*>(context);
    const Call& call = job.call;
    const auto index = static_cast<int64_t>(task);
    const int64_t slice = index % job.slices, span = index / job.slices % job.spans;
    const int64_t group = index / job.slices / job.spans % job.groups;
    const int64_t sequence = index / job.slices / job.spans / job.groups;
    void* scratch = thread_scratch(job.scratch);
    if (scratch == nullptr) {
        job.out_of_memory.store(true);
        return;
    }
    const int64_t row = slice * kMostRows, head = group * kMostHeads, unit = sequence * call.heads + head;
    const int64_t at = (unit * job.spans + span) * call.rows + row;
    const Walk walk{unit,
                    std::min(kMostHeads, call.heads - head),
                    row,
                    std::min(kMostRows, call.rows - row),
                    call.pages_per_seq * span / job.spans,
                    call.pages_per_seq * (span + 1) / job.spans,
                    job.out + at * call.value->dim,
                    job.lse + at,
                    job.spans * call.rows};
    job.variant.walk(call, walk, scratch);
}

// o = sum_i o_i * exp(lse_i - lse), lse = log(sum_i exp(lse_i)), over the spans of one unit.
void merge_unit(const Job& job, int64_t unit) {
    const Call& call = job.call;
    const int64_t rows = call.rows, dim = call.value->dim;
    for (int64_t r = 0; r < rows; ++r) {
        float* out = call.out + (unit * rows + r) * dim;
        const float* lse = job.lse + unit * job.spans * rows + r;
        float peak = kNothing, sum = 0.0F;
        for (int64_t i = 0; i < job.spans; ++i) peak = std::max(peak, lse[i * rows]);
        std::fill(out, out + dim, 0.0F);
        for (int64_t i = 0; i < job.spans; ++i) {
            // Compared first: a span that saw nothing weighs nothing, even where every span saw nothing.
            const float weight = lse[i * rows] == kNothing ? 0.0F : std::exp(lse[i * rows] - peak);
            const float* part = job.out + ((unit * job.spans + i) * rows + r) * dim;
            sum += weight;
            for (int64_t d = 0; d < dim; ++d) out[d] += weight * part[d];
        }
        const bool nothing = sum == 0.0F;
        for (int64_t d = 0; d < dim; ++d) out[d] *= nothing ? 0.0F : 1.0F / sum;
        call.lse[unit * rows + r] = nothing ? kNothing : peak + std::log(sum);
    }
}

}  // namespace

void attend_pages(const Call& call, const Variant& variant, int threads) {
    const int64_t units = call.n * call.heads;
    if (units * call.rows == 0) return;
    const int64_t row_bytes = call.keys[0]->row_bytes + (call.parts > 1 ? call.keys[1] : call.value)->row_bytes;
    const int64_t slices = (call.rows + kMostRows - 1) / kMostRows;
    const int64_t groups = (call.heads + kMostHeads - 1) / kMostHeads;
    const int64_t bytes = units * slices * call.pages_per_seq * call.block_size * row_bytes;
    threads = static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(1, threads)));
    int64_t spans = 1;
    if (threads > 1) {
        const int64_t walks = call.n * groups * slices;
        const int64_t wanted = (threads * kTasksPerThread + walks - 1) / walks;
        spans = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, call.pages_per_seq / kPagesPerSpan));
    }
    Job job{call, variant, spans, slices, groups, call.out, call.lse, variant.scratch(call)};
    std::unique_ptr<float[]> parts;
    if (spans > 1) {
        const int64_t rows = units * spans * call.rows;
        parts.reset(new float[static_cast<size_t>(rows * (call.value->dim + 1))]);
        job.out = parts.get();
        job.lse = job.out + rows * call.value->dim;
    }
    const auto tasks = static_cast<size_t>(call.n * groups * spans * slices);
    if (threads > 1) {
        ThreadPool::shared().run(threads, tasks, run_task, &job);
    } else {
        for (size_t i = 0; i < tasks; ++i) run_task(&job, i);
    }
    if (job.out_of_memory.load()) throw std::bad_alloc();
    if (spans > 1) {
        for (int64_t unit = 0; unit < units; ++unit) merge_unit(job, unit);
    }
}

}  // namespace kvfold
