// Vectors of KVFOLD_LANES floats, and what the instruction sets name differently of loading them: shared by the kernels that
// attend and those that store. Compiled with them once for each instruction set.
//
// Neither it nor what it stands in includes anything that defines inline functions outside the anonymous namespace: the
// linker keeps one copy of such a function, and that copy might be the one compiled for instructions this processor
// lacks.
#pragma once

#include <cstddef>
#include <cstdint>

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

#define KVFOLD_INLINE inline __attribute__((always_inline))

template <typename T>
KVFOLD_INLINE T load_as(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <typename T>
KVFOLD_INLINE void store_as(void* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

KVFOLD_INLINE Vec splat(float x) { return x - Vec{}; }

// Bytes or shorts as integers, one a lane. GCC 12 moves what __builtin_convertvector widens by four lane by lane, so
// the x86 builds name the instruction.
#if defined(__AVX512F__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm512_cvtepu8_epi32(load_as<__m128i>(p)));
}
KVFOLD_INLINE Words widen_shorts(const void* p) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load_as<__m256i>(p)));
}
#elif defined(__AVX2__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KVFOLD_INLINE Words widen_shorts(const void* p) {
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load_as<__m128i>(p)));
}
#else
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return __builtin_convertvector(load_as<Bytes>(p), IntVec);
}
KVFOLD_INLINE Words widen_shorts(const void* p) {
    return __builtin_convertvector(load_as<Shorts>(p), Words);
}
#endif

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
