// Bounds of the pages of one list: the interface of what is compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace kvfold {

// A list of pages and the queries of its KV head.
struct PageRows {
    const float* q;        // [rows, stride]: the negative parts of a query's numbers, then the positive ones; zeros behind
    const uint8_t* base;   // of the bounds of a page at address 0
    const int64_t* pages;  // addresses; negative: no page
    int64_t rows, numbers, stride;  // `numbers`: of a page's bounds, bfloat16, twice the dims
};

// A multiple of this many floats is a whole number of vectors in any build.
inline constexpr int64_t kMostLanes = 16;

// The greatest product of any row with each of the pages [first, last), into `out` at their places: infinity where it is
// not a number, minus infinity where there is no page.
using BoundRows = void (*)(const PageRows& call, int64_t first, int64_t last, float* out);

namespace baseline { void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out); }
namespace avx2 { void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out); }
namespace avx512 { void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out); }
namespace amx { void bound_rows(const PageRows& call, int64_t first, int64_t last, float* out); }

}  // namespace kvfold
