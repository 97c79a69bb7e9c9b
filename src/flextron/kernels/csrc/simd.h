// Vectors of eight floats, and memory that suits them.
#pragma once

#include <cstdint>
#include <new>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 8;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
#ifdef __FMA__  // compilers make two instructions of some of these
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline float sum(Vec v) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
    return v[0];
}
// The vectors of products in float32: twice as long where the processor multiplies twice as many at once.
#ifdef __AVX512F__
typedef float Wide __attribute__((vector_size(64), aligned(4)));
inline Wide fma(Wide a, Wide b, Wide c) { return (Wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline void store(float* p, Wide v) { *reinterpret_cast<Wide*>(p) = v; }
inline Vec halved(Wide v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
typedef Vec Wide;
#endif
inline Vec halved(Vec v) { return v; }
// Keeps a value in a register: compilers would rather load it again at every use.
template <class V>
inline void keep(V& v) {
#ifdef __AVX__
    if constexpr (sizeof(V) > sizeof(Vec))
        asm("" : "+v"(v));  // any of 32 registers
    else
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

}  // namespace
