// Keys and values that are codes, by integer products.
//
// Queries and weights become two signed bytes a number, high * 128 + low: a query's greatest number is 16256 steps, so
// is a row's greatest weight of a tile, and nothing is off by more than half a step. What the codes' middle makes of
// these errors is known and added back, so that only what is left of a code counts, half its range at most. A score is
// then off by less than 2**-15 |q|max * sum |code - middle| * scale, an output by less than 2**-15 of the greatest weight
// for each |code - middle|, and both errors have random signs. Products and sums of integers are exact.
#pragma once

#include "code_rows.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

constexpr int64_t kBlockRows = 8;  // two bytes of each make the rows of one product
constexpr float kSteps = 16256.0F;
constexpr float kLeast = 1e-30F;       // what is all below counts as zero
constexpr int64_t kMostDepth = 512;    // so that high * 128 + low stays within 32 bits
constexpr int64_t kMostRuns = 32;

// How query rows are cut into blocks, as rows of signed bytes: [blocks][high, low][rows of a block][depth].
struct Blocks {
    int64_t rows, each, count;

    explicit Blocks(int64_t all) : rows(all), each(smaller(all, kBlockRows)), count((all + each - 1) / each) {}
    int64_t bytes(int64_t depth) const { return count * 2 * each * depth; }
    int64_t in(int64_t block) const { return smaller(each, rows - block * each); }
};

// 16 numbers in steps of 1 / inverse -> high and low bytes. Returns what that lost.
KVFOLD_INLINE Vec split(Vec numbers, Vec step, Vec inverse, int8_t* high, int8_t* low) {
    const __m512i steps = _mm512_cvtps_epi32(numbers * inverse);
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(64)), 7);
    const __m512i lower = _mm512_sub_epi32(steps, _mm512_slli_epi32(upper, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(lower));
    return numbers - Vec(_mm512_cvtepi32_ps(steps)) * step;
}

KVFOLD_INLINE __m512 joined(const int32_t* high, const int32_t* low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 7), _mm512_load_si512(low)));
}

KVFOLD_INLINE float most(const float* numbers, int64_t n) {
    __m512 best = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) best = _mm512_max_ps(best, _mm512_abs_ps(_mm512_load_ps(numbers + i)));
    return _mm512_reduce_max_ps(best);
}

// ------------------------------------------------------------------------------------------------------------- keys

class CodeKeys {
  public:
    // Groups must lie side by side in the staged order.
    static bool fits(const Side& side) {
        if (!side.coded()) return false;
        bool natural = true;
        for (int64_t i = 0; i < side.bands; ++i) natural = natural && side.band[i].bytes % 4 == 0;
        const int64_t width = side.groups == 1 ? staged(side) : side.group_width;
        return width <= kMostDepth && (side.groups == 1 || (natural && width % 4 == 0));
    }

    CodeKeys(const Side& side, int64_t rows, Bump& own, Bump& shared)
        : side_(side), blocks_(rows), staged_(staged(side_)),
          width_(side_.groups == 1 ? staged_ : side_.group_width), depth_(rounded_up(width_, 64)),
          padded_(rounded_up(staged_, 16)) {
        dim_of_ = shared.take<int32_t>(padded_);
        query_ = own.take<float>(rows * padded_);
        line_ = shared.take<float>(depth_);
        by_ = shared.take<float>(padded_);
        share_ = shared.take<float>(padded_);
        middle_ = shared.take<float>(padded_ + 64);
        digits_ = own.take<int8_t>(side_.groups * blocks_.bytes(depth_));
        step_ = own.take<float>(side_.groups * rows);
        sum_ = own.take<float>(side_.groups * rows);
        lost_ = own.take<float>(side_.groups * rows);
        words_ = shared.take<uint32_t>((staged_ / 4 + 16) * kTile);  // 16: a product may read on, against zeros
        product_ = shared.take<int32_t>(2 * blocks_.each * kTile);
        scale_ = shared.take<float>(kTile);
        zero_ = shared.take<float>(kTile);
    }

    void begin(const float* q, int64_t q_stride, float scale) {
        order();
        __builtin_memset(digits_, 0, static_cast<size_t>(side_.groups * blocks_.bytes(depth_)));
        __builtin_memset(words_, 0, static_cast<size_t>((staged_ / 4 + 16) * kTile) * sizeof(uint32_t));
        for (int64_t r = 0; r < blocks_.rows; ++r) {
            float* to = query_ + r * padded_;
            for (int64_t i = 0; i < padded_; ++i) {
                to[i] = dim_of_[i] < 0 || dim_of_[i] >= side_.dim ? 0.0F : q[r * q_stride + dim_of_[i]] * scale;
            }
        }
        shares();
        if (side_.meta != Meta::channels) digest();
        page_ = nullptr;
    }

    void stage(const Tile& tile, Fetcher& fetcher) {
        for (int64_t t = 0; t < tile.count; t += 16) {
            fetcher.turn();
            const uint8_t* row[16];
            tile.rows(side_, t, row);
            uint32_t* to = words_ + t;
            for (int64_t i = 0; i < side_.bands; ++i) {
                const Band& band = side_.band[i];
                if (band.bits == 8) stage_band_keys<8>(band, row, to);
                if (band.bits == 4) stage_band_keys<4>(band, row, to);
                if (band.bits == 2) stage_band_keys<2>(band, row, to);
                to += 8 / band.bits * plane_words(band) * kTile;
            }
        }
    }

    void score(const Tile& tile, Fetcher& fetcher, bool add, float* scores) {
        if (side_.meta == Meta::channels && tile.page_of(0) != page_) {
            page_ = tile.page_of(0);
            load_channels(page_ + side_.meta_offset);
            digest();
        }
        const int64_t columns = rounded_up(tile.count, 16);
        for (int64_t g = 0; g < side_.groups; ++g) {
            if (side_.meta == Meta::channels) {
                for (int64_t t = 0; t < kTile; ++t) scale_[t] = zero_[t] = 1.0F;  // what there is, the queries have in them
            } else {
                load_meta(side_, tile, g, scale_, zero_);
            }
            const uint32_t* words = words_ + g * width_ / 4 * kTile;
            for (int64_t b = 0; b < blocks_.count; ++b) {
                const int8_t* digits = digits_ + g * blocks_.bytes(depth_) + b * 2 * blocks_.each * depth_;
                products(digits, depth_, 2 * blocks_.each, words, kTile, rounded_up(width_, 4), columns, product_,
                         kTile);
                const int64_t rows = blocks_.in(b);
                int64_t i = 0;
                for (; i + 4 <= rows; i += 4) apply<4>(g, b, i, columns, add || g > 0, scores, fetcher);
                for (; i + 2 <= rows; i += 2) apply<2>(g, b, i, columns, add || g > 0, scores, fetcher);
                if (i < rows) apply<1>(g, b, i, columns, add || g > 0, scores, fetcher);
            }
        }
    }

  private:
    static int64_t staged(const Side& side) {
        int64_t words = 0;
        for (int64_t i = 0; i < side.bands; ++i) words += 8 / side.band[i].bits * plane_words(side.band[i]);
        return 4 * words;
    }

    void order() {
        int64_t at = 0, dim = 0;
        for (int64_t i = 0; i < side_.bands; ++i) {
            const Band& band = side_.band[i];
            for (int64_t p = 0; p < 8 / band.bits; ++p) {
                for (int64_t j = 0; j < 4 * plane_words(band); ++j) {
                    dim_of_[at++] = j < band.bytes ? static_cast<int32_t>(dim + j) : -1;
                }
                dim += band.bytes;
            }
        }
        while (at < padded_) dim_of_[at++] = -1;
    }

    // What a token's zero adds to each dim: one; for stretched codes their middle, taken off.
    void shares() {
        int64_t at = 0;
        for (int64_t i = 0; i < side_.bands; ++i) {
            const Band& band = side_.band[i];
            for (int64_t j = 0; j < 8 / band.bits * plane_words(band) * 4; ++j, ++at) {
                by_[at] = 1.0F;
                middle_[at] = middle(band.bits);
                share_[at] = side_.meta == Meta::stretch ? -middle(band.bits) : 1.0F;
            }
        }
        for (; at < padded_; ++at) by_[at] = share_[at] = middle_[at] = 0.0F;
        for (; at < padded_ + 64; ++at) middle_[at] = 0.0F;
    }

    void load_channels(const uint8_t* meta) {
        const int64_t stored = side_.stored_dim();
        for (int64_t i = 0; i < padded_; ++i) {
            const int64_t d = dim_of_[i];
            const auto bits = [&](int64_t at) {
                return d < 0 ? 0U : static_cast<uint32_t>(load_unaligned<uint16_t>(meta + 2 * (at + d))) << 16;
            };
            by_[i] = __builtin_bit_cast(float, bits(0));
            share_[i] = __builtin_bit_cast(float, bits(stored));
        }
    }

    // Queries as bytes, and their products with the zeros.
    void digest() {
        for (int64_t g = 0; g < side_.groups; ++g) {
            for (int64_t r = 0; r < blocks_.rows; ++r) {
                const int64_t at = g * blocks_.rows + r;
                sum_[at] = scale_line(query_ + r * padded_ + g * width_, g * width_);
                const float greatest = most(line_, depth_);
                const float inverse = greatest > kLeast ? kSteps / greatest : 0.0F;
                // A query that is not a number stays none.
                step_[at] = greatest > kLeast ? greatest / kSteps : 0.0F * sum_[at];
                int8_t* high = digits_ + g * blocks_.bytes(depth_) +
                               (r / blocks_.each * 2 * blocks_.each + r % blocks_.each) * depth_;
                Vec lost = {};
                for (int64_t i = 0; i < depth_; i += kLanes) {
                    const Vec loss = split(load(line_ + i), splat(step_[at]), splat(inverse), high + i,
                                           high + blocks_.each * depth_ + i);
                    lost += loss * load_unaligned<Vec>(middle_ + g * width_ + i);
                }
                lost_[at] = _mm512_reduce_add_ps(lost);
            }
        }
    }

    // A query's dims of a group times the scales of channels, into the line; returns its product with the zeros.
    float scale_line(const float* query, int64_t first) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < depth_; i += 16) {
            const int64_t left = width_ - i;
            const auto mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1 << left) - 1);
            const __m512 number = _mm512_maskz_loadu_ps(mask, query + i);
            sum = _mm512_fmadd_ps(number, _mm512_maskz_loadu_ps(mask, share_ + first + i), sum);
            _mm512_store_ps(line_ + i, _mm512_mul_ps(number, _mm512_maskz_loadu_ps(mask, by_ + first + i)));
        }
        return _mm512_reduce_add_ps(sum);
    }

    // A block's products, from its row i on, as scores.
    template <int N>
    KVFOLD_INLINE void apply(int64_t group, int64_t block, int64_t i, int64_t columns, bool add, float* scores,
                             Fetcher& fetcher) const {
        const int64_t r = block * blocks_.each + i, at = group * blocks_.rows + r;
        const int32_t *high = product_ + i * kTile, *low = high + blocks_.each * kTile;
        for (int64_t t = 0; t < columns; t += 16) {
            fetcher.turn();
            const __m512 scale = _mm512_load_ps(scale_ + t), zero = _mm512_load_ps(zero_ + t);
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                float* const to = scores + (r + n) * kTile + t;
                const __m512 product = joined(high + n * kTile + t, low + n * kTile + t);
                __m512 score = _mm512_fmadd_ps(product, _mm512_set1_ps(step_[at + n]), _mm512_set1_ps(lost_[at + n]));
                score = _mm512_fmadd_ps(score, scale, _mm512_mul_ps(zero, _mm512_set1_ps(sum_[at + n])));
                _mm512_store_ps(to, add ? _mm512_add_ps(score, _mm512_load_ps(to)) : score);
            }
        }
    }

    const Side& side_;
    Blocks blocks_;
    int64_t staged_, width_, depth_, padded_;
    int32_t* dim_of_;
    float *query_, *line_;             // [rows, padded], [depth]
    float *by_, *share_, *middle_;     // [padded]: a dim's own scale, its share of a zero, the middle of its codes
    int8_t* digits_;                   // [groups][blocks]
    float *step_, *sum_, *lost_;       // [groups, rows]
    uint32_t* words_;                  // [staged / 4, kTile]
    int32_t* product_;
    float *scale_, *zero_;             // [kTile]
    const uint8_t* page_ = nullptr;
};

// ----------------------------------------------------------------------------------------------------------- values

class CodeValues {
  public:
    // No vector of staged columns may hold dims of two groups.
    static bool fits(const Side& side) {
        if (!side.coded() || side.meta == Meta::channels) return false;
        if (side.groups == 1) return true;
        int64_t runs = 0;
        return columns_of(side) <= kMostColumns && cut(side, nullptr, &runs);
    }

    CodeValues(const Side& side, int64_t rows, Bump& own, Bump& shared)
        : side_(side), blocks_(rows), columns_(columns_of(side_)) {
        dim_of_ = shared.take<int32_t>(columns_);
        share_ = shared.take<float>(columns_);
        middle_ = shared.take<float>(columns_);
        digits_ = shared.take<int8_t>(side_.groups * blocks_.bytes(kTile));
        step_ = shared.take<float>(side_.groups * rows);
        shift_ = own.take<float>(side_.groups * rows);
        lost_ = own.take<float>(side_.groups * rows);
        words_ = shared.take<uint32_t>(kTile / 4 * columns_);
        product_ = shared.take<int32_t>(2 * blocks_.each * columns_);
        out_ = own.take<float>(rows * columns_);
        scale_ = shared.take<float>(kTile);
        zero_ = shared.take<float>(kTile);
    }

    void begin() {
        for (int64_t c = 0, at = 0; at < side_.bands; ++at) {
            const Band& band = side_.band[at];
            for (int64_t i = 0; i < 8 / band.bits * plane_columns(band); ++i, ++c) {
                dim_of_[c] = static_cast<int32_t>(column_dim(side_, c));
                middle_[c] = middle(band.bits);
                share_[c] = side_.meta == Meta::stretch ? -middle(band.bits) : 1.0F;
            }
        }
        if (side_.groups == 1) {
            runs_ = 1;
            run_[0] = {0, 0, columns_};
        } else {
            cut(side_, run_, &runs_);
        }
        const auto clear = [](auto* p, int64_t n) { __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof *p); };
        clear(digits_, side_.groups * blocks_.bytes(kTile));
        clear(words_, kTile / 4 * columns_);
        clear(out_, blocks_.rows * columns_);
        clear(shift_, side_.groups * blocks_.rows);
        clear(lost_, side_.groups * blocks_.rows);
    }

    void stage(const Tile& tile, Fetcher& fetcher) {
        for (int64_t t = 0; t < tile.count; t += 16) {
            fetcher.turn();
            const uint8_t* row[16];
            tile.rows(side_, t, row);
            uint32_t* to = words_ + t / 4 * columns_;
            for (int64_t i = 0; i < side_.bands; ++i) {
                const Band& band = side_.band[i];
                if (band.bits == 8) stage_band_values<8>(band, row, to, columns_);
                if (band.bits == 4) stage_band_values<4>(band, row, to, columns_);
                if (band.bits == 2) stage_band_values<2>(band, row, to, columns_);
                to += 8 / band.bits * plane_columns(band);
            }
        }
    }

    void add(const Tile& tile, Fetcher& fetcher, const float* weights, const float* decay) {
        for (int64_t g = 0; g < side_.groups; ++g) {
            load_meta(side_, tile, g, scale_, zero_);
            int64_t r = 0;
            for (; r + 4 <= blocks_.rows; r += 4) weigh<4>(weights, g, r, decay, fetcher);
            for (; r + 2 <= blocks_.rows; r += 2) weigh<2>(weights, g, r, decay, fetcher);
            if (r < blocks_.rows) weigh<1>(weights, g, r, decay, fetcher);
        }
        for (int64_t run = 0; run < runs_; ++run) {
            for (int64_t b = 0; b < blocks_.count; ++b) {
                collect(run_[run], b, rounded_up(tile.count, 4), decay, fetcher);
            }
        }
    }

    void finish(int64_t r, float inverse, float* out) const {
        for (int64_t run = 0; run < runs_; ++run) {
            const float shift = shift_[run_[run].group * blocks_.rows + r];
            const float lost = lost_[run_[run].group * blocks_.rows + r];
            for (int64_t c = run_[run].first; c < run_[run].first + run_[run].columns; ++c) {
                const int64_t d = dim_of_[c];
                if (d >= 0) out[d] = (out_[r * columns_ + c] + shift * share_[c] + lost * middle_[c]) * inverse;
            }
        }
    }

  private:
    struct Run {
        int64_t group, first, columns;
    };
    static constexpr int64_t kMostColumns = 4096;

    static int64_t columns_of(const Side& side) {
        int64_t columns = 0;
        for (int64_t i = 0; i < side.bands; ++i) columns += 8 / side.band[i].bits * plane_columns(side.band[i]);
        return columns;
    }

    // The dim that a staged column holds, -1 if none.
    static int64_t column_dim(const Side& side, int64_t column) {
        int64_t dim = 0;
        for (int64_t i = 0; i < side.bands; ++i) {
            const Band& band = side.band[i];
            const int64_t plane = plane_columns(band), planes = 8 / band.bits;
            if (column >= planes * plane) {
                column -= planes * plane;
                dim += planes * band.bytes;
                continue;
            }
            const int64_t within = column % plane, start = within / 64 * 64;
            const int64_t byte = start + zipped_byte(zip_width(band.bytes - start), within - start);
            dim += column / plane * band.bytes + byte;
            return byte < band.bytes && dim < side.dim ? dim : -1;
        }
        return -1;
    }

    // Cuts the columns into runs of one group each; false if that cannot be.
    static bool cut(const Side& side, Run* runs, int64_t* count) {
        *count = 0;
        int64_t last = -1;
        for (int64_t c = 0; c < columns_of(side); c += 16) {
            int64_t group = -1;
            for (int64_t i = c; i < c + 16; ++i) {
                const int64_t d = column_dim(side, i);
                if (d < 0) continue;
                if (group >= 0 && group != d / side.group_width) return false;
                group = d / side.group_width;
            }
            if (group < 0) group = last < 0 ? 0 : last;  // nothing but padding: whoever's
            if (group != last) {
                if (*count == kMostRuns) return false;
                if (runs != nullptr) runs[*count] = {group, c, 0};
                ++*count;
                last = group;
            }
            if (runs != nullptr) runs[*count - 1].columns += 16;
        }
        return true;
    }

    // Rows' weights times the scales, as bytes; what they make of the zeros is shifted at the end.
    template <int N>
    KVFOLD_INLINE void weigh(const float* weights, int64_t group, int64_t r, const float* decay, Fetcher& fetcher) {
        Vec moved[N] = {}, greatest[N] = {}, lost[N] = {};
        for (int64_t t = 0; t < kTile; t += kLanes) {
            fetcher.turn();
            const Vec scale = load(scale_ + t), zero = load(zero_ + t);
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                const Vec weight = load(weights + (r + n) * kTile + t), scaled = weight * scale;
                // Zero times a scale that is not a number: the bytes could not say so.
                moved[n] += weight * zero;
                moved[n] += scaled * splat(0.0F);
                greatest[n] = larger(scaled, greatest[n]);
            }
        }
        const int64_t at = group * blocks_.rows + r;
        const Vec4 top = folded<Greatest, N>(greatest), kept = four<N>(decay + r);
        const Vec4 enough = top > kLeast ? top : Vec4{} + __builtin_inff();  // infinite: all steps are 0
        const Vec4 step = top > kLeast ? top * (1.0F / kSteps) : Vec4{}, inverse = kSteps / enough;
        for (int64_t t = 0; t < kTile; t += kLanes) {
            const Vec scale = load(scale_ + t);
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                int8_t* high = digits_of(group, (r + n) / blocks_.each) + (r + n) % blocks_.each * kTile + t;
                const Vec scaled = load(weights + (r + n) * kTile + t) * scale;
                lost[n] += split(scaled, splat(step[n]), splat(inverse[n]), high, high + blocks_.each * kTile);
            }
        }
        put<N>(step_ + at, step);
        put<N>(shift_ + at, four<N>(shift_ + at) * kept + folded<Sum, N>(moved));
        put<N>(lost_ + at, four<N>(lost_ + at) * kept + folded<Sum, N>(lost));
    }

    template <int N>
    KVFOLD_INLINE static Vec4 four(const float* p) {
        Vec4 numbers = {};
        __builtin_memcpy(&numbers, p, N * sizeof(float));
        return numbers;
    }

    template <int N>
    KVFOLD_INLINE static void put(float* p, Vec4 numbers) { __builtin_memcpy(p, &numbers, N * sizeof(float)); }

    int8_t* digits_of(int64_t group, int64_t block) const {
        return digits_ + group * blocks_.bytes(kTile) + block * 2 * blocks_.each * kTile;
    }

    void collect(const Run& run, int64_t block, int64_t depth, const float* decay, Fetcher& fetcher) {
        products(digits_of(run.group, block), kTile, 2 * blocks_.each, words_ + run.first, columns_, depth, run.columns,
                 product_ + run.first, columns_);
        const int64_t rows = blocks_.in(block);
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4) keep<4>(run, block, i, decay, fetcher);
        for (; i + 2 <= rows; i += 2) keep<2>(run, block, i, decay, fetcher);
        if (i < rows) keep<1>(run, block, i, decay, fetcher);
    }

    // Adds a block's products, from its row i on, to what stands.
    template <int N>
    KVFOLD_INLINE void keep(const Run& run, int64_t block, int64_t i, const float* decay, Fetcher& fetcher) const {
        const int64_t r = block * blocks_.each + i;
        const float* steps = step_ + run.group * blocks_.rows + r;
        const int32_t* high = product_ + i * columns_ + run.first;
        const int32_t* low = high + blocks_.each * columns_;
        float* out = out_ + r * columns_ + run.first;
        __m512 step[N], kept[N];
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) {
            step[n] = _mm512_set1_ps(steps[n]);
            kept[n] = _mm512_set1_ps(decay[r + n]);
        }
        for (int64_t c = 0; c < run.columns; c += 16) {
            fetcher.turn();
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                const int64_t at = n * columns_ + c;
                const __m512 stands = _mm512_mul_ps(_mm512_load_ps(out + at), kept[n]);
                _mm512_store_ps(out + at, _mm512_fmadd_ps(joined(high + at, low + at), step[n], stands));
            }
        }
    }

    const Side& side_;
    Blocks blocks_;
    int64_t columns_, runs_ = 0;
    Run run_[kMostRuns];
    int32_t* dim_of_;
    float *share_, *middle_;  // [columns]: of a token's zero, of the codes
    int8_t* digits_;
    float *step_, *shift_, *lost_;  // [groups, rows]
    uint32_t* words_;  // [kTile / 4, columns]
    int32_t* product_;
    float *out_, *scale_, *zero_;
};

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
