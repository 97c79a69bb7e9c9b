// Training chunks on a CPU in float32: attention, forward and backward, and the gate of gated MLPs.

#include <cstdint>
#include <cstring>

#include "flash_attention.h"
#include "gemm.h"
#include "layout.h"

namespace {

// The first numbers of a vector, up to kLanes of them; the others are 0.
inline Vec load(const float* p, int64_t count) {
    if (count >= kLanes) return load(p);
    Vec v{};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
}
inline void store(float* p, Vec v, int64_t count) {
    if (count >= kLanes) return store(p, v);
    std::memcpy(p, &v, count * sizeof(float));
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

inline std::string training_layout() {
    std::string text;
    text += describe_struct("Attention", sizeof(Attention),
            {FIELD(Attention, num_heads), FIELD(Attention, num_kv_heads), FIELD(Attention, head_dim),
             FIELD(Attention, window), FIELD(Attention, num_sequences), FIELD(Attention, lengths),
             FIELD(Attention, num_past), FIELD(Attention, q), FIELD(Attention, k), FIELD(Attention, v),
             FIELD(Attention, q_stride), FIELD(Attention, k_stride), FIELD(Attention, v_stride),
             FIELD(Attention, out), FIELD(Attention, lse), FIELD(Attention, threads)});
    text += describe_struct("Gradients", sizeof(Gradients),
            {FIELD(Gradients, out), FIELD(Gradients, out_stride), FIELD(Gradients, q), FIELD(Gradients, k),
             FIELD(Gradients, v)});
    return text + describe_constant("lanes", kLanes);
}

}  // namespace

extern "C" {

// The layout of the structs below, as text.
const char* flextron_layout() {
    static const std::string text = training_layout();
    return text.c_str();
}

// Causal attention of a chunk's tokens; fills `out` and `lse`.
void flextron_attend(const Attention* attention) { FlashAttention(*attention).forward(); }

// Its gradients, from what `flextron_attend` gave.
void flextron_attend_back(const Attention* attention, const Gradients* gradients) {
    FlashAttention(*attention).backward(*gradients);
}

// out = silu(gate) up, of `size` numbers.
void flextron_gate(const float* gate, const float* up, float* out, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t n = size - i;
        store(out + i, Silu(load(gate + i, n)).value * load(up + i, n), n);
    }
}

// Gradients by gate and up.
void flextron_gate_back(const float* gate, const float* up, const float* out, float* d_gate, float* d_up, int64_t size,
                        int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t n = size - i;
        const Vec g = load(out + i, n);
        const Silu y(load(gate + i, n));
        store(d_up + i, g * y.value, n);
        store(d_gate + i, g * load(up + i, n) * y.slope, n);
    }
}
}
