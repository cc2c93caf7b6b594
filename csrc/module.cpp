// The one binding file: checks what Python passes, releases the GIL, runs the kernel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "attend_pages.hpp"
#include "bind_store.hpp"

namespace nb = nanobind;

namespace {

using kvfold::Call;
using kvfold::Side;
using kvfold::Storage;

// The layout of a page, made once for a format and then passed with every call.
struct Layout {
    int64_t block_size, page_bytes;
    Side k, v;
};

int bits_of(Storage storage) {
    switch (storage) {
        case Storage::f32: return 32;
        case Storage::bf16: return 16;
        case Storage::f16: return 16;
        case Storage::code8: return 8;
        case Storage::code4: return 4;
        case Storage::code2: return 2;
    }
    throw nb::value_error("unknown storage");
}

Side make_side(int storage, int64_t dim, int64_t stored_dim, int64_t codes_offset, int64_t meta_offset,
               int64_t block_size, int64_t page_bytes) {
    if (storage < 0 || storage > static_cast<int>(Storage::code2)) throw nb::value_error("unknown storage");
    const auto kind = static_cast<Storage>(storage);
    const bool coded = kind == Storage::code8 || kind == Storage::code4 || kind == Storage::code2;
    constexpr int64_t kMost = 1 << 20;
    if (dim < 1 || stored_dim < dim || stored_dim > kMost || stored_dim * bits_of(kind) % 8 != 0 ||
        (!coded && stored_dim != dim)) {
        throw nb::value_error("bad dimensions of a page side");
    }
    const int64_t row_bytes = stored_dim * bits_of(kind) / 8;
    if (codes_offset < 0 || codes_offset + block_size * row_bytes > page_bytes ||
        (coded && (meta_offset < 0 || meta_offset + 4 * block_size > page_bytes))) {
        throw nb::value_error("a region lies outside of its page");
    }
    return Side{kind, dim, stored_dim, row_bytes, codes_offset, meta_offset};
}

// A side comes as (storage, dim, stored_dim, codes_offset, meta_offset).
using SideTuple = nb::typed<nb::tuple, int, int64_t, int64_t, int64_t, int64_t>;

Side side_from(const nb::tuple& t, int64_t block_size, int64_t page_bytes) {
    if (t.size() != 5) throw nb::value_error("a side is (storage, dim, stored_dim, codes_offset, meta_offset)");
    return make_side(nb::cast<int>(t[0]), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
                     nb::cast<int64_t>(t[4]), block_size, page_bytes);
}

Layout make_layout(int64_t block_size, int64_t page_bytes, const SideTuple& k, const SideTuple& v) {
    if (block_size < 1 || block_size > (1 << 20) || page_bytes < 1) throw nb::value_error("bad size of a page");
    return Layout{block_size, page_bytes, side_from(k, block_size, page_bytes), side_from(v, block_size, page_bytes)};
}

// Memory comes as the address of its first byte, which is the cheapest thing to read off a tensor: this is called for
// every layer of every step. The caller vouches for dtype, shape and layout.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void attend_pages(const Layout& layout, uintptr_t q, uintptr_t arena, int64_t arena_bytes, uintptr_t pages,
                  int64_t shift, uintptr_t bias, uintptr_t out, uintptr_t lse, int64_t n, int64_t heads, int64_t group,
                  int64_t pages_per_seq, float scale, int threads, size_t variant) {
    size_t count = 0;
    const kvfold::Variant* const* usable = kvfold::variants(&count);
    if (variant >= count) throw nb::value_error("this processor has no such variant");
    if (n < 0 || heads < 0 || group < 0 || pages_per_seq < 0) throw nb::value_error("a size is negative");
    const Call call{pointer<const float>(q),
                    pointer<const uint8_t>(arena),
                    pointer<const int64_t>(pages),
                    shift,
                    pointer<const float>(bias),
                    pointer<float>(out),
                    pointer<float>(lse),
                    n,
                    heads,
                    group,
                    pages_per_seq,
                    layout.block_size,
                    layout.k,
                    layout.v,
                    scale};
    const int64_t lowest = -shift, highest = arena_bytes - layout.page_bytes - shift;
    const int64_t total = n * heads * pages_per_seq;
    int64_t outside = 0;
    for (int64_t i = 0; i < total; ++i) outside += call.pages[i] < lowest || call.pages[i] > highest;
    if (outside != 0) {
        const std::string text = std::to_string(outside) + " of " + std::to_string(total) +
                                 " page addresses lie outside of the arena of " + std::to_string(arena_bytes) +
                                 " bytes";
        throw nb::value_error(text.c_str());
    }
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
}
