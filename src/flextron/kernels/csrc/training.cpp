// Training on a CPU: attention of chunks in float32, and what goes over rows of numbers, forward and backward.

#include <cstdint>

#include "elementwise.h"
#include "flash_attention.h"
#include "gemm.h"
#include "layout.h"

namespace {

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

template <class F>
void with_type(bool wide, F f) {
    if (wide)
        f(float{});
    else
        f(Bfloat16{});
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

// The rest is for float32 (`wide`) and for bfloat16; see elementwise.h.

void flextron_gate(bool wide, const void* gate, const void* up, void* out, int64_t size, int64_t threads) {
    with_type(wide, [&](auto type) {
        typedef decltype(type) T;
        gate_forward((const T*)gate, (const T*)up, (T*)out, size, threads);
    });
}

void flextron_gate_back(bool wide, const void* gate, const void* up, const void* out, void* d_gate, void* d_up,
                        int64_t size, int64_t threads) {
    with_type(wide, [&](auto type) {
        typedef decltype(type) T;
        gate_backward((const T*)gate, (const T*)up, (const T*)out, (T*)d_gate, (T*)d_up, size, threads);
    });
}

void flextron_norm(bool wide, const void* x, const float* gains, double eps, void* y, float* inverse, int64_t rows,
                   int64_t size, int64_t threads) {
    with_type(wide, [&](auto type) {
        typedef decltype(type) T;
        norm_forward((const T*)x, gains, eps, (T*)y, inverse, rows, size, threads);
    });
}

void flextron_norm_back(bool wide, const void* x, const float* gains, const float* inverse, const void* out, void* dx,
                        float* d_gains, int64_t rows, int64_t size, int64_t threads) {
    with_type(wide, [&](auto type) {
        typedef decltype(type) T;
        norm_backward((const T*)x, gains, inverse, (const T*)out, (T*)dx, d_gains, rows, size, threads);
    });
}

void flextron_distances(bool wide, void* student, const void* teacher, const int64_t* targets, double kl_scale,
                        double lm_scale, double* kl, double* lm, int64_t rows, int64_t vocabulary, int64_t threads) {
    with_type(wide, [&](auto type) {
        typedef decltype(type) T;
        Predictions<T>{(T*)student, (const T*)teacher, targets, (float)kl_scale, (float)lm_scale,
                       kl,          lm,                rows,    vocabulary}
            .differentiate(threads);
    });
}
}
