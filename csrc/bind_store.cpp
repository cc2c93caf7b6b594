// Binding of the write path: checks what Python passes, releases the GIL, runs the kernels.
#include "bind_store.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "store_pages.hpp"
#include "thread_scratch.hpp"

namespace nb = nanobind;

namespace {

using kvfold::Code;
using kvfold::Dense;
using kvfold::Number;
using kvfold::PageLayout;
using kvfold::StoredSide;
using kvfold::StoreVariant;
using kvfold::TokenRun;
using kvfold::Turn;
using kvfold::Units;

constexpr int64_t kMost = 1 << 20;  // dims in a row, tokens in a block

// Memory comes as the address of its first byte, which is the cheapest thing to read off a tensor: this is called for
// every layer of every step. The caller vouches for dtype, shape and strides; what tables say is checked here.
template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void must(bool holds, const char* otherwise) {
    if (!holds) throw nb::value_error(otherwise);
}

Number number_from(int value) {
    must(value >= 0 && value <= static_cast<int>(Number::other), "unknown kind of number");
    return static_cast<Number>(value);
}

StoredSide make_side(int code, int number, int64_t number_bytes, int64_t dim, int64_t stored_dim, int64_t groups,
                     const std::vector<std::tuple<int, int64_t>>& bands, bool inner, bool projected,
                     int64_t codes_offset, int64_t meta_offset, int64_t block, uintptr_t encode, uintptr_t decode,
                     uintptr_t mean, int64_t matrices, uintptr_t stretch) {
    must(code >= 0 && code <= static_cast<int>(Code::banded), "unknown code");
    must(dim >= 1 && dim <= kMost && stored_dim >= 1 && stored_dim <= kMost, "bad dimensions of a page side");
    StoredSide side{};
    side.code = static_cast<Code>(code);
    side.number = number_from(number);
    side.number_bytes = number_bytes;
    side.dim = dim;
    side.stored_dim = stored_dim;
    side.groups = groups;
    side.codes_offset = codes_offset;
    side.meta_offset = meta_offset;
    side.inner = inner;
    side.projected = projected;
    side.turn = Turn{block, pointer<const float>(encode), pointer<const float>(decode), pointer<const float>(mean),
                     matrices};
    side.stretch = pointer<const float>(stretch);
    if (side.code == Code::raw) {
        must(number_bytes >= 1 && number_bytes <= 16 && stored_dim == dim, "bad numbers of a raw side");
        side.row_bytes = dim * number_bytes;
        return side;
    }
    must(!bands.empty() && bands.size() <= kvfold::kMostStoredBands, "a coded side has one to three bands");
    int64_t dims = 0;
    for (const auto& [bits, width] : bands) {
        must((bits == 8 || bits == 4 || bits == 2) && width >= 1 && width <= stored_dim && width * bits % 8 == 0,
             "a band has 8, 4 or 2 bits and fills whole bytes");
        side.bands[side.bands_count++] = {bits, width, side.row_bytes};
        side.row_bytes += width * bits / 8;
        dims += width;
    }
    must(dims == stored_dim, "bands do not fill a row");
    must(block >= 1 && (block & (block - 1)) == 0 && dim % block == 0, "a Hadamard block must divide the dims");
    must((encode == 0) == (decode == 0) && (encode == 0 || (block == 1 && matrices >= 1)), "bad matrices");
    if (side.code == Code::banded) {
        must(stretch != 0 && stored_dim <= dim && encode != 0, "a banded side needs its matrices and stretches");
        side.meta_bytes = 1;
    } else {
        must(bands.size() == 1 && stored_dim >= dim && encode == 0, "an affine side has one band and no matrices");
        must(groups >= 1 && stored_dim % groups == 0, "groups do not divide a row");
        side.meta_bytes = side.code == Code::channel ? 4 * stored_dim : 4 * groups;
    }
    return side;
}

// The pages of one format in one arena. Whoever makes it keeps the arena, the matrices and the tables alive.
struct Store {
    PageLayout layout;
    uint8_t* arena;
    int64_t arena_bytes;
};

void check_regions(const StoredSide& side, int64_t block_size, int64_t page_bytes) {
    const int64_t codes = block_size * side.row_bytes;
    const int64_t meta = side.code == Code::channel ? side.meta_bytes : block_size * side.meta_bytes;
    must(side.codes_offset >= 0 && codes <= page_bytes - side.codes_offset && side.meta_offset >= 0 &&
             meta <= page_bytes - side.meta_offset,
         "a region lies outside of its page");
}

Store make_store(int64_t block_size, int64_t page_bytes, const StoredSide& k, const StoredSide& v, uintptr_t arena,
                 int64_t arena_bytes) {
    constexpr int64_t kMostBytes = int64_t{1} << 60;
    must(block_size >= 1 && block_size <= kMost && page_bytes >= 1 && page_bytes <= kMost * kMost && arena_bytes >= 0 &&
             arena_bytes <= kMostBytes,
         "bad size of a page");
    check_regions(k, block_size, page_bytes);
    check_regions(v, block_size, page_bytes);
    return Store{{block_size, page_bytes, k, v}, pointer<uint8_t>(arena), arena_bytes};
}

const StoreVariant& variant_at(size_t index) {
    size_t count = 0;
    const StoreVariant* const* usable = kvfold::store_variants(&count);
    must(index < count, "this processor has no such variant");
    return *usable[index];
}

void check(const PageLayout& layout, const Units& units, int64_t tokens) {
    must(units.count >= 0 && tokens >= 0, "a size is negative");
    must(units.matrices >= 1 && units.first_matrix >= 0, "bad matrices");
    for (const StoredSide* side : {&layout.k, &layout.v}) {
        must(side->turn.encode == nullptr || units.first_matrix <= side->turn.matrices - units.matrices,
             "no such layer or head has a matrix");
        must(units.slot == nullptr || side->code != Code::channel, "pages with scales of channels are written whole");
    }
    const std::string fault = kvfold::fault_of(layout, units, tokens);
    if (!fault.empty()) throw nb::value_error(fault.c_str());
}

// A tensor of keys or values: (address, kind of number, bytes from unit to unit, bytes from row to row). What a unit
// is, see kvfold::Units. An address of 0 leaves the side out, where that is possible.
using DenseTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

Dense dense_from(const StoredSide& side, const DenseTuple& t) {
    const auto& [address, kind, unit_stride, row_stride] = t;
    const Number number = number_from(kind);
    if (address == 0) return {};
    if (side.code == Code::raw) {
        must(number == side.number, "a raw side holds numbers of another kind");
    } else {
        must(number != Number::other, "a coded side takes float32, bfloat16 or float16");
    }
    return {pointer<uint8_t>(address), unit_stride, row_stride, number};
}

Units pages_of(const Store& store, uintptr_t addr, uintptr_t slot, int64_t count, int64_t first_matrix,
               int64_t matrices) {
    return {store.arena, store.arena_bytes,  0,       count, pointer<const int64_t>(addr), pointer<const int64_t>(slot),
            nullptr,     1,                  first_matrix, matrices};
}

void write_runs(const Store& store, uintptr_t runs, int64_t count, int64_t heads, int64_t layer, int64_t shift,
                int64_t tokens, const DenseTuple& k, const DenseTuple& v, int threads, size_t variant) {
    must(heads >= 1 && layer >= 0 && count >= 0, "a size is negative");
    must(heads <= kMost && layer <= kMost && count <= kMost * kMost / heads, "a size is too large");
    must(shift >= -store.arena_bytes && shift <= store.arena_bytes, "the shift leads out of the arena");
    must(heads <= store.arena_bytes / store.layout.page_bytes || count == 0, "page addresses lie outside of the arena");
    const Units units{store.arena, store.arena_bytes, shift, count * heads, nullptr, nullptr,
                      pointer<const TokenRun>(runs), heads, layer * heads, heads};
    const PageLayout& layout = store.layout;
    check(layout, units, tokens);
    const Dense keys = dense_from(layout.k, k), values = dense_from(layout.v, v);
    must(count == 0 || (keys.data != nullptr && values.data != nullptr), "keys and values are written together");
    const StoreVariant& chosen = variant_at(variant);
    nb::gil_scoped_release unlocked;
    kvfold::write_units(layout, units, keys, values, chosen, threads);
}

void write_pages(const Store& store, uintptr_t addr, uintptr_t slot, int64_t count, int64_t first_matrix,
                 int64_t matrices, const DenseTuple& k, const DenseTuple& v, int threads, size_t variant) {
    const Units units = pages_of(store, addr, slot, count, first_matrix, matrices);
    const PageLayout& layout = store.layout;
    check(layout, units, 0);
    const Dense keys = dense_from(layout.k, k), values = dense_from(layout.v, v);
    must(count == 0 || (keys.data != nullptr && values.data != nullptr), "keys and values are written together");
    const StoreVariant& chosen = variant_at(variant);
    nb::gil_scoped_release unlocked;
    kvfold::write_units(layout, units, keys, values, chosen, threads);
}

void read_pages(const Store& store, uintptr_t addr, int64_t count, int64_t first_matrix, int64_t matrices,
                const DenseTuple& k, const DenseTuple& v, bool turned, int threads, size_t variant) {
    const Units units = pages_of(store, addr, 0, count, first_matrix, matrices);
    const PageLayout& layout = store.layout;
    check(layout, units, 0);
    const Dense keys = dense_from(layout.k, k), values = dense_from(layout.v, v);
    const StoreVariant& chosen = variant_at(variant);
    nb::gil_scoped_release unlocked;
    kvfold::read_units(layout, units, keys, values, turned, chosen, threads);
}

void recode(const Store& source, uintptr_t source_addr, const Store& target, uintptr_t target_addr, int64_t count,
            int64_t matrices, int threads, size_t variant) {
    const PageLayout &from = source.layout, &to = target.layout;
    const Units old = pages_of(source, source_addr, 0, count, 0, matrices);
    const Units fresh = pages_of(target, target_addr, 0, count, 0, matrices);
    must(from.block_size == to.block_size, "blocks of one size cannot become blocks of another");
    const StoredSide* const sides[][2] = {{&from.k, &to.k}, {&from.v, &to.v}};
    for (const auto& pair : sides) {
        const bool old_raw = pair[0]->code == Code::raw, fresh_raw = pair[1]->code == Code::raw;
        must(pair[0]->dim == pair[1]->dim && (old_raw || fresh_raw), "one end of each side must be raw");
        must(!(old_raw && fresh_raw) || (pair[0]->number == pair[1]->number && pair[0]->row_bytes == pair[1]->row_bytes),
             "raw sides hold different numbers");
        must((old_raw ? pair[0] : pair[1])->number != Number::other || (old_raw && fresh_raw),
             "a coded side takes float32, bfloat16 or float16");
    }
    check(from, old, 0);
    check(to, fresh, 0);
    const StoreVariant& chosen = variant_at(variant);
    nb::gil_scoped_release unlocked;
    kvfold::recode_units(from, old, to, fresh, chosen, threads);
}

void copy_rows(const Store& store, uintptr_t source_addr, uintptr_t source_slot, uintptr_t target_addr,
               uintptr_t target_slot, int64_t count) {
    const Units from = pages_of(store, source_addr, source_slot, count, 0, 1);
    const Units to = pages_of(store, target_addr, target_slot, count, 0, 1);
    must(store.layout.k.code != Code::channel && store.layout.v.code != Code::channel,
         "pages with scales of channels are copied whole");
    check(store.layout, from, 0);
    check(store.layout, to, 0);
    nb::gil_scoped_release unlocked;
    kvfold::copy_rows(store.layout, from, to);
}

void check_blocks(const int64_t* at, int64_t count, int64_t bytes, int64_t arena_bytes) {
    must(count >= 0 && bytes >= 1, "a size is negative");
    const int64_t highest = arena_bytes - bytes;
    const auto inside = [highest](int64_t offset) { return offset >= 0 && offset <= highest; };
    must(std::all_of(at, at + count, inside), "a block lies outside of the arena");
}

void copy_blocks(uintptr_t arena, int64_t arena_bytes, uintptr_t from, uintptr_t to, int64_t count, int64_t bytes,
                 int threads) {
    check_blocks(pointer<const int64_t>(from), count, bytes, arena_bytes);
    check_blocks(pointer<const int64_t>(to), count, bytes, arena_bytes);
    nb::gil_scoped_release unlocked;
    kvfold::copy_blocks(pointer<uint8_t>(arena), pointer<const int64_t>(from), pointer<const int64_t>(to), count, bytes,
                        threads);
}

// Queries and outputs of a step: too few to be worth another thread.
void hadamard(uintptr_t from, uintptr_t to, int64_t count, int64_t dim, int64_t block, size_t variant) {
    must(count >= 0 && dim >= 1 && dim <= kMost && block >= 1 && (block & (block - 1)) == 0 && dim % block == 0,
         "rows are cut into blocks of a power of two");
    const StoreVariant& chosen = variant_at(variant);
    auto* line = static_cast<float*>(kvfold::thread_scratch(static_cast<size_t>(dim + 64) * sizeof(float)));
    if (line == nullptr) throw std::bad_alloc();
    chosen.hadamard(pointer<const float>(from), pointer<float>(to), count, dim, block, line);
}

void zero_blocks(uintptr_t arena, int64_t arena_bytes, uintptr_t at, int64_t count, int64_t bytes, int threads) {
    check_blocks(pointer<const int64_t>(at), count, bytes, arena_bytes);
    nb::gil_scoped_release unlocked;
    kvfold::zero_blocks(pointer<uint8_t>(arena), pointer<const int64_t>(at), count, bytes, threads);
}

std::vector<std::string> variant_names() {
    size_t count = 0;
    const StoreVariant* const* usable = kvfold::store_variants(&count);
    std::vector<std::string> names;
    for (size_t i = 0; i < count; ++i) names.emplace_back(usable[i]->name);
    return names;
}

}  // namespace

void bind_store(nb::module_& m) {
    nb::class_<StoredSide>(m, "StoredSide", "How the keys or the values of a page are stored.");
    nb::class_<Store>(m, "Store", "The pages of one format in an arena.")
        .def("write_runs", &write_runs)
        .def("write_pages", &write_pages)
        .def("read_pages", &read_pages)
        .def("recode", &recode)
        .def("copy_rows", &copy_rows);
    m.def("make_side", &make_side, nb::arg("code"), nb::arg("number"), nb::arg("number_bytes"), nb::arg("dim"),
          nb::arg("stored_dim"), nb::arg("groups"), nb::arg("bands"), nb::arg("inner"), nb::arg("projected"),
          nb::arg("codes_offset"), nb::arg("meta_offset"), nb::arg("block"), nb::arg("encode"), nb::arg("decode"),
          nb::arg("mean"), nb::arg("matrices"), nb::arg("stretch"),
          "A StoredSide; raises ValueError if its parts do not fit together.");
    m.def("make_store", &make_store, nb::arg("block_size"), nb::arg("page_bytes"), nb::arg("k"), nb::arg("v"),
          nb::arg("arena"), nb::arg("arena_bytes"), "A Store; raises ValueError if a region lies outside of its page.");
    m.def("copy_blocks", &copy_blocks, "Blocks of an arena, copied bit for bit.");
    m.def("zero_blocks", &zero_blocks, "Zeros over blocks of an arena.");
    m.def("hadamard", &hadamard, "Rows of floats, their blocks transformed; see kvfold.kernels.cpu.rows.hadamard.");
    m.def("store_variants", &variant_names, "Names of the builds of the write path that this processor can run.");
}
