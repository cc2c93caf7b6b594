// Vectors of KVFOLD_LANES floats for the kernels in store_rows.cpp: how numbers become floats in them and back, what
// the instruction sets name differently, and sums over lanes. Compiled with them once for each instruction set.
#pragma once

#include "store.hpp"
#include "vectors.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

KVFOLD_INLINE int64_t padded(int64_t n) { return (n + kRowPad - 1) / kRowPad * kRowPad; }

KVFOLD_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
KVFOLD_INLINE void store(float* p, Vec v) { store_as(p, v); }
KVFOLD_INLINE Words words(Vec v) { return reinterpret_cast<Words>(v); }
KVFOLD_INLINE Vec floats(Words w) { return reinterpret_cast<Vec>(w); }
KVFOLD_INLINE Words either(IntVec mask, Words yes, Words no) {
    return (yes & reinterpret_cast<Words>(mask)) | (no & ~reinterpret_cast<Words>(mask));
}
KVFOLD_INLINE Vec either(IntVec mask, Vec yes, Vec no) { return floats(either(mask, words(yes), words(no))); }

// ------------------------------------------------------- what the instruction sets name (GCC 12 does not find it all)

// Of two numbers that do not compare, `smaller` and `larger` return the second. `fused` may round once or twice.
#if defined(__AVX512F__)
KVFOLD_INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
KVFOLD_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
KVFOLD_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
KVFOLD_INLINE IntVec truncated(Vec v) { return reinterpret_cast<IntVec>(_mm512_cvttps_epi32(v)); }
KVFOLD_INLINE void store_bytes(uint8_t* p, IntVec v) { store_as(p, _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v))); }
KVFOLD_INLINE void store_shorts(void* p, Words v) { store_as(p, _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v))); }
KVFOLD_INLINE Vec from_half(const void* p) { return _mm512_cvtph_ps(load_as<__m256i>(p)); }
KVFOLD_INLINE void store_half(void* p, Vec v) { store_as(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
KVFOLD_INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
KVFOLD_INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
KVFOLD_INLINE Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
KVFOLD_INLINE IntVec truncated(Vec v) { return reinterpret_cast<IntVec>(_mm256_cvttps_epi32(v)); }
KVFOLD_INLINE __m128i narrow_words(Words v) {
    const auto wide = reinterpret_cast<__m256i>(v);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
KVFOLD_INLINE void store_bytes(uint8_t* p, IntVec v) {
    const __m128i shorts = narrow_words(reinterpret_cast<Words>(v));
    store_as(p, _mm_cvtsi128_si64(_mm_packus_epi16(shorts, shorts)));
}
KVFOLD_INLINE void store_shorts(void* p, Words v) { store_as(p, narrow_words(v)); }
KVFOLD_INLINE Vec from_half(const void* p) { return _mm256_cvtph_ps(load_as<__m128i>(p)); }
KVFOLD_INLINE void store_half(void* p, Vec v) { store_as(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
KVFOLD_INLINE Vec smaller(Vec a, Vec b) { return either(a < b, a, b); }
KVFOLD_INLINE Vec larger(Vec a, Vec b) { return either(a > b, a, b); }
KVFOLD_INLINE Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
KVFOLD_INLINE IntVec truncated(Vec v) { return __builtin_convertvector(v, IntVec); }
KVFOLD_INLINE void store_bytes(uint8_t* p, IntVec v) { store_as(p, __builtin_convertvector(v, Bytes)); }
KVFOLD_INLINE void store_shorts(void* p, Words v) { store_as(p, __builtin_convertvector(v, Shorts)); }
// Half to float by one multiplication, which also makes subnormals right; infinities and NaN keep their exponent.
KVFOLD_INLINE Vec from_half(const void* p) {
    const Words bits = widen_shorts(p), magnitude = bits & 0x7FFFU;
    const Words value = words(floats(magnitude << 13) * splat(0x1p112F));
    const Words special = reinterpret_cast<Words>(magnitude >= 0x7C00U) & 0x7F800000U;
    return floats(value | special | (bits & 0x8000U) << 16);
}
// To the nearest half, ties to even. Adding 1/2 to a number below the smallest normal half lets float32 round it.
KVFOLD_INLINE void store_half(void* p, Vec v) {
    const Words magnitude = words(v) & 0x7FFFFFFFU;
    const Words normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
    const Words tiny = words(floats(magnitude) + splat(0.5F)) - 0x3F000000U;
    const Words huge = either(magnitude > 0x7F800000U, Words{} + 0x7E00U, Words{} + 0x7C00U);
    const Words finite = either(magnitude < 0x38800000U, tiny, normal);
    store_shorts(p, either(magnitude >= 0x47800000U, huge, finite) | ((words(v) >> 16) & 0x8000U));
}
#endif

// ------------------------------------------------------------------------------------------------- lanes of a vector

// Lane i holds what lane i ^ H held.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVFOLD_PERMUTE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#endif
#if !defined(KVFOLD_PERMUTE)
#define KVFOLD_PERMUTE(v, ...) __builtin_shuffle(v, IntVec{__VA_ARGS__})
#endif
template <int H>
KVFOLD_INLINE Vec swapped(Vec v) {
#if KVFOLD_LANES == 16
    return KVFOLD_PERMUTE(v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H, 10 ^ H, 11 ^ H, 12 ^ H,
                          13 ^ H, 14 ^ H, 15 ^ H);
#elif KVFOLD_LANES == 8
    return KVFOLD_PERMUTE(v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H);
#else
    return KVFOLD_PERMUTE(v, 0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H);
#endif
}

KVFOLD_INLINE IntVec lane() {
    IntVec v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// The first `n` lanes of `v`, the others of `fill`.
KVFOLD_INLINE Vec first_lanes(Vec v, int64_t n, Vec fill) {
    return either(lane() < (IntVec{} + static_cast<int32_t>(n)), v, fill);
}

template <typename Op>
KVFOLD_INLINE float folded(Vec v, Op op) {
#if KVFOLD_LANES == 16
    v = op(v, swapped<8>(v));
#endif
#if KVFOLD_LANES >= 8
    v = op(v, swapped<4>(v));
#endif
    v = op(v, swapped<2>(v));
    return op(v, swapped<1>(v))[0];
}

KVFOLD_INLINE float lowest(Vec v) {
    return folded(v, [](Vec a, Vec b) __attribute__((always_inline)) { return smaller(a, b); });
}
KVFOLD_INLINE float highest(Vec v) {
    return folded(v, [](Vec a, Vec b) __attribute__((always_inline)) { return larger(a, b); });
}
KVFOLD_INLINE float total(Vec v) {
    return folded(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}

// ------------------------------------------------------------------------------------------------- numbers and floats

// The bits of the nearest bfloat16, ties to even; NaN stays NaN, unless there is none (`Real`).
template <bool Real = false>
KVFOLD_INLINE Words bf16_bits(Vec v) {
    const Words bits = words(v);
    const Words rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    if constexpr (Real) return rounded;
    return either(v != v, Words{} + 0x7FC0U, rounded);
}

template <Number N>
constexpr int64_t kSize = N == Number::f32 ? 4 : 2;

template <Number N>
KVFOLD_INLINE Vec read(const uint8_t* p) {
    if constexpr (N == Number::f32) return load_as<Vec>(p);
    if constexpr (N == Number::bf16) return floats(widen_shorts(p) << 16);
    if constexpr (N == Number::f16) return from_half(p);
}

template <Number N, bool Real = false>
KVFOLD_INLINE void write(uint8_t* p, Vec v) {
    if constexpr (N == Number::f32) store_as(p, v);
    if constexpr (N == Number::bf16) store_shorts(p, bf16_bits<Real>(v));
    if constexpr (N == Number::f16) store_half(p, v);
}

// The first `n` lanes; memory behind them is not touched, and they read as 0.
template <Number N>
KVFOLD_INLINE Vec read_part(const uint8_t* p, int64_t n) {
    uint8_t whole[kLanes * kSize<N>] = {};
    __builtin_memcpy(whole, p, static_cast<size_t>(n * kSize<N>));
    return read<N>(whole);
}

template <Number N>
KVFOLD_INLINE void write_part(uint8_t* p, Vec v, int64_t n) {
    uint8_t whole[kLanes * kSize<N>];
    write<N>(whole, v);
    __builtin_memcpy(p, whole, static_cast<size_t>(n * kSize<N>));
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
