// Products of some tokens with rows of weights in float32 or int8, at the speed of memory or of arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

#ifdef __AVX2__  // what compilers make of the general form is several times slower
inline Vec load(const int8_t* p) {
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
inline Vec load(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec); }
#endif

// Vectors of V from numbers of either kind.
template <class V, class W>
struct Loads {
    static V at(const W* p) { return load(p); }
};
template <>
struct Loads<Wide, float> {
    static Wide at(const float* p) { return *reinterpret_cast<const Wide*>(p); }
};
template <class V>
constexpr long lanes_of = sizeof(V) / sizeof(float);

// Rows of a chunk, and tokens of a tile: a chunk of weights and a tile of tokens lie in the second-level cache together.
constexpr long kChunk = 48;
constexpr long kTile = 64;

// Asks memory for the part of the next R rows that is as long as what one step of a stream over R rows uses.
template <int R, int L, class W>
__attribute__((always_inline)) inline void ask_for(const W* p) {
    for (unsigned i = 0; i < R * L; i += kLine / sizeof(W)) __builtin_prefetch(p + i, 0, 3);
}

// Asks for all of a page's keys or values: where the next page lies, no processor can foresee.
__attribute__((always_inline)) inline void ask_for_page(const float* page, long size) {
    for (long i = 0; i < size; i += kLine / sizeof(float)) __builtin_prefetch(page + i, 0, 2);
}

// Up to so many tokens a product waits for memory, and asks for the next rows at every step; with more it computes, and
// asks seldom for more at once.
constexpr long kStreamed = 12;

// Asks for this call's part of the next R rows, if the tokens before `t` are done and there are n, too many for a stream.
// (A function that only asks has no effect in a compiler's eyes: its calls go away unless it is inlined.)
template <long R, class W>
__attribute__((always_inline)) inline void ask_seldom(const W* next, long size, long t, long n) {
    if (t >= kTile) return;
    const long calls = (std::min(n, kTile) + 3) / 4, part = (R * size + calls - 1) / calls;
    for (long c = 0; c < part; c += kLine / sizeof(W)) __builtin_prefetch(next + t / 4 * part + c, 0, 2);
}

// acc[r][t] += row r times token t, in vectors of V, from column c to an end that they reach.
template <class V, int R, int T, bool kAsks, class W>
__attribute__((always_inline)) inline void gather(const W* w, long ldw, const float* x, long ldx, long c, long end,
                                                  V* acc) {
    for (; c < end; c += lanes_of<V>) {
        if (kAsks) ask_for<R, lanes_of<V>>(w + R * ldw + R * c);
        V rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            rows[r] = Loads<V, W>::at(w + r * ldw + c);
            keep(rows[r]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            V token = Loads<V, float>::at(x + t * ldx + c);
            keep(token);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r * T + t] = fma(rows[r], token, acc[r * T + t]);
        }
    }
}

// out[t][r] = dot(row r, token t) for R rows of w and T tokens of x; R * T sums are in flight. Not inlined, because all
// registers are needed.
template <int R, int T, bool kAsks, class W>
__attribute__((noinline)) void dots(const W* w, long ldw, const float* x, long ldx, long size, float* out, long ldo) {
    typedef std::conditional_t<std::is_same_v<W, float>, Wide, Vec> First;
    const long whole = size / lanes_of<First> * lanes_of<First>;
    First wide[R * T];
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) wide[i] = First{};
    gather<First, R, T, kAsks>(w, ldw, x, ldx, 0, whole, wide);
    Vec acc[R * T];
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) acc[i] = halved(wide[i]);
    if (whole < size) gather<Vec, R, T, kAsks>(w, ldw, x, ldx, whole, size, acc);
    constexpr int kInFours = R * T / 4 * 4;
#pragma GCC unroll 16
    for (int i = 0; i < kInFours; i += 4) {
        const Four four = sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
#pragma GCC unroll 16
        for (int j = 0; j < 4; j++) out[(i + j) % T * ldo + (i + j) / T] = four[j];
    }
#pragma GCC unroll 16
    for (int i = kInFours; i < R * T; i++) out[i % T * ldo + i / T] = sum(acc[i]);
}

// y[t] += sum over R rows of h[t][r] * row r in vectors of V, from column c to an end that they reach.
template <class V, int R, int T, bool kAsks, class W>
__attribute__((always_inline)) inline void scatter(const W* w, long ldw, const float* h, long ldh, float* y, long ldy,
                                                   long c, long end) {
    V factors[R][T];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) factors[r][t] = V{} + h[t * ldh + r];
    for (; c < end; c += lanes_of<V>) {
        if (kAsks) ask_for<R, lanes_of<V>>(w + R * ldw + R * c);
        V rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) rows[r] = Loads<V, W>::at(w + r * ldw + c);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            V acc = Loads<V, float>::at(y + t * ldy + c);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc = fma(rows[r], factors[r][t], acc);
            store(y + t * ldy + c, acc);
        }
    }
}

// y[t] += sum over R rows of h[t][r] * row r, for T tokens: a stream over the rows.
template <int R, int T, bool kAsks, class W>
__attribute__((noinline)) void adds(const W* w, long ldw, const float* h, long ldh, float* y, long ldy, long size) {
    typedef std::conditional_t<std::is_same_v<W, float>, Wide, Vec> First;
    const long whole = size / lanes_of<First> * lanes_of<First>;
    scatter<First, R, T, kAsks>(w, ldw, h, ldh, y, ldy, 0, whole);
    if (whole < size) scatter<Vec, R, T, kAsks>(w, ldw, h, ldh, y, ldy, whole, size);
}

// Rows that meet four tokens at once: as many as there are registers for.
#ifdef __AVX512F__
template <class W>
constexpr int most_rows = std::is_same_v<W, float> ? 6 : 3;
#else
template <class W>
constexpr int most_rows = 3;
#endif

// One of the two for rows from r and tokens from t on, of many.
template <class W>
struct Dots {
    static constexpr int kMostRows = most_rows<W>;
    const W* w;
    long ldw;
    const float* x;
    long ldx, size;
    float* out;
    long ldo;
    template <int R, int T, bool kAsks>
    void run(long r, long t) const {
        dots<R, T, kAsks>(w + r * ldw, ldw, x + t * ldx, ldx, size, out + t * ldo + r, ldo);
    }
};

template <class W>
struct Adds {
    static constexpr int kMostRows = most_rows<W>;
    const W* w;
    long ldw;
    const float* h;
    long ldh;
    float* y;
    long ldy, size;
    template <int R, int T, bool kAsks>
    void run(long r, long t) const {
        adds<R, T, kAsks>(w + r * ldw, ldw, h + t * ldh + r, ldh, y + t * ldy, ldy, size);
    }
};

// R rows and n tokens, up to four.
template <int R, bool kAsks, class K>
inline void run_few(const K& kernel, long r, long t, long n) {
    if (n == 4) return kernel.template run<R, 4, kAsks>(r, t);
    if (n == 3) return kernel.template run<R, 3, kAsks>(r, t);
    if (n == 2) return kernel.template run<R, 2, kAsks>(r, t);
    return kernel.template run<R, 1, kAsks>(r, t);
}

// All rows and T tokens, in a stream of R rows at a time.
template <int R, int T, class K>
inline void stream(const K& kernel, long count) {
    long r = 0;
    for (; r + R <= count; r += R) kernel.template run<R, T, true>(r, 0);
    for (; r < count; r++) kernel.template run<1, T, false>(r, 0);
}

// R rows that go to the first-level cache together meet the tokens of a tile four by four; where rows are left from.
template <int R, bool kAsks, class K>
inline long meet(const K& kernel, long r, long count, long tile, long end, long n) {
    for (; r + R <= count; r += R)
        for (long t = tile; t < end; t += 4) {
            if (!kAsks && R > 1) ask_seldom<R>(kernel.w + (r + R) * kernel.ldw, kernel.size, t, n);
            run_few<R, kAsks>(kernel, r, t, std::min(end - t, 4L));
        }
    return r;
}

// All rows and n tokens. With up to six tokens each row is read once, from memory; with more, some rows at a time go to
// the first-level cache.
template <class K>
inline void run_all(const K& kernel, long count, long n) {
    if (n == 1) return stream<4, 1>(kernel, count);
    if (n == 2) return stream<4, 2>(kernel, count);
    if (n == 3) return stream<4, 3>(kernel, count);
    if (n == 4) return stream<3, 4>(kernel, count);
    if (n == 5) return stream<2, 5>(kernel, count);
    if (n == 6) return stream<2, 6>(kernel, count);
    for (long tile = 0; tile < n; tile += kTile) {
        const long end = std::min(tile + kTile, n);
        long r = 0;
        if (n <= kStreamed) {
            r = meet<3, true>(kernel, r, count, tile, end, n);
        } else {
            if (K::kMostRows > 3) r = meet<K::kMostRows, false>(kernel, r, count, tile, end, n);
            r = meet<3, false>(kernel, r, count, tile, end, n);
        }
        meet<1, false>(kernel, r, count, tile, end, n);
    }
}

// Dot products of `count` rows with n tokens.
template <class W>
inline void dot_rows(const W* w, long ldw, long count, const float* x, long ldx, long n, long size, float* out,
                     long ldo) {
    run_all(Dots<W>{w, ldw, x, ldx, size, out, ldo}, count, n);
}

// Sums over `count` rows for n tokens.
template <class W>
inline void add_rows(const W* w, long ldw, long count, const float* h, long ldh, float* y, long ldy, long n,
                     long size) {
    run_all(Adds<W>{w, ldw, h, ldh, y, ldy, size}, count, n);
}

}  // namespace
