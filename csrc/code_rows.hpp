// Codes as they are multiplied: taken out of their bytes and laid side by side by fours, for tokens (keys) or dims
// (values). AVX-512.
//
// Nothing is ever put back into the order of the dims: keys are met by queries in the staged order, and what values sum
// up to is put in order once, at the end of a walk.
#pragma once

#include "code_products.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

// The first `bytes` (at most 64) of a row's part; the rest is zero.
KVFOLD_INLINE __m512i load_part(const uint8_t* p, int64_t bytes) {
    return bytes >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(~0ULL >> (64 - bytes), p);
}

KVFOLD_INLINE __m256i load_half(const uint8_t* p, int64_t bytes) {
    return bytes >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                       : _mm256_maskz_loadu_epi8(~0U >> (32 - bytes), p);
}

KVFOLD_INLINE __m128i load_quarter(const uint8_t* p, int64_t bytes) {
    return bytes >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                       : _mm_maskz_loadu_epi8(static_cast<__mmask16>(0xFFFFU >> (16 - bytes)), p);
}

KVFOLD_INLINE __m512i two_halves(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The codes of plane p in packed bytes.
template <int Bits>
KVFOLD_INLINE __m512i plane_of(__m512i packed, int p) {
    if constexpr (Bits == 8) return packed;
    const __m512i shifted = p == 0 ? packed : _mm512_srli_epi16(packed, static_cast<unsigned>(p * Bits));
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << Bits) - 1));
}

// ------------------------------------------------------------------------------------------------------------- keys

// 32 bytes of each of 16 rows -> out[j]: word j of every row, row after row.
KVFOLD_INLINE void transpose_words(const uint8_t* const* row, int64_t byte, int64_t bytes, __m512i* out) {
    __m512i a[8], b[8];
    // Whole rows are paired such that the last step, which takes quarters crosswise, leaves the rows in order.
    KVFOLD_UNROLL
    for (int i = 0; i < 4; ++i) {
        a[i] = two_halves(load_half(row[i] + byte, bytes), load_half(row[i + 4] + byte, bytes));
        a[i + 4] = two_halves(load_half(row[i + 8] + byte, bytes), load_half(row[i + 12] + byte, bytes));
    }
    KVFOLD_UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    KVFOLD_UNROLL
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    KVFOLD_UNROLL
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        out[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    }
}

// Words of a plane in staged keys.
KVFOLD_INLINE int64_t plane_words(const Band& band) { return rounded_up(band.bytes, 4) / 4; }

// 16 rows of a band -> words [planes * plane_words, kTile] of `to`, 16 columns of it.
template <int Bits>
KVFOLD_INLINE void stage_band_keys(const Band& band, const uint8_t* const* row, uint32_t* to) {
    const int64_t words = plane_words(band);
    for (int64_t byte = 0; byte < band.bytes; byte += 32) {
        __m512i packed[8];
        transpose_words(row, band.byte + byte, band.bytes - byte, packed);
        const int64_t count = smaller(8, words - byte / 4);
        KVFOLD_UNROLL
        for (int p = 0; p < 8 / Bits; ++p) {
            uint32_t* at = to + (p * words + byte / 4) * kTile;
            KVFOLD_UNROLL
            for (int j = 0; j < 8; ++j) {
                if (j < count) _mm512_store_si512(at + j * kTile, plane_of<Bits>(packed[j], p));
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- values

// How many bytes of a plane are zipped together: as many as fill a quarter, a half or all of a vector.
KVFOLD_INLINE int64_t zip_width(int64_t bytes_left) { return bytes_left > 32 ? 64 : bytes_left > 16 ? 32 : 16; }

KVFOLD_INLINE int64_t plane_columns(const Band& band) {
    int64_t columns = 0;
    for (int64_t byte = 0; byte < band.bytes; byte += 64) columns += zip_width(band.bytes - byte);
    return columns;
}

// The byte, among `width` zipped ones, that ends in a column.
KVFOLD_INLINE int64_t zipped_byte(int64_t width, int64_t column) {
    const int64_t quarters = width / 16, word = column / 4;
    return 16 * (word % quarters) + 4 * (word / quarters) + column % 4;
}

// Bytes of four rows -> out[i]: in each quarter, four dims' words of four rows.
KVFOLD_INLINE void zip_rows(const __m512i* row, __m512i* out) {
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi16(a, c);
    out[1] = _mm512_unpackhi_epi16(a, c);
    out[2] = _mm512_unpacklo_epi16(b, d);
    out[3] = _mm512_unpackhi_epi16(b, d);
}

// out [4 fours of rows][width / 16 vectors]: `width` bytes of 16 rows, four rows in a word.
template <int Width>
KVFOLD_INLINE void zip_sixteen(const uint8_t* const* row, int64_t byte, int64_t bytes, __m512i out[4][4]) {
    __m512i in[4];
    if constexpr (Width == 64) {
        KVFOLD_UNROLL
        for (int four = 0; four < 4; ++four) {
            KVFOLD_UNROLL
            for (int i = 0; i < 4; ++i) in[i] = load_part(row[4 * four + i] + byte, bytes);
            zip_rows(in, out[four]);
        }
    } else if constexpr (Width == 32) {
        KVFOLD_UNROLL
        for (int pair = 0; pair < 4; pair += 2) {
            KVFOLD_UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint8_t* const* at = row + 4 * pair + i;
                in[i] = two_halves(load_half(at[0] + byte, bytes), load_half(at[4] + byte, bytes));
            }
            __m512i zipped[4];
            zip_rows(in, zipped);
            KVFOLD_UNROLL
            for (int i = 0; i < 2; ++i) {
                out[pair][i] = _mm512_shuffle_i64x2(zipped[2 * i], zipped[2 * i + 1], 0x44);
                out[pair + 1][i] = _mm512_shuffle_i64x2(zipped[2 * i], zipped[2 * i + 1], 0xEE);
            }
        }
    } else {
        KVFOLD_UNROLL
        for (int i = 0; i < 4; ++i) {
            const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load_quarter(row[i] + byte, bytes)),
                                                        load_quarter(row[i + 4] + byte, bytes), 1);
            const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(load_quarter(row[i + 8] + byte, bytes)),
                                                         load_quarter(row[i + 12] + byte, bytes), 1);
            in[i] = two_halves(low, high);
        }
        __m512i zipped[4];
        zip_rows(in, zipped);
        const __m512i a = _mm512_shuffle_i32x4(zipped[0], zipped[1], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(zipped[2], zipped[3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(zipped[0], zipped[1], 0xEE);
        const __m512i d = _mm512_shuffle_i32x4(zipped[2], zipped[3], 0xEE);
        out[0][0] = _mm512_shuffle_i32x4(a, b, 0x88);
        out[1][0] = _mm512_shuffle_i32x4(a, b, 0xDD);
        out[2][0] = _mm512_shuffle_i32x4(c, d, 0x88);
        out[3][0] = _mm512_shuffle_i32x4(c, d, 0xDD);
    }
}

template <int Bits, int Width>
KVFOLD_INLINE void stage_zipped(const uint8_t* const* row, int64_t byte, int64_t bytes, int64_t plane, uint32_t* to,
                                int64_t stride) {
    __m512i zipped[4][4];
    zip_sixteen<Width>(row, byte, bytes, zipped);
    KVFOLD_UNROLL
    for (int four = 0; four < 4; ++four) {
        KVFOLD_UNROLL
        for (int p = 0; p < 8 / Bits; ++p) {
            uint32_t* at = to + four * stride + p * plane;
            KVFOLD_UNROLL
            for (int i = 0; i < Width / 16; ++i) _mm512_store_si512(at + 16 * i, plane_of<Bits>(zipped[four][i], p));
        }
    }
}

// 16 rows of a band -> words [4, planes * plane_columns] of `to`, with `stride` words from one four to the next.
template <int Bits>
KVFOLD_INLINE void stage_band_values(const Band& band, const uint8_t* const* row, uint32_t* to, int64_t stride) {
    const int64_t plane = plane_columns(band);
    for (int64_t byte = 0; byte < band.bytes; byte += 64) {
        const int64_t bytes = band.bytes - byte, width = zip_width(bytes);
        if (width == 64) stage_zipped<Bits, 64>(row, band.byte + byte, bytes, plane, to + byte, stride);
        if (width == 32) stage_zipped<Bits, 32>(row, band.byte + byte, bytes, plane, to + byte, stride);
        if (width == 16) stage_zipped<Bits, 16>(row, band.byte + byte, bytes, plane, to + byte, stride);
    }
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
