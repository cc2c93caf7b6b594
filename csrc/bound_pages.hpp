// What pages can matter at most to a query, by the bounds of their keys, and the pages that can most. No torch, no Python.
#pragma once

#include <cstdint>

#include "attend_pages.hpp"

namespace kvfold {

// One call. Everything is owned by the caller and only read, except `bounds` and `chosen`.
struct BoundsCall {
    const float* q;        // [n, heads, rows, dims], in the model's basis
    const uint8_t* arena;
    const int64_t* pages;  // [n, heads, per_list]: byte offsets into the arena; -1: no page
    int64_t shift;         // added to every address
    int64_t summary;       // byte offset in a page of two rows of bfloat16: the least of each channel, the greatest
    const float* bias;     // [n, heads, per_list], or null
    float* bounds;         // [n, heads, per_list], or null
    int64_t* chosen;       // [n, heads, count], or null: places of the greatest bounds, rising, -1 behind the last
    int64_t count, n, heads, rows, dims, per_list;
    float scale;
    float softcap;         // 0: none
};

// Runs the call with `variant` on at most `threads` threads. False: there is no memory.
bool bound_pages(const BoundsCall& call, const Variant& variant, int threads);

}  // namespace kvfold
