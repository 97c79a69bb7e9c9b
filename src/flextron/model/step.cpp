// One iteration of the decoder on a CPU, from token ids to scores, for a ragged batch, in a single parallel region.
//
// A decode step reads all weights for a handful of tokens, so it runs at the speed of memory if nothing else gets in
// the way. Each weight row is read once and multiplied with the tokens that are at least that wide: tokens are ordered
// by width in every layer, widest first, so that row f belongs to a prefix of them (nested sub-networks without masks).
//
// Every weight has its nested dimension first. `expand` takes dot products with rows, `contract` adds multiples of
// rows. The MLP is one pass: neuron f reads its rows of gate, up and down, and leaves nothing in memory.
//
// Tokens may have adapters of their own. What these add is computed token by token beside the dense products, which stay
// the same for all (`Bypasses`).
//
// Shapes: N tokens, D hidden size, F neurons, H query heads, K KV heads, d head size, P tokens of a page.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <numeric>
#include <omp.h>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 8;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
#ifdef __AVX2__  // what compilers make of the general form is several times slower
inline Vec load(const int8_t* p) {
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
inline Vec load(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec); }
#endif
#ifdef __FMA__  // compilers make two instructions of some of these
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline float sum(Vec v) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    return v[0];
}
// Keeps a value in a register: compilers would rather load it again at every use.
template <class V>
inline void keep(V& v) {
#ifdef __AVX__
    asm("" : "+x"(v));
#endif
}

typedef float Four __attribute__((vector_size(16)));

// The sums of four vectors.
inline Four sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec ab = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                   __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec cd = __builtin_shufflevector(c, d, 0, 8, 1, 9, 4, 12, 5, 13) +
                   __builtin_shufflevector(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    const Vec all = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                    __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
}

// Floats that begin at a line of the cache: vectors that lie in two lines take twice the time.
constexpr long kLine = 64;  // bytes
template <class T>
struct Aligned {
    typedef T value_type;
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kLine))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kLine)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

// Rows of a chunk, and tokens of a tile: a chunk of weights and a tile of tokens lie in the second-level cache together.
constexpr long kChunk = 48;
constexpr long kTile = 64;

// Asks memory for the part of the next R rows that is as long as what one step of a stream over R rows uses.
template <int R, class W>
__attribute__((always_inline)) inline void ask_for(const W* p) {
    for (unsigned i = 0; i < R * kLanes; i += kLine / sizeof(W)) __builtin_prefetch(p + i, 0, 3);
}

// Asks for all of a page's keys or values: where the next page lies, no processor can foresee.
__attribute__((always_inline)) inline void ask_for_page(const float* page, long size) {
    for (long i = 0; i < size; i += kLine / sizeof(float)) __builtin_prefetch(page + i, 0, 2);
}

// Up to so many tokens a product waits for memory, and asks for the next rows at every step; with more it computes, and
// asks seldom for more at once.
constexpr long kStreamed = 12;

// Asks for this call's part of the next three rows, if the tokens before `t` are done and there are n. (A function
// that only asks has no effect in a compiler's eyes: its calls go away unless it is inlined.)
template <class W>
__attribute__((always_inline)) inline void ask_seldom(const W* next, long size, long t, long n) {
    if (n <= kStreamed || t >= kTile) return;
    const long calls = (std::min(n, kTile) + 3) / 4, part = (3 * size + calls - 1) / calls;
    for (long c = 0; c < part; c += kLine / sizeof(W)) __builtin_prefetch(next + t / 4 * part + c, 0, 2);
}

// out[t][r] = dot(row r, token t) for R rows of w and T tokens of x; R * T sums are in flight. Not inlined, because all
// registers are needed.
template <int R, int T, bool kAsks, class W>
__attribute__((noinline)) void dots(const W* w, long ldw, const float* x, long ldx, long size, float* out, long ldo) {
    Vec acc[R * T];
#pragma GCC unroll 16
    for (int i = 0; i < R * T; i++) acc[i] = Vec{};
    for (long c = 0; c < size; c += kLanes) {
        if (kAsks) ask_for<R>(w + R * ldw + R * c);
        Vec rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            rows[r] = load(w + r * ldw + c);
            keep(rows[r]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            Vec token = load(x + t * ldx + c);
            keep(token);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[r * T + t] = fma(rows[r], token, acc[r * T + t]);
        }
    }
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

// The same for n tokens, up to four.
template <int R, bool kAsks, class W>
inline void dots_few(const W* w, long ldw, const float* x, long ldx, long n, long size, float* out, long ldo) {
    if (n == 4) return dots<R, 4, kAsks>(w, ldw, x, ldx, size, out, ldo);
    if (n == 3) return dots<R, 3, kAsks>(w, ldw, x, ldx, size, out, ldo);
    if (n == 2) return dots<R, 2, kAsks>(w, ldw, x, ldx, size, out, ldo);
    return dots<R, 1, kAsks>(w, ldw, x, ldx, size, out, ldo);
}

template <int R, int T, class W>
inline void dots_all_rows(const W* w, long ldw, long count, const float* x, long ldx, long size, float* out, long ldo) {
    long r = 0;
    for (; r + R <= count; r += R) dots<R, T, true>(w + r * ldw, ldw, x, ldx, size, out + r, ldo);
    for (; r < count; r++) dots<1, T, false>(w + r * ldw, ldw, x, ldx, size, out + r, ldo);
}

// Dot products of `count` rows with n tokens. With up to six tokens each row is read once, from memory; with more,
// three rows go to the first-level cache and meet the tokens four by four.
template <class W>
inline void dot_rows(const W* w, long ldw, long count, const float* x, long ldx, long n, long size, float* out,
                     long ldo) {
    if (n == 1) return dots_all_rows<4, 1>(w, ldw, count, x, ldx, size, out, ldo);
    if (n == 2) return dots_all_rows<4, 2>(w, ldw, count, x, ldx, size, out, ldo);
    if (n == 3) return dots_all_rows<4, 3>(w, ldw, count, x, ldx, size, out, ldo);
    if (n == 4) return dots_all_rows<3, 4>(w, ldw, count, x, ldx, size, out, ldo);
    if (n == 5) return dots_all_rows<2, 5>(w, ldw, count, x, ldx, size, out, ldo);
    if (n == 6) return dots_all_rows<2, 6>(w, ldw, count, x, ldx, size, out, ldo);
    for (long tile = 0; tile < n; tile += kTile) {
        const long end = std::min(tile + kTile, n);
        long r = 0;
        for (; r + 3 <= count; r += 3)
            for (long t = tile; t < end; t += 4) {
                ask_seldom(w + (r + 3) * ldw, size, t, n);
                const auto few = n <= kStreamed ? dots_few<3, true, W> : dots_few<3, false, W>;
                few(w + r * ldw, ldw, x + t * ldx, ldx, std::min(end - t, 4L), size, out + t * ldo + r, ldo);
            }
        for (; r < count; r++)
            for (long t = tile; t < end; t += 4)
                dots_few<1, false>(w + r * ldw, ldw, x + t * ldx, ldx, std::min(end - t, 4L), size, out + t * ldo + r,
                                   ldo);
    }
}

// y[t] += sum over R rows of h[t][r] * row r, for T tokens: a stream over the rows.
template <int R, int T, bool kAsks, class W>
__attribute__((noinline)) void adds(const W* w, long ldw, const float* h, long ldh, float* y, long ldy, long size) {
    Vec factors[R][T];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) factors[r][t] = Vec{} + h[t * ldh + r];
    for (long c = 0; c < size; c += kLanes) {
        if (kAsks) ask_for<R>(w + R * ldw + R * c);
        Vec rows[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) rows[r] = load(w + r * ldw + c);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) {
            Vec acc = load(y + t * ldy + c);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc = fma(rows[r], factors[r][t], acc);
            store(y + t * ldy + c, acc);
        }
    }
}

template <int R, bool kAsks, class W>
inline void adds_few(const W* w, long ldw, const float* h, long ldh, float* y, long ldy, long n, long size) {
    if (n == 4) return adds<R, 4, kAsks>(w, ldw, h, ldh, y, ldy, size);
    if (n == 3) return adds<R, 3, kAsks>(w, ldw, h, ldh, y, ldy, size);
    if (n == 2) return adds<R, 2, kAsks>(w, ldw, h, ldh, y, ldy, size);
    return adds<R, 1, kAsks>(w, ldw, h, ldh, y, ldy, size);
}

template <int R, int T, class W>
inline void adds_all_rows(const W* w, long ldw, long count, const float* h, long ldh, float* y, long ldy, long size) {
    long r = 0;
    for (; r + R <= count; r += R) adds<R, T, true>(w + r * ldw, ldw, h + r, ldh, y, ldy, size);
    for (; r < count; r++) adds<1, T, false>(w + r * ldw, ldw, h + r, ldh, y, ldy, size);
}

// The same for `count` rows and n tokens, in the order of `dot_rows`.
template <class W>
inline void add_rows(const W* w, long ldw, long count, const float* h, long ldh, float* y, long ldy, long n,
                     long size) {
    if (n == 1) return adds_all_rows<4, 1>(w, ldw, count, h, ldh, y, ldy, size);
    if (n == 2) return adds_all_rows<4, 2>(w, ldw, count, h, ldh, y, ldy, size);
    if (n == 3) return adds_all_rows<4, 3>(w, ldw, count, h, ldh, y, ldy, size);
    if (n == 4) return adds_all_rows<3, 4>(w, ldw, count, h, ldh, y, ldy, size);
    if (n == 5) return adds_all_rows<2, 5>(w, ldw, count, h, ldh, y, ldy, size);
    if (n == 6) return adds_all_rows<2, 6>(w, ldw, count, h, ldh, y, ldy, size);
    for (long tile = 0; tile < n; tile += kTile) {
        const long end = std::min(tile + kTile, n);
        long r = 0;
        for (; r + 3 <= count; r += 3)
            for (long t = tile; t < end; t += 4) {
                ask_seldom(w + (r + 3) * ldw, size, t, n);
                const auto few = n <= kStreamed ? adds_few<3, true, W> : adds_few<3, false, W>;
                few(w + r * ldw, ldw, h + t * ldh + r, ldh, y + t * ldy, ldy, std::min(end - t, 4L), size);
            }
        for (; r < count; r++)
            for (long t = tile; t < end; t += 4)
                adds_few<1, false>(w + r * ldw, ldw, h + t * ldh + r, ldh, y + t * ldy, ldy, std::min(end - t, 4L),
                                   size);
    }
}

// Four-bit weights: numbers of 0 to 15, 8 more than what they stand for, in groups of 32 columns with a scale each. What
// they meet gets 16 bits in groups of its own, because products and sums of whole numbers take fewer instructions than
// floats need; its error, 1/65,534 of the largest in the group, is near that of sums of floats.
constexpr long kGroup = 32;
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes), aligned(2)));
typedef uint16_t Ushorts __attribute__((vector_size(4 * kLanes), aligned(2)));

struct FourBit {
    const uint8_t* numbers;
    const uint16_t* scales;  // (rows, columns / 32): upper halves of floats; one before and 8 after may be read, too
};

inline Ints load(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<Ints*>(p) = v; }
inline Vec floats(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec magnitudes(Vec v) { return (Vec)((Ints)v & 0x7FFFFFFF); }
inline Ints nearest(Vec v) {
#ifdef __AVX2__
    return (Ints)_mm256_cvtps_epi32((__m256)v);
#else
    return __builtin_convertvector(v + (v > 0 ? Vec{} + 0.5f : Vec{} - 0.5f), Ints);
#endif
}
// Sums of two neighbours' products.
inline Ints pair_products(Shorts a, Shorts b) {
#ifdef __AVX2__
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
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

// Memory of this thread for what one call needs.
template <class T>
inline T* room(long size) {
    thread_local std::vector<T> numbers;
    if ((long)numbers.size() < size) numbers.resize(size);
    return numbers.data();
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

extern "C" {

struct Linear {
    const void* weight;           // rows nested; float, int8 with scales, or four bits with scales of groups
    const float* bias;            // of the outputs, or null
    const float* scales;          // of the rows, or null
    const uint16_t* group_scales; // or null
    const float* column_scales;   // by which sums over rows are multiplied at the end, or null
};

struct Norm {
    const float* weight;  // null where the layer has no such norm
    const float* bias;
};

struct LayerWeights {
    Norm attention_norm, mlp_norm;
    Linear q, k, v, o;
    Norm q_norm, k_norm;
    Linear gate, up, down;
};

// What lies before the first layer and after the last.
struct Ends {
    const float* embedding;  // (V, D)
    const float* positions;  // learned, (P, D), or null
    Norm final_norm;
    Linear head;  // (V, D)
};

struct Shape {
    int64_t hidden_size, head_dim, vocab_size, num_layers, rotated, window, page_size;
    int64_t query_rows_per_group, is_multi_query, parallel_residual, is_layer_norm, activation, weights;
    float norm_eps;
};

// What an adapter has beside one linear: LoRA's matrices, IA3's factors, or nothing. All lie along the linear's inputs
// or outputs as its weight does, so a sub-network uses the leading rows.
struct Bypass {
    const float* a;        // (inputs, rank), or null
    const float* b;        // (outputs, rank), or null
    const float* inputs;   // factors, or null; beside `o` and `down` only
    const float* outputs;  // factors, or null
    int64_t rank;
    float scale;
};

// Tokens of one iteration. Widths are (layers, N); a layer's units of a page are its KV heads.
struct Tokens {
    int64_t num_tokens;
    const int64_t* ids;             // (N,)
    const int64_t* positions;       // (N,)
    const int32_t* mlp_widths;      // neurons, 0 skips
    const int32_t* num_groups;      // attention groups, 0 skips
    const int32_t* const* tables;   // (N,): page table of each token's sequence, (pages, row)
    const int64_t* table_rows;      // (N,): entries of a page in that table
    const int32_t* unit_offsets;    // (layers, N): first entry of a layer
    const float* cos;               // (N, rotated)
    const float* sin;               // signed
    const Bypass* const* adapters;  // (N,): (layers, targets) of each token's adapter, or null; null if none has one
    int64_t max_rank;               // of all adapters
    float* cache;                   // (units, 2, P, d)
    int64_t num_scores;
    const int64_t* rows;            // (num_scores,): tokens after which scores are wanted
    float* scores;                  // (num_scores, V)
};
}

namespace {

enum Weights { kFloat32, kInt8, kInt4 };

enum Activation { kSilu, kGelu, kGeluTanh, kRelu };

// The activation of n numbers in place.
void activate(float* z, long n, int64_t kind) {
    switch (kind) {
        case kSilu:
            for (long i = 0; i < n; i++) z[i] = z[i] / (1.0f + std::exp(-z[i]));
            return;
        case kGelu:
            for (long i = 0; i < n; i++) z[i] = 0.5f * z[i] * (1.0f + std::erf(z[i] * 0.70710678f));
            return;
        case kGeluTanh:
            for (long i = 0; i < n; i++)
                z[i] = 0.5f * z[i] * (1.0f + std::tanh(0.79788456f * (z[i] + 0.044715f * z[i] * z[i] * z[i])));
            return;
        default:
            for (long i = 0; i < n; i++) z[i] = std::max(z[i], 0.0f);
    }
}

void normalize(const float* x, const Norm& norm, bool centred, float eps, long size, float* out) {
    float mean = 0, square = 0;
    if (centred) {
        for (long i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
    for (long i = 0; i < size; i++) square += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / std::sqrt(square / size + eps);
    for (long i = 0; i < size; i++) out[i] = (x[i] - mean) * factor * norm.weight[i];
    if (norm.bias)
        for (long i = 0; i < size; i++) out[i] += norm.bias[i];
}

// Tokens ordered by width, widest first, and how many of them use each row.
struct Order {
    std::vector<int> tokens;   // those of width above 0
    std::vector<int> widths;   // of them, falling
    void set(const int32_t* widths_N, long n) {
        tokens.clear();
        widths.clear();
        for (long t = 0; t < n; t++)
            if (widths_N[t] > 0) tokens.push_back(t);
        std::stable_sort(tokens.begin(), tokens.end(), [&](int a, int b) { return widths_N[a] > widths_N[b]; });
        for (int t : tokens) widths.push_back(widths_N[t]);
    }
    long size() const { return tokens.size(); }
    long widest() const { return widths.empty() ? 0 : widths[0]; }
    // The tokens that use row `row`, and the first row that fewer of them use.
    long users(long row, long unit, long* until) const {
        long n = size();
        while (n > 0 && widths[n - 1] * unit <= row) n--;
        *until = n ? widths[n - 1] * unit : row;
        return n;
    }
};

// Calls f(start, stop, users) on this thread's share of rows [0, widest), chunk by chunk. Rows of one number of users
// are cut into one stretch a thread, which memory reads best.
template <class F>
inline void share_rows(const Order& order, long unit, int thread, int threads, F f) {
    const long end = order.widest() * unit;
    for (long row = 0; row < end;) {
        long until;
        const long n = order.users(row, unit, &until), units = (until - row + 11) / 12;
        const long a = row + std::min(until - row, units * thread / threads * 12);
        const long e = row + std::min(until - row, units * (thread + 1) / threads * 12);
        for (long chunk = a; chunk < e; chunk += kChunk) f(chunk, std::min(chunk + kChunk, e), n);
        row = until;
    }
}

// Multiplies what rows first to first + rows gave by their scales and adds their biases; out is (n, ldo).
inline void finish(const Linear& linear, long first, long rows, long n, float* out, long ldo) {
    if (linear.scales)
        for (long t = 0; t < n; t++)
            for (long r = 0; r < rows; r++) out[t * ldo + r] *= linear.scales[first + r];
    if (linear.bias)
        for (long t = 0; t < n; t++)
            for (long r = 0; r < rows; r++) out[t * ldo + r] += linear.bias[first + r];
}

// z += x A for V vectors of the columns of A, (rows, rank); 2 * V sums are in flight.
template <int V>
void multiply_columns(const float* x, const float* a, long rows, long rank, float* z) {
    Vec even[V], odd[V];
    for (int v = 0; v < V; v++) even[v] = load(z + v * kLanes), odd[v] = Vec{};
    long c = 0;
    for (; c + 2 <= rows; c += 2)
        for (int v = 0; v < V; v++) {
            even[v] = fma(load(a + c * rank + v * kLanes), Vec{} + x[c], even[v]);
            odd[v] = fma(load(a + (c + 1) * rank + v * kLanes), Vec{} + x[c + 1], odd[v]);
        }
    for (int v = 0; v < V; v++) {
        if (c < rows) even[v] = fma(load(a + c * rank + v * kLanes), Vec{} + x[c], even[v]);
        store(z + v * kLanes, even[v] + odd[v]);
    }
}

// z += x A for A (rows, rank).
void multiply(const float* x, const float* a, long rows, long rank, float* z) {
    long j = 0;
    for (; j + 4 * kLanes <= rank; j += 4 * kLanes) multiply_columns<4>(x, a + j, rows, rank, z + j);
    for (; j + 2 * kLanes <= rank; j += 2 * kLanes) multiply_columns<2>(x, a + j, rows, rank, z + j);
    for (; j + kLanes <= rank; j += kLanes) multiply_columns<1>(x, a + j, rows, rank, z + j);
    for (; j < rank; j++)
        for (long c = 0; c < rows; c++) z[j] += x[c] * a[c * rank + j];
}

// Dot product of vectors of any size.
inline float inner(const float* x, const float* y, long size) {
    Vec acc{};
    long j = 0;
    for (; j + kLanes <= size; j += kLanes) acc = fma(load(x + j), load(y + j), acc);
    float total = sum(acc);
    for (; j < size; j++) total += x[j] * y[j];
    return total;
}

// y += scale * z B^T for n tokens, z (n, ldz), and at most kChunk rows of B, (rows, rank); y is (n, ldy). For several
// tokens B is turned round piece by piece, for sums across a vector cost more than the products.
void add_products(const float* b, long rows, long rank, float scale, const float* z, long ldz, float* y, long ldy,
                  long n) {
    constexpr long kPiece = 16;
    float turned[kPiece][kChunk];
    if (n < 3) {
        for (long t = 0; t < n; t++)
            for (long r = 0; r < rows; r++) y[t * ldy + r] += scale * inner(b + r * rank, z + t * ldz, rank);
        return;
    }
    for (long j = 0; j < rank; j += kPiece) {
        const long count = std::min(kPiece, rank - j);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < count; c++) turned[c][r] = scale * b[r * rank + j + c];
        for (long t = 0; t < n; t++)
            for (long c = 0; c < count; c++)
                for (long r = 0; r < rows; r++) y[t * ldy + r] += z[t * ldz + j + c] * turned[c][r];
    }
}

enum Target { kQ, kK, kV, kO, kGate, kUp, kDown, kTargets };

// What the adapters of a batch change: y = W x becomes W x + scale * B (A x), with A and B of each token's own adapter
// (LoRA), or the inputs or outputs get factors (IA3). Into a nested dimension, `read` makes z = A x of whole tokens and
// `add` takes rows of B; out of it, `read_rows` makes each thread's part of z and `add_whole` takes them together. All
// of it is over at once in a batch without adapters.
struct Bypasses {
    const Tokens& b;
    const long N, D, rank;
    Floats low;    // (kTargets, N, rank): z, by a token's place in the order
    Floats parts;  // (threads, N, rank)

    Bypasses(const Tokens& b, long D, int threads) : b(b), N(b.num_tokens), D(D), rank(b.max_rank) {
        if (b.adapters) low.resize(kTargets * N * rank), parts.resize(threads * N * rank);
    }

    // Calls f(i, bypass) for those of places first, first + step, ... below n whose token has an adapter.
    template <class F>
    void each(long l, Target target, const Order& order, long first, long step, long n, F f) const {
        if (!b.adapters) return;
        for (long i = first; i < n; i += step)
            if (const Bypass* own = b.adapters[order.tokens[i]]) f(i, own[l * kTargets + target]);
    }

    // Calls f(i, count, bypass) for neighbours below n whose tokens have the same adapter.
    template <class F>
    void runs(long l, Target target, const Order& order, long n, F f) const {
        if (!b.adapters) return;
        for (long i = 0, end; i < n; i = end) {
            const Bypass* own = b.adapters[order.tokens[i]];
            for (end = i + 1; end < n && b.adapters[order.tokens[end]] == own;) end++;
            if (own) f(i, end - i, own[l * kTargets + target]);
        }
    }

    // From this thread's tokens, which it has just normalised, (order.size(), D).
    void read(long l, std::initializer_list<Target> targets, const Order& order, const float* x, int id, int nt) {
        for (Target target : targets)
            each(l, target, order, id, nt, order.size(), [&](long i, const Bypass& own) {
                if (!own.a) return;
                float* z = low.data() + (target * N + i) * rank;
                std::fill(z, z + own.rank, 0.0f);
                multiply(x + i * D, own.a, D, own.rank, z);
            });
    }

    // To rows first to first + rows of n tokens' outputs, (n, ldo).
    void add(long l, Target target, const Order& order, long first, long rows, float* out, long ldo, long n) const {
        runs(l, target, order, n, [&](long i, long count, const Bypass& own) {
            float* y = out + i * ldo;
            const float* z = low.data() + (target * N + i) * rank;
            if (own.b) add_products(own.b + first * own.rank, rows, own.rank, own.scale, z, rank, y, ldo, count);
            if (own.outputs)
                for (long t = 0; t < count; t++)
                    for (long r = 0; r < rows; r++) y[t * ldo + r] *= own.outputs[first + r];
        });
    }

    void clear_parts(int id) {
        if (b.adapters) std::fill_n(parts.data() + id * N * rank, N * rank, 0.0f);
    }

    // From rows first to first + rows of n tokens' inputs h, (n, ldh), which get their factors.
    void read_rows(long l, Target target, const Order& order, long first, long rows, float* h, long ldh, long n,
                   int id) {
        each(l, target, order, 0, 1, n, [&](long i, const Bypass& own) {
            float* z = parts.data() + (id * N + i) * rank;
            if (own.a) multiply(h + i * ldh, own.a + first * own.rank, rows, own.rank, z);
            if (own.inputs)
                for (long r = 0; r < rows; r++) h[i * ldh + r] *= own.inputs[first + r];
        });
    }

    // To place i's token x, (D,), which has all threads' dense products `partial`, (nt, N, D), and the bias already.
    void add_whole(long l, Target target, const Order& order, long i, const float* partial, const float* bias, int nt,
                   float* x) {
        each(l, target, order, i, 1, i + 1, [&](long, const Bypass& own) {
            if (own.b) {
                float* z = parts.data() + i * rank;
                for (int p = 1; p < nt; p++)
                    for (long j = 0; j < own.rank; j++) z[j] += parts[(p * N + i) * rank + j];
                for (long c = 0; c < D; c++) x[c] += own.scale * inner(own.b + c * own.rank, z, own.rank);
            }
            if (own.outputs)
                for (long c = 0; c < D; c++) {
                    float y = bias ? bias[c] : 0.0f;
                    for (int p = 0; p < nt; p++) y += partial[(p * N + i) * D + c];
                    x[c] += y * (own.outputs[c] - 1.0f);
                }
        });
    }
};

// W is the type of the weights whose rows are outputs, E that of the head and of weights whose rows are inputs.
template <class W, class E>
struct Step {
    static constexpr bool kIsFourBit = std::is_same<W, FourBit>::value;
    const Shape& s;
    const LayerWeights* layers;
    const Ends& ends;
    const Tokens& b;
    Bypasses bypasses;
    std::vector<Order> attention, mlp;
    Floats x, xn, q, k, v, heads, partial;
    std::vector<int32_t> prepared;  // tokens of xn for four-bit weights
    long D, N, d, kv_max, q_max;

    long kv_rows(long groups) const { return d * (s.is_multi_query ? std::min(groups, 1L) : groups); }

    Step(const Shape& s, const LayerWeights* layers, const Ends& ends, const Tokens& b, int threads)
        : s(s), layers(layers), ends(ends), b(b), bypasses(b, s.hidden_size, threads) {
        D = s.hidden_size, N = b.num_tokens, d = s.head_dim;
        attention.resize(s.num_layers), mlp.resize(s.num_layers);
        long groups = 0;
        for (long l = 0; l < s.num_layers; l++) {
            attention[l].set(b.num_groups + l * N, N);
            mlp[l].set(b.mlp_widths + l * N, N);
            groups = std::max(groups, attention[l].widest());
        }
        q_max = groups * s.query_rows_per_group, kv_max = kv_rows(groups);
        x.resize(N * D), xn.resize(2 * N * D), q.resize(N * q_max), k.resize(N * kv_max), v.resize(N * kv_max);
        if (kIsFourBit) prepared.resize(2 * N * token_size(D));
        heads.resize(N * q_max), partial.resize((long)threads * N * D);
    }

    void norms(const Order& order, const Norm& norm, float* out, int id, int nt) {
        for (long i = id; i < order.size(); i += nt) {
            normalize(&x[order.tokens[i] * D], norm, s.is_layer_norm, s.norm_eps, D, out + i * D);
            if (kIsFourBit)
                prepare_token(out + i * D, D, prepared.data() + ((out - xn.data()) / D + i) * token_size(D));
        }
    }

    void attention_input(long l, float* out, int id, int nt) {
        norms(attention[l], layers[l].attention_norm, out, id, nt);
        bypasses.read(l, {kQ, kK, kV}, attention[l], out, id, nt);
    }

    void mlp_input(long l, float* out, int id, int nt) {
        norms(mlp[l], layers[l].mlp_norm, out, id, nt);
        bypasses.read(l, {kGate, kUp}, mlp[l], out, id, nt);
    }

    // Products of rows first to first + rows with n tokens of `in`, which is a part of `xn`; (n, ldo).
    void products(const Linear& linear, long first, long rows, const float* in, long n, float* out, long ldo) const {
        if constexpr (kIsFourBit) {
            const int32_t* tokens = prepared.data() + (in - xn.data()) / D * token_size(D);
            dot_groups({static_cast<const uint8_t*>(linear.weight), linear.group_scales}, first, rows, tokens, n, D, out,
                       ldo);
        } else {
            dot_rows(static_cast<const W*>(linear.weight) + first * D, D, rows, in, D, n, D, out, ldo);
        }
    }

    void project(long l, Target target, const Order& order, long unit, const Linear& linear, float* out, long ldo,
                 int id, int nt) const {
        share_rows(order, unit, id, nt, [&](long a, long e, long n) {
            products(linear, a, e - a, xn.data(), n, out + a, ldo);
            finish(linear, a, e - a, n, out + a, ldo);
            bypasses.add(l, target, order, a, e - a, out + a, ldo, n);
        });
    }

    void rotate(float* head, long token) const {
        const long R = s.rotated, half = R / 2;
        const float *cos = b.cos + token * R, *sin = b.sin + token * R;
        for (long i = 0; i < half; i++) {
            const float lo = head[i], hi = head[i + half];
            head[i] = lo * cos[i] + hi * sin[i];
            head[i + half] = hi * cos[i + half] + lo * sin[i + half];
        }
    }

    float* unit(long layer, long token, long page, long kv_head) const {
        const int32_t* row = b.tables[token] + page * b.table_rows[token];
        return b.cache + (long)row[b.unit_offsets[layer * N + token] + kv_head] * 2 * s.page_size * d;
    }

    // Normalises and rotates the heads of every token, and writes keys and values to their pages.
    void place(long l, int id, int nt) {
        const Order& order = attention[l];
        const LayerWeights& w = layers[l];
        for (long i = id; i < order.size(); i += nt) {
            const long token = order.tokens[i], position = b.positions[token];
            const long q_rows = order.widths[i] * s.query_rows_per_group, kv = kv_rows(order.widths[i]);
            for (long r = 0; r < q_rows; r += d) {
                float* head = &q[i * q_max + r];
                if (w.q_norm.weight) normalize(head, w.q_norm, false, s.norm_eps, d, head);
                if (s.rotated) rotate(head, token);
            }
            for (long r = 0; r < kv; r += d) {
                float* head = &k[i * kv_max + r];
                if (w.k_norm.weight) normalize(head, w.k_norm, false, s.norm_eps, d, head);
                if (s.rotated) rotate(head, token);
                float* keys = unit(l, token, position / s.page_size, r / d) + position % s.page_size * d;
                std::memcpy(keys, head, d * sizeof(float));
                std::memcpy(keys + s.page_size * d, &v[i * kv_max + r], d * sizeof(float));
            }
        }
    }

    // Heads of one token over one KV head.
    void attend(long l, long i, long kv_head, Floats& scores) {
        const Order& order = attention[l];
        const long token = order.tokens[i], P = s.page_size, last = b.positions[token];
        const long per_kv = s.is_multi_query ? order.widths[i] : s.query_rows_per_group / d;
        const long first = s.window > 0 ? std::max(0L, last + 1 - s.window) : 0;
        const long start = first / P * P, ld = (last / P + 1) * P - start;
        float* own_q = &q[i * q_max + kv_head * per_kv * d];
        float* out = &heads[i * q_max + kv_head * per_kv * d];
        if ((long)scores.size() < per_kv * ld) scores.resize(per_kv * ld);
        for (long p = start; p <= last; p += P) {
            ask_for_page(p + P <= last ? unit(l, token, p / P + 1, kv_head) : unit(l, token, start / P, kv_head) + P * d,
                         P * d);
            dot_rows(unit(l, token, p / P, kv_head), d, P, own_q, d, per_kv, d, &scores[p - start], ld);
        }
        const float scale = 1.0f / std::sqrt((float)d);
        for (long h = 0; h < per_kv; h++) {
            float* row = &scores[h * ld];
            float most = -INFINITY, total = 0;
            const long a = first - start, e = last + 1 - start;
            for (long j = a; j < e; j++) most = std::max(most, row[j]);
            for (long j = a; j < e; j++) row[j] = std::exp((row[j] - most) * scale), total += row[j];
            for (long j = a; j < e; j++) row[j] /= total;
            std::fill(row, row + a, 0.0f);
            std::fill(row + e, row + ld, 0.0f);
        }
        std::fill(out, out + per_kv * d, 0.0f);
        for (long p = start; p <= last; p += P) {
            if (p + P <= last) ask_for_page(unit(l, token, p / P + 1, kv_head) + P * d, P * d);
            add_rows(unit(l, token, p / P, kv_head) + P * d, d, std::min(P, last + 1 - p), &scores[p - start], ld, out,
                     d, per_kv, d);
        }
    }

    // x += what all threads' partial sums say, the bias, and what bypasses make of it.
    void residual(long l, Target target, const Order& order, const Linear& linear, int id, int nt) {
        const float* bias = linear.bias;
        for (long i = id; i < order.size(); i += nt) {
            float* own = &x[order.tokens[i] * D];
            for (int p = 0; p < nt; p++) {
                float* y = &partial[((long)p * N + i) * D];
                if (linear.column_scales)
                    for (long c = 0; c < D; c++) y[c] *= linear.column_scales[c];
                for (long c = 0; c < D; c++) own[c] += y[c];
            }
            if (bias)
                for (long c = 0; c < D; c++) own[c] += bias[c];
            bypasses.add_whole(l, target, order, i, partial.data(), bias, nt, own);
        }
    }

    // Neurons f to f + rows of n tokens, with their biases and bypasses; (n, kChunk).
    void neurons(long l, Target target, const Linear& linear, long f, long rows, const float* in, long n,
                 float* out) const {
        products(linear, f, rows, in, n, out, kChunk);
        finish(linear, f, rows, n, out, kChunk);
        bypasses.add(l, target, mlp[l], f, rows, out, kChunk, n);
    }

    // own += h times rows first to first + rows; h, (n, ldh), is used up.
    void contract(const Linear& linear, long first, long rows, float* h, long ldh, float* own, long n) const {
        if (linear.scales)
            for (long t = 0; t < n; t++)
                for (long r = 0; r < rows; r++) h[t * ldh + r] *= linear.scales[first + r];
        add_rows(static_cast<const E*>(linear.weight) + first * D, D, rows, h, ldh, own, D, n, D);
    }

    void feed_forward(long l, const float* in, float* own, int id, int nt) {
        const LayerWeights& w = layers[l];
        Floats up(kChunk * N), gate(w.gate.weight ? kChunk * N : 0);
        share_rows(mlp[l], 1, id, nt, [&](long a, long e, long n) {
            neurons(l, kUp, w.up, a, e - a, in, n, up.data());
            if (w.gate.weight) {
                neurons(l, kGate, w.gate, a, e - a, in, n, gate.data());
                activate(gate.data(), kChunk * n, s.activation);
                for (long i = 0; i < kChunk * n; i++) up[i] *= gate[i];
            } else {
                activate(up.data(), kChunk * n, s.activation);
            }
            bypasses.read_rows(l, kDown, mlp[l], a, e - a, up.data(), kChunk, n, id);
            contract(w.down, a, e - a, up.data(), kChunk, own, n);
        });
    }

    void embed(int id, int nt) {
        for (long t = id; t < N; t += nt) {
            std::memcpy(&x[t * D], ends.embedding + b.ids[t] * D, D * sizeof(float));
            if (ends.positions)
                for (long c = 0; c < D; c++) x[t * D + c] += ends.positions[b.positions[t] * D + c];
        }
    }

    void score(int id, int nt) {
        const long n = b.num_scores, V = s.vocab_size;
        for (long i = id; i < n; i += nt)
            normalize(&x[b.rows[i] * D], ends.final_norm, s.is_layer_norm, s.norm_eps, D, &xn[i * D]);
#pragma omp barrier
        const long last = n ? V * (id + 1) / nt : 0;
        for (long a = V * id / nt; a < last; a += kChunk) {
            const long count = std::min(kChunk, last - a);
            dot_rows(static_cast<const E*>(ends.head.weight) + a * D, D, count, xn.data(), D, n, D, b.scores + a, V);
            finish(ends.head, a, count, n, b.scores + a, V);
        }
    }

    void run(int id, int nt) {
        Floats scores;
        embed(id, nt);
#pragma omp barrier
        float* own = &partial[(long)id * N * D];
        float *xa = xn.data(), *xm = xn.data() + N * D;
        for (long l = 0; l < s.num_layers; l++) {
            const LayerWeights& w = layers[l];
            const Order &heads_of = attention[l], &neurons_of = mlp[l];
            if (heads_of.size()) {
                attention_input(l, xa, id, nt);
                if (s.parallel_residual && neurons_of.size()) mlp_input(l, xm, id, nt);
#pragma omp barrier
                project(l, kQ, heads_of, s.query_rows_per_group, w.q, q.data(), q_max, id, nt);
                project_kv(l, id, nt);
#pragma omp barrier
                place(l, id, nt);
#pragma omp barrier
                long task = 0;
                for (long i = 0; i < heads_of.size(); i++)
                    for (long h = 0; h < kv_rows(heads_of.widths[i]) / d; h++, task++)
                        if (task % nt == id) attend(l, i, h, scores);
                std::fill(own, own + heads_of.size() * D, 0.0f);
                bypasses.clear_parts(id);
#pragma omp barrier
                share_rows(heads_of, s.query_rows_per_group, id, nt, [&](long a, long e, long n) {
                    bypasses.read_rows(l, kO, heads_of, a, e - a, heads.data() + a, q_max, n, id);
                    contract(w.o, a, e - a, heads.data() + a, q_max, own, n);
                });
#pragma omp barrier
                residual(l, kO, heads_of, w.o, id, nt);
#pragma omp barrier
            } else if (s.parallel_residual && neurons_of.size()) {
                mlp_input(l, xm, id, nt);
#pragma omp barrier
            }
            if (neurons_of.size()) {
                if (!s.parallel_residual) mlp_input(l, xm, id, nt);
                std::fill(own, own + neurons_of.size() * D, 0.0f);
                bypasses.clear_parts(id);
#pragma omp barrier
                feed_forward(l, xm, own, id, nt);
#pragma omp barrier
                residual(l, kDown, neurons_of, w.down, id, nt);
#pragma omp barrier
            }
        }
        score(id, nt);
    }

    void project_kv(long l, int id, int nt) {
        const Order& order = attention[l];
        const LayerWeights& w = layers[l];
        if (!s.is_multi_query) {
            project(l, kK, order, d, w.k, k.data(), kv_max, id, nt);
            project(l, kV, order, d, w.v, v.data(), kv_max, id, nt);
            return;
        }
        Order one = order;  // all share one KV head
        std::fill(one.widths.begin(), one.widths.end(), 1);
        project(l, kK, one, d, w.k, k.data(), kv_max, id, nt);
        project(l, kV, one, d, w.v, v.data(), kv_max, id, nt);
    }
};

template <class W, class E>
void run_step(const Shape& shape, const LayerWeights* layers, const Ends& ends, const Tokens& tokens, int threads) {
    Step<W, E> step(shape, layers, ends, tokens, threads);
#pragma omp parallel num_threads(threads)
    step.run(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

extern "C" {

// Scores after the wanted tokens; keys and values go to the cache's pages.
void flextron_step(const Shape* shape, const LayerWeights* layers, const Ends* ends, const Tokens* tokens,
                   int threads) {
    const auto run = shape->weights == kInt4   ? run_step<FourBit, int8_t>
                     : shape->weights == kInt8 ? run_step<int8_t, int8_t>
                                               : run_step<float, float>;
    run(*shape, layers, *ends, *tokens, threads);
}
}
