// The kernel itself: a walk over pages with an online softmax. This file is compiled once for each instruction set, with
// KVFOLD_ISA naming the namespace and KVFOLD_LANES the floats in a vector; attend_pages.cpp picks one at run time. What
// it includes keeps to the rule of vectors.hpp.
#include <new>  // placement new: the one inline function from outside, and one without instructions

#include "float_rows.hpp"
#if defined(__AVX512VNNI__)
#include "code_keys.hpp"
#include "code_values.hpp"
#endif

namespace kvfold::KVFOLD_ISA {
namespace {

// -------------------------------------------------------------------------------------------------- online softmax

struct Softmax {
    float *scores;               // [rows, kTile]: scores, then weights
    float *peak, *sum, *decay;   // [rows]

    Softmax(int64_t rows, Bump& own, Bump& shared)
        : scores(shared.take<float>(rows * kTile)), peak(own.take<float>(rows)), sum(own.take<float>(rows)),
          decay(shared.take<float>(rows)) {}

    void begin(int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            peak[r] = kNothing;
            sum[r] = 0.0F;
        }
    }

    // Turns rows of scores into weights against the running peak; `decay` is what the peak's rise makes of what stands.
    // Scores past the tile's count are those of tokens that are not there: they get weight 0.
    void weigh(const Call& call, const Tile& tile, int64_t rows, Fetcher& fetcher) const {
        if (call.softcap != 0.0F || tile.biased) adjust(call, tile, rows);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) weigh_rows<4>(tile, r, fetcher);
        for (; r + 2 <= rows; r += 2) weigh_rows<2>(tile, r, fetcher);
        if (r < rows) weigh_rows<1>(tile, r, fetcher);
    }

  private:
    void adjust(const Call& call, const Tile& tile, int64_t rows) const {
        const Vec cap = splat(call.softcap), inverse = splat(1.0F / call.softcap);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t t = 0; t < tile.count; t += kLanes) {
                Vec score = load(scores + r * kTile + t);
                if (call.softcap != 0.0F) score = cap * tanh_of(score * inverse);
                if (tile.biased) score += load(tile.bias + t);
                store(scores + r * kTile + t, score);
            }
        }
    }

    // Rows side by side keep the processor busy where one would wait for itself.
    template <int N>
    KVFOLD_INLINE void weigh_rows(const Tile& tile, int64_t r, Fetcher& fetcher) const {
        float* const score = scores + r * kTile;
        const int64_t width = rounded_up(tile.count, 16);
        for (int64_t t = tile.count; t < width; ++t) {
            for (int n = 0; n < N; ++n) score[n * kTile + t] = -__builtin_inff();
        }
        Vec most[N], sums[N] = {};
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) most[n] = load(score + n * kTile);
        for (int64_t t = kLanes; t < width; t += kLanes) {
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) most[n] = larger(load(score + n * kTile + t), most[n]);
        }
        Vec4 before = {}, sum = {};
        __builtin_memcpy(&before, peak + r, N * sizeof(float));
        __builtin_memcpy(&sum, this->sum + r, N * sizeof(float));
        const Vec4 highest = folded<Greatest, N>(most), top = highest > before ? highest : before;
        for (int64_t t = 0; t < width; t += kLanes) {
            fetcher.turn();
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                const Vec weight = exp_negative(load(score + n * kTile + t) - splat(top[n]));
                sums[n] += weight;
                store(score + n * kTile + t, weight);
            }
        }
        for (int64_t t = width; t < kTile; t += kLanes) {
            for (int n = 0; n < N; ++n) store(score + n * kTile + t, Vec{});
        }
        const Vec4 fall = before - top;
        Vec falls = {};
        __builtin_memcpy(&falls, &fall, sizeof fall);
        const Vec decays = exp_negative(falls);
        Vec4 kept;
        __builtin_memcpy(&kept, &decays, sizeof kept);
        sum = sum * kept + folded<Sum, N>(sums);
        __builtin_memcpy(decay + r, &kept, N * sizeof(float));
        __builtin_memcpy(peak + r, &top, N * sizeof(float));
        __builtin_memcpy(this->sum + r, &sum, N * sizeof(float));
    }
};

// ------------------------------------------------------------------------------------------------------------ walks

#if defined(__AVX512VNNI__)
bool keys_fit(const Call& call) {
    return CodeKeys::fits(*call.keys[0]) && (call.parts == 1 || CodeKeys::fits(*call.keys[1]));
}
bool values_fit(const Call& call) { return CodeValues::fits(*call.value); }
#else
using CodeKeys = FloatKeys;
using CodeValues = FloatValues;
struct ProductScope {
    explicit ProductScope(int64_t) {}
};
constexpr int64_t kBlockRows = 8;
bool keys_fit(const Call&) { return false; }
bool values_fit(const Call&) { return false; }
#endif

// One head of a walk. What outlives a tile is its `own`, the rest is `shared` by the heads, which take turns.
template <typename Keys, typename Values>
struct Head {
    Softmax softmax;
    Keys first, second;
    Values values;

    Head(const Call& call, int64_t rows, Bump& own, Bump shared)
        : softmax(rows, own, shared), first(*call.keys[0], rows, own, shared),
          second(*call.keys[call.parts - 1], rows, own, shared), values(*call.value, rows, own, shared) {
        end = shared.used;
    }

    void begin(const Call& call, const float* q, int64_t rows, bool first_head) {
        softmax.begin(rows);
        first.begin(q, call.key_dims(), call.scale, first_head);
        if (call.parts > 1) second.begin(q + call.keys[0]->dim, call.key_dims(), call.scale, first_head);
        values.begin(first_head);
    }

    void attend(const Call& call, int64_t rows, const Tile& tile, Fetcher& fetcher) {
        // Everything is staged before anything is multiplied: AMX takes it from the cache, which it has reached by then.
        first.stage(tile, fetcher);
        if (call.parts > 1) second.stage(tile, fetcher);
        values.stage(tile, fetcher);
        first.score(tile, fetcher, false, softmax.scores);
        if (call.parts > 1) second.score(tile, fetcher, true, softmax.scores);
        softmax.weigh(call, tile, rows, fetcher);
        values.add(tile, fetcher, softmax.scores, softmax.decay);
    }

    void finish(const Call& call, int64_t rows, float* out, float* lse) const {
        for (int64_t r = 0; r < rows; ++r) {
            const bool nothing = softmax.sum[r] == 0.0F;  // NaN is not nothing
            values.finish(r, nothing ? 0.0F : 1.0F / softmax.sum[r], out + r * call.value->dim);
            lse[r] = nothing ? kNothing : softmax.peak[r] + __builtin_logf(softmax.sum[r]);
        }
    }

    size_t end = 0;  // of what is shared
};

template <typename Keys, typename Values>
size_t scratch_of(const Call& call) {
    Bump own{nullptr};
    const Head<Keys, Values> head(call, smaller(call.rows, kMostRows), own, Bump{nullptr});
    return head.end + static_cast<size_t>(smaller(call.heads, kMostHeads)) * own.used;
}

bool any_channels(const Call& call) {
    return call.keys[0]->meta == Meta::channels || call.keys[call.parts - 1]->meta == Meta::channels;
}

// Tiles that memory is asked for ahead of their turn.
constexpr int64_t kAhead = 2;

template <typename Keys, typename Values>
void walk_pages(const Call& call, const Walk& walk, void* scratch) {
    using AHead = Head<Keys, Values>;
    // What is unpacked to floats should stay in the nearest cache; scales of channels are good for one page.
    const bool floats = !keys_fit(call) || !values_fit(call), channels = any_channels(call);
    Bump nothing{nullptr};
    Bump own{static_cast<uint8_t*>(scratch), AHead(call, walk.rows, nothing, Bump{nullptr}).end};
    alignas(AHead) uint8_t heads_memory[kMostHeads * sizeof(AHead)];
    alignas(Slots) uint8_t slots_memory[kMostHeads * sizeof(Slots)];
    auto* heads = reinterpret_cast<AHead*>(heads_memory);
    auto* slots = reinterpret_cast<Slots*>(slots_memory);
    for (int64_t h = 0; h < walk.heads; ++h) {
        new (heads + h) AHead(call, walk.rows, own, Bump{static_cast<uint8_t*>(scratch)});
        new (slots + h) Slots(call, walk, walk.unit + h, floats ? 32 : kTile, channels);
        heads[h].begin(call, call.q + ((walk.unit + h) * call.rows + walk.row) * call.key_dims(), walk.rows, h == 0);
    }

    const ProductScope scope(2 * smaller(walk.rows, kBlockRows));
    Fetcher fetcher(call);
    // One tile is attended while the last of the others is asked for.
    Tile tiles[kAhead + 1];
    int64_t ahead = 0;
    const auto look_ahead = [&](Tile& into) {
        slots[ahead].next(into);
        ahead = ahead + 1 < walk.heads ? ahead + 1 : 0;
    };
    for (int64_t i = 0; i < kAhead; ++i) look_ahead(tiles[i]);
    for (int64_t h = 0, now = 0; tiles[now].count > 0; h = h + 1 < walk.heads ? h + 1 : 0) {
        Tile& last = tiles[now == 0 ? kAhead : now - 1];
        look_ahead(last);
        fetcher.begin(last, 8 + (walk.rows + 3) / 4 * 16);
        heads[h].attend(call, walk.rows, tiles[now], fetcher);
        now = now == kAhead ? 0 : now + 1;
    }
    for (int64_t h = 0; h < walk.heads; ++h) {
        const int64_t at = h * walk.stride;
        heads[h].finish(call, walk.rows, walk.out + at * call.value->dim, walk.lse + at);
    }
}

size_t scratch(const Call& call) {
    if (keys_fit(call)) {
        return values_fit(call) ? scratch_of<CodeKeys, CodeValues>(call) : scratch_of<CodeKeys, FloatValues>(call);
    }
    return values_fit(call) ? scratch_of<FloatKeys, CodeValues>(call) : scratch_of<FloatKeys, FloatValues>(call);
}

void walk(const Call& call, const Walk& walk, void* scratch) {
    const bool keys = keys_fit(call), values = values_fit(call);
    const auto run = keys ? (values ? walk_pages<CodeKeys, CodeValues> : walk_pages<CodeKeys, FloatValues>)
                          : (values ? walk_pages<FloatKeys, CodeValues> : walk_pages<FloatKeys, FloatValues>);
    run(call, walk, scratch);
}

}  // namespace

#define KVFOLD_TEXT(x) #x
#define KVFOLD_NAME(x) KVFOLD_TEXT(x)
const Variant variant = {KVFOLD_NAME(KVFOLD_ISA), scratch, walk};

}  // namespace kvfold::KVFOLD_ISA
