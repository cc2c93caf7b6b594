// The kernel itself. This file is compiled once for each instruction set, with KVFOLD_ISA naming the namespace and
// KVFOLD_LANES the floats in a vector; attend_pages.cpp picks one at run time. What it includes keeps to the rule of
// lanes.hpp.
#include "lanes.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

// ------------------------------------------------------------------------------------------------------- products

// scores [G, kTile] of four keys at a time, G queries sharing each key vector that is loaded.
template <int G>
KVFOLD_INLINE void dot_rows(const float* q, const float* rows, int64_t stride, int64_t count, float* scores) {
    for (int64_t t = 0; t < count; t += 4) {
        Vec sum[G][4] = {};
        for (int64_t d = 0; d < stride; d += kLanes) {
            const float* at = rows + t * stride + d;
            const Vec key[4] = {load(at), load(at + stride), load(at + 2 * stride), load(at + 3 * stride)};
            for (int g = 0; g < G; ++g) {
                const Vec query = load(q + g * stride + d);
                for (int i = 0; i < 4; ++i) sum[g][i] += query * key[i];
            }
        }
        for (int g = 0; g < G; ++g) {
            const Vec4 four = totals(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
            __builtin_memcpy(scores + g * kTile + t, &four, sizeof four);
        }
    }
}

// out [G, stride] = out * decay[g] + weights [G, kTile] @ rows [count, stride], C vectors of the row at a time.
template <int G, int C>
KVFOLD_INLINE void add_columns(const float* weights, const float* rows, int64_t stride, int64_t count,
                               const float* decay, float* out) {
    Vec sum[G][C];
    for (int g = 0; g < G; ++g) {
        for (int c = 0; c < C; ++c) sum[g][c] = load(out + g * stride + c * kLanes) * splat(decay[g]);
    }
    for (int64_t t = 0; t < count; ++t) {
        Vec value[C];
        for (int c = 0; c < C; ++c) value[c] = load(rows + t * stride + c * kLanes);
        for (int g = 0; g < G; ++g) {
            const Vec weight = splat(weights[g * kTile + t]);
            for (int c = 0; c < C; ++c) sum[g][c] += weight * value[c];
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int c = 0; c < C; ++c) store(out + g * stride + c * kLanes, sum[g][c]);
    }
}

template <int G>
KVFOLD_INLINE void add_rows(const float* weights, const float* rows, int64_t stride, int64_t count, const float* decay,
                            float* out) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= stride; d += 4 * kLanes) {
        add_columns<G, 4>(weights, rows + d, stride, count, decay, out + d);
    }
    for (; d < stride; d += kLanes) add_columns<G, 1>(weights, rows + d, stride, count, decay, out + d);
}

void dot_group(const float* q, const float* rows, int64_t stride, int64_t count, int64_t group, float* scores) {
    int64_t g = 0;
    for (; g + 4 <= group; g += 4) dot_rows<4>(q + g * stride, rows, stride, count, scores + g * kTile);
    for (; g + 2 <= group; g += 2) dot_rows<2>(q + g * stride, rows, stride, count, scores + g * kTile);
    if (g < group) dot_rows<1>(q + g * stride, rows, stride, count, scores + g * kTile);
}

void add_group(const float* weights, const float* rows, int64_t stride, int64_t count, int64_t group,
               const float* decay, float* out) {
    int64_t g = 0;
    for (; g + 4 <= group; g += 4) {
        add_rows<4>(weights + g * kTile, rows, stride, count, decay + g, out + g * stride);
    }
    for (; g + 2 <= group; g += 2) {
        add_rows<2>(weights + g * kTile, rows, stride, count, decay + g, out + g * stride);
    }
    if (g < group) add_rows<1>(weights + g * kTile, rows, stride, count, decay + g, out + g * stride);
}

// -------------------------------------------------------------------------------------------------- online softmax

// What a span keeps while it walks: cut from the caller's scratch.
struct State {
    float *query, *key_rows, *value_rows, *out;           // [group, k], [kTile, k], [kTile, v], [group, v]
    float *scores;                                        // [group, kTile]: scores, then weights
    float *peak, *sum, *shift, *query_sum, *decay;        // [group]
    float *key_scale, *key_zero, *value_scale, *value_zero, *bias;  // [kTile]
    int64_t k_stride, v_stride;
};

State cut(const Call& call, float* scratch) {
    State s{};
    s.k_stride = padded(call.k.stored_dim);
    s.v_stride = padded(call.v.stored_dim);
    const int64_t group = padded(call.group);
    auto take = [&scratch](int64_t count) {
        float* part = scratch;
        scratch += count;
        return part;
    };
    s.query = take(call.group * s.k_stride);
    s.key_rows = take(kTile * s.k_stride);
    s.value_rows = take(kTile * s.v_stride);
    s.out = take(call.group * s.v_stride);
    s.scores = take(call.group * kTile);
    float** const per_query[] = {&s.peak, &s.sum, &s.shift, &s.query_sum, &s.decay};
    for (float** part : per_query) *part = take(group);
    float** const per_token[] = {&s.key_scale, &s.key_zero, &s.value_scale, &s.value_zero, &s.bias};
    for (float** part : per_token) *part = take(kTile);
    return s;
}

void begin(const Call& call, int64_t unit, const State& s) {
    const auto clear = [](float* p, int64_t n) { __builtin_memset(p, 0, static_cast<size_t>(n) * 4); };
    clear(s.query, call.group * s.k_stride);
    clear(s.key_rows, kTile * s.k_stride);
    clear(s.value_rows, kTile * s.v_stride);
    clear(s.out, call.group * s.v_stride);
    for (int64_t g = 0; g < call.group; ++g) {
        const float* q = call.q + (unit * call.group + g) * call.k.dim;
        float sum = 0.0F;
        for (int64_t d = 0; d < call.k.dim; ++d) {
            s.query[g * s.k_stride + d] = q[d] * call.scale;
            sum += q[d] * call.scale;
        }
        s.query_sum[g] = sum;
        s.peak[g] = kNothing;
        s.sum[g] = 0.0F;
        s.shift[g] = 0.0F;
    }
}

// Turns a row of scores into weights against the running peak; `decay` is what the peak's rise makes of what stands.
// Scores past `count`, up to the tile, are those of rows that are not there: they get weight 0.
void weigh(const Call& call, const State& s, int64_t g, int64_t count, bool biased) {
    float* score = s.scores + g * kTile;
    const bool coded = is_code(call.k.storage);
    if (coded || biased) {
        const Vec query_sum = splat(s.query_sum[g]);
        for (int64_t t = 0; t < kTile; t += kLanes) {
            Vec value = load(score + t);
            if (coded) value = value * load(s.key_scale + t) + load(s.key_zero + t) * query_sum;
            if (biased) value += load(s.bias + t);
            store(score + t, value);
        }
    }
    for (int64_t t = count; t < kTile; ++t) score[t] = -__builtin_inff();
    Vec most = load(score);
    for (int64_t t = kLanes; t < kTile; t += kLanes) most = larger(load(score + t), most);
    float peak = s.peak[g];
    for (int i = 0; i < kLanes; ++i) peak = most[i] > peak ? most[i] : peak;
    Vec sum = {};
    Vec shift = {};
    for (int64_t t = 0; t < kTile; t += kLanes) {
        const Vec weight = exp_negative(load(score + t) - splat(peak));
        sum += weight;
        if (is_code(call.v.storage)) {
            shift += weight * load(s.value_zero + t);
            store(score + t, weight * load(s.value_scale + t));
        } else {
            store(score + t, weight);
        }
    }
    const float decay = exp_negative(splat(s.peak[g] - peak))[0];
    s.decay[g] = decay;
    s.peak[g] = peak;
    s.sum[g] = s.sum[g] * decay + total(sum);
    s.shift[g] = s.shift[g] * decay + total(shift);
}

// The slots of a tile that the bias leaves visible, with their bias.
int64_t choose(const float* bias, int64_t first, int64_t width, int32_t* slot, float* chosen) {
    if (bias == nullptr) {
        for (int64_t i = 0; i < width; ++i) slot[i] = static_cast<int32_t>(first + i);
        return width;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < width; ++i) {
        if (bias[first + i] <= kHidden) continue;
        chosen[count] = bias[first + i];
        slot[count++] = static_cast<int32_t>(first + i);
    }
    return count;
}

void finish(const Call& call, const State& s, float* out, float* lse) {
    for (int64_t g = 0; g < call.group; ++g) {
        const float sum = s.sum[g];
        const bool nothing = sum == 0.0F;  // NaN is not nothing
        const float inverse = nothing ? 0.0F : 1.0F / sum;
        for (int64_t d = 0; d < call.v.dim; ++d) {
            out[g * call.v.dim + d] = (s.out[g * s.v_stride + d] + s.shift[g]) * inverse;
        }
        lse[g] = nothing ? kNothing : s.peak[g] + __builtin_logf(sum);
    }
}

void attend_span(const Call& call, int64_t unit, int64_t first, int64_t last, float* out, float* lse, float* scratch) {
    const State s = cut(call, scratch);
    begin(call, unit, s);
    const int64_t sequence = unit / call.heads;
    int32_t slot[kTile];
    const int64_t* pages = call.pages + unit * call.pages_per_seq;
    for (int64_t p = first; p < last; ++p) {
        const uint8_t* page = call.arena + pages[p] + call.shift;
        const int64_t ahead = p + 1 < last ? pages[p + 1] - pages[p] : 0;
        const float* bias = nullptr;
        if (call.bias != nullptr) bias = call.bias + (sequence * call.pages_per_seq + p) * call.block_size;
        for (int64_t at = 0; at < call.block_size; at += kTile) {
            const int64_t width = call.block_size - at < kTile ? call.block_size - at : kTile;
            const int64_t count = choose(bias, at, width, slot, s.bias);
            if (count == 0) continue;
            unpack_side(call.k, page, ahead, slot, count, s.key_rows, s.k_stride, s.key_scale, s.key_zero);
            unpack_side(call.v, page, ahead, slot, count, s.value_rows, s.v_stride, s.value_scale, s.value_zero);
            dot_group(s.query, s.key_rows, s.k_stride, count, call.group, s.scores);
            for (int64_t g = 0; g < call.group; ++g) weigh(call, s, g, count, bias != nullptr);
            add_group(s.scores, s.value_rows, s.v_stride, count, call.group, s.decay, s.out);
        }
    }
    finish(call, s, out, lse);
}

}  // namespace

#define KVFOLD_TEXT(x) #x
#define KVFOLD_NAME(x) KVFOLD_TEXT(x)
const Variant variant = {KVFOLD_NAME(KVFOLD_ISA), attend_span};

}  // namespace kvfold::KVFOLD_ISA
