// Which build of the kernel runs, how its work is split over threads, and how split results are merged.
#include "attend_pages.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "thread_pool.hpp"

namespace kvfold {
namespace {

// A thread is worth waking for about this many bytes of pages (some 20 microseconds of work).
constexpr int64_t kBytesPerThread = 128 << 10;
constexpr int64_t kPagesPerSpan = 4;  // no finer: each span costs a merge
constexpr int64_t kTasksPerThread = 4;

struct AlignedDelete {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// Scratch of one thread. It lives as long as the thread, because allocating it anew costs page faults on every call.
float* thread_scratch(size_t floats) {
    thread_local std::unique_ptr<float[], AlignedDelete> memory;
    thread_local size_t size = 0;
    if (size < floats) {
        memory.reset();
        size = 0;
        memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{64}, std::nothrow)));
        if (memory) size = floats;
    }
    return memory.get();
}

struct Job {
    const Call& call;
    AttendSpan attend_span;
    int64_t spans;
    float *out, *lse;  // [units, spans, group, v.dim], [units, spans, group]
    size_t scratch;
    std::atomic<bool> out_of_memory{false};
};

void run_task(void* context, size_t task) {
    Job& job = *static_cast<Job*>(context);
    const Call& call = job.call;
    const auto index = static_cast<int64_t>(task);
    const int64_t unit = index / job.spans, span = index % job.spans;
    float* scratch = thread_scratch(job.scratch);
    if (scratch == nullptr) {
        job.out_of_memory.store(true);
        return;
    }
    const int64_t first = call.pages_per_seq * span / job.spans, last = call.pages_per_seq * (span + 1) / job.spans;
    job.attend_span(call, unit, first, last, job.out + index * call.group * call.v.dim, job.lse + index * call.group,
                    scratch);
}

// o = sum_i o_i * exp(lse_i - lse), lse = log(sum_i exp(lse_i)), over the spans of one unit.
void merge_unit(const Job& job, int64_t unit) {
    const Call& call = job.call;
    const int64_t group = call.group, dim = call.v.dim;
    for (int64_t g = 0; g < group; ++g) {
        float* out = call.out + (unit * group + g) * dim;
        const float* lse = job.lse + unit * job.spans * group + g;
        float peak = kNothing, sum = 0.0F;
        for (int64_t i = 0; i < job.spans; ++i) peak = std::max(peak, lse[i * group]);
        std::fill(out, out + dim, 0.0F);
        for (int64_t i = 0; i < job.spans; ++i) {
            // Compared first: a span that saw nothing weighs nothing, even where every span saw nothing.
            const float weight = lse[i * group] == kNothing ? 0.0F : std::exp(lse[i * group] - peak);
            const float* part = job.out + ((unit * job.spans + i) * group + g) * dim;
            sum += weight;
            for (int64_t d = 0; d < dim; ++d) out[d] += weight * part[d];
        }
        const bool nothing = sum == 0.0F;
        for (int64_t d = 0; d < dim; ++d) out[d] *= nothing ? 0.0F : 1.0F / sum;
        call.lse[unit * group + g] = nothing ? kNothing : peak + std::log(sum);
    }
}

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

}  // namespace

size_t scratch_floats(const Call& call) {
    const int64_t k = padded(call.k.stored_dim), v = padded(call.v.stored_dim);
    return static_cast<size_t>((call.group + kTile) * (k + v) + call.group * kTile + 5 * padded(call.group) +
                               5 * kTile);
}

const Variant* const* variants(size_t* count) {
    static const std::vector<const Variant*> usable = [] {
        std::vector<const Variant*> found;
#ifdef KVFOLD_X86
        __builtin_cpu_init();
        const bool avx2_here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2_here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            found.push_back(&avx512::variant);
        }
        if (avx2_here) found.push_back(&avx2::variant);
#endif
        found.push_back(&baseline::variant);
        return found;
    }();
    *count = usable.size();
    return usable.data();
}

void attend_pages(const Call& call, const Variant& variant, int threads) {
    const int64_t units = call.n * call.heads;
    if (units * call.group == 0) return;
    const int64_t page_bytes = call.block_size * (call.k.row_bytes + call.v.row_bytes);
    const int64_t worth = std::max<int64_t>(1, units * call.pages_per_seq * page_bytes / kBytesPerThread);
    threads = static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(1, threads)));
    int64_t spans = 1;
    if (threads > 1) {
        const int64_t wanted = (threads * kTasksPerThread + units - 1) / units;
        spans = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, call.pages_per_seq / kPagesPerSpan));
    }
    Job job{call, variant.attend_span, spans, call.out, call.lse, scratch_floats(call)};
    std::unique_ptr<float[]> parts;
    const int64_t rows = units * spans * call.group;
    if (spans > 1) {
        parts.reset(new float[static_cast<size_t>(rows * (call.v.dim + 1))]);
        job.out = parts.get();
        job.lse = job.out + rows * call.v.dim;
    }
    const auto tasks = static_cast<size_t>(units * spans);
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
