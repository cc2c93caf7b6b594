// The kernel itself. This file is compiled once for each instruction set, with KVFOLD_ISA naming the namespace and
// KVFOLD_LANES the floats in a vector; attend_pages.cpp picks one at run time.
//
// It includes nothing that defines inline functions outside the anonymous namespace: the linker keeps one copy of
// such a function, and that copy might be the one compiled for instructions this processor lacks.
#include "attend_pages.hpp"

#if defined(__AVX2__)
#include <immintrin.h>  // only intrinsics, which are always inlined
#endif

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int kLanes = KVFOLD_LANES;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
#if !defined(__AVX2__)
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * sizeof(uint8_t))));
#endif
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float)), may_alias));

#define KVFOLD_INLINE inline __attribute__((always_inline))

KVFOLD_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
KVFOLD_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
KVFOLD_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
KVFOLD_INLINE Vec splat(float x) { return x - Vec{}; }

template <typename T>
KVFOLD_INLINE T load_unaligned(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

template <typename T>
KVFOLD_INLINE void store_unaligned(float* p, T value) {
    __builtin_memcpy(p, &value, sizeof value);
}

// Bytes or shorts as integers, one a lane. GCC 12 moves what __builtin_convertvector widens by four lane by lane, so
// the x86 builds name the instruction.
#if defined(__AVX512F__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm512_cvtepu8_epi32(load_unaligned<__m128i>(p)));
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(load_unaligned<__m256i>(p)));
}
#elif defined(__AVX2__)
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return reinterpret_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(load_unaligned<__m128i>(p)));
}
#else
KVFOLD_INLINE IntVec widen_bytes(const uint8_t* p) {
    return __builtin_convertvector(load_unaligned<Bytes>(p), IntVec);
}
KVFOLD_INLINE Words widen_shorts(const uint8_t* p) {
    return __builtin_convertvector(load_unaligned<Shorts>(p), Words);
}
#endif

KVFOLD_INLINE float bf16_to_float(uint16_t bits) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

// ---------------------------------------------------------------------------------------------- unpacking of rows

// Left to itself, the compiler vectorises these loops by whole vectors of bytes, which are longer than most rows are.

KVFOLD_INLINE void unpack_bf16(const uint8_t* row, float* __restrict out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Words bits = widen_shorts(row + 2 * i) << 16;
        store_unaligned(out + i, bits);
    }
    for (; i < n; ++i) out[i] = bf16_to_float(load_unaligned<uint16_t>(row + 2 * i));
}

// Half to float by one multiplication, which also makes subnormals right; infinities and NaN keep their exponent.
KVFOLD_INLINE float f16_to_float(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFU;
    const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112F;
    uint32_t word = __builtin_bit_cast(uint32_t, value);
    word |= magnitude >= 0x7C00U ? 0x7F800000U : 0U;
    return __builtin_bit_cast(float, word | static_cast<uint32_t>(bits & 0x8000U) << 16);
}

KVFOLD_INLINE void unpack_f16(const uint8_t* row, float* __restrict out, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Words bits = widen_shorts(row + 2 * i);
        const Words magnitude = bits & 0x7FFFU;
        const Vec value = reinterpret_cast<Vec>(magnitude << 13) * splat(0x1p112F);
        const Words special = reinterpret_cast<Words>(magnitude >= 0x7C00U) & 0x7F800000U;
        store_unaligned(out + i, reinterpret_cast<Words>(value) | special | (bits & 0x8000U) << 16);
    }
    for (; i < n; ++i) out[i] = f16_to_float(load_unaligned<uint16_t>(row + 2 * i));
}

// Bare codes as numbers. Dims lie in planes (halves, quarters of the row), so no interleave is needed.
template <int Bits>
KVFOLD_INLINE void unpack_codes(const uint8_t* row, float* __restrict out, int64_t plane) {
    constexpr int kMask = (1 << Bits) - 1;
    int64_t i = 0;
    for (; i + kLanes <= plane; i += kLanes) {
        const IntVec bytes = widen_bytes(row + i);
        for (int p = 0; p < 8 / Bits; ++p) {
            store_unaligned(out + p * plane + i, __builtin_convertvector((bytes >> (p * Bits)) & kMask, Vec));
        }
    }
    for (; i < plane; ++i) {
        for (int p = 0; p < 8 / Bits; ++p) out[p * plane + i] = static_cast<float>((row[i] >> (p * Bits)) & kMask);
    }
}

template <Storage S>
KVFOLD_INLINE void unpack_row(const uint8_t* row, float* __restrict out, int64_t n) {
    if constexpr (S == Storage::f32) __builtin_memcpy(out, row, static_cast<size_t>(n) * 4);
    if constexpr (S == Storage::bf16) unpack_bf16(row, out, n);
    if constexpr (S == Storage::f16) unpack_f16(row, out, n);
    if constexpr (S == Storage::code8) unpack_codes<8>(row, out, n);
    if constexpr (S == Storage::code4) unpack_codes<4>(row, out, n / 2);
    if constexpr (S == Storage::code2) unpack_codes<2>(row, out, n / 4);
}

// Rows `slot[0..count)` into `rows [count, stride]`. Meanwhile the same rows of the next page, `ahead` bytes from this
// one, are fetched: pages lie anywhere, and the processor cannot guess where.
template <Storage S>
void unpack_rows(const Side& side, const uint8_t* codes, int64_t ahead, const int32_t* slot, int64_t count,
                 float* __restrict rows, int64_t stride) {
    const int64_t row_bytes = side.row_bytes, n = side.stored_dim;
    for (int64_t t = 0; t < count; ++t) {
        const uint8_t* row = codes + slot[t] * row_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + ahead + byte);
        unpack_row<S>(row, rows + t * stride, n);
    }
}

KVFOLD_INLINE bool is_code(Storage storage) { return static_cast<int>(storage) >= static_cast<int>(Storage::code8); }

// Rows `slot[0..count)` of one side into `rows [count, stride]`, and their scales and zeros. The padding behind a row
// was cleared once and is never written, except by codes that fill up a byte; queries are zero there.
void unpack_side(const Side& side, const uint8_t* page, int64_t ahead, const int32_t* slot, int64_t count, float* rows,
                 int64_t stride, float* scales, float* zeros) {
    const uint8_t* codes = page + side.codes_offset;
    switch (side.storage) {
        case Storage::f32: unpack_rows<Storage::f32>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::bf16: unpack_rows<Storage::bf16>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::f16: unpack_rows<Storage::f16>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code8: unpack_rows<Storage::code8>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code4: unpack_rows<Storage::code4>(side, codes, ahead, slot, count, rows, stride); break;
        case Storage::code2: unpack_rows<Storage::code2>(side, codes, ahead, slot, count, rows, stride); break;
    }
    if (!is_code(side.storage)) return;
    alignas(64) uint32_t pairs[kTile] = {};  // of tokens that are not there: zero, so that they add nothing
    for (int64_t t = 0; t < count; ++t) __builtin_memcpy(pairs + t, page + side.meta_offset + 4 * slot[t], 4);
    __builtin_prefetch(page + side.meta_offset + 4 * slot[0] + ahead);
    __builtin_prefetch(page + side.meta_offset + 4 * slot[count - 1] + ahead);
    for (int64_t t = 0; t < kTile; t += kLanes) {
        const Words pair = *reinterpret_cast<const Words*>(pairs + t);
        store(scales + t, reinterpret_cast<Vec>(pair << 16));
        store(zeros + t, reinterpret_cast<Vec>(pair & 0xFFFF0000U));
    }
}

// ------------------------------------------------------------------------------------------------- sums and exp

KVFOLD_INLINE Vec larger(Vec a, Vec b) {
    const IntVec first = a > b;
    return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(a) & first) | (reinterpret_cast<IntVec>(b) & ~first));
}

KVFOLD_INLINE float total(Vec v) {
    float sum = 0.0F;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVFOLD_SHUFFLE 1
#endif
#endif

// The sums of four vectors, side by side: folding them together takes a third of the work of four sums.
KVFOLD_INLINE Vec4 totals(Vec a, Vec b, Vec c, Vec d) {
#ifdef KVFOLD_SHUFFLE
    Vec4 part[4];
    const Vec whole[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
#if KVFOLD_LANES == 16
        typedef float Vec8 __attribute__((vector_size(32)));
        const Vec8 half = __builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(whole[i], whole[i], 8, 9, 10, 11, 12, 13, 14, 15);
        part[i] = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif KVFOLD_LANES == 8
        part[i] = __builtin_shufflevector(whole[i], whole[i], 0, 1, 2, 3) +
                  __builtin_shufflevector(whole[i], whole[i], 4, 5, 6, 7);
#else
        part[i] = whole[i];
#endif
    }
    const Vec4 ab = __builtin_shufflevector(part[0], part[1], 0, 4, 1, 5) +
                    __builtin_shufflevector(part[0], part[1], 2, 6, 3, 7);
    const Vec4 cd = __builtin_shufflevector(part[2], part[3], 0, 4, 1, 5) +
                    __builtin_shufflevector(part[2], part[3], 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#else
    return Vec4{total(a), total(b), total(c), total(d)};
#endif
}

// exp(x) for x <= 0, relative error below 2e-7; exactly 0 below -87. NaN stays NaN. The range is reduced by powers of
// two, rounded to the nearest one by adding and subtracting 1.5 * 2^23; the polynomial is that of Cephes' expf.
KVFOLD_INLINE Vec exp_negative(Vec x) {
    const Vec magic = splat(12582912.0F);
    const Vec lowest = splat(-87.0F);
    const IntVec tiny = x < lowest;
    const Vec bounded = reinterpret_cast<Vec>((reinterpret_cast<IntVec>(x) & ~tiny) |
                                              (reinterpret_cast<IntVec>(lowest) & tiny));
    const Vec shifted = bounded * splat(1.44269504088896341F) + magic;
    const Vec n = shifted - magic;
    const Vec r = (bounded - n * splat(0.693359375F)) - n * splat(-2.12194440e-4F);
    Vec p = splat(1.9875691500e-4F);
    p = p * r + splat(1.3981999507e-3F);
    p = p * r + splat(8.3334519073e-3F);
    p = p * r + splat(4.1665795894e-2F);
    p = p * r + splat(1.6666665459e-1F);
    p = p * r + splat(5.0000001201e-1F);
    p = p * r * r + r + splat(1.0F);
    const IntVec power = (reinterpret_cast<IntVec>(shifted) - reinterpret_cast<IntVec>(magic) + 127) << 23;
    const Vec value = p * reinterpret_cast<Vec>(power);
    return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(value) & ~tiny);
}

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
