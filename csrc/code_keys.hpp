// Keys that are codes, by integer products.
#pragma once

#include "digits.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

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

    // `first`: of the heads that share scratch.
    void begin(const float* q, int64_t q_stride, float scale, bool first) {
        if (first) order();
        __builtin_memset(digits_, 0, static_cast<size_t>(side_.groups * blocks_.bytes(depth_)));
        for (int64_t r = 0; r < blocks_.rows; ++r) {
            float* to = query_ + r * padded_;
            for (int64_t i = 0; i < padded_; ++i) {
                to[i] = dim_of_[i] < 0 || dim_of_[i] >= side_.dim ? 0.0F : q[r * q_stride + dim_of_[i]] * scale;
            }
        }
        if (first) shares();
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
                return d < 0 ? 0U : static_cast<uint32_t>(load_as<uint16_t>(meta + 2 * (at + d))) << 16;
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
                    lost += loss * load_as<Vec>(middle_ + g * width_ + i);
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

}  // namespace
}  // namespace kvfold::KVFOLD_ISA
