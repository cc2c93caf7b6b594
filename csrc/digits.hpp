// How queries and weights become integers, to be multiplied with codes.
//
// Queries and weights become two signed bytes a number, high * 128 + low: a query's greatest number is 16256 steps, so
// is a row's greatest weight of a tile, and nothing is off by more than half a step, 1/32512 of the greatest. What the codes' middle makes of
// these errors is known and added back, so that only what is left of a code counts, half its range at most. A score is
// then off by at most |q|max / 32512 * sum |code - middle| * scale, an output by at most 1/32512 of the greatest weight
// for each |code - middle|, and both errors have random signs. Products and sums of integers are exact.
#pragma once

#include "code_rows.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kBlockRows = 8;  // two bytes of each make the rows of one product
constexpr float kSteps = 16256.0F;
constexpr float kLeast = 1e-30F;       // what is all below counts as zero
constexpr int64_t kMostDepth = 512;    // so that high * 128 + low stays within 32 bits
constexpr int64_t kMostRuns = 32;

// How query rows are cut into blocks, as rows of signed bytes: [blocks][high, low][rows of a block][depth].
struct Blocks {
    int64_t rows, each, count;

    explicit Blocks(int64_t all) : rows(all), each(smaller(all, kBlockRows)), count((all + each - 1) / each) {}
    int64_t bytes(int64_t depth) const { return count * 2 * each * depth; }
    int64_t in(int64_t block) const { return smaller(each, rows - block * each); }
};

// 16 numbers in steps of 1 / inverse -> high and low bytes. Returns what that lost.
KVFOLD_INLINE Vec split(Vec numbers, Vec step, Vec inverse, int8_t* high, int8_t* low) {
    const __m512i steps = _mm512_cvtps_epi32(numbers * inverse);
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(64)), 7);
    const __m512i lower = _mm512_sub_epi32(steps, _mm512_slli_epi32(upper, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(lower));
    return numbers - Vec(_mm512_cvtepi32_ps(steps)) * step;
}

KVFOLD_INLINE __m512 joined(const int32_t* high, const int32_t* low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 7), _mm512_load_si512(low)));
}

KVFOLD_INLINE float most(const float* numbers, int64_t n) {
    __m512 best = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) best = _mm512_max_ps(best, _mm512_abs_ps(_mm512_load_ps(numbers + i)));
    return _mm512_reduce_max_ps(best);
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
