// One iteration of the decoder on a CPU, from token ids to logits, for a ragged batch, in a single parallel region.
//
// A decode step reads all weights for a handful of tokens, so it runs at the speed of memory if nothing else gets in
// the way. Each weight row is read once and multiplied with the tokens that are at least that wide: tokens are ordered
// by width in every layer, widest first, so that row f belongs to a prefix of them (nested sub-networks without masks).
//
// Every weight has its nested dimension first. `expand` takes dot products with rows, `contract` adds multiples of
// rows. In float32 the MLP is one pass: neuron f reads its rows of gate, up and down, and leaves nothing in memory, and
// threads add what they have. With eight bits a token is rounded as a whole before each product, and threads share the
// outputs: sums are exact, so a token gets the same numbers whatever else runs, and on any number of threads.
//
// What is done for single tokens (norms, rounding, sums with the residual stream) has fixed owners among the threads, so
// that no barrier lies between.
//
// Tokens may have adapters of their own. What these add is computed token by token beside the dense products, which stay
// the same for all (`Bypasses`).
//
// Shapes: N tokens, D hidden size, F neurons, H query heads, K KV heads, d head size, P tokens of a page.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <omp.h>
#include <type_traits>
#include <vector>

#include "lora.h"
#include "int8.h"
#include "rows.h"
#include "decoder.h"
#include "decoder_layout.h"

namespace {

// Most rows whose head is screened: with more, products in float32 take no longer than those with eight bits.
constexpr long kScreened = 8;

// W is the type of the weights whose rows are outputs, E that of the head and of weights whose rows are inputs.
template <class W, class E>
struct Step {
    static constexpr bool kIsFourBit = std::is_same<W, FourBit>::value;
    static constexpr bool kIsEightBit = std::is_same<W, EightBit>::value;
    static constexpr bool kIsWhole = std::is_same<E, EightBit>::value;
    static constexpr long kRows = kIsEightBit ? kPanelChunk : kChunk;  // of a product at once
    const Shape& s;
    const LayerWeights* layers;
    const Ends& ends;
    const Tokens& b;
    Bypasses bypasses;
    std::vector<Order> attention, mlp;
    Floats x, xn, q, k, v, heads, partial;
    Floats bounds;  // of the largest logit of each row, by each thread
    std::vector<int32_t> prepared;  // tokens of xn for four-bit weights
    RoundedTokens rounded, inner;   // tokens of xn, and heads or neurons, for eight-bit weights
    Floats hidden;                  // neurons for eight-bit weights, (N, hidden_max)
    long D, N, d, kv_max, q_max, hidden_max;

    long kv_rows(long groups) const { return d * (s.is_multi_query ? std::min(groups, 1L) : groups); }

    Step(const Shape& s, const LayerWeights* layers, const Ends& ends, const Tokens& b, int threads)
        : s(s), layers(layers), ends(ends), b(b), bypasses(b, s.hidden_size, threads) {
        D = s.hidden_size, N = b.num_tokens, d = s.head_dim;
        attention.resize(s.num_layers), mlp.resize(s.num_layers);
        long groups = 0, neurons = 0;
        for (long l = 0; l < s.num_layers; l++) {
            attention[l].set(b.num_groups + l * N, N);
            mlp[l].set(b.mlp_widths + l * N, N);
            groups = std::max(groups, attention[l].widest()), neurons = std::max(neurons, mlp[l].widest());
        }
        q_max = groups * s.query_rows_per_group, kv_max = kv_rows(groups);
        x.resize(N * D), xn.resize(2 * N * D), q.resize(N * q_max), k.resize(N * kv_max), v.resize(N * kv_max);
        if (kIsFourBit) prepared.resize(2 * N * token_size(D));
        if (kIsWhole) {
            hidden_max = (neurons + kLanes - 1) / kLanes * kLanes;
            rounded.resize(2 * N, D), inner.resize(N, std::max(q_max, hidden_max)), hidden.resize(N * hidden_max);
        }
        heads.resize(N * q_max), partial.resize((kIsWhole ? 1 : threads) * N * D);
        bounds.resize(threads * b.num_logits);
    }

    // Calls f(i) for the places of the tokens that this thread owns.
    template <class F>
    static void each_own(const Order& order, int id, int nt, F f) {
        for (long i = 0; i < order.size(); i++)
            if (order.tokens[i] % nt == id) f(i);
    }

    // One token of the residual stream, normalised and rounded for its products, to place `place` of xn.
    void norm_token(const float* own, const Norm& norm, long place) {
        float* out = &xn[place * D];
        if (norm.weight)
            normalize(own, norm, s.is_layer_norm, s.norm_eps, D, out);
        else
            std::memcpy(out, own, D * sizeof(float));
        if (kIsFourBit) prepare_token(out, D, prepared.data() + place * token_size(D));
        if (kIsEightBit) round_token(out, nullptr, D, D, 0, place, rounded);
    }

    void attention_input(long l, int id, int nt) {
        const Order& order = attention[l];
        each_own(order, id, nt, [&](long i) {
            norm_token(&x[order.tokens[i] * D], layers[l].attention_norm, i);
            bypasses.read(l, {kQ, kK, kV}, order, i, &xn[i * D]);
        });
    }

    void mlp_input(long l, int id, int nt) {
        const Order& order = mlp[l];
        each_own(order, id, nt, [&](long i) {
            norm_token(&x[order.tokens[i] * D], layers[l].mlp_norm, N + i);
            bypasses.read(l, {kGate, kUp}, order, i, &xn[(N + i) * D]);
        });
    }

    // Calls f(start, stop, users) on this thread's share of rows.
    template <class F>
    static void share(const Order& order, long rows_each, int id, int nt, F f) {
        share_rows<kIsEightBit ? kPanelRows : 12, kRows, kIsEightBit>(order, rows_each, id, nt, f);
    }

    // Products of rows first to first + rows with n tokens from `place` of `xn` on, with their biases; (n, ldo).
    void products(const Linear& linear, long first, long rows, long place, long n, float* out, long ldo) const {
        if constexpr (kIsFourBit) {
            const int32_t* tokens = prepared.data() + place * token_size(D);
            dot_groups({static_cast<const uint8_t*>(linear.weight), linear.group_scales}, first, rows, tokens, n, D, out,
                       ldo);
        } else if constexpr (kIsEightBit) {
            multiply_panels(linear.weight, linear.panel_quads, linear.scales, first, rows, rounded, place, place + n, out,
                            ldo, [&](long) { return num_quads(D); });
        } else {
            dot_rows(static_cast<const W*>(linear.weight) + first * D, D, rows, &xn[place * D], D, n, D, out, ldo);
        }
        add_bias(linear, first, rows, n, out, ldo);
    }

    // Adds what bypasses make of rows first to last, each for the tokens that use it; out is (n, ldo) from row first on.
    void add_bypasses(long l, Target target, const Order& order, long rows_each, long first, long last, float* out,
                      long ldo) const {
        if (!b.adapters) return;
        for (long row = first, until; row < last; row = until) {
            const long n = order.users(row, rows_each, &until);
            until = std::min({until, last, row + kChunk});
            bypasses.add(l, target, order, row, until - row, out + row - first, ldo, n);
        }
    }

    void project(long l, Target target, const Order& order, long rows_each, const Linear& linear, float* out, long ldo,
                 int id, int nt) const {
        share(order, rows_each, id, nt, [&](long a, long e, long n) {
            products(linear, a, e - a, 0, n, out + a, ldo);
            add_bypasses(l, target, order, rows_each, a, e, out + a, ldo);
        });
    }

    void rotate(long l, float* head, long token) const {
        if (!b.cos || !b.cos[l]) return;
        const long R = s.rotated, half = R / 2;
        const float *cos = b.cos[l] + token * R, *sin = b.sin[l] + token * R;
        for (long i = 0; i < half; i++) {
            const float lo = head[i], hi = head[i + half];
            head[i] = lo * cos[i] + hi * sin[i];
            head[i + half] = hi * cos[i + half] + lo * sin[i + half];
        }
    }

    float* block(long layer, long token, long page, long kv_head) const {
        const int32_t* row = b.block_tables[token] + page * b.table_rows[token];
        return b.cache + (long)row[b.block_offsets[layer * N + token] + kv_head] * 2 * s.page_size * d;
    }

    // Normalises and rotates the heads of every token, and writes keys and values to their pages.
    void place(long l, int id, int nt) {
        const Order& order = attention[l];
        const LayerWeights& w = layers[l];
        for (long i = id; i < order.size(); i += nt) {
            const long token = order.tokens[i], position = b.positions[token];
            const long q_rows = order.widths[i] * s.query_rows_per_group, kv = kv_rows(order.widths[i]);
            if (w.q_norm.weight && s.qk_norm_is_whole) {
                normalize(&q[i * q_max], w.q_norm, false, s.norm_eps, q_rows, &q[i * q_max]);
                normalize(&k[i * kv_max], w.k_norm, false, s.norm_eps, kv, &k[i * kv_max]);
            }
            const bool by_head = w.q_norm.weight && !s.qk_norm_is_whole;
            for (long r = 0; r < q_rows; r += d) {
                float* head = &q[i * q_max + r];
                if (by_head) normalize(head, w.q_norm, false, s.norm_eps, d, head);
                if (w.query_scale != 1.0f)
                    for (long c = 0; c < d; c++) head[c] *= w.query_scale;
                rotate(l, head, token);
            }
            for (long r = 0; r < kv; r += d) {
                float* head = &k[i * kv_max + r];
                if (by_head) normalize(head, w.k_norm, false, s.norm_eps, d, head);
                rotate(l, head, token);
                float* keys = block(l, token, position / s.page_size, r / d) + position % s.page_size * d;
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
        const long window = layers[l].window, first = window > 0 ? std::max(0L, last + 1 - window) : 0;
        const long start = first / P * P, ld = (last / P + 1) * P - start;
        float* own_q = &q[i * q_max + kv_head * per_kv * d];
        float* out = &heads[i * q_max + kv_head * per_kv * d];
        if ((long)scores.size() < per_kv * ld) scores.resize(per_kv * ld);
        for (long p = start; p <= last; p += P) {
            ask_for_page(p + P <= last ? block(l, token, p / P + 1, kv_head) : block(l, token, start / P, kv_head) + P * d,
                         P * d);
            dot_rows(block(l, token, p / P, kv_head), d, P, own_q, d, per_kv, d, &scores[p - start], ld);
        }
        const float usual = 1.0f / std::sqrt((float)d), scale = s.attention_cap ? 1.0f : usual;
        for (long h = 0; h < per_kv; h++) {
            float* row = &scores[h * ld];
            float most = -INFINITY, total = 0;
            const long a = first - start, e = last + 1 - start;
            if (s.attention_cap) {
                for (long j = a; j < e; j++) row[j] *= usual;
                softcap(row + a, e - a, s.attention_cap);
            }
            for (long j = a; j < e; j++) most = std::max(most, row[j]);
            for (long j = a; j < e; j++) row[j] = std::exp((row[j] - most) * scale), total += row[j];
            for (long j = a; j < e; j++) row[j] /= total;
            std::fill(row, row + a, 0.0f);
            std::fill(row + e, row + ld, 0.0f);
        }
        std::fill(out, out + per_kv * d, 0.0f);
        for (long p = start; p <= last; p += P) {
            if (p + P <= last) ask_for_page(block(l, token, p / P + 1, kv_head) + P * d, P * d);
            add_rows(block(l, token, p / P, kv_head) + P * d, d, std::min(P, last + 1 - p), &scores[p - start], ld, out,
                     d, per_kv, d);
        }
    }

    // x += what the partial sums say, the bias, and what bypasses make of it; normalised where the model does.
    void residual(long l, Target target, const Order& order, const Linear& linear, const Norm& norm, int id, int nt) {
        const int parts = kIsWhole ? 1 : nt;
        const float* bias = linear.bias;
        const bool is_plain = !norm.weight && s.residual_scale == 1.0f;
        Floats sum(is_plain ? 0 : D);
        each_own(order, id, nt, [&](long i) {
            float* stream = &x[order.tokens[i] * D];
            float* own = is_plain ? stream : sum.data();
            if (!is_plain) std::fill(sum.begin(), sum.end(), 0.0f);
            for (int p = 0; p < parts; p++) {
                const float* y = &partial[((long)p * N + i) * D];
                for (long c = 0; c < D; c++) own[c] += y[c];
            }
            if (bias)
                for (long c = 0; c < D; c++) own[c] += bias[c];
            bypasses.add_whole(l, target, order, i, partial.data(), bias, parts, own);
            if (is_plain) return;
            if (norm.weight) normalize(own, norm, s.is_layer_norm, s.norm_eps, D, own);
            for (long c = 0; c < D; c++) stream[c] += s.residual_scale * own[c];
        });
    }

    // Neurons f to f + rows of n tokens, with their biases and bypasses; (n, kRows).
    void neurons(long l, Target target, const Linear& linear, long f, long rows, long n, float* out) const {
        products(linear, f, rows, N, n, out, kRows);
        add_bypasses(l, target, mlp[l], 1, f, f + rows, out, kRows);
    }

    // Calls f(start, stop, users, neurons) on this thread's share of activated neurons; (users, kRows).
    template <class F>
    void feed_forward(long l, int id, int nt, F f) {
        const LayerWeights& w = layers[l];
        Floats up(kRows * N), gate(w.gate.weight ? kRows * N : 0);
        share(mlp[l], 1, id, nt, [&](long a, long e, long n) {
            neurons(l, kUp, w.up, a, e - a, n, up.data());
            if (w.gate.weight) {
                neurons(l, kGate, w.gate, a, e - a, n, gate.data());
                activate(gate.data(), kRows * n, s.activation);
                for (long i = 0; i < kRows * n; i++) up[i] *= gate[i];
            } else {
                activate(up.data(), kRows * n, s.activation);
            }
            f(a, e, n, up.data());
        });
    }

    // own += h times rows first to first + rows; h is (n, ldh).
    void contract(const Linear& linear, long first, long rows, const float* h, long ldh, float* own, long n) const {
        add_rows(static_cast<const E*>(linear.weight) + first * D, D, rows, h, ldh, own, D, n, D);
    }

    // Rounds what a linear out of a nested dimension reads, h (N, ldh), for this thread's tokens.
    void round_inputs(long l, Target target, const Order& order, long rows_each, const Linear& linear, float* h, long ldh,
                      int id, int nt) {
        each_own(order, id, nt, [&](long i) {
            const long rows = order.widths[i] * rows_each;
            bypasses.read_token(l, target, order, i, rows, h + i * ldh);
            round_token(h + i * ldh, linear.scales, rows, order.widest() * rows_each, 0, i, inner);
        });
    }

    // partial = this thread's share of the outputs of a linear out of a nested dimension, for all rounded tokens.
    void contract_whole(const Order& order, long rows_each, const Linear& linear, int id, int nt) {
        const long panels = num_panels(D), last = std::min(panels * (id + 1) / nt * kPanelRows, D);
        for (long a = panels * id / nt * kPanelRows; a < last; a += kPanelChunk)
            multiply_panels(linear.weight, linear.panel_quads, linear.column_scales, a, std::min(kPanelChunk, last - a),
                            inner, 0, order.size(), partial.data() + a, D,
                            [&](long i) { return num_quads(order.widths[i] * rows_each); });
    }

    // partial = the heads' outputs times `o`.
    void contract_heads(long l, int id, int nt) {
        const Order& order = attention[l];
        const LayerWeights& w = layers[l];
        const long rows_each = s.query_rows_per_group;
        if constexpr (kIsWhole) {
#pragma omp barrier
            round_inputs(l, kO, order, rows_each, w.o, heads.data(), q_max, id, nt);
#pragma omp barrier
            contract_whole(order, rows_each, w.o, id, nt);
        } else {
            float* own = &partial[(long)id * N * D];
            std::fill(own, own + order.size() * D, 0.0f);
            bypasses.clear_parts(id);
#pragma omp barrier
            share(order, rows_each, id, nt, [&](long a, long e, long n) {
                bypasses.read_rows(l, kO, order, a, e - a, heads.data() + a, q_max, n, id);
                contract(w.o, a, e - a, heads.data() + a, q_max, own, n);
            });
        }
    }

    // partial = the outputs of the MLP.
    void contract_neurons(long l, int id, int nt) {
        const Order& order = mlp[l];
        const LayerWeights& w = layers[l];
        if constexpr (kIsWhole) {
            feed_forward(l, id, nt, [&](long a, long e, long n, const float* h) {
                for (long i = 0; i < n; i++) std::copy_n(h + i * kRows, e - a, &hidden[i * hidden_max + a]);
            });
#pragma omp barrier
            round_inputs(l, kDown, order, 1, w.down, hidden.data(), hidden_max, id, nt);
#pragma omp barrier
            contract_whole(order, 1, w.down, id, nt);
        } else {
            float* own = &partial[(long)id * N * D];
            std::fill(own, own + order.size() * D, 0.0f);
            bypasses.clear_parts(id);
            feed_forward(l, id, nt, [&](long a, long e, long n, float* h) {
                bypasses.read_rows(l, kDown, order, a, e - a, h, kRows, n, id);
                contract(w.down, a, e - a, h, kRows, own, n);
            });
        }
    }

    void embed(int id, int nt) {
        for (long t = id; t < N; t += nt) {
            std::memcpy(&x[t * D], ends.embedding + b.ids[t] * D, D * sizeof(float));
            if (s.embedding_scale != 1.0f)
                for (long c = 0; c < D; c++) x[t * D + c] *= s.embedding_scale;
            if (ends.positions)
                for (long c = 0; c < D; c++) x[t * D + c] += ends.positions[b.positions[t] * D + c];
        }
    }

    // Logits of the wanted rows. Where only the largest one of a row matters, and few rows do not hide the time to read
    // the head, an eight-bit copy finds the tokens that may have it.
    void head(int id, int nt) {
        const long n = b.num_logits, V = s.vocab_size;
        const bool screens = !kIsWhole && ends.screen.weight && n - b.num_full <= kScreened;
        const long full = screens ? b.num_full : n;
        for (long i = id; i < n; i += nt) {
            normalize(&x[b.rows[i] * D], ends.final_norm, s.is_layer_norm, s.norm_eps, D, &xn[i * D]);
            if (kIsWhole) round_token(&xn[i * D], nullptr, D, D, 0, i, rounded);
        }
#pragma omp barrier
        const long panels = num_panels(V), first = panels * id / nt * kPanelRows;
        const long last = std::min(panels * (id + 1) / nt * kPanelRows, V);
        if (full) vocabulary<E>(ends.head, first, last, 0, full);
        if constexpr (!kIsWhole)
            if (full < n) screen(first, last, full, n, id, nt);
        if (s.logits_cap) cap_logits(first, last);
    }

    // Caps the logits of tokens first to last, but for those that screening has ruled out.
    void cap_logits(long first, long last) {
        for (long i = 0; i < b.num_logits; i++)
            for (float *z = b.logits + i * s.vocab_size + first, *end = z + last - first; z < end; z++)
                if (*z != -INFINITY) softcap(z, 1, s.logits_cap);
    }

    // Logits of tokens first to last for rows from to to.
    template <class T>
    void vocabulary(const Linear& linear, long first, long last, long from, long to) const {
        const long V = s.vocab_size, most = std::is_same<T, EightBit>::value ? kPanelChunk : kChunk;
        for (long a = first; a < last; a += most) {
            const long count = std::min(most, last - a);
            float* out = b.logits + from * V + a;
            if constexpr (std::is_same<T, EightBit>::value) {
                multiply_panels(linear.weight, linear.panel_quads, linear.scales, a, count, rounded, from, to, out, V,
                                [&](long) { return num_quads(D); });
            } else {
                dot_rows(static_cast<const T*>(linear.weight) + a * D, D, count, &xn[from * D], D, to - from, D, out, V);
                for (long t = 0; linear.scales && t < to - from; t++)
                    for (long r = 0; r < count; r++) out[t * V + r] *= linear.scales[a + r];
            }
        }
    }

    // Exact logits of the tokens that may be the likeliest, minus infinity for the others. By Cauchy and Schwarz, the
    // eight-bit copy is at most (error of the token's row) x (norm of the hidden state) away.
    void screen(long first, long last, long from, long to, int id, int nt) {
        const long V = s.vocab_size;
        vocabulary<int8_t>(ends.screen, first, last, from, to);
        std::vector<float> norms;
        for (long i = from; i < to; i++) {
            const float *h = &xn[i * D], *z = b.logits + i * V;
            norms.push_back(std::sqrt(std::inner_product(h, h + D, h, 0.0f)) * 1.0001f);
            float least = -INFINITY;
            for (long r = first; r < last; r++) least = std::max(least, z[r] - ends.errors[r] * norms.back());
            bounds[i * nt + id] = least;
        }
#pragma omp barrier
        for (long i = from; i < to; i++) {
            float* z = b.logits + i * V;
            const float least = *std::max_element(&bounds[i * nt], &bounds[i * nt] + nt);
            for (long r = first; r < last; r++) {
                if (z[r] + ends.errors[r] * norms[i - from] < least)
                    z[r] = -INFINITY;
                else
                    vocabulary<E>(ends.head, r, r + 1, i, i + 1);
            }
        }
    }

    void run(int id, int nt) {
        Floats scores;
        embed(id, nt);
        for (long l = 0; l < s.num_layers; l++) {
            const LayerWeights& w = layers[l];
            const Order &heads_of = attention[l], &neurons_of = mlp[l];
            if (s.parallel_residual) mlp_input(l, id, nt);
            if (heads_of.size()) {
                attention_input(l, id, nt);
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
                contract_heads(l, id, nt);
#pragma omp barrier
                residual(l, kO, heads_of, w.o, w.attention_post_norm, id, nt);
            }
            if (neurons_of.size()) {
                if (!s.parallel_residual) mlp_input(l, id, nt);
#pragma omp barrier
                contract_neurons(l, id, nt);
#pragma omp barrier
                residual(l, kDown, neurons_of, w.down, w.mlp_post_norm, id, nt);
            }
        }
#pragma omp barrier
        head(id, nt);
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

// The layout of the structs above, as text.
const char* flextron_layout() {
    static const std::string text = decoder_layout();
    return text.c_str();
}

// Logits after the wanted tokens; keys and values go to the cache's pages.
void flextron_step(const Shape* shape, const LayerWeights* layers, const Ends* ends, const Tokens* tokens,
                   int threads) {
    const auto run = shape->weights == kInt4   ? run_step<FourBit, EightBit>
                     : shape->weights == kInt8 ? run_step<EightBit, EightBit>
                                               : run_step<float, float>;
    run(*shape, layers, *ends, *tokens, threads);
}

// See `multiply_tokens`.
void flextron_multiply_tokens(const float* x, int64_t n, int64_t size, const float* token_scales, const void* panels,
                              int64_t panel_quads, const float* scales, int64_t outputs, float* out, int64_t threads) {
    multiply_tokens(x, n, size, token_scales, panels, panel_quads, scales, outputs, out, threads);
}
}
