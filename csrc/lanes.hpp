// Vectors of KVFOLD_LANES floats, how stored rows become floats in them, and exp: what the kernel in attend_span.cpp is
// made of. Compiled with it once for each instruction set.
//
// It includes nothing that defines inline functions outside the anonymous namespace: the linker keeps one copy of
// such a function, and that copy might be the one compiled for instructions this processor lacks.
#pragma once

#include "attend_pages.hpp"

#if defined(__AVX2__)
#include <immintrin.h>  // only intrinsics, which are always inlined
#endif

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int kLanes = KVFOLD_LANES;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
#if !defined(__AVX2__)
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * sizeof(uint8_t))));
#endif
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float)), may_alias));

#define KVFOLD_INLINE inline __attribute__((always_inline))

KVFOLD_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
KVFOLD_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
KVFOLD_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
KVFOLD_INLINE Vec splat(float x) { return x - Vec{}; }

template <typename T>
KVFOLD_INLINE T load_unaligned(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <typename T>
KVFOLD_INLINE void store_unaligned(float* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

// Bytes or shorts as integers, one a lane. GCC 12 moves what __builtin_convertvector widens by four lane by lane, so
// the x86 builds name the instruction.
#if defined(__AVX512F__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm512_cvtepu8_epi32(load_unaligned<__m128i>(p)));
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load_unaligned<__m256i>(p)));
}
#elif defined(__AVX2__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load_unaligned<__m128i>(p)));
}
#else
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return __builtin_convertvector(load_unaligned<Bytes>(p), IntVec);
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return __builtin_convertvector(load_unaligned<Shorts>(p), Words);
}
#endif

KVFOLD_INLINE float bf16_to_float(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

// ---------------------------------------------------------------------------------------------- unpacking of rows

// Left to itself, the compiler vectorises these loops by whole vectors of bytes, which are longer than most rows are.

KVFOLD_INLINE void unpack_bf16(const uint8_t* row, float* __restrict out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Words bits = widen_shorts(row + 2 * i) << 16;
        store_unaligned(out + i, bits);
    }
    for (; i < n; ++i) out[i] = bf16_to_float(load_unaligned<uint16_t>(row + 2 * i));
}

// Half to float by one multiplication, which also makes subnormals right; infinities and NaN keep their exponent.
KVFOLD_INLINE float f16_to_float(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFU;
    const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112F;
    uint32_t word = __builtin_bit_cast(uint32_t, value);
    word |= magnitude >= 0x7C00U ? 0x7F800000U : 0U;
    return __builtin_bit_cast(float, word | static_cast<uint32_t>(bits & 0x8000U) << 16);
}

KVFOLD_INLINE void unpack_f16(const uint8_t* row, float* __restrict out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Words bits = widen_shorts(row + 2 * i);
        const Words magnitude = bits & 0x7FFFU;
        const Vec value = reinterpret_cast<Vec>(magnitude << 13) * splat(0x1p112F);
        const Words special = reinterpret_cast<Words>(magnitude >= 0x7C00U) & 0x7F800000U;
        store_unaligned(out + i, reinterpret_cast<Words>(value) | special | (bits & 0x8000U) << 16);
    }
    for (; i < n; ++i) out[i] = f16_to_float(load_unaligned<uint16_t>(row + 2 * i));
}

// Bare codes as numbers. Dims lie in planes (halves, quarters of the row), so no interleave is needed.
template <int Bits>
KVFOLD_INLINE void unpack_codes(const uint8_t* row, float* __restrict out, int64_t plane) {
    constexpr int kMask = (1 << Bits) - 1;
    int64_t i = 0;
    for (; i + kLanes <= plane; i += kLanes) {
        const IntVec bytes = widen_bytes(row + i);
        for (int p = 0; p < 8 / Bits; ++p) {
            store_unaligned(out + p * plane + i, __builtin_convertvector((bytes >> (p * Bits)) & kMask, Vec));
        }
    }
    for (; i < plane; ++i) {
        for (int p = 0; p < 8 / Bits; ++p) out[p * plane + i] = static_cast<float>((row[i] >> (p * Bits)) & kMask);
    }
}

template <Storage S>
KVFOLD_INLINE void unpack_row(const uint8_t* row, float* __restrict out, int64_t n) {
    if constexpr (S == Storage::f32) __builtin_memcpy(out, row, static_cast<size_t>(n) * 4);
    if constexpr (S == Storage::bf16) unpack_bf16(row, out, n);
    if constexpr (S == Storage::f16) unpack_f16(row, out, n);
    if constexpr (S == Storage::code8) unpack_codes<8>(row, out, n);
    if constexpr (S == Storage::code4) unpack_codes<4>(row, out, n / 2);
    if constexpr (S == Storage::code2) unpack_codes<2>(row, out, n / 4);
}

// Rows `slot[0..count)` into `rows [count, stride]`. Meanwhile the same rows of the next page, `ahead` bytes from this
// one, are fetched: pages lie anywhere, and the processor cannot guess where.
template <Storage S>
void unpack_rows(const Side& side, const uint8_t* codes, int64_t ahead, const int32_t* slot, int64_t count,
                 float* __restrict rows, int64_t stride) {
    const int64_t row_bytes = side.row_bytes, n = side.stored_dim;
    for (int64_t t = 0; t < count; ++t) {
        const uint8_t* row = codes + slot[t] * row_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + ahead + byte);
        unpack_row<S>(row, rows + t * stride, n);
    }
}

KVFOLD_INLINE bool is_code(Storage storage) { return static_cast<int>(storage) >= static_cast<int>(Storage::code8); }

// Rows `slot[0..count)` of one side into `rows [count, stride]`, and their scales and zeros. The padding behind a row
// was cleared once and is never written, except by codes that fill up a byte; queries are zero there.
void unpack_side(const Side& side, const uint8_t* page, int64_t ahead, const int32_t* slot, int64_t count, float* rows,
                 int64_t stride, float* scales, float* zeros) {
    const uint8_t* codes = page + side.codes_offset;
    switch (side.storage) {
        case Storage::f32: unpack_rows<Storage::f32>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::bf16: unpack_rows<Storage::bf16>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::f16: unpack_rows<Storage::f16>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code8: unpack_rows<Storage::code8>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code4: unpack_rows<Storage::code4>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code2: unpack_rows<Storage::code2>(side, codes, ahead, slot, count, rows, stride); break;
    }
    if (!is_code(side.storage)) return;
    alignas(64) uint32_t pairs[kTile] = {};  // of tokens that are not there: zero, so that they add nothing
    for (int64_t t = 0; t < count; ++t) __builtin_memcpy(pairs + t, page + side.meta_offset + 4 * slot[t], 4);
    __builtin_prefetch(page + side.meta_offset + 4 * slot[0] + ahead);
    __builtin_prefetch(page + side.meta_offset + 4 * slot[count - 1] + ahead);
    for (int64_t t = 0; t < kTile; t += kLanes) {
        const Words pair = *reinterpret_cast<const Words*>(pairs + t);
        store(scales + t, reinterpret_cast<Vec>(pair << 16));
        store(zeros + t, reinterpret_cast<Vec>(pair & 0xFFFF0000U));
    }
}

// ------------------------------------------------------------------------------------------------- sums and exp

KVFOLD_INLINE Vec larger(Vec a, Vec b) {
    const IntVec first = a > b;
    return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(a) & first) | (reinterpret_cast<IntVec>(b) & ~first));
}

KVFOLD_INLINE float total(Vec v) {
    float sum = 0.0F;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVFOLD_SHUFFLE 1
#endif
#endif

// The sums of four vectors, side by side: folding them together takes a third of the work of four sums.
KVFOLD_INLINE Vec4 totals(Vec a, Vec b, Vec c, Vec d) {
#ifdef KVFOLD_SHUFFLE
    Vec4 part[4];
    const Vec whole[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
#if KVFOLD_LANES == 16
        typedef float Vec8 __attribute__((vector_size(32)));
        const Vec8 half = __builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(whole[i], whole[i], 8, 9, 10, 11, 12, 13, 14, 15);
        part[i] = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif KVFOLD_LANES == 8
        part[i] = __builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3) +
                  __builtin_shufflevector(whole[i], whole[i], 4, 5, 6, 7);
#else
        part[i] = whole[i];
#endif
    }
    const Vec4 ab = __builtin_shufflevector(part[0], part[1], 0, 4, 1, 5) +
                    __builtin_shufflevector(part[0], part[1], 2, 6, 3, 7);
    const Vec4 cd = __builtin_shufflevector(part[2], part[3], 0, 4, 1, 5) +
                    __builtin_shufflevector(part[2], part[3], 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
    return Vec4{total(a), total(b), total(c), total(d)};
#endif
}

// exp(x) for x <= 0, relative error below 2e-7; exactly 0 below -87. NaN stays NaN. The range is reduced by powers of
// two, rounded to the nearest one by adding and subtracting 1.5 * 2^23; the polynomial is that of Cephes' expf.
KVFOLD_INLINE Vec exp_negative(Vec x) {
    const Vec magic = splat(12582912.0F);
    const Vec lowest = splat(-87.0F);
    const IntVec tiny = x < lowest;
    const Vec bounded = reinterpret_cast<Vec>((reinterpret_cast<IntVec>(x) & ~tiny) |
                                              (reinterpret_cast<IntVec>(lowest) & tiny));
    const Vec shifted = bounded * splat(1.44269504088896341F) + magic;
    const Vec n = shifted - magic;
    const Vec r = (bounded - n * splat(0.693359375F)) - n * splat(-2.12194440e-4F);
    Vec p = splat(1.9875691500e-4F);
    p = p * r + splat(1.3981999507e-3F);
    p = p * r + splat(8.3334519073e-3F);
    p = p * r + splat(4.1665795894e-2F);
    p = p * r + splat(1.6666665459e-1F);
    p = p * r + splat(5.0000001201e-1F);
    p = p * r * r + r + splat(1.0F);
    const IntVec power = (reinterpret_cast<IntVec>(shifted) - reinterpret_cast<IntVec>(magic) + 127) << 23;
    const Vec value = p * reinterpret_cast<Vec>(power);
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(value) & ~tiny);
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
