// Attention of up to 32 query rows of one sequence and one KV head on the paged pool.
//
// A row is one query head of one token, so the heads of a group share every K and V tile that is read. Context is
// taken in chunks at fixed positions, and tokens that a row may not see weigh exactly zero: a row's result does
// not depend on which other rows are in its tile. Slots that no row may see are never read (V) or masked (K).
#pragma once

#include <algorithm>

#include "cpu_model.h"

namespace diptych {

constexpr int kChunk = 256;  // tokens whose scores are held at once

// Rows first_row .. first_row + rows of the (token, head of the group) list of one sequence's tokens.
struct QueryTile {
  int first_token;  // row of the batch
  int first_row;    // counted from first_token, group() rows a token
  int rows;
  int sequence;
};

struct AttentionScratch {
  explicit AttentionScratch(const Shape& s)
      : query(2 * s.head_dim / 32 * kTileElements),
        weights(2 * kChunk / 32 * kTileElements),
        tail(s.tile_elements()),
        scores(kPanel * kChunk),
        part(kPanel * s.head_dim),
        sums(kPanel * s.head_dim) {}

  Buffer<bf16> query, weights, tail;
  Buffer<float> scores, part, sums;
  float peak[kPanel], total[kPanel];
  int low[kPanel], high[kPanel];  // the tokens that each row sees: low <= token < high
  const bf16* values[kChunk / kTile];
};

class PoolView {
 public:
  PoolView(const Shape& s, const bf16* pool, const int32_t* table, int layer, int head)
      : shape_(s), table_(table), key_(pool + (layer * 2 * s.num_kv_heads + head) * s.tile_elements()) {}

  // Tiles that begin at `token`, a multiple of 16 (K) or of the depth of a V step.
  const bf16* key(int token) const { return block(token) + (token % shape_.tokens_per_block) * shape_.head_dim; }
  const bf16* value_block(int token) const { return block(token) + shape_.num_kv_heads * shape_.tile_elements(); }
  const bf16* value(int token) const { return value_block(token) + (token % shape_.tokens_per_block) * kTile; }

 private:
  const bf16* block(int token) const { return key_ + table_[token / shape_.tokens_per_block] * shape_.block_elements(); }

  const Shape& shape_;
  const int32_t* table_;
  const bf16* key_;
};

// A copy of the V tiles at `token` in which the slots from `end` on are zero: what is in them is not ours to read.
inline const bf16* cut_values(const Shape& s, const PoolView& pool, int token, int depth, int end, bf16* copy) {
  const bf16* source = pool.value(token);
  for (int group = 0; group < s.head_dim / kTile; group++, source += s.tokens_per_block * kTile) {
    bf16* out = copy + group * s.tokens_per_block * kTile;
    int valid = end - token;
    for (int slot = 0; slot < depth; slot++)
      for (int d = 0; d < kTile; d++) {
        int at = slot / 2 * 32 + d * 2 + slot % 2;
        out[at] = slot < valid ? source[at] : 0;
      }
  }
  return copy;
}

inline void prefetch_span(const bf16* p, ptrdiff_t elements) {
  for (ptrdiff_t i = 0; i < elements; i += 32) __builtin_prefetch(p + i);
}

template <Isa kIsa>
class TileAttention {
 public:
  TileAttention(const Shape& s, TileState& state, AttentionScratch& scratch)
      : s_(s), state_(state), m_(scratch), depth_(std::min(32, s.tokens_per_block)) {}

  // queries: [tokens, num_heads * head_dim]; out: A tiles of the same columns.
  void run(const QueryTile& tile, int head, const PoolView& pool, const int32_t* positions, const bf16* queries,
           bf16* out) {
    load_queries(tile, head, positions, queries);
    int first = m_.low[0] / depth_ * depth_, end = m_.high[tile.rows - 1];
    for (int r = 0; r < tile.rows; r++) m_.peak[r] = -1e30f, m_.total[r] = 0;
    std::fill_n(m_.sums.data(), tile.rows * s_.head_dim, 0.f);
    for (int chunk = first / kChunk * kChunk; chunk < end; chunk += kChunk) {
      int from = std::max(first, chunk), to = std::min(end, chunk + kChunk);
      score(tile.rows, pool, from, to, end);
      weigh(tile.rows, from, to);
      collect(tile.rows, pool, from, to);
    }
    write(tile, head, out);
  }

 private:
  int token_of(const QueryTile& tile, int row) const { return tile.first_token + (tile.first_row + row) / s_.group(); }
  int column_of(const QueryTile& tile, int row, int head) const {
    return (head * s_.group() + (tile.first_row + row) % s_.group()) * s_.head_dim;
  }

  void load_queries(const QueryTile& tile, int head, const int32_t* positions, const bf16* queries) {
    for (int r = 0; r < tile.rows; r++) {
      int token = token_of(tile, r);
      m_.high[r] = positions[token] + 1;
      m_.low[r] = s_.sliding_window ? std::max(0, m_.high[r] - s_.sliding_window) : 0;
      const bf16* in = queries + (ptrdiff_t)token * s_.attention_size() + column_of(tile, r, head);
      bf16* row = m_.query.data() + r / kTile * query_tile() + r % kTile * 32;
      for (int k = 0; k < s_.head_dim; k += 32) memcpy(row + k / 32 * kTileElements, in + k, 64);
    }
  }

  ptrdiff_t query_tile() const { return s_.head_dim / 32 * kTileElements; }

  void score(int rows, const PoolView& pool, int from, int to, int end) {
    const bf16* q = m_.query.data();
    for (int token = from; token < to; token += kPanel) {
      const bf16* keys = pool.key(token);
      bool whole = token + kTile < to;
      ptrdiff_t right = whole ? pool.key(token + kTile) - keys : 0;
      if (token + kPanel < end) prefetch_span(pool.key(token + kPanel), kPanel * s_.head_dim);
      prefetch_span(pool.value(token), kPanel * s_.head_dim);
      multiply<kIsa>(
          state_, rows, s_.head_dim / 32, kTile, [=](int step) { return q + step * kTileElements; }, query_tile(),
          [=](int step) { return keys + step * kTileElements; }, right, m_.scores.data() + (token - from), kChunk);
    }
  }

  // Scores become weights relative to the largest seen so far; what was summed before is brought to the same scale.
  void weigh(int rows, int from, int to) {
    const float scale = s_.attention_scale * 1.44269504f;
    const int width = (to - from + depth_ - 1) / depth_ * depth_;
    for (int r = 0; r < rows; r++) {
      float* scores = m_.scores.data() + r * kChunk;
      int low = std::max(0, m_.low[r] - from), high = std::min(to, m_.high[r]) - from;
      Vec best = fill(kMasked);
      for (int i = low / kLanes * kLanes; i < high; i += kLanes) best = maximum(best, masked(scores, i, low, high));
      float peak = std::max(m_.peak[r], largest(best) * scale);
      Vec total = fill(0);
      bf16* out = m_.weights.data() + r / kTile * weight_tile() + r % kTile * 32;
      for (int i = 0; i < width; i += kLanes) {
        Vec weight = fill(0);
        if (i + kLanes > low && i < high) {
          weight = exp2(fma(masked(scores, i, low, high), fill(scale), fill(-peak)));
          total = add(total, weight);
        }
        store_bf16(out + i / 32 * kTileElements + i % 32, weight);
      }
      float shrink[kLanes];
      store(shrink, exp2(fill(m_.peak[r] - peak)));
      m_.total[r] = m_.total[r] * shrink[0] + sum(total);
      m_.peak[r] = peak;
      Vec factor = fill(shrink[0]);
      float* sums = m_.sums.data() + r * s_.head_dim;
      for (int d = 0; d < s_.head_dim; d += kLanes) store(sums + d, mul(load(sums + d), factor));
    }
  }

  static ptrdiff_t weight_tile() { return kChunk / 32 * kTileElements; }

  static Vec masked(const float* scores, int at, int low, int high) {
    Vec v = load(scores + at);
    return at >= low && at + kLanes <= high ? v : keep_lanes(v, low - at, high - at);
  }

  void collect(int rows, const PoolView& pool, int from, int to) {
    const int steps = (to - from + depth_ - 1) / depth_, per_tile = 32 / depth_;
    for (int i = 0; i < steps; i++) {
      int token = from + i * depth_;
      bool cut = token + depth_ > to;
      m_.values[i] = cut ? cut_values(s_, pool, token, depth_, to, m_.tail.data()) : pool.value(token);
    }
    const ptrdiff_t right = (ptrdiff_t)s_.tokens_per_block * kTile;
    const bf16 *weights = m_.weights.data(), *const* values = m_.values;
    const int depth = depth_;
    for (int d = 0; d < s_.head_dim; d += kPanel) {
      const ptrdiff_t column = d / kTile * right;
      multiply<kIsa>(
          state_, rows, steps, depth / 2,
          [=](int i) { return weights + i / per_tile * kTileElements + i % per_tile * depth; }, weight_tile(),
          [=](int i) { return values[i] + column; }, right, m_.part.data() + d, s_.head_dim);
    }
    for (int i = 0; i < rows * s_.head_dim; i += kLanes)
      store(m_.sums.data() + i, add(load(m_.sums.data() + i), load(m_.part.data() + i)));
  }

  void write(const QueryTile& tile, int head, bf16* out) {
    for (int r = 0; r < tile.rows; r++) {
      int token = token_of(tile, r), column = column_of(tile, r, head);
      Vec factor = fill(1.f / m_.total[r]);
      bf16* tiles = out + (ptrdiff_t)(token / kTile) * (s_.attention_size() / 32) * kTileElements + token % kTile * 32;
      for (int d = 0; d < s_.head_dim; d += kLanes) {
        int k = column + d;
        store_bf16(tiles + (ptrdiff_t)(k / 32) * kTileElements + k % 32,
                   mul(load(m_.sums.data() + r * s_.head_dim + d), factor));
      }
    }
  }

  const Shape& s_;
  TileState& state_;
  AttentionScratch& m_;
  const int depth_;
};

}  // namespace diptych
