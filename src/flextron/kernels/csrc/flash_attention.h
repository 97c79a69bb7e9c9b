// Attention of training chunks in float32, forward and backward.
//
// It goes block by block (FlashAttention-2, arXiv 2307.08691). A block's rows are the query heads of one KV head
// for some tokens, so that keys are read once for all of them. Every product is a sum of outer products in registers:
// six rows times sixteen columns; what causality hides is left out down to such tiles.
//
// Results do not depend on which thread does what: a block of rows has one thread, and gradients of keys and values are
// added up in an order that the shape and the number of threads determine.
//
// Shapes: N tokens of the chunk, M keys, H query heads, K KV heads, r = H / K, d head size, m rows of a block.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "gemm.h"

extern "C" {

// What attention has to do. Tensors are (rows, heads, d); the strides are those of rows.
struct Attention {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t window;          // keys that a query sees, itself included; 0 is all
    int64_t num_sequences;
    const int64_t* lengths;  // tokens of each sequence in the chunk, (num_sequences,)
    int64_t num_past;        // keys before those of the chunk; of the first sequence
    const float *q, *k, *v;  // (N, H, d), (num_past + N, K, d) twice
    int64_t q_stride, k_stride, v_stride;
    float* out;              // (N, H, d)
    float* lse;              // log-sum-exp of a query's scores, (N, H)
    int64_t threads;
};

// Gradients; those of q, k and v may be null.
struct Gradients {
    const float* out;
    int64_t out_stride;
    float *q, *k, *v;
};
}

namespace {

// Tokens a to e - 1 of a sequence with one KV head.
struct Span {
    long sequence, kv_head, a, e;
    double cost;
};

struct Sequence {
    long first_row, num_rows;  // in the chunk
    long first_key, num_keys;  // among all keys
    long packed;               // first key among those that are padded to whole panels
    long before() const { return num_keys - num_rows; }
};

// A tile of keys that a block of rows attends to.
struct KeyTile {
    long key, num_keys;
};

class FlashAttention {
  public:
    explicit FlashAttention(const Attention& a)
        : a_(a), d_(a.head_dim), r_(a.num_heads / a.num_kv_heads), tokens_(std::max(1L, kRows / r_)),
          scale_(1.0f / std::sqrt((float)d_)) {
        long row = 0, key = 0, packed = 0;
        for (long s = 0; s < a.num_sequences; s++) {
            const long n = a.lengths[s], keys = n + (s ? 0 : a.num_past);
            sequences_.push_back({row, n, key, keys, packed});
            row += n, key += keys, packed += padded(keys);
        }
        num_packed_ = packed;
    }

    void forward() {
        const Room keys(num_packed_ * d_ * a_.num_kv_heads), values(num_packed_ * d_ * a_.num_kv_heads);
        const std::vector<Span> blocks = spans(0);
#pragma omp parallel num_threads(a_.threads)
        {
            const Block block(*this);
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < num_panels(); i++) {
                pack_panels(i, a_.k, a_.k_stride, keys);
                pack_rows(i, a_.v, a_.v_stride, values);
            }
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < blocks.size(); i++) attend(blocks[i], keys, values, block);
        }
    }

    void backward(const Gradients& g) {
        const long size = num_packed_ * d_ * a_.num_kv_heads;
        const bool scores = g.q || g.k;
        const Room keys(size), key_rows(g.q ? size : 0), values(scores ? size : 0);
        const std::vector<Span> parts = spans(a_.threads > 1 ? 4 * a_.threads : 1);
        std::vector<Room> dk, dv;
        for (const Span& p : parts) {
            const long rows = sequences_[p.sequence].before() + p.e;
            dk.emplace_back(g.k ? rows * d_ : 0);
            dv.emplace_back(g.v ? rows * d_ : 0);
        }
#pragma omp parallel num_threads(a_.threads)
        {
            const Block block(*this);
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < num_panels(); i++) {
                pack_panels(i, a_.k, a_.k_stride, keys);
                if (g.q) pack_rows(i, a_.k, a_.k_stride, key_rows);
                if (scores) pack_panels(i, a_.v, a_.v_stride, values);
            }
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < parts.size(); i++) {
                const Span& p = parts[i];
                const long rows = sequences_[p.sequence].before() + p.e;
                if (g.k) std::fill(dk[i] + 0, dk[i] + rows * d_, 0.0f);
                if (g.v) std::fill(dv[i] + 0, dv[i] + rows * d_, 0.0f);
                for (long t = p.a; t < p.e; t += tokens_)
                    differentiate({p.sequence, p.kv_head, t, std::min(t + tokens_, p.e), 0}, g, keys, key_rows, values,
                                  dk[i], dv[i], block);
            }
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < num_panels(); i++) {
                if (g.k) add_up(i, parts, dk, g.k);
                if (g.v) add_up(i, parts, dv, g.v);
            }
        }
    }

  private:
    // What a thread needs for a block of rows.
    struct Block {
        explicit Block(const FlashAttention& run)
            : rows(run.tokens_ * run.r_), q(rows * run.d_), g(rows * run.d_), out(rows * run.d_), shares(rows * kKeys),
              ds(rows * kKeys), most(rows), total(rows) {}
        long rows;
        Room q, g, out, shares, ds, most, total;
    };

    static long padded(long keys) { return (keys + kPanel - 1) / kPanel * kPanel; }

    // Blocks of rows, or about `count` spans of equal cost that are made of them; the costly ones first.
    std::vector<Span> spans(long count) const {
        std::vector<Span> out;
        for (size_t s = 0; s < sequences_.size(); s++)
            for (long h = 0; h < a_.num_kv_heads; h++)
                for (long t = 0; t < sequences_[s].num_rows; t += tokens_) {
                    const long e = std::min(t + tokens_, sequences_[s].num_rows), end = sequences_[s].before() + e;
                    const long keys = a_.window ? std::min<long>(end, a_.window + e - t) : end;
                    out.push_back({(long)s, h, t, e, (double)(e - t) * keys});
                }
        if (count) out = joined(out, count);
        std::stable_sort(out.begin(), out.end(), [](const Span& a, const Span& b) { return a.cost > b.cost; });
        return out;
    }

    static std::vector<Span> joined(const std::vector<Span>& blocks, long count) {
        const double whole = std::accumulate(blocks.begin(), blocks.end(), 0.0,
                                             [](double sum, const Span& block) { return sum + block.cost; });
        std::vector<Span> out;
        double done = 0;
        long piece = -1;
        for (const Span& block : blocks) {
            const long own = std::min<long>(count - 1, (done + block.cost / 2) / whole * count);
            const bool follows = own == piece && out.back().kv_head == block.kv_head && block.a;
            if (follows) {
                out.back().e = block.e;
                out.back().cost += block.cost;
            } else {
                out.push_back(block);
            }
            piece = own;
            done += block.cost;
        }
        return out;
    }

    // Keys are packed, and their gradients added up, panel by panel.
    long num_panels() const { return num_packed_ / kPanel * a_.num_kv_heads; }

    struct Panel {
        const Sequence& sequence;
        long index, kv_head, key, num_keys;
    };

    Panel panel(long i) const {
        const long first = i / a_.num_kv_heads * kPanel;
        size_t s = sequences_.size() - 1;
        while (sequences_[s].packed > first) s--;
        const long key = first - sequences_[s].packed;
        return {sequences_[s], (long)s, i % a_.num_kv_heads, key, std::min(kPanel, sequences_[s].num_keys - key)};
    }

    // Where the packed keys or values of a KV head begin, from one key on.
    float* packed(const Room& where, const Sequence& s, long kv_head, long key) const {
        return where + (kv_head * num_packed_ + s.packed + key) * d_;
    }

    // (panels, d, kPanel)
    void pack_panels(long i, const float* from, long stride, const Room& where) const {
        const Panel c = panel(i);
        float* out = packed(where, c.sequence, c.kv_head, c.key);
        if (c.num_keys < kPanel) std::fill(out, out + kPanel * d_, 0.0f);
        const float* own = from + (c.sequence.first_key + c.key) * stride + c.kv_head * d_;
        for (long j = 0; j < c.num_keys; j++)
            for (long x = 0; x < d_; x++) out[x * kPanel + j] = own[j * stride + x];
    }

    // (keys, d)
    void pack_rows(long i, const float* from, long stride, const Room& where) const {
        const Panel c = panel(i);
        float* out = packed(where, c.sequence, c.kv_head, c.key);
        const float* own = from + (c.sequence.first_key + c.key) * stride + c.kv_head * d_;
        for (long j = 0; j < c.num_keys; j++) std::memcpy(out + j * d_, own + j * stride, d_ * sizeof(float));
    }

    // The gradient of a panel of keys, in the order of the spans' tokens.
    void add_up(long i, const std::vector<Span>& parts, const std::vector<Room>& sums, float* out) const {
        const Panel c = panel(i);
        const long stride = a_.num_kv_heads * d_;
        float* own = out + (c.sequence.first_key + c.key) * stride + c.kv_head * d_;
        for (long j = 0; j < c.num_keys; j++) std::fill(own + j * stride, own + j * stride + d_, 0.0f);
        for (size_t p = 0; p < parts.size(); p++) {
            if (parts[p].sequence != c.index || parts[p].kv_head != c.kv_head) continue;
            const long end = std::min(c.key + c.num_keys, c.sequence.before() + parts[p].e);
            for (long key = c.key; key < end; key++)
                for (long x = 0; x < d_; x += kLanes) {
                    float* to = own + (key - c.key) * stride + x;
                    store(to, load(to) + load(sums[p] + key * d_ + x));
                }
        }
    }

    // Rows of tokens a to e - 1 of the query heads of a KV head, times a factor, one after the other.
    void gather(const Span& span, const float* from, long stride, float factor, float* out) const {
        const float* own = from + (sequences_[span.sequence].first_row + span.a) * stride + span.kv_head * r_ * d_;
        for (long t = 0; t < span.e - span.a; t++)
            for (long x = 0; x < r_ * d_; x += kLanes)
                store(out + t * r_ * d_ + x, load(own + t * stride + x) * factor);
    }

    float* own_rows(const Span& span, float* all, long width) const {
        return all + (sequences_[span.sequence].first_row + span.a) * a_.num_heads * width + span.kv_head * r_ * width;
    }

    void scatter(const Span& span, const float* rows, float factor, float* all) const {
        float* own = own_rows(span, all, d_);
        for (long t = 0; t < span.e - span.a; t++)
            for (long x = 0; x < r_ * d_; x += kLanes)
                store(own + t * a_.num_heads * d_ + x, load(rows + t * r_ * d_ + x) * factor);
    }

    // Calls f for the tiles of keys that any token of a span sees.
    template <class F>
    void for_each_tile(const Span& span, F f) const {
        const long before = sequences_[span.sequence].before(), end = before + span.e;
        const long first = a_.window ? std::max(0L, before + span.a + 1 - (long)a_.window) / kPanel * kPanel : 0;
        for (long key = first; key < end; key += kKeys) f(KeyTile{key, std::min(kKeys, end - key)});
    }

    // The keys of a tile that a row sees.
    Range seen(const Span& span, const KeyTile& tile, long row) const {
        const long last = sequences_[span.sequence].before() + span.a + row / r_ - tile.key;
        return {a_.window ? std::max(0L, last + 1 - (long)a_.window) : 0, std::min(tile.num_keys, last + 1)};
    }

    // The first row that sees a key of a tile or, where a window hides it again, comes after those that do.
    long first_row(const Span& span, const KeyTile& tile, long key) const {
        return std::max(0L, tile.key + key - sequences_[span.sequence].before() - span.a) * r_;
    }

    // Products of rows with the keys of a tile, (m, kKeys); those that are hidden may be left out.
    void products(const Span& span, const KeyTile& tile, const float* rows, const float* panels, float* out) const {
        const long m = (span.e - span.a) * r_;
        for (long key = 0; key < tile.num_keys; key += kPanel) {
            const long i = first_row(span, tile, key) / kTileRows * kTileRows;
            multiply(m - i, kPanel, rows + i * d_, d_, 1, panels + key * d_, kPanel, out + i * kKeys + key, kKeys, false,
                     [&](long, long) { return Range{0, d_}; });
        }
    }

    // out += shares times rows of keys.
    void gather_keys(const Span& span, const KeyTile& tile, const float* shares, const float* rows, float* out) const {
        multiply((span.e - span.a) * r_, d_, shares, kKeys, 1, rows, d_, out, d_, true,
                 [&](long, long e) { return Range{0, std::max(0L, seen(span, tile, e - 1).to)}; });
    }

    // sums += transposed shares times rows of queries.
    void give_keys(const Span& span, const KeyTile& tile, const float* shares, const float* rows, float* sums) const {
        const long m = (span.e - span.a) * r_;
        multiply(tile.num_keys, d_, shares, 1, kKeys, rows, d_, sums + tile.key * d_, d_, true,
                 [&](long i, long) { return Range{std::min(m, first_row(span, tile, i)), m}; });
    }

    // Puts a value in the place of what a row does not see.
    static void fill_outside(float* row, const Range& range, long end, float value) {
        std::fill(row, row + range.from, value);
        std::fill(row + range.to, row + end, value);
    }

    void attend(const Span& span, const Room& keys, const Room& values, const Block& block) const {
        const Sequence& s = sequences_[span.sequence];
        const long m = (span.e - span.a) * r_;
        gather(span, a_.q, a_.q_stride, scale_, block.q + 0);
        std::fill(block.out + 0, block.out + m * d_, 0.0f);
        std::fill(block.most + 0, block.most + m, kHidden);
        std::fill(block.total + 0, block.total + m, 0.0f);
        for_each_tile(span, [&](const KeyTile& tile) {
            products(span, tile, block.q + 0, packed(keys, s, span.kv_head, tile.key), block.shares + 0);
            for (long i = 0; i < m; i++) online_softmax(seen(span, tile, i), tile, i, block);
            gather_keys(span, tile, block.shares + 0, packed(values, s, span.kv_head, tile.key), block.out + 0);
        });
        float* lse = own_rows(span, a_.lse, 1);
        for (long i = 0; i < m; i++) {
            const float factor = 1.0f / block.total[i];
            for (long x = 0; x < d_; x += kLanes) store(block.out + i * d_ + x, load(block.out + i * d_ + x) * factor);
            lse[i / r_ * a_.num_heads + i % r_] = block.most[i] + std::log(block.total[i]);
        }
        scatter(span, block.out + 0, 1.0f, a_.out);
    }

    // Online softmax: exponentiates a tile of a row, and rescales the running output when the row's maximum grows.
    void online_softmax(const Range& range, const KeyTile& tile, long i, const Block& block) const {
        float* scores = block.shares + i * kKeys;
        const long end = padded(tile.num_keys);
        if (range.from >= range.to) return std::fill(scores, scores + end, 0.0f);
        fill_outside(scores, range, end, kHidden);
        Vec top = load(scores);
        for (long j = kLanes; j < end; j += kLanes) top = larger(top, load(scores + j));
        const float before = block.most[i], most = std::max(before, largest(top));
        Vec total{};
        for (long j = 0; j < end; j += kLanes) {
            const Vec share = exp_negative(load(scores + j) - most);
            store(scores + j, share);
            total += share;
        }
        const float factor = most == before ? 1.0f : exp_negative(Vec{} + (before - most))[0];
        block.total[i] = block.total[i] * factor + sum(total);
        if (most == before) return;
        block.most[i] = most;
        float* out = block.out + i * d_;
        for (long x = 0; x < d_; x += kLanes) store(out + x, load(out + x) * factor);
    }

    void differentiate(const Span& span, const Gradients& g, const Room& keys, const Room& key_rows,
                       const Room& values, const Room& dk, const Room& dv, const Block& block) const {
        const Sequence& s = sequences_[span.sequence];
        const long m = (span.e - span.a) * r_;
        gather(span, a_.q, a_.q_stride, scale_, block.q + 0);
        gather(span, g.out, g.out_stride, 1.0f, block.g + 0);
        const float *out = own_rows(span, a_.out, d_), *lse = own_rows(span, a_.lse, 1);
        for (long i = 0; i < m; i++) {
            Vec through{};
            const float* own = out + (i / r_ * a_.num_heads + i % r_) * d_;
            for (long x = 0; x < d_; x += kLanes) through = fma(load(own + x), load(block.g + i * d_ + x), through);
            block.total[i] = sum(through);
            block.most[i] = lse[i / r_ * a_.num_heads + i % r_];
        }
        if (g.q) std::fill(block.out + 0, block.out + m * d_, 0.0f);
        for_each_tile(span, [&](const KeyTile& tile) {
            const long end = padded(tile.num_keys);
            products(span, tile, block.q + 0, packed(keys, s, span.kv_head, tile.key), block.shares + 0);
            if (g.q || g.k)
                products(span, tile, block.g + 0, packed(values, s, span.kv_head, tile.key), block.ds + 0);
            for (long i = 0; i < m; i++) {
                float *shares = block.shares + i * kKeys, *ds = block.ds + i * kKeys;
                const Range range = seen(span, tile, i);
                if (range.from >= range.to) {
                    std::fill(shares, shares + end, 0.0f);
                    std::fill(ds, ds + end, 0.0f);
                    continue;
                }
                fill_outside(shares, range, end, kHidden);
                fill_outside(ds, range, end, 0.0f);
                for (long j = 0; j < end; j += kLanes) {
                    const Vec share = exp_negative(load(shares + j) - block.most[i]);
                    store(shares + j, share);
                    if (g.q || g.k) store(ds + j, share * (load(ds + j) - block.total[i]));
                }
            }
            if (g.v) give_keys(span, tile, block.shares + 0, block.g + 0, dv + 0);
            if (g.k) give_keys(span, tile, block.ds + 0, block.q + 0, dk + 0);
            if (g.q) gather_keys(span, tile, block.ds + 0, packed(key_rows, s, span.kv_head, tile.key), block.out + 0);
        });
        if (g.q) scatter(span, block.out + 0, scale_, g.q);
    }

    static constexpr float kHidden = -1e30f;
    const Attention& a_;
    const long d_, r_, tokens_;  // tokens of a block
    const float scale_;
    long num_packed_ = 0;
    std::vector<Sequence> sequences_;
};

}  // namespace
