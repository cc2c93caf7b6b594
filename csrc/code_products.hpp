// Integer products of signed with unsigned bytes, the heart of attention over codes: c [rows, columns] = a @ b.
// By VNNI; by AMX where the processor has tiles.
//
// a: `rows` (at most 16) of signed bytes, `depth` of them (a multiple of 4; what pads them to 64 is zero).
// b: unsigned bytes, four of a column side by side: [depth / 4, b_stride] words, of which `columns` (a multiple of 16).
#pragma once

#include "tile.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

#if defined(__AMX_INT8__)

// Tiles 0-3 collect results, 4 holds rows of a, 5 and 6 take turns with columns of b. AMX belongs to whoever configures
// it: the configuration of before (by a library of matrix products, say) is put back at the end, not what tiles held.
class ProductScope {
  public:
    explicit ProductScope(int64_t rows) {
        _tile_storeconfig(before_);
        alignas(64) uint8_t config[64] = {};
        config[0] = 1;
        for (int tile = 0; tile < 7; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = static_cast<uint8_t>(tile < 5 ? rows : 16);
        }
        _tile_loadconfig(config);
    }
    ~ProductScope() {
        if (before_[0] == 0) {
            _tile_release();
        } else {
            _tile_loadconfig(before_);
        }
    }
    ProductScope(const ProductScope&) = delete;
    ProductScope& operator=(const ProductScope&) = delete;

  private:
    alignas(64) uint8_t before_[64];
};

template <int N>
KVFOLD_INLINE void tile_products(const int8_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth,
                                 int32_t* c, int64_t c_stride) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
        const uint32_t* from = b + k / 4 * b_stride;
        _tile_loadd(4, a + k, a_stride);
        _tile_loadd(5, from, b_stride * 4);
        _tile_dpbsud(0, 4, 5);
        if constexpr (N > 1) {
            _tile_loadd(6, from + 16, b_stride * 4);
            _tile_dpbsud(1, 4, 6);
        }
        if constexpr (N > 2) {
            _tile_loadd(5, from + 32, b_stride * 4);
            _tile_dpbsud(2, 4, 5);
        }
        if constexpr (N > 3) {
            _tile_loadd(6, from + 48, b_stride * 4);
            _tile_dpbsud(3, 4, 6);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    if constexpr (N > 1) _tile_stored(1, c + 16, c_stride * 4);
    if constexpr (N > 2) _tile_stored(2, c + 32, c_stride * 4);
    if constexpr (N > 3) _tile_stored(3, c + 48, c_stride * 4);
}

// `rows` are those the scope was made for.
KVFOLD_INLINE void products(const int8_t* a, int64_t a_stride, int64_t, const uint32_t* b, int64_t b_stride,
                            int64_t depth, int64_t columns, int32_t* c, int64_t c_stride) {
    int64_t n = 0;
    for (; n + 64 <= columns; n += 64) tile_products<4>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
    if (n + 32 <= columns) {
        tile_products<2>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
        n += 32;
    }
    if (n < columns) tile_products<1>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
}

#else

struct ProductScope {
    explicit ProductScope(int64_t) {}
};

template <int M, int N>
KVFOLD_INLINE void block_products(const int8_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                  int64_t depth, int32_t* c, int64_t c_stride) {
    __m512i sum[M][N];
    KVFOLD_UNROLL
    for (int m = 0; m < M; ++m) {
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < depth; k += 4) {
        __m512i column[N];
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) column[n] = _mm512_load_si512(b + k / 4 * b_stride + 16 * n);
        KVFOLD_UNROLL
        for (int m = 0; m < M; ++m) {
            const __m512i four = _mm512_set1_epi32(load_as<int32_t>(a + m * a_stride + k));
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], column[n], four);
        }
    }
    KVFOLD_UNROLL
    for (int m = 0; m < M; ++m) {
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) _mm512_store_si512(c + m * c_stride + 16 * n, sum[m][n]);
    }
}

template <int M>
KVFOLD_INLINE void row_products(const int8_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth,
                                int64_t columns, int32_t* c, int64_t c_stride) {
    int64_t n = 0;
    for (; n + 32 <= columns; n += 32) block_products<M, 2>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
    if (n < columns) block_products<M, 1>(a, a_stride, b + n, b_stride, depth, c + n, c_stride);
}

KVFOLD_INLINE void products(const int8_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                            int64_t depth, int64_t columns, int32_t* c, int64_t c_stride) {
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8) {
        row_products<8>(a + m * a_stride, a_stride, b, b_stride, depth, columns, c + m * c_stride, c_stride);
    }
    if (m + 4 <= rows) {
        row_products<4>(a + m * a_stride, a_stride, b, b_stride, depth, columns, c + m * c_stride, c_stride);
        m += 4;
    }
    if (m + 2 <= rows) {
        row_products<2>(a + m * a_stride, a_stride, b, b_stride, depth, columns, c + m * c_stride, c_stride);
        m += 2;
    }
    if (m < rows) {
        row_products<1>(a + m * a_stride, a_stride, b, b_stride, depth, columns, c + m * c_stride, c_stride);
    }
}

#endif

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
