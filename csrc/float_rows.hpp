// Keys and values as floats: read where they lie when they are raw, decoded into scratch first when they are codes or
// odd. What every build of the kernel can do with every format.
#pragma once

#include "tile.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kPair = 2 * kLanes;  // dims that are loaded at a time

// ------------------------------------------------------------------------------------------------------------ loads

KVFOLD_INLINE Vec half_to_float(Words bits) {
    // By one multiplication, which also makes subnormals right; infinities and NaN keep their exponent.
    const Words magnitude = bits & 0x7FFFU;
    const Vec value = reinterpret_cast<Vec>(magnitude << 13) * splat(0x1p112F);
    const Words special = reinterpret_cast<Words>(magnitude >= 0x7C00U) & 0x7F800000U;
    return reinterpret_cast<Vec>(reinterpret_cast<Words>(value) | special | (bits & 0x8000U) << 16);
}

// `kPair` numbers of a row from dim d on. Those of bfloat16 come evens first, then odds: their bits are in place then.
template <Storage S>
KVFOLD_INLINE void load_pair(const uint8_t* row, int64_t d, Vec& a, Vec& b) {
    if constexpr (S == Storage::f32) {
        a = load_as<Vec>(row + 4 * d);
        b = load_as<Vec>(row + 4 * (d + kLanes));
    } else if constexpr (S == Storage::bf16) {
        const auto both = load_as<Words>(row + 2 * d);
        a = reinterpret_cast<Vec>(both << 16);
        b = reinterpret_cast<Vec>(both & 0xFFFF0000U);
    } else {
        a = half_to_float(widen_shorts(row + 2 * d));
        b = half_to_float(widen_shorts(row + 2 * (d + kLanes)));
    }
}

// The dim that `load_pair` puts at position i.
KVFOLD_INLINE int64_t dim_at(Storage storage, int64_t i) {
    if (storage != Storage::bf16) return i;
    const int64_t at = i % kPair;
    return i - at + (at < kLanes ? 2 * at : 2 * (at - kLanes) + 1);
}

// --------------------------------------------------------------------------------------------------------- decoding

KVFOLD_INLINE float raw_number(Storage storage, const uint8_t* row, int64_t d) {
    if (storage == Storage::f32) return load_as<float>(row + 4 * d);
    const auto bits = static_cast<uint32_t>(load_as<uint16_t>(row + 2 * d));
    if (storage == Storage::bf16) return __builtin_bit_cast(float, bits << 16);
    return half_to_float(Words{} + bits)[0];
}

// Bare codes of one band as numbers, plane after plane.
template <int Bits>
KVFOLD_INLINE void unpack_band(const uint8_t* row, int64_t plane, float* __restrict out) {
    constexpr int kMask = (1 << Bits) - 1;
    int64_t i = 0;
    for (; i + kLanes <= plane; i += kLanes) {
        const IntVec bytes = widen_bytes(row + i);
        KVFOLD_UNROLL
        for (int p = 0; p < 8 / Bits; ++p) {
            store_as(out + p * plane + i, __builtin_convertvector((bytes >> (p * Bits)) & kMask, Vec));
        }
    }
    for (; i < plane; ++i) {
        KVFOLD_UNROLL
        for (int p = 0; p < 8 / Bits; ++p) out[p * plane + i] = static_cast<float>((row[i] >> (p * Bits)) & kMask);
    }
}

KVFOLD_INLINE float bf16_at(const uint8_t* p) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(load_as<uint16_t>(p)) << 16);
}

// One row of codes, scales and zeros applied: [stored_dim] floats.
void decode_row(const Side& side, const uint8_t* page, int64_t slot, float* __restrict out) {
    const uint8_t* row = page + side.codes_offset + slot * side.row_bytes;
    float* to = out;
    for (int64_t i = 0; i < side.bands; ++i) {
        const Band& band = side.band[i];
        if (band.bits == 8) unpack_band<8>(row + band.byte, band.bytes, to);
        if (band.bits == 4) unpack_band<4>(row + band.byte, band.bytes, to);
        if (band.bits == 2) unpack_band<2>(row + band.byte, band.bytes, to);
        const int64_t dims = band.bytes * (8 / band.bits);
        if (side.meta == Meta::stretch) {
            const float stretch = stretch_of(page[side.meta_offset + slot]), half = middle(band.bits);
            for (int64_t d = 0; d < dims; ++d) to[d] = (to[d] - half) * stretch;
        }
        to += dims;
    }
    const int64_t stored = to - out;
    const uint8_t* meta = page + side.meta_offset;
    if (side.meta == Meta::pairs) {
        for (int64_t g = 0; g < side.groups; ++g) {
            const uint8_t* pair = meta + 4 * (slot * side.groups + g);
            const float scale = bf16_at(pair), zero = bf16_at(pair + 2);
            for (int64_t d = g * side.group_width; d < (g + 1) * side.group_width; ++d) out[d] = out[d] * scale + zero;
        }
    } else if (side.meta == Meta::channels) {
        for (int64_t d = 0; d < stored; ++d) out[d] = out[d] * bf16_at(meta + 2 * d) + bf16_at(meta + 2 * (stored + d));
    }
}

void decode(const Side& side, const Tile& tile, float* rows, int64_t stride) {
    for (int64_t t = 0; t < tile.count; ++t) {
        float* out = rows + t * stride;
        const uint8_t* page = tile.page_of(t);
        const int64_t slot = tile.slot_of(t);
        if (side.coded()) {
            decode_row(side, page, slot, out);
        } else {
            const uint8_t* row = page + side.codes_offset + slot * side.row_bytes;
            for (int64_t d = 0; d < side.dim; ++d) out[d] = raw_number(side.storage, row, d);
        }
    }
}

// --------------------------------------------------------------------------------------------------------- products

// scores [G, kTile] (+)= q [G, stride] . rows, four rows at a time, G queries sharing each row that is loaded.
template <Storage S, int G>
KVFOLD_INLINE void dot_rows(const float* q, const uint8_t* const* rows, int64_t stride, int64_t count, bool add,
                            float* scores, Fetcher& fetcher) {
    for (int64_t t = 0; t < count; t += 4) {
        fetcher.turn();
        Vec sum[G][4] = {};
        for (int64_t d = 0; d < stride; d += kPair) {
            Vec even[4], odd[4];
            KVFOLD_UNROLL
            for (int i = 0; i < 4; ++i) load_pair<S>(rows[t + i], d, even[i], odd[i]);
            KVFOLD_UNROLL
            for (int g = 0; g < G; ++g) {
                const Vec first = load(q + g * stride + d), second = load(q + g * stride + d + kLanes);
                KVFOLD_UNROLL
                for (int i = 0; i < 4; ++i) {
                    sum[g][i] += first * even[i];
                    sum[g][i] += second * odd[i];
                }
            }
        }
        KVFOLD_UNROLL
        for (int g = 0; g < G; ++g) {
            float* to = scores + g * kTile + t;
            Vec4 four = folded<Sum, 4>(sum[g]);
            if (add) four += load_as<Vec4>(to);
            __builtin_memcpy(to, &four, sizeof four);
        }
    }
}

// out [G, stride] = out * decay[g] + weights [G, kTile] @ rows, C pairs of vectors of the rows at a time.
template <Storage S, int G, int C>
KVFOLD_INLINE void add_columns(const float* weights, const uint8_t* const* rows, int64_t d, int64_t stride,
                               int64_t count, const float* decay, float* out, Fetcher& fetcher) {
    Vec sum[G][2 * C];
    KVFOLD_UNROLL
    for (int g = 0; g < G; ++g) {
        KVFOLD_UNROLL
        for (int c = 0; c < 2 * C; ++c) sum[g][c] = load(out + g * stride + d + c * kLanes) * splat(decay[g]);
    }
    for (int64_t t = 0; t < count; ++t) {
        if (t % 4 == 0) fetcher.turn();
        Vec value[2 * C];
        KVFOLD_UNROLL
        for (int c = 0; c < C; ++c) load_pair<S>(rows[t], d + c * kPair, value[2 * c], value[2 * c + 1]);
        KVFOLD_UNROLL
        for (int g = 0; g < G; ++g) {
            const Vec weight = splat(weights[g * kTile + t]);
            KVFOLD_UNROLL
            for (int c = 0; c < 2 * C; ++c) sum[g][c] += weight * value[c];
        }
    }
    KVFOLD_UNROLL
    for (int g = 0; g < G; ++g) {
        KVFOLD_UNROLL
        for (int c = 0; c < 2 * C; ++c) store(out + g * stride + d + c * kLanes, sum[g][c]);
    }
}

template <Storage S, int G>
KVFOLD_INLINE void add_rows(const float* weights, const uint8_t* const* rows, int64_t stride, int64_t count,
                            const float* decay, float* out, Fetcher& fetcher) {
    int64_t d = 0;
    for (; d + 2 * kPair <= stride; d += 2 * kPair) add_columns<S, G, 2>(weights, rows, d, stride, count, decay, out, fetcher);
    for (; d < stride; d += kPair) add_columns<S, G, 1>(weights, rows, d, stride, count, decay, out, fetcher);
}

template <Storage S>
void dot_group(const float* q, const uint8_t* const* at, int64_t stride, int64_t count, int64_t rows, bool add,
               float* scores, Fetcher& fetcher) {
    int64_t g = 0;
    for (; g + 4 <= rows; g += 4) dot_rows<S, 4>(q + g * stride, at, stride, count, add, scores + g * kTile, fetcher);
    for (; g + 2 <= rows; g += 2) dot_rows<S, 2>(q + g * stride, at, stride, count, add, scores + g * kTile, fetcher);
    if (g < rows) dot_rows<S, 1>(q + g * stride, at, stride, count, add, scores + g * kTile, fetcher);
}

template <Storage S>
void add_group(const float* weights, const uint8_t* const* at, int64_t stride, int64_t count, int64_t rows,
               const float* decay, float* out, Fetcher& fetcher) {
    int64_t g = 0;
    for (; g + 4 <= rows; g += 4) {
        add_rows<S, 4>(weights + g * kTile, at, stride, count, decay + g, out + g * stride, fetcher);
    }
    for (; g + 2 <= rows; g += 2) {
        add_rows<S, 2>(weights + g * kTile, at, stride, count, decay + g, out + g * stride, fetcher);
    }
    if (g < rows) add_rows<S, 1>(weights + g * kTile, at, stride, count, decay + g, out + g * stride, fetcher);
}

// ------------------------------------------------------------------------------------------------------------ sides

// Where the rows of a tile are to be read, and as what.
struct FloatRows {
    const Side* side;
    Storage storage;    // of the rows that are read
    int64_t stride;     // numbers of a row, with padding
    float* scratch;     // [kTile, stride], null when rows are read where they lie
    const uint8_t* at[kTile];

    FloatRows(const Side& which, int64_t query_rows, Bump& bump) : side(&which) {
        // A few queries cost less than a copy; rows that do not fill their vectors cannot be read where they lie.
        const bool direct = !side->coded() && side->dim % kPair == 0 && query_rows <= 8;
        storage = direct ? side->storage : Storage::f32;
        stride = rounded_up(side->stored_dim(), kPair);
        scratch = direct ? nullptr : bump.take<float>(kTile * stride);
        for (int64_t t = 0; t < kTile; ++t) at[t] = scratch == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(scratch + t * stride);
    }

    void clear() const {
        if (scratch != nullptr) __builtin_memset(scratch, 0, static_cast<size_t>(kTile * stride) * sizeof(float));
    }

    void open(const Tile& tile) {
        if (scratch != nullptr) {
            decode(*side, tile, scratch, stride);
        } else {
            for (int64_t t = 0; t < tile.count; t += 16) tile.rows(*side, t, at + t);
        }
    }
};

class FloatKeys {
  public:
    FloatKeys(const Side& side, int64_t rows, Bump& own, Bump& shared)
        : rows_(side, rows, shared), queries_(rows), query_(own.take<float>(rows * rows_.stride)) {}

    // q [rows, q_stride], the side's own dims of it; `first`: of the heads that share scratch.
    void begin(const float* q, int64_t q_stride, float scale, bool first) {
        if (first) rows_.clear();
        for (int64_t r = 0; r < queries_; ++r) {
            for (int64_t i = 0; i < rows_.stride; ++i) {
                const int64_t d = dim_at(rows_.storage, i);
                query_[r * rows_.stride + i] = d < rows_.side->dim ? q[r * q_stride + d] * scale : 0.0F;
            }
        }
    }

    void stage(const Tile& tile, Fetcher&) { rows_.open(tile); }

    void score(const Tile& tile, Fetcher& fetcher, bool add, float* scores) {
        const auto run = rows_.storage == Storage::bf16  ? dot_group<Storage::bf16>
                         : rows_.storage == Storage::f16 ? dot_group<Storage::f16>
                                                         : dot_group<Storage::f32>;
        run(query_, rows_.at, rows_.stride, tile.count, queries_, add, scores, fetcher);
    }

  private:
    FloatRows rows_;
    int64_t queries_;
    float* query_;
};

class FloatValues {
  public:
    FloatValues(const Side& side, int64_t rows, Bump& own, Bump& shared)
        : rows_(side, rows, shared), queries_(rows), out_(own.take<float>(rows * rows_.stride)) {}

    void begin(bool first) {
        if (first) rows_.clear();
        __builtin_memset(out_, 0, static_cast<size_t>(queries_ * rows_.stride) * sizeof(float));
    }

    void stage(const Tile& tile, Fetcher&) { rows_.open(tile); }

    void add(const Tile& tile, Fetcher& fetcher, const float* weights, const float* decay) {
        const auto run = rows_.storage == Storage::bf16  ? add_group<Storage::bf16>
                         : rows_.storage == Storage::f16 ? add_group<Storage::f16>
                                                         : add_group<Storage::f32>;
        run(weights, rows_.at, rows_.stride, tile.count, queries_, decay, out_, fetcher);
    }

    void finish(int64_t r, float inverse, float* out) const {
        for (int64_t i = 0; i < rows_.stride; ++i) {
            const int64_t d = dim_at(rows_.storage, i);
            if (d < rows_.side->dim) out[d] = out_[r * rows_.stride + i] * inverse;
        }
    }

  private:
    FloatRows rows_;
    int64_t queries_;
    float* out_;
};

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
