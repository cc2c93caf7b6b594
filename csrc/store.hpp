// Rows of keys and values on their way into pages, out of them and between them: the interface of the kernels that
// encode and decode. No torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfold {

// What a row of numbers consists of. The values are part of the Python binding. `other` is only ever copied.
enum class Number : int { f32 = 0, bf16 = 1, f16 = 2, other = 3 };

// What a stored row consists of: numbers as they are; or codes, with a scale and a zero for each token and group of
// dims, for each dim of a page, or with the static steps of a calibrated basis (the banded code). Also in the binding.
enum class Code : int { raw = 0, token = 1, channel = 2, banded = 3 };

// Dims that share a width; they are packed by halves or quarters of the band, from byte `byte` of the row on.
struct StoredBand {
    int bits;
    int64_t dims, byte;
};

inline constexpr int kMostStoredBands = 3;

// The way from a model's vectors to stored ones, and back: the fast Hadamard transform in blocks of `block` dims (1:
// none), or a matrix of each head: `(x - mean) @ encode [dim, kept]` and `y @ decode [kept, dim] + mean`.
struct Turn {
    int64_t block;
    const float *encode, *decode, *mean;  // of `matrices` heads each; null: no matrices; mean may be null alone
    int64_t matrices;
};

// One side (keys or values) of a page.
struct StoredSide {
    Code code;
    Number number;         // what raw rows consist of
    int64_t number_bytes;  // of one such number
    int64_t dim;           // numbers in a row of the model
    int64_t stored_dim;    // numbers or codes in a stored row
    int64_t groups;        // of dims, each with a scale and a zero (Code::token)
    int64_t row_bytes, meta_bytes;         // from one token to the next; `meta_bytes` of the page with Code::channel
    int64_t codes_offset, meta_offset;     // in bytes from the start of the page
    bool inner, projected;                 // see kvfold.codecs.affine
    int bands_count;
    StoredBand bands[kMostStoredBands];
    Turn turn;
    // The banded code's tables of 256: the largest excess each stretch takes, its inverse, the stretch.
    const float* stretch;

    // Numbers in a row of the stored basis.
};

// Some rows of one page or tensor, and where they go. With Code::channel they are all rows of a page.
struct Run {
    const uint8_t* from;
    const uint8_t* from_meta;
    int64_t from_stride;
    uint8_t* to;
    uint8_t* to_meta;
    int64_t to_stride;
    int64_t count;
    int64_t matrix;  // which of the side's matrices
};

// Rows that are taken through each step together.
inline constexpr int64_t kRows = 16;

// Rows in scratch are padded to multiples of this many floats, on every build.
inline constexpr int64_t kRowPad = 16;

// One build of the kernels. `encode` takes numbers to stored rows; `decode` takes stored rows to numbers, of the model
// (`turned`) or of the stored basis.
struct StoreVariant {
    const char* name;
    void (*encode)(const StoredSide&, Number from, const Run&, float* scratch);
    void (*decode)(const StoredSide&, Number to, bool turned, const Run&, float* scratch);
    // Rows [count, dim] of floats, their blocks (powers of two that divide dim) transformed; `line`: dim + 64 floats.
    void (*hadamard)(const float* from, float* to, int64_t count, int64_t dim, int64_t block, float* line);
};

namespace baseline { extern const StoreVariant store_variant; }
namespace avx2 { extern const StoreVariant store_variant; }
namespace avx512 { extern const StoreVariant store_variant; }

// Floats of scratch, aligned to 64 bytes, that either of them needs for runs of at most `rows` rows.
size_t store_scratch_floats(const StoredSide& side, int64_t rows);

}  // namespace kvfold
