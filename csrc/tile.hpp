// A tile: the next few visible tokens of a walk, wherever in their pages they lie, and where scratch comes from.
#pragma once

#include "attend_pages.hpp"
#include "lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kTile = 64;  // tokens at most; as many bytes as an AMX tile row
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

struct Tile {
    int64_t count;
    bool biased;
    const uint8_t* page[kTile];
    int64_t slot[kTile];
    alignas(64) float bias[kTile];
};

// Walks the visible slots of a sequence's pages, in order, a tile at a time.
class Slots {
  public:
    Slots(const Call& call, const Walk& walk, int64_t limit, bool within_page)
        : call_(call),
          pages_(call.pages + walk.unit * call.pages_per_seq),
          bias_(call.bias == nullptr ? nullptr
                                     : call.bias + walk.unit / call.heads * call.pages_per_seq * call.block_size),
          limit_(limit),
          last_(walk.last),
          page_(walk.first),
          slot_(0),
          within_page_(within_page) {}

    // What a tile lacks of whole vectors repeats its first token: memory that is there, and that gets no weight.
    void next(Tile& tile) {
        int64_t count = 0;
        while (count < limit_ && page_ < last_) {
            const uint8_t* page = call_.arena + pages_[page_] + call_.shift;
            const int64_t end = call_.block_size;
            if (bias_ == nullptr) {
                for (; slot_ < end && count < limit_; ++slot_, ++count) {
                    tile.page[count] = page;
                    tile.slot[count] = slot_;
                }
            } else {
                const float* bias = bias_ + page_ * end;
                for (; slot_ < end && count < limit_; ++slot_) {
                    if (bias[slot_] <= kHidden) continue;
                    tile.page[count] = page;
                    tile.slot[count] = slot_;
                    tile.bias[count++] = bias[slot_];
                }
            }
            if (slot_ == end) {
                slot_ = 0;
                ++page_;
                if (within_page_ && count > 0) break;
            }
        }
        tile.count = count;
        tile.biased = bias_ != nullptr;
        const int64_t whole = count == 0 ? 0 : rounded_up(count, 16);
        for (int64_t t = count; t < whole; ++t) {
            tile.page[t] = tile.page[0];
            tile.slot[t] = tile.slot[0];
        }
    }

  private:
    const Call& call_;
    const int64_t* pages_;
    const float* bias_;
    int64_t limit_, last_, page_, slot_;
    bool within_page_;
};

KVFOLD_INLINE const uint8_t* row_of(const Side& side, const Tile& tile, int64_t t) {
    return tile.page[t] + side.codes_offset + tile.slot[t] * side.row_bytes;
}

// Asks for the rows `first .. first + 15` of a later tile: pages lie anywhere, the processor cannot guess where.
KVFOLD_INLINE void fetch(const Side& side, const Tile& tile, int64_t first) {
    if (first >= tile.count) return;
    for (int64_t t = first; t < first + 16; ++t) {
        const uint8_t* row = row_of(side, tile, t);
        for (int64_t byte = 0; byte < side.row_bytes; byte += 64) __builtin_prefetch(row + byte);
    }
    if (side.meta != Meta::none) {
        const int64_t bytes = side.meta == Meta::stretch ? 1 : 4 * side.groups;
        __builtin_prefetch(tile.page[first] + side.meta_offset + tile.slot[first] * bytes);
    }
}

// 2 ** (m / 8), the stretch that the byte m stands for.
KVFOLD_INLINE float stretch_of(uint8_t m) {
    if (m == 255) return __builtin_nanf("");
    constexpr float kEighths[8] = {1.0F,        1.09050773F, 1.18920712F, 1.29683955F,
                                   1.41421356F, 1.54221083F, 1.68179283F, 1.83400809F};
    const auto power = static_cast<uint32_t>(m / 8 + 127) << 23;
    return kEighths[m % 8] * __builtin_bit_cast(float, power);
}

// A token's scale and zero in a group: `scale` belongs to its codes, `zero` to what `zero_share` says of a dim.
KVFOLD_INLINE void load_meta(const Side& side, const Tile& tile, int64_t group, float* scales, float* zeros) {
    if (side.meta == Meta::stretch) {
        for (int64_t t = 0; t < tile.count; ++t) {
            scales[t] = zeros[t] = stretch_of(tile.page[t][side.meta_offset + tile.slot[t]]);
        }
    } else {
        alignas(64) uint32_t pairs[kTile];
        const int64_t step = 4 * side.groups, offset = side.meta_offset + 4 * group;
        for (int64_t t = 0; t < tile.count; ++t) {
            __builtin_memcpy(pairs + t, tile.page[t] + offset + step * tile.slot[t], 4);
        }
        for (int64_t t = tile.count; t < kTile; ++t) pairs[t] = 0;
        for (int64_t t = 0; t < kTile; t += kLanes) {
            const Words pair = *reinterpret_cast<const Words*>(pairs + t);
            store(scales + t, reinterpret_cast<Vec>(pair << 16));
            store(zeros + t, reinterpret_cast<Vec>(pair & 0xFFFF0000U));
        }
        return;
    }
    for (int64_t t = tile.count; t < kTile; ++t) scales[t] = zeros[t] = 0.0F;
}

KVFOLD_INLINE float middle(int64_t bits) { return static_cast<float>((1 << bits) - 1) * 0.5F; }

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
