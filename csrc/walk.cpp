// The kernel itself: a walk over pages with an online softmax. This file is compiled once for each instruction set, with
// KVFOLD_ISA naming the namespace and KVFOLD_LANES the floats in a vector; attend_pages.cpp picks one at run time. What
// it includes keeps to the rule of lanes.hpp.
#include "float_rows.hpp"
#if defined(__AVX512VNNI__)
#include "code_sides.hpp"
#endif

namespace kvfold::KVFOLD_ISA {
namespace {

// -------------------------------------------------------------------------------------------------- online softmax

struct Softmax {
    float *scores;               // [rows, kTile]: scores, then weights
    float *peak, *sum, *decay;   // [rows]

    Softmax(int64_t rows, Bump& bump)
        : scores(bump.take<float>(rows * kTile)), peak(bump.take<float>(rows)), sum(bump.take<float>(rows)),
          decay(bump.take<float>(rows)) {}

    void begin(int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            peak[r] = kNothing;
            sum[r] = 0.0F;
        }
    }

    // Turns a row of scores into weights against the running peak; `decay` is what the peak's rise makes of what
    // stands. Scores past the tile's count are those of tokens that are not there: they get weight 0.
    void weigh(const Call& call, const Tile& tile, int64_t r) const {
        float* score = scores + r * kTile;
        if (call.softcap != 0.0F) {
            const Vec cap = splat(call.softcap), inverse = splat(1.0F / call.softcap);
            for (int64_t t = 0; t < tile.count; t += kLanes) store(score + t, cap * tanh_of(load(score + t) * inverse));
        }
        if (tile.biased) {
            for (int64_t t = 0; t < tile.count; t += kLanes) store(score + t, load(score + t) + load(tile.bias + t));
        }
        const int64_t width = rounded_up(tile.count, 16);
        for (int64_t t = tile.count; t < width; ++t) score[t] = -__builtin_inff();
        Vec most = load(score);
        for (int64_t t = kLanes; t < width; t += kLanes) most = larger(load(score + t), most);
        const float highest = greatest(most), top = highest > peak[r] ? highest : peak[r];
        Vec total_weight = {};
        for (int64_t t = 0; t < width; t += kLanes) {
            const Vec weight = exp_negative(load(score + t) - splat(top));
            total_weight += weight;
            store(score + t, weight);
        }
        for (int64_t t = width; t < kTile; t += kLanes) store(score + t, Vec{});
        decay[r] = exp_negative(splat(peak[r] - top))[0];
        peak[r] = top;
        sum[r] = sum[r] * decay[r] + total(total_weight);
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

template <typename Keys, typename Values>
struct State {
    Softmax softmax;
    Keys first, second;
    Values values;

    State(const Call& call, int64_t rows, Bump& bump)
        : softmax(rows, bump), first(*call.keys[0], rows, bump),
          second(*call.keys[call.parts - 1], rows, bump), values(*call.value, rows, bump) {}
};

template <typename Keys, typename Values>
size_t scratch_of(const Call& call) {
    Bump bump{nullptr};
    const State<Keys, Values> state(call, smaller(call.rows, kMostRows), bump);
    return bump.used;
}

template <typename Keys, typename Values>
void walk_pages(const Call& call, const Walk& walk, void* scratch) {
    Bump bump{static_cast<uint8_t*>(scratch)};
    State<Keys, Values> s(call, walk.rows, bump);
    const ProductScope scope(2 * smaller(walk.rows, kBlockRows));
    const float* q = call.q + (walk.unit * call.rows + walk.row) * call.key_dims();
    s.softmax.begin(walk.rows);
    s.first.begin(q, call.key_dims(), call.scale);
    if (call.parts > 1) s.second.begin(q + call.keys[0]->dim, call.key_dims(), call.scale);
    s.values.begin();

    // What is unpacked to floats should stay in the nearest cache; scales of channels are good for one page.
    const bool floats = !keys_fit(call) || !values_fit(call), channels = call.keys[0]->meta == Meta::channels;
    Slots slots(call, walk, floats ? 32 : kTile, channels);
    Fetcher fetcher(call);
    Tile tiles[2];
    Tile *tile = &tiles[0], *next = &tiles[1];
    slots.next(*tile);
    while (tile->count > 0) {
        slots.next(*next);
        fetcher.begin(*next, (floats ? 8 : 16) + 4 * walk.rows);
        s.first.score(*tile, fetcher, false, s.softmax.scores);
        if (call.parts > 1) s.second.score(*tile, fetcher, true, s.softmax.scores);
        for (int64_t r = 0; r < walk.rows; ++r) {
            fetcher.turn();
            s.softmax.weigh(call, *tile, r);
        }
        s.values.add(*tile, fetcher, s.softmax.scores, s.softmax.decay);
        Tile* const done = tile;
        tile = next;
        next = done;
    }
    for (int64_t r = 0; r < walk.rows; ++r) {
        const float sum = s.softmax.sum[r];
        const bool nothing = sum == 0.0F;  // NaN is not nothing
        s.values.finish(r, nothing ? 0.0F : 1.0F / sum, walk.out + r * call.value->dim);
        walk.lse[r] = nothing ? kNothing : s.softmax.peak[r] + __builtin_logf(sum);
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
