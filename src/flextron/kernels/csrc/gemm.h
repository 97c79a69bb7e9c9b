// Products of matrices that lie in the cache, tile by tile in registers, and the exponential function.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace {

inline float largest(Vec v) {
    v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
    return v[0];
}

// e^x for x up to about 0, relative error 1e-7; 0 below -87. 2^n times a polynomial of what is left of x.
inline Vec exp_negative(Vec x) {
    const Vec low = Vec{} - 87.0f;
    const Ints counts = x > low;
    x = larger(x, low);
    const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    const Vec rest = fma(__builtin_convertvector(n, Vec), Vec{} - 0.693147181f, x);
    Vec y = Vec{} + 1.0f / 720;
    y = fma(y, rest, Vec{} + 1.0f / 120);
    y = fma(y, rest, Vec{} + 1.0f / 24);
    y = fma(y, rest, Vec{} + 1.0f / 6);
    y = fma(y, rest, Vec{} + 0.5f);
    y = fma(y, rest, Vec{} + 1.0f);
    y = fma(y, rest, Vec{} + 1.0f);
    return (Vec)(((Ints)y + (n << 23)) & counts);
}

// Floats at the start of a cache line; not initialised.
struct Room {
    explicit Room(long size)
        : data(static_cast<float*>(std::aligned_alloc(64, (std::max(1L, size) * 4 + 63) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    float* operator+(long i) const { return data.get() + i; }
    float& operator[](long i) const { return data.get()[i]; }
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data;
};

constexpr long kTileRows = 6;
constexpr long kPanel = 16;  // columns of a tile
constexpr long kRows = 48;   // of a block, unless one token has more
constexpr long kKeys = 64;   // that a block meets at a time

// c = or += a b, for R rows and 8 V columns; a's element (i, k) lies at a[i * ar + k * ak]. Not inlined, because all
// registers are needed.
template <int R, int V>
__attribute__((noinline)) void tile(const float* a, long ar, long ak, const float* b, long ldb, long depth, float* c,
                                    long ldc, bool add) {
    Vec acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) acc[i / V][i % V] = add ? load(c + i / V * ldc + i % V * kLanes) : Vec{};
    for (long k = 0; k < depth; k++, a += ak, b += ldb) {
        Vec row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const Vec factor = Vec{} + a[r * ar];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) acc[r][v] = fma(factor, row[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * V; i++) store(c + i / V * ldc + i % V * kLanes, acc[i / V][i % V]);
}

template <int V>
inline void tile_of(long rows, const float* a, long ar, long ak, const float* b, long ldb, long depth, float* c,
                    long ldc, bool add) {
    switch (rows) {
        case 1: return tile<1, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
        case 2: return tile<2, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
        case 3: return tile<3, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
        case 4: return tile<4, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
        case 5: return tile<5, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
        default: return tile<6, V>(a, ar, ak, b, ldb, depth, c, ldc, add);
    }
}

struct Range {
    long from, to;
};

// c (m x n) = or += a b, n a multiple of 8. Of the depth, rows i to e - 1 need range(i, e) only.
template <class F>
inline void multiply(long m, long n, const float* a, long ar, long ak, const float* b, long ldb, float* c, long ldc,
                     bool add, F range) {
    for (long col = 0; col < n; col += kPanel)
        for (long i = 0; i < m; i += kTileRows) {
            const long rows = std::min(kTileRows, m - i);
            const Range k = range(i, i + rows);
            const float *own = a + i * ar + k.from * ak, *panel = b + k.from * ldb + col;
            float* out = c + i * ldc + col;
            if (n - col >= kPanel)
                tile_of<2>(rows, own, ar, ak, panel, ldb, k.to - k.from, out, ldc, add);
            else
                tile_of<1>(rows, own, ar, ak, panel, ldb, k.to - k.from, out, ldc, add);
        }
}

}  // namespace
