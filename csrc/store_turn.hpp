// Rows taken to the basis they are stored in, and back: the fast Hadamard transform, and products with small matrices.
#pragma once

#include "store_lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ Hadamard transform

// Sums and differences of lanes H apart. The product with 1 or -1 is exact.
template <int H>
KVFOLD_INLINE Vec mixed(Vec v) {
    Vec sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = (i & H) != 0 ? -1.0F : 1.0F;
    return fused(v, sign, swapped<H>(v));
}

// The transform, without its factor, of each `Block` lanes.
template <int Block>
KVFOLD_INLINE Vec mixed_within(Vec v) {
    if constexpr (Block > 1) v = mixed<1>(v);
    if constexpr (Block > 2) v = mixed<2>(v);
    if constexpr (Block > 4) v = mixed<4>(v);
    if constexpr (Block > 8) v = mixed<8>(v);
    return v;
}

// Sums and differences of vectors H apart, then 2 H apart, and so on.
template <int H, int N>
KVFOLD_INLINE void mix_across(Vec* r) {
    if constexpr (H < N) {
        for (int i = 0; i < N; ++i) {
            if ((i & H) != 0) continue;
            const Vec a = r[i], b = r[i + H];
            r[i] = a + b;
            r[i + H] = a - b;
        }
        mix_across<2 * H, N>(r);
    }
}

template <int N>
KVFOLD_INLINE void mix_vectors(float* x, Vec factor) {
    Vec r[N];
    for (int i = 0; i < N; ++i) r[i] = mixed_within<kLanes>(load(x + i * kLanes));
    mix_across<1, N>(r);
    for (int i = 0; i < N; ++i) store(x + i * kLanes, r[i] * factor);
}

template <int Block>
KVFOLD_INLINE void mix_lanes(float* x, int64_t n, Vec factor) {
    for (int64_t i = 0; i < n; i += kLanes) store(x + i, mixed_within<Block>(load(x + i)) * factor);
}

#if defined(__AVX512F__)
constexpr int kRegisters = 16;  // vectors that are mixed without going back to memory
#else
constexpr int kRegisters = 8;
#endif

// A row of `n` floats, its blocks of `block` (a power of two that divides n) transformed in place. What is behind the
// row, up to a whole vector, is overwritten with nothing of use.
KVFOLD_INLINE void hadamard(float* x, int64_t n, int64_t block, float scale) {
    const Vec factor = splat(scale);
    if (block <= kLanes) {
        switch (block) {
            case 2: mix_lanes<2>(x, n, factor); break;
            case 4: mix_lanes<4>(x, n, factor); break;
#if KVFOLD_LANES >= 8
            case 8: mix_lanes<8>(x, n, factor); break;
#endif
#if KVFOLD_LANES >= 16
            case 16: mix_lanes<16>(x, n, factor); break;
#endif
            default: break;
        }
        return;
    }
    constexpr int64_t kMost = kRegisters * kLanes;
    const int64_t span = block < kMost ? block : kMost;
    for (int64_t i = 0; i < n; i += span) {
        switch (span / kLanes) {
            case 2: mix_vectors<2>(x + i, factor); break;
            case 4: mix_vectors<4>(x + i, factor); break;
            case 8: mix_vectors<8>(x + i, factor); break;
            default: mix_vectors<kRegisters>(x + i, factor); break;
        }
    }
    for (int64_t h = span; h < block; h *= 2) {
        for (int64_t i = 0; i < n; i += 2 * h) {
            for (int64_t j = i; j < i + h; j += kLanes) {
                const Vec a = load(x + j), b = load(x + j + h);
                store(x + j, a + b);
                store(x + j + h, a - b);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------- small matrices

#if defined(__AVX512F__)
constexpr int kProductRows = 8;  // of two vectors each: as many sums as registers hold
#else
constexpr int kProductRows = 4;
#endif

// out [R, columns] = x [R, depth] @ matrix [depth, columns] (+ mean); two vectors of columns at a time. Whole vectors
// of the matrix and the mean are read, up to a vector behind their ends, and whole vectors of `out` written.
template <int R>
KVFOLD_INLINE void multiply_rows(const float* x, float* out, int64_t stride, int64_t depth, const float* matrix,
                                 int64_t columns, const float* mean) {
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
        const bool both = c + kLanes < columns;
        const int64_t second = both ? kLanes : 0;
        Vec sum[R][2];
        for (int r = 0; r < R; ++r) {
            sum[r][0] = mean == nullptr ? Vec{} : load(mean + c);
            sum[r][1] = mean == nullptr ? Vec{} : load(mean + c + second);
        }
        for (int64_t d = 0; d < depth; ++d) {
            const Vec a = load(matrix + d * columns + c), b = load(matrix + d * columns + c + second);
            for (int r = 0; r < R; ++r) {
                const Vec one = splat(x[r * stride + d]);
                sum[r][0] = fused(one, a, sum[r][0]);
                sum[r][1] = fused(one, b, sum[r][1]);
            }
        }
        for (int r = 0; r < R; ++r) {
            store(out + r * stride + c, sum[r][0]);
            if (both) store(out + r * stride + c + kLanes, sum[r][1]);
        }
    }
}

void multiply(const float* x, float* out, int64_t count, int64_t stride, int64_t depth, const float* matrix,
              int64_t columns, const float* mean) {
    int64_t t = 0;
    for (; t + kProductRows <= count; t += kProductRows) {
        multiply_rows<kProductRows>(x + t * stride, out + t * stride, stride, depth, matrix, columns, mean);
    }
    for (; t < count; ++t) multiply_rows<1>(x + t * stride, out + t * stride, stride, depth, matrix, columns, mean);
}

// ---------------------------------------------------------------------------------------------------- either of them

// `count` rows of `dim` floats in `x` (`stride` apart) in the stored basis: in `x` or in `spare`.
KVFOLD_INLINE float* turn_rows(const StoredSide& side, int64_t matrix, int64_t count, int64_t stride, float* x,
                               float* spare) {
    const Turn& turn = side.turn;
    if (turn.encode != nullptr) {
        if (turn.mean != nullptr) {
            const float* mean = turn.mean + matrix * side.dim;
            for (int64_t t = 0; t < count; ++t) {
                float* row = x + t * stride;
                for (int64_t d = 0; d < side.dim; d += kLanes) store(row + d, load(row + d) - load(mean + d));
            }
        }
        const float* encode = turn.encode + matrix * side.dim * side.stored_dim;
        multiply(x, spare, count, stride, side.dim, encode, side.stored_dim, nullptr);
        return spare;
    }
    if (turn.block > 1) {
        const float factor = 1.0F / __builtin_sqrtf(static_cast<float>(turn.block));
        for (int64_t t = 0; t < count; ++t) hadamard(x + t * stride, side.dim, turn.block, factor);
    }
    return x;
}

// The way back: rows of `dim` floats again.
KVFOLD_INLINE float* turn_rows_back(const StoredSide& side, int64_t matrix, int64_t count, int64_t stride, float* y,
                                    float* spare) {
    const Turn& turn = side.turn;
    if (turn.decode != nullptr) {
        const float* mean = turn.mean == nullptr ? nullptr : turn.mean + matrix * side.dim;
        const float* decode = turn.decode + matrix * side.dim * side.stored_dim;
        multiply(y, spare, count, stride, side.stored_dim, decode, side.dim, mean);
        return spare;
    }
    return turn_rows(side, matrix, count, stride, y, spare);  // a Hadamard transform is its own inverse
}

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
