// Floats to codes and back: ranges, scales, packing. The arithmetic is that of kvfold.codecs, operation by operation,
// so that what is encoded here has the bits it has there; only sums over a row run in another order.
#pragma once

#include "store_lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

// ------------------------------------------------------------------------------------------------------------ packing

// One code a byte -> 8 / Bits codes a byte, `plane` bytes of them: the row's halves or quarters side by side. The last
// word may take again what the one before took.
template <int Bits, typename Word>
KVFOLD_INLINE void pack_words(const uint8_t* codes, int64_t plane, uint8_t* out) {
    constexpr int64_t kWidth = sizeof(Word);
    for (int64_t i = 0; i < plane; i += kWidth) {
        const int64_t at = i + kWidth <= plane ? i : plane - kWidth;
        auto word = load_as<Word>(codes + at);
        for (int p = 1; p < 8 / Bits; ++p) {
            word |= static_cast<Word>(load_as<Word>(codes + p * plane + at) << (p * Bits));
        }
        store_as(out + at, word);
    }
}

template <int Bits>
KVFOLD_INLINE void pack_planes(const uint8_t* codes, int64_t plane, uint8_t* out) {
    typedef uint64_t Wide __attribute__((vector_size(16)));  // codes stay in their bytes: no carry crosses them
    if (plane >= 16) {
        pack_words<Bits, Wide>(codes, plane, out);
    } else if (plane >= 8) {
        pack_words<Bits, uint64_t>(codes, plane, out);
    } else {
        pack_words<Bits, uint8_t>(codes, plane, out);
    }
}

KVFOLD_INLINE void pack_row(const StoredSide& side, const uint8_t* codes, uint8_t* out) {
    for (int b = 0; b < side.bands_count; ++b) {
        const StoredBand& band = side.bands[b];
        switch (band.bits) {
            case 8: __builtin_memcpy(out + band.byte, codes, static_cast<size_t>(band.dims)); break;
            case 4: pack_planes<4>(codes, band.dims / 2, out + band.byte); break;
            default: pack_planes<2>(codes, band.dims / 4, out + band.byte); break;
        }
        codes += band.dims;
    }
}

// Bare codes as floats.
template <int Bits>
KVFOLD_INLINE void unpack_planes(const uint8_t* bytes, int64_t plane, float* __restrict out) {
    constexpr int kMask = (1 << Bits) - 1;
    if (plane < kLanes) {
        for (int64_t i = 0; i < plane; ++i) {
            for (int p = 0; p < 8 / Bits; ++p) out[p * plane + i] = static_cast<float>((bytes[i] >> (p * Bits)) & kMask);
        }
        return;
    }
    for (int64_t i = 0; i < plane; i += kLanes) {
        const int64_t at = i + kLanes <= plane ? i : plane - kLanes;
        const IntVec wide = widen_bytes(bytes + at);
        for (int p = 0; p < 8 / Bits; ++p) {
            store(out + p * plane + at, __builtin_convertvector((wide >> (p * Bits)) & kMask, Vec));
        }
    }
}

KVFOLD_INLINE void unpack_row(const StoredSide& side, const uint8_t* bytes, float* out) {
    for (int b = 0; b < side.bands_count; ++b) {
        const StoredBand& band = side.bands[b];
        switch (band.bits) {
            case 8: unpack_planes<8>(bytes + band.byte, band.dims, out); break;
            case 4: unpack_planes<4>(bytes + band.byte, band.dims / 2, out); break;
            default: unpack_planes<2>(bytes + band.byte, band.dims / 4, out); break;
        }
        out += band.dims;
    }
}

// ------------------------------------------------------------------------------------------------- ranges and scales

// The ends of a range and, in `high`, NaN if any number of it is not finite.
struct Range {
    float low, high;
};

KVFOLD_INLINE Range range_of(const float* x, int64_t n) {
    Vec low = splat(x[0]), high = low, bad = Vec{};
    for (int64_t i = 0; i < n; i += kLanes) {
        Vec v = load(x + i);
        if (n - i < kLanes) v = first_lanes(v, n - i, splat(x[0]));
        low = smaller(low, v);
        high = larger(high, v);
        bad += v - v;
    }
    return {lowest(low), highest(high) + total(bad)};
}

// Ranges of many groups -> their scales, inverses of them, and zeros: `quantize` of kvfold.codecs.affine.
struct Scales {
    float *low, *high;  // in; then free for sums
    float *scale, *inverse, *zero;
};

KVFOLD_INLINE Vec floor_bf16(Vec v) {
    const Words bits = words(v);
    const Words negative = reinterpret_cast<Words>(reinterpret_cast<IntVec>(bits) >> 31) & 0xFFFFU;
    return floats((bits + negative) & 0xFFFF0000U);
}

KVFOLD_INLINE Vec ceil_bf16(Vec v) { return floats((words(v) + 0xFFFFU) & 0xFFFF0000U); }

KVFOLD_INLINE void find_scales(const Scales& s, int64_t n, int bits, bool inner) {
    const int levels = (1 << bits) - 1;
    const double whole = (1.0 - 1.0 / 65536) / levels, half_cells = 1.0 / (levels + 0.5);
    const Vec share = splat(static_cast<float>(inner ? half_cells : whole));
    const Vec cell = splat(static_cast<float>(0.5 / (levels + 1)));
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec low = load(s.low + i), high = load(s.high + i), width = high - low;
        const Vec zero = floor_bf16(inner ? width * cell + low : low);
        const Vec scale = ceil_bf16(larger((high - zero) * share, splat(0x1p-126F)));
        store(s.inverse + i, splat(1.0F) / scale);
        store(s.scale + i, scale + width * splat(0.0F));  // NaN if the width is infinite or NaN
        store(s.zero + i, zero);
    }
}

// (scale, zero) of many groups as pairs of bfloat16, where `low` was; with `projected`, stretched before by the squared
// norms in `low` over the projections in `high`.
KVFOLD_INLINE void pair_scales(const Scales& s, int64_t n, bool projected) {
    for (int64_t i = 0; i < n; i += kLanes) {
        Vec scale = load(s.scale + i), zero = load(s.zero + i);
        if (projected) {
            Vec gain = load(s.low + i) / load(s.high + i);
            // Constant zeros, numbers beyond float32 and NaN have no such gain; a far one says nothing.
            gain = either((gain > splat(0.5F)) & (gain < splat(2.0F)), gain, splat(1.0F));
            scale = scale * gain;
            zero = zero * gain;
        }
        store(s.low + i, floats(bf16_bits(scale) | bf16_bits(zero) << 16));
    }
}

// -------------------------------------------------------------------------------------------------- codes of a group

struct Sums {
    float norm, along;  // x . x, and x . decoded
};

// One code a byte of `n` numbers with one scale; whole vectors of `codes` are written.
template <bool Projected>
KVFOLD_INLINE Sums encode_group(const float* x, int64_t n, int bits, float scale, float inverse, float zero,
                                uint8_t* codes) {
    const int levels = (1 << bits) - 1;
    const Vec most = splat(static_cast<float>(levels)), origin = splat(zero), steps = splat(inverse);
    Vec norm = Vec{}, along = Vec{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const Vec v = load(x + i);
        // The mask keeps what is not finite out of other codes' bits.
        const IntVec code = truncated(smaller((v - origin) * steps + splat(0.5F), most)) & levels;
        store_bytes(codes + i, code);
        if constexpr (Projected) {
            const Vec counted = n - i < kLanes ? first_lanes(v, n - i, Vec{}) : v;
            const Vec found = fused(__builtin_convertvector(code, Vec), splat(scale), origin);
            norm = fused(counted, counted, norm);
            along = fused(n - i < kLanes ? first_lanes(found, n - i, Vec{}) : found, counted, along);
        }
    }
    if constexpr (Projected) return {total(norm), total(along)};
    return {};
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
