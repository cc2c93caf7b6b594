// Decode attention over pages where they lie: the interface of the kernel. No torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

// What is compiled once for each instruction set must not leave copies that the linker may choose among.
#define KVFOLD_ALWAYS inline __attribute__((always_inline))

namespace kvfold {

// How the numbers of a row are stored. The values are part of the Python binding.
enum class Storage : int { f32 = 0, bf16 = 1, f16 = 2, codes = 3 };

// What stands beside the codes. `pairs`: for each token and group of dims a (scale, zero) pair of bfloat16.
// `stretch`: for each token one byte m, and a code c means 2**(m / 8) * (c - middle), with the middle of the c's own
// width; m = 255 is NaN. `channels`: for each page a row of scales and a row of zeros, bfloat16, one a dim.
enum class Meta : int { none = 0, pairs = 1, stretch = 2, channels = 3 };

// Codes of one width side by side: `8 / bits` planes of `bytes` dims, one plane in each share of the bytes' bits. Dim
// `p * bytes + j` of the band lies in byte `j`, in the p-th share from the low bits on.
struct Band {
    int64_t bits, byte, bytes;  // `byte`: of the first, in the row
};

inline constexpr int kMostBands = 16;

// Keys or values of a page.
struct Side {
    Storage storage;
    Meta meta;
    int64_t dim;           // numbers in a row that mean something
    int64_t groups;        // of equally many dims; each has a pair of its own
    int64_t group_width;
    int64_t row_bytes;     // from one token to the next
    int64_t codes_offset;  // of the first row, in bytes from the start of the page
    int64_t meta_offset;   // of scales, zeros and stretches; unused when raw
    int64_t bands;
    Band band[kMostBands];

    KVFOLD_ALWAYS bool coded() const { return storage == Storage::codes; }
    KVFOLD_ALWAYS int64_t stored_dim() const {
        if (!coded()) return dim;
        int64_t dims = 0;
        for (int64_t i = 0; i < bands; ++i) dims += band[i].bytes * (8 / band[i].bits);
        return dims;
    }
};

// One call. Everything is owned by the caller and only read, except `out` and `lse`.
struct Call {
    const float* q;        // [n, heads, rows, key dims], in the basis of the stored keys
    const uint8_t* arena;
    const int64_t* pages;  // [n, heads, pages_per_seq]: byte offsets into the arena; with one head, -1 behind the last
    int64_t shift;         // added to every address: leads to the layer's own pages
    const float* bias;     // [n, pages_per_seq * block_size] added to the scores, or null
    float* out;            // [n, heads, rows, value.dim]
    float* lse;            // [n, heads, rows]
    int64_t n, heads, rows, pages_per_seq, block_size;
    const Side* keys[2];   // a key is the one row, or both one after the other (latent pages: latent and rotary part)
    int64_t parts;         // 1 or 2
    const Side* value;     // latent pages: the latent once more
    float scale;
    float softcap;         // 0: none

    KVFOLD_ALWAYS int64_t key_dims() const { return keys[0]->dim + (parts > 1 ? keys[1]->dim : 0); }
};

// A token whose bias is at most this is hidden: its memory is not read.
inline constexpr float kHidden = -1e30F;

// What a row that sees nothing reports: finite, so that a merge weighs it with 0 and never makes NaN.
inline constexpr float kNothing = -3.4028234663852886e38F;

// Query rows that walk the pages together; more go in several walks.
inline constexpr int64_t kMostRows = 64;

// KV heads of a sequence that are walked side by side, at most: their pages of a block mostly lie side by side too, and
// memory gives more when it is read in long runs.
inline constexpr int64_t kMostHeads = 8;

// Where a walk begins and ends, and where its result goes.
struct Walk {
    int64_t unit, heads;  // sequence * call.heads + first head; heads, at most kMostHeads
    int64_t row, rows;    // the heads' query rows, at most kMostRows
    int64_t first, last;  // pages
    float *out, *lse;     // of the first head: [rows, value.dim], [rows]
    int64_t stride;       // rows from one head's result to the next one's
};

// What a build of the kernel gives: `scratch` bytes, aligned to 64, must be handed to every walk of the call.
struct Variant {
    const char* name;
    size_t (*scratch)(const Call&);
    void (*walk)(const Call&, const Walk&, void* scratch);
};

namespace baseline { extern const Variant variant; }
namespace avx2 { extern const Variant variant; }
namespace avx512 { extern const Variant variant; }
namespace amx { extern const Variant variant; }

// The variants this processor can run, best first; `count` of them.
const Variant* const* variants(size_t* count);

// Runs the call with `variant` on at most `threads` threads.
void attend_pages(const Call& call, const Variant& variant, int threads);

}  // namespace kvfold
