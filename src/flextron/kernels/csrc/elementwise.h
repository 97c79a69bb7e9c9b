// Rows of numbers in float32 or bfloat16: norms, the gate of gated MLPs, and distances between predictions. All
// arithmetic is in float32; a result is rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "simd.h"

namespace {

typedef uint16_t Bfloat16;  // the upper half of a float
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec load(const Bfloat16* p) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
}
// Rounds to the nearest, ties to even.
inline void store(Bfloat16* p, Vec v) {
    const Bits bits = (Bits)v;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

// The first numbers of a vector, up to kLanes of them; the others are 0.
template <class T>
inline Vec load(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    T some[kLanes] = {};
    std::memcpy(some, p, count * sizeof(T));
    return load(some);
}
template <class T>
inline void store(T* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(p, v);
    T some[kLanes];
    store(some, v);
    std::memcpy(p, some, count * sizeof(T));
}

// x / (1 + e^-x), and its derivative.
struct Silu {
    explicit Silu(Vec x) {
        const Vec e = exp_negative(x > 0.0f ? -x : x), factor = 1.0f / (1.0f + e);
        const Vec share = x > 0.0f ? factor : e * factor, rest = x > 0.0f ? e * factor : factor;
        value = x * share;
        slope = fma(value, rest, share);
    }
    Vec value, slope;
};

// out = silu(gate) up, of `size` numbers.
template <class T>
void gate_forward(const T* gate, const T* up, T* out, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t n = size - i;
        store(out + i, Silu(load(gate + i, n)).value * load(up + i, n), n);
    }
}

// Gradients by gate and up.
template <class T>
void gate_backward(const T* gate, const T* up, const T* out, T* d_gate, T* d_up, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t n = size - i;
        const Vec g = load(out + i, n);
        const Silu y(load(gate + i, n));
        store(d_up + i, g * y.value, n);
        store(d_gate + i, g * load(up + i, n) * y.slope, n);
    }
}

// y = x gain / sqrt(mean x^2 + eps), row by row; `inverse` keeps a row's 1 / sqrt.
template <class T>
void norm_forward(const T* x, const float* gains, float eps, T* y, float* inverse, int64_t rows, int64_t size,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* own = x + r * size;
        Vec squares{};
        for (int64_t i = 0; i < size; i += kLanes) {
            const Vec v = load(own + i, size - i);
            squares = fma(v, v, squares);
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
        inverse[r] = factor;
        for (int64_t i = 0; i < size; i += kLanes)
            store(y + r * size + i, load(own + i, size - i) * factor * load(gains + i, size - i), size - i);
    }
}

// Gradients by x and, where `d_gains` is given, by the gains.
template <class T>
void norm_backward(const T* x, const float* gains, const float* inverse, const T* out, T* dx, float* d_gains,
                   int64_t rows, int64_t size, int64_t threads) {
    const int64_t width = (size + kLanes - 1) / kLanes * kLanes;
    std::vector<Floats> sums(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t t = 0; t < threads; t++) {
        Floats& total = sums[t];
        total.assign(width, 0.0f);
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const T *own = x + r * size, *g = out + r * size;
            const float factor = inverse[r];
            Vec along{};
            for (int64_t i = 0; i < size; i += kLanes) {
                const Vec gx = load(g + i, size - i) * load(own + i, size - i);
                along = fma(gx, load(gains + i, size - i), along);
                store(total.data() + i, fma(gx, Vec{} + factor, load(total.data() + i)));
            }
            const float share = sum(along) * factor * factor * factor / size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const Vec through = load(g + i, size - i) * load(gains + i, size - i) * factor;
                store(dx + r * size + i, through - load(own + i, size - i) * share, size - i);
            }
        }
    }
    if (d_gains == nullptr) return;
    // in the order of the threads, so that the same numbers come out each time
    for (int64_t i = 0; i < size; i++) {
        d_gains[i] = 0;
        for (const Floats& total : sums) d_gains[i] += total[i];
    }
}

// Predictions of tokens over a vocabulary: the student's logits, which their gradient replaces, the teacher's, and the
// next tokens. Without a teacher or without targets their part is 0.
template <class T>
struct Predictions {
    T* student;
    const T* teacher;
    const int64_t* targets;  // -1 where there is none
    float kl_scale, lm_scale;
    double *kl, *lm;  // a row's losses in nats
    int64_t rows, vocabulary;

    void differentiate(int64_t threads) const {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t r = 0; r < rows; r++) differentiate_row(r);
    }

  private:
    void differentiate_row(int64_t r) const {
        const int64_t target = targets ? targets[r] : -1;
        T* s = student + r * vocabulary;
        const T* t = teacher ? teacher + r * vocabulary : nullptr;
        const float most = largest(s), teacher_most = t ? largest(t) : 0.0f;
        Vec total{}, teacher_total{}, apart{};
        each(s, t, most, teacher_most, [&](int64_t, Vec sv, Vec tv, Vec share, Vec teacher_share) {
            total += share;
            teacher_total += teacher_share;
            apart = fma(teacher_share, tv - sv, apart);
        });
        const float own = sum(total), whole = sum(teacher_total);
        kl[r] = t ? sum(apart) / whole - (std::log(whole) - std::log(own)) : 0.0;
        lm[r] = target < 0 ? 0.0 : std::log(own) + most - load(s + target, 1)[0];
        const float lm_part = target < 0 ? 0.0f : lm_scale, kl_part = t ? kl_scale : 0.0f;
        const Vec up = Vec{} + (kl_part + lm_part) / own, down = Vec{} + (t ? kl_part / whole : 0.0f);
        // before its logit goes
        const float at = target < 0 ? 0.0f : exp_negative(load(s + target, 1) - most)[0] * up[0] - lm_part;
        const float teacher_at = t && target >= 0 ? exp_negative(load(t + target, 1) - teacher_most)[0] * down[0] : 0;
        each(s, t, most, teacher_most, [&](int64_t i, Vec, Vec, Vec share, Vec teacher_share) {
            store(s + i, share * up - teacher_share * down, vocabulary - i);
        });
        if (target >= 0) store(s + target, Vec{} + (at - teacher_at), 1);
    }

    // Calls `f` with the position, both vectors of logits less the largest, and their shares; 0 beyond the end.
    template <class F>
    void each(const T* s, const T* t, float most, float teacher_most, F f) const {
        for (int64_t i = 0; i < vocabulary; i += kLanes) {
            const int64_t n = vocabulary - i;
            const Vec sv = load(s + i, n) - most, tv = t ? load(t + i, n) - teacher_most : Vec{};
            Vec share = exp_negative(sv), teacher_share = t ? exp_negative(tv) : Vec{};
            if (n < kLanes)
                for (int64_t k = n; k < kLanes; k++) share[k] = teacher_share[k] = 0.0f;
            f(i, sv, tv, share, teacher_share);
        }
    }

    float largest(const T* row) const {
        Vec most = Vec{} + load(row, 1)[0];
        for (int64_t i = 0; i + kLanes <= vocabulary; i += kLanes) most = larger(most, load(row + i));
        float out = most[0];
        for (int k = 1; k < kLanes; k++) out = std::max(out, most[k]);
        for (int64_t i = vocabulary / kLanes * kLanes; i < vocabulary; i++) out = std::max(out, load(row + i, 1)[0]);
        return out;
    }
};

}  // namespace
