// Values that are codes, by integer products.
#pragma once

#include "digits.hpp"

namespace kvfold::KVFOLD_ISA {
namespace {

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

    void begin(bool first) {
        for (int64_t c = 0, at = 0; first && at < side_.bands; ++at) {
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
                greatest[n] = larger(scaled, greatest[n]);  // no weight and no scale is negative
            }
        }
        const int64_t at = group * blocks_.rows + r;
        const Vec4 top = folded<Greatest, N>(greatest), kept = four<N>(decay + r);
        const Vec4 enough = top > kLeast ? top : Vec4{} + __builtin_inff();  // infinite: all steps are 0
        const Vec4 step = top > kLeast ? top * (1.0F / kSteps) : Vec4{}, inverse = kSteps / enough;
        int8_t* high[N];
        KVFOLD_UNROLL
        for (int n = 0; n < N; ++n) {
            high[n] = digits_of(group, (r + n) / blocks_.each) + (r + n) % blocks_.each * kTile;
        }
        const int64_t low = blocks_.each * kTile;
        for (int64_t t = 0; t < kTile; t += kLanes) {
            const Vec scale = load(scale_ + t);
            KVFOLD_UNROLL
            for (int n = 0; n < N; ++n) {
                const Vec scaled = load(weights + (r + n) * kTile + t) * scale;
                lost[n] += split(scaled, splat(step[n]), splat(inverse[n]), high[n] + t, high[n] + low + t);
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
