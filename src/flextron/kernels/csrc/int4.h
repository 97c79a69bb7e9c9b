// Products of some tokens with rows of four-bit weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace {

// Four-bit weights: numbers of 0 to 15, 8 more than what they stand for, in groups of 32 columns with a scale each. What
// they meet gets 16 bits in groups of its own, because products and sums of whole numbers take fewer instructions than
// floats need; its error, 1/65,534 of the largest in the group, is near that of sums of floats.
constexpr long kGroup = 32;
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes), aligned(2)));
typedef uint16_t Ushorts __attribute__((vector_size(4 * kLanes), aligned(2)));

struct FourBit {
    const uint8_t* numbers;
    const uint16_t* scales;  // (rows, columns / 32): upper halves of floats; one before and 8 after may be read, too
};

inline Ints load(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<Ints*>(p) = v; }
inline Vec floats(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec magnitudes(Vec v) { return (Vec)((Ints)v & 0x7FFFFFFF); }
inline Ints nearest(Vec v) {
#ifdef __AVX2__
    return (Ints)_mm256_cvtps_epi32((__m256)v);
#else  // ties to even, too: the last bits of numbers up to 2^22 beside a large one are whole
    const Vec large = Vec{} + 12582912.0f;
    return (Ints)(v + large) - (Ints)large;
#endif
}
// Sums of two neighbours' products.
inline Ints pair_products(Shorts a, Shorts b) {
#ifdef __AVX2__
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)  // what compilers make of the general form is several times slower
    __m128i halves[2], others[2];
    std::memcpy(halves, &a, sizeof a), std::memcpy(others, &b, sizeof b);
    for (int i = 0; i < 2; i++) halves[i] = _mm_madd_epi16(halves[i], others[i]);
    Ints sums;
    std::memcpy(&sums, halves, sizeof sums);
    return sums;
#else
    return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}
inline Vec load_scales(const uint16_t* p) {
#ifdef __AVX2__
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
#endif
}
// One scale for all lanes.
inline Vec same_scale(const uint16_t* p) {
    int32_t two;
    std::memcpy(&two, p - 1, sizeof two);
    Ints all = Ints{} + two;
    keep(all);  // from memory to all lanes at once, which compilers would not do
    return (Vec)(all & (int32_t)0xFFFF0000);
}

// A token for dot products with four-bit rows: for each group 32 numbers of 16 bits, a scale, and what undoes the weights'
// offset in each of eight lanes; in 32-bit units.
constexpr long kTokenGroup = kGroup / 2 + 2;
inline long token_size(long size) { return size / kGroup * kTokenGroup; }

void prepare_token(const float* x, long size, int32_t* token) {
    for (long g = 0; g < size / kGroup; g++, x += kGroup, token += kTokenGroup) {
        Vec high = larger(larger(magnitudes(load(x)), magnitudes(load(x + 8))),
                          larger(magnitudes(load(x + 16)), magnitudes(load(x + 24))));
        float most = 1e-30f;
        for (int i = 0; i < kLanes; i++) most = std::max(most, high[i]);
        int16_t numbers[kGroup];
        for (int i = 0; i < kGroup; i += kLanes) {
            const Ints part = nearest(load(x + i) * (32767.0f / most));
            for (int j = 0; j < kLanes; j++) numbers[i + j] = (int16_t)part[j];
        }
        std::memcpy(token, numbers, sizeof numbers);
        int32_t total = 0;
        for (int i = 0; i < kGroup; i++) total += numbers[i];
        const float scale = most / 32767.0f, ends[2] = {scale / (g % 2 ? 16 : 1), -8.0f / kLanes * scale * (float)total};
        std::memcpy(token + kGroup / 2, ends, sizeof ends);
    }
}

// Rows for dot products lie in blocks of two groups, the last one filled up. 16 bits hold, from the lowest, column i of the
// first group, columns i and 16 + i of the second, and column 16 + i of the first. The second group's come out 16 times as
// large, which its scale in prepared tokens makes good.
constexpr long kBlockBytes = kGroup;
inline long row_bytes(long groups) { return (groups + 1) / 2 * kBlockBytes; }

inline const float* ends_of(const int32_t* token) { return reinterpret_cast<const float*>(token + kGroup / 2); }

// Adds R rows' products with T prepared tokens in group G of a block.
template <int R, int T, int G>
inline void add_group(const Shorts (&blocks)[R], const uint16_t* scales, const int32_t* x, long ldx, long groups,
                      Vec (&acc)[R][T]) {
    Shorts first = (Shorts)load(x), second = (Shorts)load(x + kLanes);
    Vec own = Vec{} + ends_of(x)[0], offset = Vec{} + ends_of(x)[1];
    if (T == 1) keep(first), keep(second), keep(own), keep(offset);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const Shorts low = G ? blocks[r] & 0xF0 : blocks[r] & 0xF;
        const Shorts high = G ? (Shorts)((Ushorts)blocks[r] >> 4) & 0xF0 : (Shorts)((Ushorts)blocks[r] >> 12);
        const Vec scale = same_scale(scales + r * groups);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            if (T > 1) {
                const int32_t* token = x + t * ldx;
                first = (Shorts)load(token), second = (Shorts)load(token + kLanes);
                own = Vec{} + ends_of(token)[0], offset = Vec{} + ends_of(token)[1];
            }
            const Ints sum = pair_products(low, first) + pair_products(high, second);
            acc[r][t] = fma(fma(floats(sum), own, offset), scale, acc[r][t]);
        }
    }
}

// Dot products of R rows with T prepared tokens.
template <int R, int T>
__attribute__((noinline)) void group_dots(const uint8_t* w, const uint16_t* scales, const int32_t* x, long ldx,
                                          long groups, float* out, long ldo) {
    const long ldw = row_bytes(groups);
    Vec acc[R][T];
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) acc[i / T][i % T] = Vec{};
    for (long g = 0; g < groups; g += 2, w += kBlockBytes, scales += 2, x += 2 * kTokenGroup) {
        Shorts blocks[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            if (r % 2 == 0) __builtin_prefetch(w + R * ldw + (R - 1) * g / 2 * kBlockBytes + r * kBlockBytes, 0, 3);
            blocks[r] = (Shorts)load(reinterpret_cast<const int32_t*>(w + r * ldw));
            keep(blocks[r]);
        }
        add_group<R, T, 0>(blocks, scales, x, ldx, groups, acc);
        if (g + 1 < groups) add_group<R, T, 1>(blocks, scales + 1, x + kTokenGroup, ldx, groups, acc);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) out[i % T * ldo + i / T] = sum(acc[i / T][i % T]);
}

template <int R, int T>
inline void group_dots_all_rows(FourBit w, long first, long count, const int32_t* x, long ldx, long groups, float* out,
                                long ldo) {
    const long bytes = row_bytes(groups);
    const uint8_t* numbers = w.numbers + first * bytes;
    const uint16_t* scales = w.scales + first * groups;
    long r = 0;
    for (; r + R <= count; r += R)
        group_dots<R, T>(numbers + r * bytes, scales + r * groups, x, ldx, groups, out + r, ldo);
    for (; r < count; r++)
        group_dots<1, T>(numbers + r * bytes, scales + r * groups, x, ldx, groups, out + r, ldo);
}

// Dot products of rows first to first + count with n prepared tokens.
void dot_groups(FourBit w, long first, long count, const int32_t* x, long n, long size, float* out, long ldo) {
    const long groups = size / kGroup, ldx = token_size(size);
    long t = 0;
    for (; t + 4 <= n; t += 4)
        group_dots_all_rows<2, 4>(w, first, count, x + t * ldx, ldx, groups, out + t * ldo, ldo);
    x += t * ldx, out += t * ldo;
    if (n - t == 3) group_dots_all_rows<2, 3>(w, first, count, x, ldx, groups, out, ldo);
    if (n - t == 2) group_dots_all_rows<2, 2>(w, first, count, x, ldx, groups, out, ldo);
    if (n - t == 1) group_dots_all_rows<4, 1>(w, first, count, x, ldx, groups, out, ldo);
}

}  // namespace
