// Rows into pages, out of them and between them, for many pages at once: where each row lies, and which thread takes
// it. No torch, no Python.
#pragma once

#include <cstdint>
#include <string>

#include "store.hpp"

namespace kvfold {

// The pages of one format in an arena, as one kind of block has them.
struct PageLayout {
    int64_t block_size, page_bytes;
    StoredSide k, v;
};

// A run of tokens as Python lays it down: the byte offset of their block, how many they are, the slot and the token of
// the first. The pages of the block's heads lie one after the other, each `page_bytes` long.
struct TokenRun {
    int64_t offset, count, slot, token;
};

// Which rows of which pages a call is about. A unit is what lies in one page: with `runs`, a run of one head, heads
// fastest; with `slot`, one row; else a page.
struct Units {
    uint8_t* arena;
    int64_t arena_bytes;
    int64_t shift;           // added to every offset and address: leads to the layer's own pages
    int64_t count;
    const int64_t* addr;     // [count]: byte offsets of pages; null with `runs`
    const int64_t* slot;     // [count], or null
    const TokenRun* runs;    // [count / heads], or null
    int64_t heads;           // with `runs`
    int64_t first_matrix, matrices;  // unit u turns with matrix first_matrix + u % matrices
};

// Numbers of keys or values in a tensor: a unit's rows begin `unit_stride` bytes after the one's before (with runs:
// at the run's token, and `unit_stride` bytes after the head's before).
struct Dense {
    uint8_t* data;
    int64_t unit_stride, row_stride;
    Number number;
};

// What is wrong with the units of a layout, for people; empty: nothing. `tokens`: how many a run may reach for.
std::string fault_of(const PageLayout& layout, const Units& units, int64_t tokens);

// Numbers into pages; keys and values may be left out (null data). All on at most `threads` threads.
void write_units(const PageLayout& layout, const Units& units, const Dense& k, const Dense& v,
                 const StoreVariant& variant, int threads);

// Pages as numbers, of the model (`turned`) or of the stored basis.
void read_units(const PageLayout& layout, const Units& units, const Dense& k, const Dense& v, bool turned,
                const StoreVariant& variant, int threads);

// Pages into pages of another layout; each side has a raw end.
void recode_units(const PageLayout& source, const Units& from, const PageLayout& target, const Units& to,
                  const StoreVariant& variant, int threads);

// Rows into other slots, bit for bit; all are read before any is written.
void copy_rows(const PageLayout& layout, const Units& from, const Units& to);

// Blocks of `bytes` from byte offsets `from [count]` to `to [count]`; all are read before any is written. Targets do not
// overlap each other.
void copy_blocks(uint8_t* arena, const int64_t* from, const int64_t* to, int64_t count, int64_t bytes, int threads);

// Zeros over blocks of `bytes` at byte offsets `at [count]`.
void zero_blocks(uint8_t* arena, const int64_t* at, int64_t count, int64_t bytes, int threads);

// The builds this processor can run, best first; `count` of them.
const StoreVariant* const* store_variants(size_t* count);

}  // namespace kvfold
