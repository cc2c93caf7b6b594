// Runs of rows from numbers to stored rows and back. This file is compiled once for each instruction set, with
// KVFOLD_ISA naming the namespace and KVFOLD_LANES the floats in a vector; store_pages.cpp picks one at run time. What
// it includes keeps to the rule of vectors.hpp.
#include "store_codes.hpp"
#include "store_turn.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr float kRoom = 1.25F;       // as in kvfold.codecs.banded
constexpr int64_t kNotFinite = 255;

// What a run needs beside its rows.
struct Scratch {
    int64_t stride;  // floats from one row to the next
    float *rows, *spare;
    float* line;  // one row
    Scales scales;
    uint8_t* codes;
};

Scratch cut(const StoredSide& side, int64_t rows, float* scratch) {
    Scratch s{};
    s.stride = padded(side.dim > side.stored_dim ? side.dim : side.stored_dim);
    const int64_t ranges = side.code == Code::token ? kRows * side.groups : side.stored_dim;
    const auto take = [&scratch](int64_t floats) {
        float* const start = scratch;
        scratch += padded(floats) + kRowPad;  // whole vectors may be read and written behind the end
        return start;
    };
    s.rows = take(rows * s.stride);
    s.spare = take(rows * s.stride);
    s.line = take(s.stride);
    s.scales = {take(ranges), take(ranges), take(ranges), take(ranges), take(ranges)};
    s.codes = reinterpret_cast<uint8_t*>(scratch);
    return s;
}

// ------------------------------------------------------------------------------------------------------ rows in, out

template <Number N>
KVFOLD_INLINE void read_row(const uint8_t* from, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, read<N>(from + i * kSize<N>));
    if (i < n) store(out + i, read_part<N>(from + i * kSize<N>, n - i));
}

template <Number N>
KVFOLD_INLINE void write_row(uint8_t* to, int64_t n, const float* x) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) write<N>(to + i * kSize<N>, load(x + i));
    if (i < n) write_part<N>(to + i * kSize<N>, load(x + i), n - i);
}

template <Number N>
void read_rows(const uint8_t* from, int64_t from_stride, int64_t count, int64_t n, float* rows, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) read_row<N>(from + t * from_stride, n, rows + t * stride);
}

template <Number N>
void write_rows(uint8_t* to, int64_t to_stride, int64_t count, int64_t n, const float* rows, int64_t stride) {
    for (int64_t t = 0; t < count; ++t) write_row<N>(to + t * to_stride, n, rows + t * stride);
}

// Rows of a run in the basis they are stored in, padded as kvfold.codecs.affine pads them.
float* stored_rows(const StoredSide& side, Number number, const Run& run, int64_t first, int64_t count,
                   const Scratch& s) {
    const uint8_t* from = run.from + first * run.from_stride;
    switch (number) {
        case Number::f32: read_rows<Number::f32>(from, run.from_stride, count, side.dim, s.rows, s.stride); break;
        case Number::bf16: read_rows<Number::bf16>(from, run.from_stride, count, side.dim, s.rows, s.stride); break;
        default: read_rows<Number::f16>(from, run.from_stride, count, side.dim, s.rows, s.stride); break;
    }
    float* rows = turn_rows(side, run.matrix, count, s.stride, s.rows, s.spare);
    for (int64_t t = 0; t < count; ++t) {
        float* row = rows + t * s.stride;
        for (int64_t d = side.dim; d < side.stored_dim; ++d) row[d] = row[side.dim - 1];
    }
    return rows;
}

// ------------------------------------------------------------------------------------------------------------ encode

template <bool Projected>
void encode_tokens(const StoredSide& side, const Run& run, int64_t first, int64_t count, const float* rows,
                   const Scratch& s) {
    const int64_t groups = side.groups, width = side.stored_dim / groups;
    const int bits = side.bands[0].bits;
    const Scales& scales = s.scales;
    for (int64_t i = 0; i < count * groups; ++i) {
        const Range range = range_of(rows + i / groups * s.stride + i % groups * width, width);
        scales.low[i] = range.low;
        scales.high[i] = range.high;
    }
    find_scales(scales, count * groups, bits, side.inner);
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t i = t * groups + g;
            const Sums sums = encode_group<Projected>(rows + t * s.stride + g * width, width, bits, scales.scale[i],
                                                      scales.inverse[i], scales.zero[i], s.codes + g * width);
            if constexpr (Projected) {
                scales.low[i] = sums.norm;
                scales.high[i] = sums.along;
            }
        }
        pack_row(side, s.codes, run.to + (first + t) * run.to_stride);
    }
    pair_scales(scales, count * groups, Projected);
    __builtin_memcpy(run.to_meta + first * side.meta_bytes, scales.low, static_cast<size_t>(count * side.meta_bytes));
}

void encode_page(const StoredSide& side, const Run& run, const float* rows, const Scratch& s) {
    const Scales& scales = s.scales;
    const int64_t dims = side.stored_dim;
    const int bits = side.bands[0].bits, levels = (1 << bits) - 1;
    for (int64_t d = 0; d < dims; d += kLanes) {
        Vec low = load(rows + d), high = low, bad = Vec{};
        for (int64_t t = 0; t < run.count; ++t) {
            const Vec v = load(rows + t * s.stride + d);
            low = smaller(low, v);
            high = larger(high, v);
            bad += v - v;
        }
        store(scales.low + d, low);
        store(scales.high + d, high + bad);
    }
    find_scales(scales, dims, bits, side.inner);
    for (int64_t t = 0; t < run.count; ++t) {
        for (int64_t d = 0; d < dims; d += kLanes) {
            const Vec v = (load(rows + t * s.stride + d) - load(scales.zero + d)) * load(scales.inverse + d);
            store_bytes(s.codes + d, truncated(smaller(v + splat(0.5F), splat(static_cast<float>(levels)))) & levels);
        }
        pack_row(side, s.codes, run.to + t * run.to_stride);
    }
    write_row<Number::bf16>(run.to_meta, dims, scales.scale);
    write_row<Number::bf16>(run.to_meta + 2 * dims, dims, scales.zero);
}

// The stretch a row of the banded code needs: the first whose limit its excess does not pass.
KVFOLD_INLINE int64_t stretch_of(const StoredSide& side, const float* row) {
    float excess = 0.0F, bad = 0.0F;
    for (int b = 0; b < side.bands_count; ++b) {
        const StoredBand& band = side.bands[b];
        Vec most = Vec{}, unreal = Vec{};
        for (int64_t i = 0; i < band.dims; i += kLanes) {
            Vec v = load(row + i);
            if (band.dims - i < kLanes) v = first_lanes(v, band.dims - i, Vec{});
            most = larger(floats(words(v) & 0x7FFFFFFFU), most);
            unreal += v - v;
        }
        const float share = highest(most) / static_cast<float>(1 << (band.bits - 1));
        excess = share > excess ? share : excess;
        bad += total(unreal);
        row += band.dims;
    }
    excess /= kRoom;
    int64_t below = 0, end = kNotFinite;  // of 0 .. 254, the limits are `side.stretch`
    if (!(excess + bad <= side.stretch[end - 1])) return kNotFinite;
    while (below < end) {
        const int64_t middle = (below + end) / 2;
        if (side.stretch[middle] < excess) {
            below = middle + 1;
        } else {
            end = middle;
        }
    }
    return below;
}

void encode_bands(const StoredSide& side, const Run& run, int64_t first, int64_t count, const float* rows,
                  const Scratch& s) {
    for (int64_t t = 0; t < count; ++t) {
        const float* row = rows + t * s.stride;
        const int64_t stretch = stretch_of(side, row);
        const Vec shrink = splat(side.stretch[256 + stretch]);
        uint8_t* codes = s.codes;
        for (int b = 0; b < side.bands_count; ++b) {
            const StoredBand& band = side.bands[b];
            const int levels = (1 << band.bits) - 1;
            const Vec half = splat(static_cast<float>(levels) / 2), most = splat(static_cast<float>(levels));
            for (int64_t i = 0; i < band.dims; i += kLanes) {
                const Vec v = load(row + i) * shrink + half + splat(0.5F);
                const IntVec code = truncated(smaller(larger(v, Vec{}), most)) & levels;
                store_bytes(codes + i, stretch == kNotFinite ? IntVec{} : code);
            }
            row += band.dims;
            codes += band.dims;
        }
        pack_row(side, s.codes, run.to + (first + t) * run.to_stride);
        run.to_meta[first + t] = static_cast<uint8_t>(stretch);
    }
}

void encode(const StoredSide& side, Number from, const Run& run, float* scratch) {
    const int64_t most = side.code == Code::channel ? run.count : kRows;
    const Scratch s = cut(side, most, scratch);
    for (int64_t first = 0; first < run.count; first += most) {
        const int64_t count = run.count - first < most ? run.count - first : most;
        const float* rows = stored_rows(side, from, run, first, count, s);
        if (side.code == Code::channel) {
            encode_page(side, run, rows, s);
        } else if (side.code == Code::banded) {
            encode_bands(side, run, first, count, rows, s);
        } else if (side.projected) {
            encode_tokens<true>(side, run, first, count, rows, s);
        } else {
            encode_tokens<false>(side, run, first, count, rows, s);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ decode

// x = scale * code + zero of each group, `n` dims in all, as numbers.
template <Number N>
KVFOLD_INLINE void scale_tokens(const StoredSide& side, const uint8_t* meta, const float* codes, uint8_t* to) {
    const int64_t width = side.stored_dim / side.groups;
    for (int64_t g = 0; g * width < side.dim; ++g) {
        const auto pair = load_as<uint32_t>(meta + 4 * g);
        const Vec scale = splat(__builtin_bit_cast(float, pair << 16));
        const Vec zero = splat(__builtin_bit_cast(float, pair & 0xFFFF0000U));
        const int64_t end = (g + 1) * width < side.dim ? (g + 1) * width : side.dim;
        for (int64_t d = g * width; d < end; d += kLanes) {
            const Vec v = fused(load(codes + d), scale, zero);
            if (d + kLanes <= side.dim) {  // what spills into the next group is written again by that group
                write<N>(to + d * kSize<N>, v);
            } else {
                write_part<N>(to + d * kSize<N>, v, side.dim - d);
            }
        }
    }
}

// The same for a whole row with one scale, straight from its codes.
template <Number N, int Bits, bool Real>
KVFOLD_INLINE void decode_planes(const uint8_t* bytes, int64_t plane, Vec scale, Vec zero, uint8_t* to) {
    constexpr int kMask = (1 << Bits) - 1;
    for (int64_t i = 0; i < plane; i += kLanes) {
        const int64_t at = i + kLanes <= plane ? i : plane - kLanes;
        const IntVec wide = widen_bytes(bytes + at);
        for (int p = 0; p < 8 / Bits; ++p) {
            const Vec code = __builtin_convertvector((wide >> (p * Bits)) & kMask, Vec);
            write<N, Real>(to + (p * plane + at) * kSize<N>, fused(code, scale, zero));
        }
    }
}

template <Number N, int Bits>
void decode_plain_rows(const StoredSide& side, const Run& run) {
    const int64_t plane = side.row_bytes;
    for (int64_t t = 0; t < run.count; ++t) {
        const auto pair = load_as<uint32_t>(run.from_meta + t * side.meta_bytes);
        const Vec scale = splat(__builtin_bit_cast(float, pair << 16));
        const Vec zero = splat(__builtin_bit_cast(float, pair & 0xFFFF0000U));
        const uint8_t* bytes = run.from + t * run.from_stride;
        uint8_t* to = run.to + t * run.to_stride;
        // A scale that is infinite or NaN, or a zero, makes NaN; nothing else does.
        if ((pair & 0x7F80U) != 0x7F80U && (pair & 0x7F800000U) != 0x7F800000U) {
            decode_planes<N, Bits, true>(bytes, plane, scale, zero, to);
        } else {
            decode_planes<N, Bits, false>(bytes, plane, scale, zero, to);
        }
    }
}

template <Number N>
KVFOLD_INLINE void scale_channels(const StoredSide& side, const Scales& scales, float* codes, uint8_t* to) {
    for (int64_t d = 0; d < side.dim; d += kLanes) {
        store(codes + d, fused(load(codes + d), load(scales.scale + d), load(scales.zero + d)));
    }
    write_row<N>(to, side.dim, codes);
}

template <Number N>
KVFOLD_INLINE void scale_bands(const StoredSide& side, const uint8_t* meta, float* codes, uint8_t* to) {
    const Vec stretch = splat(side.stretch[512 + *meta]);
    float* band_codes = codes;
    for (int b = 0; b < side.bands_count; ++b) {
        const Vec half = splat(static_cast<float>((1 << side.bands[b].bits) - 1) / 2);
        const int64_t dims = side.bands[b].dims;
        for (int64_t d = 0; d < dims; d += kLanes) {
            const Vec code = load(band_codes + d), v = (code - half) * stretch;
            store(band_codes + d, dims - d < kLanes ? first_lanes(v, dims - d, code) : v);
        }
        band_codes += dims;
    }
    write_row<N>(to, side.stored_dim, codes);
}

// Stored rows as numbers of the stored basis.
template <Number N>
void decode_rows(const StoredSide& side, const Run& run, int64_t first, int64_t count, const Scratch& s, uint8_t* to,
                 int64_t to_stride) {
    float* const codes = s.line;
    for (int64_t t = 0; t < count; ++t) {
        unpack_row(side, run.from + (first + t) * run.from_stride, codes);
        uint8_t* row = to + t * to_stride;
        if (side.code == Code::token) scale_tokens<N>(side, run.from_meta + (first + t) * side.meta_bytes, codes, row);
        if (side.code == Code::channel) scale_channels<N>(side, s.scales, codes, row);
        if (side.code == Code::banded) scale_bands<N>(side, run.from_meta + first + t, codes, row);
    }
}

template <Number N>
void decode_to(const StoredSide& side, bool turned, const Run& run, const Scratch& s) {
    if (!turned && side.code == Code::token && side.groups == 1 && side.dim == side.stored_dim &&
        side.row_bytes >= kLanes) {
        switch (side.bands[0].bits) {
            case 8: decode_plain_rows<N, 8>(side, run); break;
            case 4: decode_plain_rows<N, 4>(side, run); break;
            default: decode_plain_rows<N, 2>(side, run); break;
        }
        return;
    }
    for (int64_t first = 0; first < run.count; first += kRows) {
        const int64_t count = run.count - first < kRows ? run.count - first : kRows;
        uint8_t* const to = run.to + first * run.to_stride;
        if (!turned) {
            decode_rows<N>(side, run, first, count, s, to, run.to_stride);
            continue;
        }
        auto* const stored = reinterpret_cast<uint8_t*>(s.rows);
        decode_rows<Number::f32>(side, run, first, count, s, stored, 4 * s.stride);
        const float* rows = turn_rows_back(side, run.matrix, count, s.stride, s.rows, s.spare);
        write_rows<N>(to, run.to_stride, count, side.dim, rows, s.stride);
    }
}

void decode(const StoredSide& side, Number to, bool turned, const Run& run, float* scratch) {
    const Scratch s = cut(side, kRows, scratch);
    if (side.code == Code::channel) {
        read_row<Number::bf16>(run.from_meta, side.stored_dim, s.scales.scale);
        read_row<Number::bf16>(run.from_meta + 2 * side.stored_dim, side.stored_dim, s.scales.zero);
    }
    const bool turns = turned && (side.turn.decode != nullptr || side.turn.block > 1);
    switch (to) {
        case Number::f32: decode_to<Number::f32>(side, turns, run, s); break;
        case Number::bf16: decode_to<Number::bf16>(side, turns, run, s); break;
        default: decode_to<Number::f16>(side, turns, run, s); break;
    }
}

void hadamard_rows(const float* from, float* to, int64_t count, int64_t dim, int64_t block, float* line) {
    const float factor = 1.0F / __builtin_sqrtf(static_cast<float>(block));
    for (int64_t r = 0; r < count; ++r) {
        __builtin_memcpy(line, from + r * dim, static_cast<size_t>(dim) * sizeof(float));
        hadamard(line, dim, block, factor);
        __builtin_memcpy(to + r * dim, line, static_cast<size_t>(dim) * sizeof(float));
    }
}

}  // namespace

#define KVFOLD_TEXT(name) #name
#define KVFOLD_NAME(name) KVFOLD_TEXT(name)
const StoreVariant store_variant = {KVFOLD_NAME(KVFOLD_ISA), encode, decode, hadamard_rows};

}  // namespace kvfold::KVFOLD_ISA
