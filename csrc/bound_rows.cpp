// Products of queries with the bounds of pages. This file is compiled once for each instruction set, as walk.cpp is, and
// keeps to the rule of vectors.hpp.
#include "bound_rows.hpp"

#include "lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kAhead = 6;  // pages whose bounds memory is asked for ahead of their turn
constexpr int64_t kLine = 64;

KVFOLD_INLINE Vec numbers_at(const uint8_t* p) { return reinterpret_cast<Vec>(widen_shorts(p) << 16); }

// The products of R rows with a page's `numbers` bfloat16; rows are padded with zeros to whole vectors.
template <int R>
KVFOLD_INLINE Vec4 products(const uint8_t* page, const float* rows, int64_t numbers, int64_t stride) {
    Vec sum[R] = {};
    int64_t i = 0;
    for (; i + kLanes <= numbers; i += kLanes) {
        const Vec x = numbers_at(page + 2 * i);
        KVFOLD_UNROLL
        for (int r = 0; r < R; ++r) sum[r] += x * load(rows + r * stride + i);
    }
    if (i < numbers) {
        uint8_t last[2 * kLanes] = {};
        __builtin_memcpy(last, page + 2 * i, static_cast<size_t>(2 * (numbers - i)));
        const Vec x = numbers_at(last);
        for (int r = 0; r < R; ++r) sum[r] += x * load(rows + r * stride + i);
    }
    return folded<Sum, R>(sum);
}

KVFOLD_INLINE float greater(float a, float b) { return a > b ? a : b; }

}  // namespace

void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out) {
    for (int64_t i = first; i < last; ++i) {
        if (i + kAhead < last && call.pages[i + kAhead] >= 0) {
            const uint8_t* const ahead = call.base + call.pages[i + kAhead];
            for (int64_t b = 0; b < 2 * call.numbers; b += kLine) __builtin_prefetch(ahead + b);
        }
        if (call.pages[i] < 0) {
            out[i] = -__builtin_inff();
            continue;
        }
        const uint8_t* const page = call.base + call.pages[i];
        float most = -__builtin_inff();
        bool real = true;
        int64_t r = 0;
        const auto take = [&](Vec4 found, int count) {
            for (int k = 0; k < count; ++k) {
                real = real && found[k] == found[k];
                most = greater(found[k], most);
            }
        };
        for (; r + 4 <= call.rows; r += 4) {
            take(products<4>(page, call.q + r * call.stride, call.numbers, call.stride), 4);
        }
        for (; r < call.rows; ++r) take(products<1>(page, call.q + r * call.stride, call.numbers, call.stride), 1);
        out[i] = real ? most : __builtin_inff();
    }
}

}  // namespace kvfold::KVFOLD_ISA
