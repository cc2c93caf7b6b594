// Decode attention over pages where they lie: the interface of the kernel. No torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfold {

// How the numbers of a key or value row are stored. The values are part of the Python binding.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, code8 = 3, code4 = 4, code2 = 5 };

// One side (keys or values) of a page.
struct Side {
    Storage storage;
    int64_t dim;           // numbers in a row that mean something
    int64_t stored_dim;    // codes in a row: `dim` padded so that they fill whole bytes; `dim` when raw
    int64_t row_bytes;     // from one token to the next
    int64_t codes_offset;  // of the first row, in bytes from the start of the page
    int64_t meta_offset;   // of the (scale, zero) pairs, one bfloat16 pair a token; unused when raw
};

// One call. Everything is owned by the caller and only read, except `out` and `lse`.
struct Call {
    const float* q;        // [n, heads, group, k.dim], in the basis of the stored keys
    const uint8_t* arena;
    const int64_t* pages;  // [n, heads, pages_per_seq]: byte offsets into the arena
    int64_t shift;         // added to every address: leads to the layer's own pages
    const float* bias;     // [n, pages_per_seq * block_size] added to the scores, or null
    float* out;            // [n, heads, group, v.dim]
    float* lse;            // [n, heads, group]
    int64_t n, heads, group, pages_per_seq, block_size;
    Side k, v;
    float scale;
};

// A token whose bias is at most this is hidden: its memory is not read.
inline constexpr float kHidden = -1e30F;

// What a row that sees nothing reports: finite, so that a merge weighs it with 0 and never makes NaN.
inline constexpr float kNothing = -3.4028234663852886e38F;

// Tokens unpacked at a time: keys and values of a tile stay in the processor's nearest caches.
inline constexpr int64_t kTile = 32;

// Rows in scratch are padded to multiples of this many floats, on every build.
inline constexpr int64_t kPad = 16;

// Attention of one (sequence, head) over its pages [first, last): out [group, v.dim], lse [group].
using AttendSpan = void (*)(const Call&, int64_t unit, int64_t first, int64_t last, float* out, float* lse,
                            float* scratch);

// One build of the kernel.
struct Variant {
    const char* name;
    AttendSpan attend_span;
};

namespace baseline { extern const Variant variant; }
namespace avx2 { extern const Variant variant; }
namespace avx512 { extern const Variant variant; }

// Floats of scratch, aligned to 64 bytes, that `attend_span` needs for this call.
size_t scratch_floats(const Call& call);

// The variants this processor can run, best first; `count` of them.
const Variant* const* variants(size_t* count);

// Runs the call with `variant` on at most `threads` threads.
void attend_pages(const Call& call, const Variant& variant, int threads);

}  // namespace kvfold
