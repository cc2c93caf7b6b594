#include "store_pages.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu_features.hpp"
#include "thread_pool.hpp"
#include "thread_scratch.hpp"

namespace kvfold {
namespace {

constexpr int64_t kBytesPerTask = 64 << 10;  // of stored and dense rows; a thread is worth waking for two of them

int64_t padded(int64_t n) { return (n + kRowPad - 1) / kRowPad * kRowPad; }

float* scratch_floats(size_t floats) { return static_cast<float*>(thread_scratch(floats * sizeof(float))); }

// ---------------------------------------------------------------------------------------------------- where rows lie

struct Place {
    int64_t page;  // in the arena
    int64_t slot, count, token;
};

Place place(const PageLayout& layout, const Units& units, int64_t u) {
    if (units.runs != nullptr) {
        const TokenRun& run = units.runs[u / units.heads];
        return {run.offset + units.shift + u % units.heads * layout.page_bytes, run.slot, run.count, run.token};
    }
    if (units.slot != nullptr) return {units.addr[u] + units.shift, units.slot[u], 1, 0};
    return {units.addr[u] + units.shift, 0, layout.block_size, 0};
}

struct Rows {
    uint8_t* data;
    uint8_t* meta;
    int64_t stride;
};

Rows stored_rows(const StoredSide& side, const Units& units, const Place& at) {
    uint8_t* const page = units.arena + at.page;
    const int64_t meta = side.code == Code::channel ? 0 : at.slot * side.meta_bytes;
    return {page + side.codes_offset + at.slot * side.row_bytes, page + side.meta_offset + meta, side.row_bytes};
}

Rows dense_rows(const Dense& dense, const Units& units, const Place& at, int64_t u) {
    const int64_t unit = units.runs != nullptr ? u % units.heads : u;
    return {dense.data + unit * dense.unit_stride + at.token * dense.row_stride, nullptr, dense.row_stride};
}

// ------------------------------------------------------------------------------------------------------------- moves

enum class Way { encode, decode, copy };

// What becomes of the rows of a side on their way.
struct Conversion {
    const StoredSide* side;  // that has the code, or both ends' when raw
    Way way;
    Number number;  // of the end that is not coded
    bool turned;
};

void convert(const Conversion& c, const StoreVariant& variant, const Rows& from, const Rows& to, int64_t count,
             int64_t matrix) {
    const StoredSide& side = *c.side;
    if (c.way == Way::copy) {
        const auto bytes = static_cast<size_t>(side.row_bytes);
        if (from.stride == side.row_bytes && to.stride == side.row_bytes) {
            std::memcpy(to.data, from.data, bytes * static_cast<size_t>(count));
            return;
        }
        for (int64_t t = 0; t < count; ++t) std::memcpy(to.data + t * to.stride, from.data + t * from.stride, bytes);
        return;
    }
    const Run run{from.data, from.meta, from.stride, to.data, to.meta, to.stride, count, matrix};
    const int64_t rows = side.code == Code::channel ? count : kRows;
    float* const scratch = scratch_floats(store_scratch_floats(side, rows));
    if (scratch == nullptr) throw std::bad_alloc();
    if (c.way == Way::encode) {
        variant.encode(side, c.number, run, scratch);
    } else {
        variant.decode(side, c.number, c.turned, run, scratch);
    }
}

// Runs `one(u)` for every unit, several at a time where that is worth it. A failure in one task is reported by all.
template <typename One>
void for_units(int64_t units, int64_t unit_bytes, int threads, const One& one) {
    const int64_t chunk = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, unit_bytes));
    struct Job {
        const One& one;
        int64_t units, chunk;
        std::atomic<bool> out_of_memory{false};
    } job{one, units, chunk};
    const auto task = [](void* context, size_t index) {
        Job& mine = *static_cast<Job*>(context);
        const int64_t first = static_cast<int64_t>(index) * mine.chunk;
        try {
            for (int64_t u = first; u < std::min(first + mine.chunk, mine.units); ++u) mine.one(u);
        } catch (const std::bad_alloc&) {
            mine.out_of_memory.store(true);
        }
    };
    const int64_t tasks = (units + chunk - 1) / chunk;
    const int wanted = static_cast<int>(std::clamp<int64_t>(tasks / 2, 1, std::max(1, threads)));
    if (wanted > 1) {
        ThreadPool::shared().run(wanted, static_cast<size_t>(tasks), task, &job);
    } else {
        for (int64_t i = 0; i < tasks; ++i) task(&job, static_cast<size_t>(i));
    }
    if (job.out_of_memory.load()) throw std::bad_alloc();
}

int64_t matrix_of(const Units& units, int64_t u) { return units.first_matrix + u % units.matrices; }

// Dense and stored bytes of a unit, on average.
int64_t unit_bytes(const PageLayout& layout, const Units& units) {
    const int64_t token = 2 * (layout.k.dim + layout.v.dim) + layout.page_bytes / layout.block_size;
    if (units.slot != nullptr) return token;
    if (units.runs == nullptr || units.count == 0) return token * layout.block_size;
    int64_t tokens = 0;
    for (int64_t i = 0; i < units.count / units.heads; ++i) tokens += units.runs[i].count;
    return token * tokens * units.heads / units.count;
}

}  // namespace

std::string fault_of(const PageLayout& layout, const Units& units, int64_t tokens) {
    const int64_t pages = units.runs != nullptr ? units.heads : 1;
    const int64_t highest = units.arena_bytes - pages * layout.page_bytes - units.shift, lowest = -units.shift;
    const int64_t places = units.runs != nullptr ? units.count / units.heads : units.count;
    const bool whole = layout.k.code == Code::channel || layout.v.code == Code::channel;
    int64_t outside = 0, crossing = 0, unknown = 0, partial = 0;
    for (int64_t i = 0; i < places; ++i) {
        const int64_t start = units.runs != nullptr ? units.runs[i].offset : units.addr[i];
        outside += start < lowest || start > highest;
        if (units.runs != nullptr) {
            const TokenRun& run = units.runs[i];
            crossing += run.slot < 0 || run.count < 0 || run.count > layout.block_size ||
                        run.slot > layout.block_size - run.count;
            partial += whole && run.count != layout.block_size;
            unknown += run.token < 0 || run.token > tokens - run.count;
        } else if (units.slot != nullptr) {
            crossing += units.slot[i] < 0 || units.slot[i] >= layout.block_size;
        }
    }
    const std::string of = " of " + std::to_string(places);
    if (outside != 0) {
        return std::to_string(outside) + of + " page addresses lie outside of the arena of " +
               std::to_string(units.arena_bytes) + " bytes";
    }
    if (crossing != 0) {
        return std::to_string(crossing) + of + " slots lie outside of a block of " +
               std::to_string(layout.block_size) + " tokens";
    }
    if (partial != 0) return "pages with scales of channels are written whole, not by runs of other lengths";
    if (unknown != 0) {
        return std::to_string(unknown) + of + " runs reach for tokens outside of the " + std::to_string(tokens) +
               " that are there";
    }
    return "";
}

void write_units(const PageLayout& layout, const Units& units, const Dense& k, const Dense& v,
                 const StoreVariant& variant, int threads) {
    const auto one = [&](int64_t u) {
        const Place at = place(layout, units, u);
        const StoredSide* const sides[] = {&layout.k, &layout.v};
        const Dense* const dense[] = {&k, &v};
        for (int i = 0; i < 2; ++i) {
            const StoredSide& side = *sides[i];
            const Conversion c{&side, side.code == Code::raw ? Way::copy : Way::encode, dense[i]->number, true};
            convert(c, variant, dense_rows(*dense[i], units, at, u), stored_rows(side, units, at), at.count,
                    matrix_of(units, u));
        }
    };
    for_units(units.count, unit_bytes(layout, units), threads, one);
}

void read_units(const PageLayout& layout, const Units& units, const Dense& k, const Dense& v, bool turned,
                const StoreVariant& variant, int threads) {
    const auto one = [&](int64_t u) {
        const Place at = place(layout, units, u);
        const StoredSide* const sides[] = {&layout.k, &layout.v};
        const Dense* const dense[] = {&k, &v};
        for (int i = 0; i < 2; ++i) {
            if (dense[i]->data == nullptr) continue;
            const StoredSide& side = *sides[i];
            const Conversion c{&side, side.code == Code::raw ? Way::copy : Way::decode, dense[i]->number, turned};
            convert(c, variant, stored_rows(side, units, at), dense_rows(*dense[i], units, at, u), at.count,
                    matrix_of(units, u));
        }
    };
    for_units(units.count, unit_bytes(layout, units), threads, one);
}

void recode_units(const PageLayout& source, const Units& from, const PageLayout& target, const Units& to,
                  const StoreVariant& variant, int threads) {
    const auto one = [&](int64_t u) {
        const Place here = place(source, from, u), there = place(target, to, u);
        const StoredSide* const sides[][2] = {{&source.k, &target.k}, {&source.v, &target.v}};
        for (const auto& [old, fresh] : sides) {
            Conversion c{fresh, Way::copy, Number::other, true};
            if (fresh->code != Code::raw) c = {fresh, Way::encode, old->number, true};
            if (old->code != Code::raw) c = {old, Way::decode, fresh->number, true};
            convert(c, variant, stored_rows(*old, from, here), stored_rows(*fresh, to, there), here.count,
                    matrix_of(c.way == Way::encode ? to : from, u));
        }
    };
    for_units(from.count, unit_bytes(source, from) + unit_bytes(target, to), threads, one);
}

void copy_rows(const PageLayout& layout, const Units& from, const Units& to) {
    const StoredSide* const sides[] = {&layout.k, &layout.v};
    for (const StoredSide* side : sides) {
        const auto code = static_cast<size_t>(side->row_bytes), meta = static_cast<size_t>(side->meta_bytes);
        std::vector<uint8_t> held(static_cast<size_t>(from.count) * (code + meta));
        for (int64_t u = 0; u < from.count; ++u) {
            const Rows rows = stored_rows(*side, from, place(layout, from, u));
            uint8_t* const kept = held.data() + static_cast<size_t>(u) * (code + meta);
            std::memcpy(kept, rows.data, code);
            if (meta != 0) std::memcpy(kept + code, rows.meta, meta);
        }
        for (int64_t u = 0; u < to.count; ++u) {
            const Rows rows = stored_rows(*side, to, place(layout, to, u));
            const uint8_t* const kept = held.data() + static_cast<size_t>(u) * (code + meta);
            std::memcpy(rows.data, kept, code);
            if (meta != 0) std::memcpy(rows.meta, kept + code, meta);
        }
    }
}

void copy_blocks(uint8_t* arena, const int64_t* from, const int64_t* to, int64_t count, int64_t bytes, int threads) {
    const auto size = static_cast<size_t>(bytes);
    std::vector<int64_t> sources(from, from + count);
    std::sort(sources.begin(), sources.end());
    const bool meet = std::any_of(to, to + count, [&](int64_t target) {
        const auto next = std::upper_bound(sources.begin(), sources.end(), target - bytes);
        return next != sources.end() && *next < target + bytes;
    });
    std::vector<uint8_t> held;
    if (meet) {  // a target that is also a source: everything is read first
        held.resize(static_cast<size_t>(count) * size);
        for (int64_t i = 0; i < count; ++i) std::memcpy(held.data() + static_cast<size_t>(i) * size, arena + from[i], size);
    }
    for_units(count, 2 * bytes, threads, [&](int64_t i) {
        std::memcpy(arena + to[i], meet ? held.data() + static_cast<size_t>(i) * size : arena + from[i], size);
    });
}

void zero_blocks(uint8_t* arena, const int64_t* at, int64_t count, int64_t bytes, int threads) {
    for_units(count, bytes, threads, [&](int64_t i) { std::memset(arena + at[i], 0, static_cast<size_t>(bytes)); });
}

size_t store_scratch_floats(const StoredSide& side, int64_t rows) {
    rows = std::max(rows, kRows);  // decoding takes so many at a time, whatever the run
    const int64_t stride = padded(std::max(side.dim, side.stored_dim));
    const int64_t ranges = padded(side.code == Code::token ? kRows * side.groups : side.stored_dim);
    const int64_t taken = (2 * rows + 1) * stride + 5 * ranges + 8 * kRowPad;  // 8 pieces, each with room behind it
    return static_cast<size_t>(taken + stride / 4 + kRowPad);                  // and a row of codes, a byte each
}

const StoreVariant* const* store_variants(size_t* count) {
    static const std::vector<const StoreVariant*> usable = [] {
        std::vector<const StoreVariant*> found;
#ifdef KVFOLD_X86
        const auto here = [](std::initializer_list<const char*> names) {
            return std::all_of(names.begin(), names.end(), has_feature);
        };
        const bool avx2_here = here({"avx2", "fma", "f16c"});
        if (avx2_here && here({"avx512f", "avx512bw", "avx512vl", "avx512dq"})) found.push_back(&avx512::store_variant);
        if (avx2_here) found.push_back(&avx2::store_variant);
#endif
        found.push_back(&baseline::store_variant);
        return found;
    }();
    *count = usable.size();
    return usable.data();
}

}  // namespace kvfold
