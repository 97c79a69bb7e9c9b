// Tokens' adapters: what LoRA and IA3 add beside the dense products.
//
// Shapes: N tokens, D hidden size.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "decoder.h"

namespace {

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

    // From place i's token x, (D,), which has just been normalised.
    void read(long l, std::initializer_list<Target> targets, const Order& order, long i, const float* x) {
        for (Target target : targets)
            each(l, target, order, i, 1, i + 1, [&](long, const Bypass& own) {
                if (!own.a) return;
                float* z = low.data() + (target * N + i) * rank;
                std::fill(z, z + own.rank, 0.0f);
                multiply(x, own.a, D, own.rank, z);
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

    // From place i's inputs h, `rows` of them: the same for a whole token at once. It leaves one part.
    void read_token(long l, Target target, const Order& order, long i, long rows, float* h) {
        each(l, target, order, i, 1, i + 1, [&](long, const Bypass& own) {
            float* z = parts.data() + i * rank;
            if (own.a) {
                std::fill(z, z + own.rank, 0.0f);
                multiply(h, own.a, rows, own.rank, z);
            }
            if (own.inputs)
                for (long r = 0; r < rows; r++) h[r] *= own.inputs[r];
        });
    }

    // To place i's token x, (D,), which has the dense products `partial`, (num_parts, N, D), and the bias already.
    void add_whole(long l, Target target, const Order& order, long i, const float* partial, const float* bias,
                   int num_parts, float* x) {
        each(l, target, order, i, 1, i + 1, [&](long, const Bypass& own) {
            if (own.b) {
                float* z = parts.data() + i * rank;
                for (int p = 1; p < num_parts; p++)
                    for (long j = 0; j < own.rank; j++) z[j] += parts[(p * N + i) * rank + j];
                for (long c = 0; c < D; c++) x[c] += own.scale * inner(own.b + c * own.rank, z, own.rank);
            }
            if (own.outputs)
                for (long c = 0; c < D; c++) {
                    float y = bias ? bias[c] : 0.0f;
                    for (int p = 0; p < num_parts; p++) y += partial[(p * N + i) * D + c];
                    x[c] += y * (own.outputs[c] - 1.0f);
                }
        });
    }
};

}  // namespace
