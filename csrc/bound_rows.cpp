// Products of queries with the bounds of pages. This file is compiled once for each instruction set, as walk.cpp is, and
// keeps to the rule of vectors.hpp.
#include "bound_rows.hpp"

#include "lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kAhead = 8;  // pages whose bounds are asked for, to the second cache, ahead of their turn
constexpr int64_t kLine = 64;

KVFOLD_INLINE Vec numbers_at(const uint8_t* p) { return reinterpret_cast<Vec>(widen_shorts(p) << 16); }

// The products of R rows with the `numbers` bfloat16 of P pages; rows are padded with zeros to whole vectors. Pages side by
// side share the reads of the rows.
template <int P, int R>
KVFOLD_INLINE void products(const uint8_t* const (&page)[P], const float* rows, int64_t numbers, int64_t stride,
                            Vec4 (&found)[P]) {
    Vec sum[P][R] = {};
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) {
        Vec x[P];
        KVFOLD_UNROLL
        for (int p = 0; p < P; ++p) x[p] = numbers_at(page[p] + 2 * i);
        KVFOLD_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vec row = load(rows + r * stride + i);
            KVFOLD_UNROLL
            for (int p = 0; p < P; ++p) sum[p][r] += x[p] * row;
        }
    }
    for (int p = 0; p < P; ++p) {
        if (i < numbers) {
            uint8_t last[2 * kLanes] = {};
            __builtin_memcpy(last, page[p] + 2 * i, static_cast<size_t>(2 * (numbers - i)));
            const Vec x = numbers_at(last);
            for (int r = 0; r < R; ++r) sum[p][r] += x * load(rows + r * stride + i);
        }
        found[p] = folded<Sum, R>(sum[p]);
    }
}

KVFOLD_INLINE float most_of(Vec4 found, int count, float most, bool& real) {
    for (int k = 0; k < count; ++k) {
        real = real && found[k] == found[k];
        most = found[k] > most ? found[k] : most;
    }
    return most;
}

template <int P>
KVFOLD_INLINE void bound(const PageRows& call, const uint8_t* const (&page)[P], float* out) {
    float most[P];
    bool real[P];
    for (int p = 0; p < P; ++p) {
        most[p] = -__builtin_inff();
        real[p] = true;
    }
    Vec4 found[P];
    int64_t r = 0;
    for (; r + 4 <= call.rows; r += 4) {
        products<P, 4>(page, call.q + r * call.stride, call.numbers, call.stride, found);
        for (int p = 0; p < P; ++p) most[p] = most_of(found[p], 4, most[p], real[p]);
    }
    for (; r < call.rows; ++r) {
        products<P, 1>(page, call.q + r * call.stride, call.numbers, call.stride, found);
        for (int p = 0; p < P; ++p) most[p] = most_of(found[p], 1, most[p], real[p]);
    }
    for (int p = 0; p < P; ++p) out[p] = real[p] ? most[p] : __builtin_inff();
}

KVFOLD_INLINE void ask_for(const PageRows& call, int64_t place, int64_t last) {
    if (place >= last || call.pages[place] < 0) return;
    const uint8_t* const ahead = call.base + call.pages[place];
    for (int64_t b = 0; b < 2 * call.numbers; b += kLine) __builtin_prefetch(ahead + b, 0, 2);
}

}  // namespace

void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out) {
    for (int64_t i = first; i < last;) {
        ask_for(call, i + kAhead, last);
        if (call.pages[i] < 0) {
            out[i++] = -__builtin_inff();
        } else if (i + 1 < last && call.pages[i + 1] >= 0) {
            ask_for(call, i + 1 + kAhead, last);
            bound<2>(call, {call.base + call.pages[i], call.base + call.pages[i + 1]}, out + i);
            i += 2;
        } else {
            bound<1>(call, {call.base + call.pages[i]}, out + i);
            ++i;
        }
    }
}

}  // namespace kvfold::KVFOLD_ISA
