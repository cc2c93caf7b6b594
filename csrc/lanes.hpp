// Sums, exp and tanh of vectors of floats: what the kernel that attends is made of, by the rule of vectors.hpp.
#pragma once

#include "vectors.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

typedef float Vec4 __attribute__((vector_size(4 * sizeof(float)), may_alias));

// Before a loop with few and constant turns, whose arrays are meant to be registers.
#define KVFOLD_UNROLL _Pragma("GCC unroll 16")

KVFOLD_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
KVFOLD_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
KVFOLD_INLINE IntVec splat_int(int32_t x) { return x - IntVec{}; }

// ------------------------------------------------------------------------------------------------- sums and exp

KVFOLD_INLINE Vec larger(Vec a, Vec b) {
    const IntVec first = a > b;
    return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(a) & first) | (reinterpret_cast<IntVec>(b) & ~first));
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVFOLD_SHUFFLE 1
#endif
#endif

struct Sum {
    template <typename V>
    KVFOLD_INLINE static V of(V a, V b) { return a + b; }
};
struct Greatest {
    template <typename V>
    KVFOLD_INLINE static V of(V a, V b) { return a > b ? a : b; }
};

// What four vectors come to, side by side: folding them together takes a third of the work of four folds.
template <typename Fold>
KVFOLD_INLINE Vec4 folded(Vec a, Vec b, Vec c, Vec d) {
#ifdef KVFOLD_SHUFFLE
    Vec4 part[4];
    const Vec whole[4] = {a, b, c, d};
    KVFOLD_UNROLL
    for (int i = 0; i < 4; ++i) {
#if KVFOLD_LANES == 16
        typedef float Vec8 __attribute__((vector_size(32)));
        const Vec8 half = Fold::of(Vec8(__builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3, 4, 5, 6, 7)),
                                   Vec8(__builtin_shufflevector(whole[i], whole[i], 8, 9, 10, 11, 12, 13, 14, 15)));
        part[i] = Fold::of(Vec4(__builtin_shufflevector(half, half, 0, 1, 2, 3)),
                           Vec4(__builtin_shufflevector(half, half, 4, 5, 6, 7)));
#elif KVFOLD_LANES == 8
        part[i] = Fold::of(Vec4(__builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3)),
                           Vec4(__builtin_shufflevector(whole[i], whole[i], 4, 5, 6, 7)));
#else
        part[i] = whole[i];
#endif
    }
    const Vec4 ab = Fold::of(Vec4(__builtin_shufflevector(part[0], part[1], 0, 4, 1, 5)),
                             Vec4(__builtin_shufflevector(part[0], part[1], 2, 6, 3, 7)));
    const Vec4 cd = Fold::of(Vec4(__builtin_shufflevector(part[2], part[3], 0, 4, 1, 5)),
                             Vec4(__builtin_shufflevector(part[2], part[3], 2, 6, 3, 7)));
    return Fold::of(Vec4(__builtin_shufflevector(ab, cd, 0, 1, 4, 5)),
                    Vec4(__builtin_shufflevector(ab, cd, 2, 3, 6, 7)));
#else
    Vec4 found = {a[0], b[0], c[0], d[0]};
    for (int i = 1; i < kLanes; ++i) found = Fold::of(found, Vec4{a[i], b[i], c[i], d[i]});
    return found;
#endif
}

// The same of N vectors, N at most 4.
template <typename Fold, int N>
KVFOLD_INLINE Vec4 folded(const Vec* v) {
    return folded<Fold>(v[0], v[N > 1 ? 1 : 0], v[N > 2 ? 2 : 0], v[N > 3 ? 3 : 0]);
}

// exp(x) for x <= 0, relative error below 2e-7; exactly 0 below -87. NaN stays NaN. The range is reduced by powers of
// two, rounded to the nearest one by adding and subtracting 1.5 * 2^23; the polynomial is that of Cephes' expf.
KVFOLD_INLINE Vec exp_negative(Vec x) {
#if defined(__AVX512F__)
    const __mmask16 some = _mm512_cmp_ps_mask(x, splat(-87.0F), _CMP_NLT_UQ);  // NaN too
    const Vec n = _mm512_maskz_roundscale_ps(some, x * splat(1.44269504088896341F), 0);
    const Vec r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4F), _mm512_fnmadd_ps(n, splat(0.693359375F), x));
    Vec p = _mm512_fmadd_ps(splat(1.9875691500e-4F), r, splat(1.3981999507e-3F));
    p = _mm512_fmadd_ps(p, r, splat(8.3334519073e-3F));
    p = _mm512_fmadd_ps(p, r, splat(4.1665795894e-2F));
    p = _mm512_fmadd_ps(p, r, splat(1.6666665459e-1F));
    p = _mm512_fmadd_ps(p, r, splat(5.0000001201e-1F));
    p = _mm512_fmadd_ps(p, r * r, r + splat(1.0F));
    return _mm512_maskz_scalef_ps(some, p, n);
#else
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
#endif
}

// tanh(x), absolute error below 3e-7.
KVFOLD_INLINE Vec tanh_of(Vec x) {
    const IntVec sign = reinterpret_cast<IntVec>(x) & splat_int(INT32_MIN);
    const Vec magnitude = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) ^ sign);
    const Vec e = exp_negative(magnitude * splat(-2.0F));
    const Vec value = (splat(1.0F) - e) / (splat(1.0F) + e);
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(value) | sign);
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
