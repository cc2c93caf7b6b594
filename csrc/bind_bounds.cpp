// Binding of the bounds of pages: checks what Python passes, releases the GIL, runs them.
#include <nanobind/nanobind.h>

#include <new>
#include <string>

#include "bound_pages.hpp"

namespace nb = nanobind;

namespace {

using kvfold::BoundsCall;

constexpr int64_t kMost = 1 << 20;                 // dims, rows, pages of a list: far more than is meant
constexpr int64_t kMostBytes = int64_t{1} << 60;  // sums and differences of a few do not overflow

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void must(bool holds, const char* otherwise) {
    if (!holds) throw nb::value_error(otherwise);
}

void bound_pages(uintptr_t q, uintptr_t arena, int64_t arena_bytes, uintptr_t pages, int64_t shift, int64_t summary,
                 uintptr_t bias, uintptr_t bounds, uintptr_t chosen, int64_t count, int64_t n, int64_t heads, int64_t rows,
                 int64_t dims, int64_t per_list, float scale, float softcap, int threads, size_t variant) {
    size_t builds = 0;
    const kvfold::Variant* const* usable = kvfold::variants(&builds);
    must(variant < builds, "this processor has no such variant");
    for (const int64_t size : {count, n, heads, rows, per_list}) {
        must(size >= 0 && size <= kMost * kMost, "a size is negative or too large");
    }
    must(rows >= 1 && rows <= kMost && dims >= 1 && dims <= kMost && per_list < kMost * kMost, "bad dimensions");
    must(arena_bytes >= 0 && arena_bytes <= kMostBytes && shift >= -kMostBytes && shift <= kMostBytes && summary >= 0 &&
             summary <= kMostBytes && count <= per_list && per_list <= int64_t{0xFFFFFFFF},
         "a size is negative or too large");
    int64_t table = 0;
    must(!__builtin_mul_overflow(n, heads, &table) && !__builtin_mul_overflow(table, per_list, &table) &&
             table <= kMostBytes,
         "a page table too large to count");
    const int64_t* const addr = pointer<const int64_t>(pages);
    const int64_t lowest = -shift, highest = arena_bytes - summary - 4 * dims - shift;
    int64_t outside = 0;
    for (int64_t i = 0; i < table; ++i) outside += addr[i] != -1 && (addr[i] < lowest || addr[i] < 0 || addr[i] > highest);
    if (outside != 0) {
        const std::string text = std::to_string(outside) + " of " + std::to_string(table) +
                                 " page addresses lie outside of the arena of " + std::to_string(arena_bytes) + " bytes";
        throw nb::value_error(text.c_str());
    }
    const BoundsCall call{pointer<const float>(q),
                          pointer<const uint8_t>(arena),
                          addr,
                          shift,
                          summary,
                          pointer<const float>(bias),
                          pointer<float>(bounds),
                          pointer<int64_t>(chosen),
                          count,
                          n,
                          heads,
                          rows,
                          dims,
                          per_list,
                          scale,
                          softcap};
    bool done = false;
    {
        nb::gil_scoped_release unlocked;
        done = kvfold::bound_pages(call, *usable[variant], threads);
    }
    if (!done) throw std::bad_alloc();
}

}  // namespace

void bind_bounds(nb::module_& m) {
    m.def("bound_pages", &bound_pages, "Bounds of pages, and the greatest; see kvfold.kernels.cpu.retrieval.");
}
