// Products of some tokens with rows of eight-bit weights, in whole numbers.
//
// Weights lie in panels of 16 outputs; in a panel each four inputs of an output are neighbours, as the instructions want
// them: (outputs / 16, inputs / 4, 16, 4), both rounded up, 128 more than what they stand for. Any leading outputs and
// inputs can be read.
//
// Tokens are rounded one by one to multiples of a scale. A few numbers of a token are often many times as large as the
// others and would leave no steps for them, so the scale follows from the root mean square, and numbers beyond 127 steps
// are split into two bytes. Sums are exact: they do not depend on the instructions, on what else is multiplied, or on
// threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>

#include "int4.h"
#include "rows.h"
#include "tiles.h"

namespace {

struct EightBit {};  // weights of this form

constexpr long kPanelRows = 16, kQuad = 4, kQuadBytes = kPanelRows * kQuad;
inline long num_panels(long outputs) { return (outputs + kPanelRows - 1) / kPanelRows; }
inline long num_quads(long inputs) { return (inputs + kQuad - 1) / kQuad; }

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int kSumLanes = 16, kMostVectors = 4, kMostTokens = 6;
#elif defined(__AVXVNNI__)
constexpr int kSumLanes = 8, kMostVectors = 2, kMostTokens = 6;
#else
constexpr int kSumLanes = 8, kMostVectors = 2, kMostTokens = 4;
#endif
typedef int32_t Sums __attribute__((vector_size(4 * kSumLanes), aligned(4)));
typedef float SumFloats __attribute__((vector_size(4 * kSumLanes), aligned(4)));
constexpr long kVectorsOfPanel = kPanelRows / kSumLanes;
constexpr long kTilePanels = kMostVectors / kVectorsOfPanel;  // panels that are multiplied at once
constexpr long kPanelChunk = kTilePanels * kPanelRows;
constexpr long kAskedTokens = 16;  // up to so many, products wait for memory and ask for the next panels

// Four numbers of a token in each lane, and sums + (four weights of each lane's output) * (these).
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef Sums TokenQuad;
inline TokenQuad token_quad(int32_t x) { return (Sums)_mm512_set1_epi32(x); }
inline Sums add_quads(Sums sums, Sums weights, TokenQuad x) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x);
}
#elif defined(__AVXVNNI__)
typedef Sums TokenQuad;
inline TokenQuad token_quad(int32_t x) { return Sums{} + x; }
inline Sums add_quads(Sums sums, Sums weights, TokenQuad x) {
    return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)x);
}
#else
// pairs of 16 bits, for products of bytes would saturate: numbers 0 and 2, then 1 and 3
struct TokenQuad {
    Shorts even, odd;
};
inline TokenQuad token_quad(int32_t x) {
    const Shorts all = (Shorts)(Ints{} + x);
    return {(Shorts)(all << 8) >> 8, all >> 8};
}
inline Sums add_quads(Sums sums, Sums weights, TokenQuad x) {
    const Shorts even = (Shorts)weights & 0xFF, odd = (Shorts)((Ushorts)weights >> 8);
    return sums + pair_products(even, x.even) + pair_products(odd, x.odd);
}
#endif

// Tokens in whole numbers.
struct RoundedTokens {
    long room;  // bytes of a token, a multiple of 64
    std::vector<int8_t, Aligned<int8_t>> low;
    std::vector<int32_t> high;    // (tokens, room / 4, 2): place and numbers of each four with large ones among them, over 128
    std::vector<int32_t> counts;  // of those
    std::vector<int32_t> sums;    // 128 times the sum of a token's numbers, which the weights' offset adds
    Floats scales;

    void resize(long tokens, long size) {
        room = (size + kLine - 1) / kLine * kLine;
        low.resize(tokens * room), high.resize(tokens * room / 2);
        counts.resize(tokens), sums.resize(tokens), scales.resize(tokens);
    }
};

inline bool any(Ints v) {
#ifdef __AVX2__
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t all = 0;
    for (int j = 0; j < kLanes; j++) all |= v[j];
    return all != 0;
#endif
}
inline void store_bytes(int8_t* p, Ints v) {
#ifdef __AVX2__
    const __m256i all = (__m256i)v;
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
    *reinterpret_cast<Bytes*>(p) = __builtin_convertvector(v, Bytes);
#endif
}

// Root mean squares that 127 steps reach: more leave fewer steps for most numbers, fewer split more of them.
constexpr float kReach = 4;

// Compilers that may forget what is no number must be asked about its bits.
inline bool is_finite(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7F800000) != 0x7F800000;
}
inline float not_a_number() {
    const int32_t bits = 0x7FC00000;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

struct Spread {
    float largest, root_mean_square;
};

// The first `size` numbers at x times `factors`, if there are any, to `out`, with zeros up to a multiple of 8. All three
// may be read up to there.
inline Spread weigh(const float* x, const float* factors, long size, float* out) {
    Vec squares{}, most{};
    for (long c = 0; c < size; c += kLanes) {
        Vec part = load(x + c);
        if (factors) part *= load(factors + c);
        if (c + kLanes > size)
            for (long j = size - c; j < kLanes; j++) part[j] = 0;
        squares = fma(part, part, squares), most = larger(most, magnitudes(part));
        store(out + c, part);
    }
    float largest = 0;
    for (int j = 0; j < kLanes; j++) largest = std::max(largest, most[j]);
    return {largest, std::sqrt(sum(squares) / size)};
}

// Takes what eight whole numbers are beyond 127 out of them, to fours from `high` on; returns how many fours that are.
inline int split_large(Ints& whole, long c, int32_t* high) {
    const Ints beyond = (whole > 127) | (whole < -127);
    if (!any(beyond)) return 0;
    const Ints upper = ((whole + 64) >> 7) & beyond;
    whole -= upper * 128;
    int count = 0;
    for (int half = 0; half < kLanes; half += kQuad) {
        uint32_t four = 0;
        for (int j = 0; j < kQuad; j++) four |= (uint32_t)(uint8_t)upper[half + j] << (8 * j);
        if (four) high[2 * count] = (c + half) / kQuad, high[2 * count++ + 1] = (int32_t)four;
    }
    return count;
}

// Rounds token i, `size` numbers at x times `factors`, if there are any; zeros follow up to `width`. A scale of 0 is
// chosen here. x and factors may be read up to the next multiple of 8.
inline void round_token(const float* x, const float* factors, long size, long width, float scale, long i,
                        RoundedTokens& to) {
    static thread_local Floats room;
    if ((long)room.size() < to.room) room.resize(to.room);
    float* numbers = room.data();
    int8_t* low = to.low.data() + i * to.room;
    int32_t* high = to.high.data() + i * to.room / 2;
    const Spread spread = weigh(x, factors, size, numbers);
    if (!is_finite(spread.root_mean_square)) scale = not_a_number();
    if (scale == 0) scale = std::max(1e-30f, std::min(spread.largest, kReach * spread.root_mean_square)) / 127;
    const Vec inverse = Vec{} + 1 / scale;
    const bool has_large = spread.largest > 127.4f * scale;
    Ints total{};
    int32_t count = 0;
    long c = 0;
    for (; c < size; c += kLanes) {
        Ints whole = nearest(load(numbers + c) * inverse);
        total += whole;
        if (has_large) count += split_large(whole, c, high + 2 * count);
        store_bytes(low + c, whole);
    }
    if (c < width) std::fill(low + c, low + std::min(to.room, (width + kLanes - 1) / kLanes * kLanes), 0);
    int32_t all = 0;
    for (int j = 0; j < kLanes; j++) all += total[j];
    to.counts[i] = count, to.sums[i] = 128 * all, to.scales[i] = scale;
}

// Sums over the first `quads` fours of inputs that are there already, (tokens, ld), or null and 0.
struct Begun {
    const int32_t* sums;
    long ld, quads;
};

// Products of V vectors of outputs, which begin with a panel, and T tokens, over `quads` of their inputs. Not inlined,
// because all registers are needed.
template <int V, int T, bool kAsks>
__attribute__((noinline)) void panel_tile(const uint8_t* w, long panel_bytes, long quads, const RoundedTokens& x, long t,
                                          Begun begun, const float* scales, long count, float* out, long ldo) {
    const int8_t* low = x.low.data() + t * x.room;
    const uint8_t* panels[V];
    Sums acc[V][T];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
        panels[v] = w + v / kVectorsOfPanel * panel_bytes + v % kVectorsOfPanel * kSumLanes * kQuad;
    const auto weights = [&](int v, long k) { return *reinterpret_cast<const Sums*>(panels[v] + k * kQuadBytes); };
#pragma GCC unroll 16
    for (int j = 0; j < T; j++) {
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) acc[v][j] = Sums{};
        const int32_t *high = x.high.data() + (t + j) * x.room / 2, *end = high + 2 * x.counts[t + j];
        if (high == end) continue;
        for (; high < end; high += 2) {
            const TokenQuad numbers = token_quad(high[1]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[v][j] = add_quads(acc[v][j], weights(v, high[0]), numbers);
        }
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) acc[v][j] <<= 7;
    }
    if (begun.sums)
#pragma GCC unroll 16
        for (int j = 0; j < T; j++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                acc[v][j] += *reinterpret_cast<const Sums*>(begun.sums + j * begun.ld + v * kSumLanes);
    for (long k = begun.quads; k < quads; k++) {
        Sums rows[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            if (kAsks && v % kVectorsOfPanel == 0)
                __builtin_prefetch(panels[v] + kTilePanels * panel_bytes + k * kQuadBytes, 0, 2);
            rows[v] = weights(v, k);
            keep(rows[v]);
        }
#pragma GCC unroll 16
        for (int j = 0; j < T; j++) {
            int32_t four;
            std::memcpy(&four, low + j * x.room + k * kQuad, sizeof four);
            const TokenQuad numbers = token_quad(four);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[v][j] = add_quads(acc[v][j], rows[v], numbers);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < T; j++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            const SumFloats own = *reinterpret_cast<const SumFloats*>(scales + v * kSumLanes) * x.scales[t + j];
            const SumFloats y = __builtin_convertvector(acc[v][j] - x.sums[t + j], SumFloats) * own;
            const long left = std::min((long)kSumLanes, count - v * kSumLanes);
            if (left == kSumLanes)
                *reinterpret_cast<SumFloats*>(out + j * ldo + v * kSumLanes) = y;
            else if (left > 0)
                std::memcpy(out + j * ldo + v * kSumLanes, &y, left * sizeof(float));
        }
}

template <int V, bool kAsks>
inline void panel_tile_of(long tokens, const uint8_t* w, long panel_bytes, long quads, const RoundedTokens& x, long t,
                          Begun begun, const float* scales, long count, float* out, long ldo) {
    switch (tokens) {
        case 1: return panel_tile<V, 1, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
        case 2: return panel_tile<V, 2, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
        case 3: return panel_tile<V, 3, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
        case 4: return panel_tile<V, 4, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
        case 5: return panel_tile<V, 5, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
        default: return panel_tile<V, 6, kAsks>(w, panel_bytes, quads, x, t, begun, scales, count, out, ldo);
#endif
    }
}

// The products of n tokens from t on with some panels, in pieces that fill the registers.
inline void finish_tokens(const uint8_t* w, long panel_bytes, long panels, const RoundedTokens& x, long t, long n,
                          Begun begun, long quads, bool asks, const float* scales, long count, float* out, long ldo) {
    const long vectors = panels * kVectorsOfPanel;
    for (long done = 0, now; done < n; done += now) {
        const long pieces = (n - done + kMostTokens - 1) / kMostTokens;
        now = (n - done + pieces - 1) / pieces;
        for (long v = 0, own; v < vectors; v += own) {
            own = vectors - v >= kMostVectors ? kMostVectors : vectors - v >= 2 ? 2 : 1;
            const auto tile = asks ? (own == kMostVectors ? panel_tile_of<kMostVectors, true>
                                      : own == 2          ? panel_tile_of<2, true>
                                                          : panel_tile_of<1, true>)
                                   : (own == kMostVectors ? panel_tile_of<kMostVectors, false>
                                      : own == 2          ? panel_tile_of<2, false>
                                                          : panel_tile_of<1, false>);
            const long row = v * kSumLanes;
            Begun part = begun;
            if (part.sums) part.sums += done * begun.ld + row;
            tile(now, w + v / kVectorsOfPanel * panel_bytes, panel_bytes, quads, x, t + done, part, scales + row,
                 count - row, out + done * ldo + row, ldo);
        }
    }
}

// Rows first to first + count, at most kPanelChunk of a panel's start, times tokens from to to; out is (to - from, ldo).
// `quads` tells the inputs that a token has.
template <class Q>
void multiply_panels(const void* numbers, long panel_quads, const float* scales, long first, long count,
                     const RoundedTokens& x, long from, long to, float* out, long ldo, Q quads) {
    const long panel_bytes = panel_quads * kQuadBytes, panels = num_panels(count);
    const uint8_t* w = static_cast<const uint8_t*>(numbers) + first / kPanelRows * panel_bytes;
    const bool asks = to - from <= kAskedTokens, uses_tiles = to - from >= kTileTokens && has_tiles();
    if (uses_tiles) configure_tiles();
    for (long t = from, n; t < to; t += n) {
        // not six and one, but four and three
        const long pieces = (to - t + kMostTokens - 1) / kMostTokens;
        n = uses_tiles ? std::min(to - t, kTileTokens) : (to - t + pieces - 1) / pieces;
        Begun begun{nullptr, 0, 0};
        alignas(64) int32_t sums[kTileTokens * kTilePanels * kPanelRows];
        if (uses_tiles && n == kTileTokens) {
            begun = {sums, kTilePanels * kPanelRows, quads(t) / kTileQuads * kTileQuads};
            multiply_tiles(w, panel_bytes, panels, x.low.data() + t * x.room, x.room, begun.quads, sums, begun.ld);
        }
        finish_tokens(w, panel_bytes, panels, x, t, n, begun, quads(t), asks, scales + first, count,
                      out + (t - from) * ldo, ldo);
    }
    if (uses_tiles) release_tiles();
}

// Rounds n tokens x, (n, size), and multiplies them with the leading `outputs` of panels; out is (n, outputs). A scale of
// each token, or null for those that rounding chooses.
inline void multiply_tokens(const float* x, long n, long size, const float* token_scales, const void* panels,
                            long panel_quads, const float* scales, long outputs, float* out, int threads) {
    RoundedTokens tokens;
    tokens.resize(n, size);
    const long count = num_panels(outputs);
#pragma omp parallel num_threads(threads)
    {
        const long id = omp_get_thread_num(), nt = omp_get_num_threads();
        Floats row(tokens.room);  // a token may be read up to there
        for (long i = id; i < n; i += nt) {
            std::copy_n(x + i * size, size, row.begin());
            round_token(row.data(), nullptr, size, size, token_scales ? token_scales[i] : 0, i, tokens);
        }
#pragma omp barrier
        const long last = std::min(count * (id + 1) / nt * kPanelRows, outputs);
        for (long a = count * id / nt * kPanelRows; a < last; a += kPanelChunk)
            multiply_panels(panels, panel_quads, scales, a, std::min(kPanelChunk, last - a), tokens, 0, n, out + a,
                            outputs, [&](long) { return num_quads(size); });
    }
}

}  // namespace
