// A tile: the next few visible tokens of a walk, wherever in their pages they lie, and where scratch comes from.
#pragma once

#include "attend_pages.hpp"
#include "lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kTile = 64;  // tokens at most: what is staged of them stays in the nearest cache
static_assert(kTile % kLanes == 0);

KVFOLD_INLINE int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
KVFOLD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Cuts scratch into parts; with no memory behind it, it counts how much is wanted.
struct Bump {
    uint8_t* base;
    size_t used = 0;

    template <typename T>
    T* take(int64_t count) {
        T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += static_cast<size_t>(rounded_up(count * static_cast<int64_t>(sizeof(T)), 64));
        return part;
    }
};

// Sixteen tokens. `in_line`: they lie one after the other in one page, and `row` and `meta` are not filled in.
struct Sixteen {
    bool in_line;
    const uint8_t* page;
    int64_t slot;  // of the first
};

struct Tile {
    int64_t count;
    bool biased;
    Sixteen part[kTile / 16];
    const uint8_t* page[kTile];  // of tokens that are not in line
    int64_t slot[kTile];
    alignas(64) float bias[kTile];

    // Where the codes of the tokens from `first` (a multiple of 16) on begin.
    KVFOLD_INLINE void rows(const Side& side, int64_t first, const uint8_t** row) const {
        const Sixteen& some = part[first / 16];
        if (some.in_line) {
            const uint8_t* base = some.page + side.codes_offset + some.slot * side.row_bytes;
            KVFOLD_UNROLL
            for (int64_t i = 0; i < 16; ++i) row[i] = base + i * side.row_bytes;
        } else {
            for (int64_t i = 0; i < 16; ++i) {
                row[i] = page[first + i] + side.codes_offset + slot[first + i] * side.row_bytes;
            }
        }
    }

    KVFOLD_INLINE const uint8_t* page_of(int64_t t) const {
        return part[t / 16].in_line ? part[t / 16].page : page[t];
    }
    KVFOLD_INLINE int64_t slot_of(int64_t t) const {
        return part[t / 16].in_line ? part[t / 16].slot + t % 16 : slot[t];
    }
};

// Walks the visible slots of a sequence's pages, in order, a tile at a time.
class Slots {
  public:
    Slots(const Call& call, const Walk& walk, int64_t unit, int64_t limit, bool within_page)
        : call_(call),
          pages_(call.pages + unit * call.pages_per_seq),
          bias_(call.bias == nullptr ? nullptr
                                     : call.bias + unit / call.heads * call.pages_per_seq * call.block_size),
          limit_(limit),
          last_(walk.last),
          page_(walk.first),
          slot_(0),
          within_page_(within_page) {
        while (last_ > page_ && pages_[last_ - 1] < 0) --last_;
    }

    void next(Tile& tile) {
        tile.count = 0;
        tile.biased = bias_ != nullptr;
        while (tile.count < limit_ && page_ < last_) {
            const bool page_ends = fill(tile);
            if (page_ends && within_page_ && tile.count > 0) break;
        }
    }

  private:
    // The next sixteen tokens; whether they end a page.
    bool fill(Tile& tile) {
        Sixteen& some = tile.part[tile.count / 16];
        if (some.in_line = bias_ == nullptr && slot_ + 16 <= call_.block_size; some.in_line) {
            some.page = page();
            some.slot = slot_;
            tile.count += 16;
            return step(16);
        }
        const int64_t first = tile.count, end = first + 16;
        bool page_ends = false;
        while (tile.count < end && page_ < last_ && !(page_ends && within_page_)) {
            const float bias = bias_ == nullptr ? 0.0F : bias_[page_ * call_.block_size + slot_];
            if (bias > kHidden) {
                tile.page[tile.count] = page();
                tile.slot[tile.count] = slot_;
                tile.bias[tile.count++] = bias;
            }
            page_ends = step(1);
        }
        // What is lacking repeats a token: memory that is there, and that gets no weight.
        for (int64_t t = tile.count; t < end && tile.count > first; ++t) {
            tile.page[t] = tile.page[first];
            tile.slot[t] = tile.slot[first];
        }
        if (tile.count > first && tile.count < end) page_ends = true;
        return page_ends;
    }

    bool step(int64_t slots) {
        slot_ += slots;
        if (slot_ < call_.block_size) return false;
        slot_ = 0;
        ++page_;
        return true;
    }

    const uint8_t* page() const { return call_.arena + pages_[page_] + call_.shift; }

    const Call& call_;
    const int64_t* pages_;
    const float* bias_;
    int64_t limit_, last_, page_, slot_;
    bool within_page_;
};

// Asks for the memory of the tile after this one, a few lines at a time between other work: pages lie anywhere, so the
// processor cannot guess where, and it keeps track of no more than a dozen or so lines at once.
class Fetcher {
  public:
    Fetcher(const Call& call) : call_(call) {}

    // `turns`: about how many times it will be its turn.
    void begin(const Tile& tile, int64_t turns) {
        runs_ = at_ = 0;
        const Side& other = call_.parts > 1 ? *call_.keys[1] : *call_.value;
        for (int64_t t = 0; t < tile.count; t += 16) {
            const Sixteen& some = tile.part[t / 16];
            if (!some.in_line) continue;  // tokens that few of their neighbours are read with are not worth asking for
            int64_t end = some.slot + 16;
            for (; t + 16 < tile.count && follows(tile.part[t / 16 + 1], some, end); t += 16) end += 16;
            add(*call_.keys[0], some.page, some.slot, end);
            add(other, some.page, some.slot, end);
        }
        if (runs_ == 0) return;
        byte_ = run_[0].first;
        int64_t bytes = 0;
        for (int64_t i = 0; i < runs_; ++i) bytes += run_[i].last - run_[i].first;
        share_ = bytes / 64 / turns + 1;
    }

    KVFOLD_INLINE void turn() {
        for (int64_t i = 0; i < share_ && at_ < runs_; ++i) {
            __builtin_prefetch(byte_, 0, 2);
            byte_ += 64;
            if (byte_ < run_[at_].last) continue;
            if (++at_ < runs_) byte_ = run_[at_].first;
        }
    }

  private:
    struct Run {
        const uint8_t *first, *last;
    };

    static bool follows(const Sixteen& next, const Sixteen& some, int64_t slot) {
        return next.in_line && next.page == some.page && next.slot == slot;
    }

    // In the order of addresses, and regions that touch as one: the processor follows along.
    void add(const Side& side, const uint8_t* page, int64_t slot, int64_t end) {
        add(page + side.codes_offset + slot * side.row_bytes, page + side.codes_offset + end * side.row_bytes);
        if (side.meta == Meta::none || side.meta == Meta::channels) return;
        const int64_t bytes = side.meta == Meta::stretch ? 1 : 4 * side.groups;
        add(page + side.meta_offset + slot * bytes, page + side.meta_offset + end * bytes);
    }

    void add(const uint8_t* first, const uint8_t* last) {
        if (runs_ > 0 && first >= run_[runs_ - 1].last && first - run_[runs_ - 1].last < 64) {
            run_[runs_ - 1].last = last;
        } else {
            run_[runs_++] = {first, last};
        }
    }

    const Call& call_;
    Run run_[4 * kTile / 16];
    int64_t runs_ = 0, at_ = 0, share_ = 1;
    const uint8_t* byte_ = nullptr;
};

// 2 ** (m / 8), the stretch that the byte m stands for.
KVFOLD_INLINE float stretch_of(uint8_t m) {
    if (m == 255) return __builtin_nanf("");
    constexpr float kEighths[8] = {1.0F,        1.09050773F, 1.18920712F, 1.29683955F,
                                   1.41421356F, 1.54221083F, 1.68179283F, 1.83400809F};
    const auto power = static_cast<uint32_t>(m / 8 + 127) << 23;
    return kEighths[m % 8] * __builtin_bit_cast(float, power);
}

// A token's scale and zero in a group: `scale` belongs to its codes, `zero` to what a dim's share of it is.
KVFOLD_INLINE void load_meta(const Side& side, const Tile& tile, int64_t group, float* scales, float* zeros) {
    if (side.meta == Meta::stretch) {
        for (int64_t t = 0; t < tile.count; ++t) {
            scales[t] = zeros[t] = stretch_of(tile.page_of(t)[side.meta_offset + tile.slot_of(t)]);
        }
        for (int64_t t = tile.count; t < kTile; ++t) scales[t] = zeros[t] = 0.0F;
        return;
    }
    alignas(64) uint32_t pairs[kTile] = {};
    const int64_t step = 4 * side.groups, offset = side.meta_offset + 4 * group;
    for (int64_t t = 0; t < tile.count; t += 16) {
        const Sixteen& some = tile.part[t / 16];
        if (some.in_line && step == 4) {
            __builtin_memcpy(pairs + t, some.page + offset + 4 * some.slot, 64);
            continue;
        }
        for (int64_t i = t; i < smaller(t + 16, tile.count); ++i) {
            __builtin_memcpy(pairs + i, tile.page_of(i) + offset + step * tile.slot_of(i), 4);
        }
    }
    for (int64_t t = 0; t < kTile; t += kLanes) {
        const Words pair = *reinterpret_cast<const Words*>(pairs + t);
        store(scales + t, reinterpret_cast<Vec>(pair << 16));
        store(zeros + t, reinterpret_cast<Vec>(pair & 0xFFFF0000U));
    }
}

KVFOLD_INLINE float middle(int64_t bits) { return static_cast<float>((1 << bits) - 1) * 0.5F; }

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
