// What the kernel is to Python: checks what Python passes, releases the GIL, runs the kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "attend_pages.hpp"
#include "bind_store.hpp"

namespace nb = nanobind;

void bind_bounds(nb::module_& m);   // bind_bounds.cpp
void bind_threads(nb::module_& m);  // bind_threads.cpp

namespace {

using kvfold::Band;
using kvfold::Call;
using kvfold::Meta;
using kvfold::Side;
using kvfold::Storage;

// The layout of a page, made once for a format and then passed with every call.
struct Layout {
    int64_t block_size, page_bytes;
    Side k, v;
};

// Larger than any size that is meant, small enough that no product of a few overflows.
constexpr int64_t kMost = 1 << 20;

// Sizes of memory: sums and differences of a few do not overflow.
constexpr int64_t kMostBytes = int64_t{1} << 60;

int64_t raw_bytes(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

// Bytes of a page's scales, zeros or stretches.
int64_t meta_bytes(const Side& side, int64_t block_size) {
    switch (side.meta) {
        case Meta::none: return 0;
        case Meta::pairs: return 4 * side.groups * block_size;
        case Meta::stretch: return block_size;
        case Meta::channels: return 4 * side.stored_dim();
    }
    throw nb::value_error("unknown scales");
}

// A band comes as (bits, first byte, bytes).
using BandTuple = std::tuple<int64_t, int64_t, int64_t>;

void add_bands(Side& side, const std::vector<BandTuple>& bands) {
    if (bands.size() > kvfold::kMostBands) throw nb::value_error("too many bands of codes");
    for (const auto& [bits, byte, bytes] : bands) {
        if ((bits != 8 && bits != 4 && bits != 2) || byte < 0 || bytes < 1 || byte > kMost || bytes > kMost ||
            byte + bytes > side.row_bytes) {
            throw nb::value_error("a band of codes lies outside of its row");
        }
        side.band[side.bands++] = Band{bits, byte, bytes};
    }
}

// A side comes as (storage, meta, dim, groups, row_bytes, codes_offset, meta_offset, bands).
using SideTuple = std::tuple<int, int, int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<BandTuple>>;

Side make_side(const SideTuple& from, int64_t block_size, int64_t page_bytes) {
    const auto& [storage, meta, dim, groups, row_bytes, codes, metas, bands] = from;
    if (storage < 0 || storage > static_cast<int>(Storage::codes)) throw nb::value_error("unknown storage");
    if (meta < 0 || meta > static_cast<int>(Meta::channels)) throw nb::value_error("unknown scales");
    if (dim < 1 || dim > kMost || groups < 1 || groups > dim || row_bytes < 1 || row_bytes > kMost) {
        throw nb::value_error("bad dimensions of a page side");
    }
    Side side{static_cast<Storage>(storage), static_cast<Meta>(meta), dim, groups, 0, row_bytes, codes, metas, 0, {}};
    add_bands(side, bands);
    const int64_t stored = side.stored_dim();
    const bool shaped = side.coded()
                            ? side.meta != Meta::none && side.bands > 0 && stored % groups == 0 &&
                                  (side.meta == Meta::stretch || stored >= dim)
                            : side.meta == Meta::none && groups == 1 && row_bytes == dim * raw_bytes(side.storage);
    if (!shaped) throw nb::value_error("bad dimensions of a page side");
    side.group_width = stored / groups;
    // A calibrated row keeps fewer dims than the model has: those are all there is of it.
    side.dim = stored < dim ? stored : dim;
    const int64_t all_metas = meta_bytes(side, block_size);
    if (codes < 0 || codes > page_bytes - block_size * row_bytes || metas < 0 || metas > page_bytes - all_metas) {
        throw nb::value_error("a region lies outside of its page");
    }
    return side;
}

Layout make_layout(int64_t block_size, int64_t page_bytes, const SideTuple& k, const SideTuple& v) {
    if (block_size < 1 || block_size > kMost || page_bytes < 1 || page_bytes > kMostBytes) {
        throw nb::value_error("bad size of a page");
    }
    return Layout{block_size, page_bytes, make_side(k, block_size, page_bytes), make_side(v, block_size, page_bytes)};
}

// Memory comes as the address of its first byte, which is the cheapest thing to read off a tensor: this is called for
// every layer of every step. The caller vouches for dtype, shape and layout.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Every page must lie in the arena: addresses come from tables, and a wrong one would be read all the same. Lists of
// `per_list` pages (0: none does) may end early, with -1.
void check_pages(const int64_t* pages, int64_t count, int64_t shift, int64_t page_bytes, int64_t arena_bytes,
                 int64_t per_list) {
    int64_t outside = 0;
    if (shift < -arena_bytes || shift > arena_bytes) {
        outside = count;
    } else {
        const int64_t lowest = -shift, highest = arena_bytes - page_bytes - shift;
        for (int64_t i = 0; i < count; ++i) {
            const bool ended = per_list > 0 && pages[i] == -1 && ((i + 1) % per_list == 0 || pages[i + 1] == -1);
            outside += (pages[i] < lowest || pages[i] > highest) && !ended;
        }
    }
    if (outside == 0) return;
    const std::string text = std::to_string(outside) + " of " + std::to_string(count) +
                             " page addresses lie outside of the arena of " + std::to_string(arena_bytes) + " bytes";
    throw nb::value_error(text.c_str());
}

void attend_pages(const Layout& layout, bool latent, uintptr_t q, uintptr_t arena, int64_t arena_bytes,
                  uintptr_t pages, int64_t shift, uintptr_t bias, uintptr_t out, uintptr_t lse, int64_t n,
                  int64_t heads, int64_t rows, int64_t pages_per_seq, float scale, float softcap, int threads,
                  size_t variant) {
    size_t count = 0;
    const kvfold::Variant* const* usable = kvfold::variants(&count);
    if (variant >= count) throw nb::value_error("this processor has no such variant");
    for (const int64_t size : {n, heads, rows, pages_per_seq, arena_bytes}) {
        if (size < 0 || size > kMostBytes) throw nb::value_error("a size is negative or too large");
    }
    int64_t table = 0;
    if (__builtin_mul_overflow(n, heads, &table) || __builtin_mul_overflow(table, pages_per_seq, &table)) {
        throw nb::value_error("a page table too large to count");
    }
    const Call call{.q = pointer<const float>(q),
                    .arena = pointer<const uint8_t>(arena),
                    .pages = pointer<const int64_t>(pages),
                    .shift = shift,
                    .bias = pointer<const float>(bias),
                    .out = pointer<float>(out),
                    .lse = pointer<float>(lse),
                    .n = n,
                    .heads = heads,
                    .rows = rows,
                    .pages_per_seq = pages_per_seq,
                    .block_size = layout.block_size,
                    .keys = {&layout.k, &layout.v},
                    .parts = latent ? 2 : 1,
                    .value = latent ? &layout.k : &layout.v,
                    .scale = scale,
                    .softcap = softcap};
    // Heads that are walked side by side take turns, which they must have equally many of.
    check_pages(call.pages, table, shift, layout.page_bytes, arena_bytes, heads == 1 && shift == 0 ? pages_per_seq : 0);
    nb::gil_scoped_release unlocked;
    kvfold::attend_pages(call, *usable[variant], threads);
}

std::vector<std::string> variant_names() {
    size_t count = 0;
    const kvfold::Variant* const* usable = kvfold::variants(&count);
    std::vector<std::string> names;
    for (size_t i = 0; i < count; ++i) names.emplace_back(usable[i]->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Decode attention over pages, in C++. Use kvfold.kernels.cpu instead.";
    nb::class_<Layout>(m, "Layout", "Where the regions of a page lie.");
    m.def("make_layout", &make_layout, nb::arg("block_size"), nb::arg("page_bytes"), nb::arg("k"), nb::arg("v"),
          "A Layout; raises ValueError if a region lies outside of its page.");
    m.def("attend_pages", &attend_pages, "Attention over pages; see kvfold.kernels.cpu.attend.");
    m.def("variants", &variant_names, "Names of the builds of the kernel that this processor can run, best first.");
    bind_store(m);
    bind_bounds(m);
    bind_threads(m);
}
