// What an iteration is given, and the order of its tokens.
//
// Shapes: N tokens, D hidden size, V vocabulary, P tokens of a page, d head size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

extern "C" {

struct Linear {
    const void* weight;           // rows nested; float, panels of eight bits, or four bits with scales of groups
    const float* bias;            // of the outputs, or null
    const float* scales;          // of the rows, or null; of panels filled up to a multiple of 16
    const uint16_t* group_scales; // or null
    const float* column_scales;   // by which sums over rows are multiplied at the end, filled up as well, or null
    int64_t panel_quads;          // fours of inputs of a panel; 0 where there are none
};

struct Norm {
    const float* weight;  // null where the layer has no such norm: what it would read goes on as it is
    const float* bias;
};

struct LayerWeights {
    Norm attention_norm, mlp_norm;
    Norm attention_post_norm, mlp_post_norm;  // of what a half adds to the residual stream
    Linear q, k, v, o;
    Norm q_norm, k_norm;
    Linear gate, up, down;
    int64_t window;     // tokens that each sees, itself included; 0 for all
    float query_scale;  // factor of the queries
};

// What lies before the first layer and after the last.
struct Ends {
    const float* embedding;  // (V, D)
    const float* positions;  // learned, (P, D), or null
    Norm final_norm;
    Linear head;           // (V, D)
    Linear screen;         // the head in eight bits, row by row, or null
    const float* errors;   // (V,): what `screen` and rounding are away from the head, in norms of rows
};

struct Shape {
    int64_t hidden_size, head_dim, vocab_size, num_layers, rotated, page_size;
    int64_t query_rows_per_group, is_multi_query, parallel_residual, is_layer_norm, activation, weights;
    int64_t qk_norm_is_whole;  // all heads as one vector, not each by itself
    float norm_eps, embedding_scale, residual_scale;
    float attention_cap, logits_cap;  // 0 for none
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

// Tokens of one iteration. Widths are (layers, N); a layer has a block of the cache for each KV head of a page.
struct Tokens {
    int64_t num_tokens;
    const int64_t* ids;                 // (N,)
    const int64_t* positions;           // (N,)
    const int32_t* mlp_widths;          // neurons, 0 skips
    const int32_t* num_groups;          // attention groups, 0 skips
    const int32_t* const* block_tables; // (N,): block table of each token's sequence, (pages, row)
    const int64_t* table_rows;          // (N,): entries of a page in that table
    const int32_t* block_offsets;       // (layers, N): first entry of a layer
    const float* const* cos;            // (layers,): (N, rotated), or null where a layer rotates nothing
    const float* const* sin;            // signed
    const Bypass* const* adapters;      // (N,): (layers, targets) of each token's adapter, or null; null if none has one
    int64_t max_rank;                   // of all adapters
    float* cache;                       // (blocks, 2, P, d)
    int64_t num_logits;
    const int64_t* rows;                // (num_logits,): tokens after which logits are wanted
    int64_t num_full;                   // rows, the leading ones, of which all logits are wanted; else the largest one
    float* logits;                      // (num_logits, V)
};
}

namespace {

enum Weights { kFloat32, kInt8, kInt4, kNumWeights };

enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kNumActivations };

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

// cap tanh(x / cap) of n numbers in place.
void softcap(float* x, long n, float cap) {
    for (long i = 0; i < n; i++) x[i] = cap * std::tanh(x[i] / cap);
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
    long users(long row, long rows_each, long* until) const {
        long n = size();
        while (n > 0 && widths[n - 1] * rows_each <= row) n--;
        *until = n ? widths[n - 1] * rows_each : row;
        return n;
    }
};

// Calls f(start, stop, users) on this thread's share of rows [0, widest), up to kMost at a time. Rows of one number of
// users are cut into one stretch a thread, which memory reads best. Chunks begin at multiples of kPiece rows of their
// stretch; where these are panels, which lie whole in memory, stretches begin at panels, and users may need fewer rows.
template <long kPiece, long kMost, bool kIsPanels, class F>
inline void share_rows(const Order& order, long rows_each, int thread, int threads, F f) {
    const long end = order.widest() * rows_each;
    for (long row = 0; row < end;) {
        long until;
        const long n = order.users(row, rows_each, &until);
        if (kIsPanels) until = std::min(end, (until + kPiece - 1) / kPiece * kPiece);
        const long pieces = (until - row + kPiece - 1) / kPiece;
        const long a = row + std::min(until - row, pieces * thread / threads * kPiece);
        const long e = row + std::min(until - row, pieces * (thread + 1) / threads * kPiece);
        for (long chunk = a; chunk < e; chunk += kMost) f(chunk, std::min(chunk + kMost, e), n);
        row = until;
    }
}

// Adds the biases of rows first to first + rows; out is (n, ldo).
inline void add_bias(const Linear& linear, long first, long rows, long n, float* out, long ldo) {
    if (linear.bias)
        for (long t = 0; t < n; t++)
            for (long r = 0; r < rows; r++) out[t * ldo + r] += linear.bias[first + r];
}

}  // namespace
