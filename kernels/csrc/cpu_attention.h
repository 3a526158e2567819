// Attention of up to 32 query rows of one sequence and one KV head on the paged pool.
//
// A row is one query head of one token, so the heads of a group share every K and V tile that is read. Context is
// taken in chunks at fixed positions, and tokens that a row may not see weigh exactly zero: a row's result does
// not depend on which other rows are in its tile. Slots that no row may see are never read (V) or masked (K).
#pragma once

#include <algorithm>

#include "cpu_model.h"

namespace diptych {

constexpr int kChunk = 256;                // tokens whose scores are held at once
constexpr int kScoreStride = kChunk + 16;  // not a power of two: rows would compete for the same cache lines

// Rows first_row .. first_row + rows of the (token, head of the group) list of one run of a sequence's tokens.
struct QueryTile {
  int first_token;  // row of the batch at which the run begins
  int first_row;    // counted from first_token, a group of rows a token
  int rows;
  int head;  // KV head
};

struct AttentionScratch {
  explicit AttentionScratch(const Shape& s)
      : query(2 * s.head_dim / 32 * kTileElements),
        weights(2 * kChunk / 32 * kTileElements),
        tail(s.tile_elements()),
        scores(kPanel * kScoreStride),
        part(kPanel * s.head_dim),
        sums(kPanel * s.head_dim) {}

  Buffer<bf16> query, weights, tail;
  Buffer<float> scores, part, sums;
  // Of each row: the largest scaled score so far and the one to come, their ratio, the sum of the weights.
  alignas(64) float peak[kPanel] = {}, next_peak[kPanel] = {}, shrink[kPanel] = {}, total[kPanel] = {};
  int low[kPanel], high[kPanel];  // the tokens that the row sees: low <= token < high
  int token[kPanel], column[kPanel];  // where its query is read and its result written
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
  const bf16* block(int token) const {
    return key_ + table_[token / shape_.tokens_per_block] * shape_.block_elements();
  }

  const Shape& shape_;
  const int32_t* table_;
  const bf16* key_;
};

// A copy of the V tiles at `token` in which the slots from `end` on are zero: what is in them is not ours to read.
inline const bf16* cut_values(const Shape& s, const PoolView& pool, int token, int depth, int end, bf16* copy) {
  const bf16* source = pool.value(token);
  const int valid = end - token, whole = valid / 2 * 32;
  for (int group = 0; group < s.head_dim / kTile; group++) {
    const bf16* in = source + group * s.tokens_per_block * kTile;
    bf16* out = copy + group * s.tokens_per_block * kTile;
    memset(out, 0, depth * kTile * sizeof(bf16));
    memcpy(out, in, whole * sizeof(bf16));
    if (valid % 2)
      for (int i = 0; i < 32; i += 2) out[whole + i] = in[whole + i];
  }
  return copy;
}

inline void prefetch(const bf16* p, int elements) {
  for (int i = 0; i < elements; i += 32) __builtin_prefetch(p + i, 0, 2);
}

inline void prefetch_keys(const Shape& s, const PoolView& pool, int from, int to) {
  for (int token = from; token < to; token += kTile) prefetch(pool.key(token), kTile * s.head_dim);
}

inline void prefetch_values(const Shape& s, const PoolView& pool, int from, int to) {
  for (int token = from; token < to; token += kTile)
    for (int group = 0; group < s.head_dim / kTile; group++)
      prefetch(pool.value(token) + group * s.tokens_per_block * kTile, kTile * kTile);
}

template <Isa kIsa>
class TileAttention {
 public:
  TileAttention(const Shape& s, TileState& state, AttentionScratch& scratch, const int32_t* positions)
      : s_(s), state_(state), m_(scratch), positions_(positions), depth_(std::min(32, s.tokens_per_block)) {}

  // queries: [tokens, num_heads * head_dim]; out: A tiles of the same columns. `next` is the tile that this thread
  // takes afterwards, if any: its keys are asked for early, as only a run's first tile finds them out of the cache.
  void run(const QueryTile& tile, const PoolView& pool, const QueryTile* next, const PoolView& next_pool,
           const bf16* queries, bf16* out) {
    load_queries(tile, queries);
    const bool cold = tile.first_row == 0;
    const int first = first_token(m_.low[0]), end = m_.high[tile.rows - 1];
    for (int r = 0; r < tile.rows; r++) m_.peak[r] = -1e30f, m_.total[r] = 0;
    for (int chunk = first / kChunk * kChunk; chunk < end; chunk += kChunk) {
      const int from = std::max(first, chunk), to = std::min(end, chunk + kChunk);
      score(tile.rows, pool, from, to, cold);
      weigh(tile.rows, from, to);
      if (to < end)
        collect(tile.rows, pool, from, to, from == first, pool, to, cold ? std::min(end, to + kChunk) : to);
      else if (next && next->first_row == 0)
        collect(tile.rows, pool, from, to, from == first, next_pool, start_of(*next), first_chunk_end(*next));
      else
        collect(tile.rows, pool, from, to, from == first, pool, 0, 0);
    }
    write(tile.rows, out);
  }

 private:
  int low_of(int position) const { return s_.sliding_window ? std::max(0, position + 1 - s_.sliding_window) : 0; }
  int first_token(int low) const { return low / depth_ * depth_; }
  int start_of(const QueryTile& tile) const { return first_token(low_of(positions_[tile.first_token])); }
  int first_chunk_end(const QueryTile& tile) const {
    return std::min(positions_[tile.first_token] + 1, start_of(tile) / kChunk * kChunk + kChunk);
  }

  void load_queries(const QueryTile& tile, const bf16* queries) {
    const int group = s_.group();
    int token = tile.first_token + tile.first_row / group, member = tile.first_row % group;
    for (int r = 0; r < tile.rows; r++) {
      m_.token[r] = token;
      m_.column[r] = (tile.head * group + member) * s_.head_dim;
      m_.low[r] = low_of(positions_[token]);
      m_.high[r] = positions_[token] + 1;
      const bf16* in = queries + (ptrdiff_t)token * s_.attention_size() + m_.column[r];
      bf16* row = m_.query.data() + r / kTile * query_tile() + r % kTile * 32;
      for (int k = 0; k < s_.head_dim; k += 32) memcpy(row + k / 32 * kTileElements, in + k, 64);
      if (++member == group) member = 0, token++;
    }
  }

  ptrdiff_t query_tile() const { return s_.head_dim / 32 * kTileElements; }

  void score(int rows, const PoolView& pool, int from, int to, bool cold) {
    const bf16* q = m_.query.data();
    for (int token = from; token < to; token += kPanel) {
      const bf16* keys = pool.key(token);
      const ptrdiff_t right = token + kTile < to ? pool.key(token + kTile) - keys : 0;
      if (cold) prefetch_values(s_, pool, token, std::min(to, token + kPanel));
      multiply<kIsa>(
          state_, rows, s_.head_dim / 32, kTile, [=](int step) { return q + step * kTileElements; }, query_tile(),
          [=](int step) { return keys + step * kTileElements; }, right, m_.scores.data() + (token - from),
          kScoreStride);
    }
  }

  // Scores become weights relative to the largest seen so far.
  void weigh(int rows, int from, int to) {
    const float scale = s_.attention_scale * 1.44269504f;
    const int width = (to - from + depth_ - 1) / depth_ * depth_;
    for (int r = 0; r < rows; r++) {
      const int low = std::max(0, m_.low[r] - from), high = std::min(to, m_.high[r]) - from;
      const float* scores = m_.scores.data() + r * kScoreStride;
      Vec best = fill(kMasked);
      for (int i = low / kLanes * kLanes; i < high; i += kLanes) best = maximum(best, masked(scores, i, low, high));
      m_.next_peak[r] = std::max(m_.peak[r], largest(best) * scale);
    }
    for (int r = 0; r < rows; r += kLanes) {
      store(m_.shrink + r, exp2(sub(load(m_.peak + r), load(m_.next_peak + r))));
      store(m_.peak + r, load(m_.next_peak + r));
    }
    for (int r = 0; r < rows; r++) {
      const int low = std::max(0, m_.low[r] - from), high = std::min(to, m_.high[r]) - from;
      const float* scores = m_.scores.data() + r * kScoreStride;
      const Vec factor = fill(scale), offset = fill(-m_.peak[r]);
      bf16* out = m_.weights.data() + r / kTile * weight_tile() + r % kTile * 32;
      Vec total = fill(0);
      for (int i = 0; i < width; i += kLanes) {
        Vec weight = fill(0);
        if (i + kLanes > low && i < high) {
          weight = exp2(fma(masked(scores, i, low, high), factor, offset));
          total = add(total, weight);
        }
        store_bf16(out + i / 32 * kTileElements + i % 32, weight);
      }
      m_.total[r] = m_.total[r] * m_.shrink[r] + sum(total);
    }
  }

  static ptrdiff_t weight_tile() { return kChunk / 32 * kTileElements; }

  static Vec masked(const float* scores, int at, int low, int high) {
    Vec v = load(scores + at);
    return at >= low && at + kLanes <= high ? v : keep_lanes(v, low - at, high - at);
  }

  // Adds this chunk's weighted values; meanwhile the keys ahead_from .. ahead_to are asked for.
  void collect(int rows, const PoolView& pool, int from, int to, bool first, const PoolView& ahead, int ahead_from,
               int ahead_to) {
    const int steps = (to - from + depth_ - 1) / depth_, per_tile = 32 / depth_, depth = depth_;
    for (int i = 0; i < steps; i++) {
      const int token = from + i * depth_;
      const bool cut = token + depth_ > to;
      m_.values[i] = cut ? cut_values(s_, pool, token, depth_, to, m_.tail.data()) : pool.value(token);
    }
    const ptrdiff_t right = (ptrdiff_t)s_.tokens_per_block * kTile;
    const bf16 *weights = m_.weights.data(), *const* values = m_.values;
    float* out = first ? m_.sums.data() : m_.part.data();
    const int share = (ahead_to - ahead_from) * kPanel / s_.head_dim / kTile * kTile + kTile;
    for (int d = 0; d < s_.head_dim; d += kPanel) {
      const ptrdiff_t column = d / kTile * right;
      prefetch_keys(s_, ahead, ahead_from, std::min(ahead_to, ahead_from + share));
      ahead_from += share;
      multiply<kIsa>(
          state_, rows, steps, depth / 2,
          [=](int i) { return weights + i / per_tile * kTileElements + i % per_tile * depth; }, weight_tile(),
          [=](int i) { return values[i] + column; }, right, out + d, s_.head_dim);
    }
    if (first) return;
    for (int r = 0; r < rows; r++) {
      const Vec shrink = fill(m_.shrink[r]);
      float *sums = m_.sums.data() + r * s_.head_dim, *part = m_.part.data() + r * s_.head_dim;
      for (int d = 0; d < s_.head_dim; d += kLanes) store(sums + d, fma(load(sums + d), shrink, load(part + d)));
    }
  }

  void write(int rows, bf16* out) {
    const ptrdiff_t row_tile = (ptrdiff_t)(s_.attention_size() / 32) * kTileElements;
    for (int r = 0; r < rows; r++) {
      const Vec factor = fill(1.f / m_.total[r]);
      const int token = m_.token[r], column = m_.column[r];
      bf16* tiles = out + token / kTile * row_tile + token % kTile * 32 + column / 32 * kTileElements;
      const float* sums = m_.sums.data() + r * s_.head_dim;
      for (int d = 0; d < s_.head_dim; d += kLanes)
        store_bf16(tiles + d / 32 * kTileElements + d % 32, mul(load(sums + d), factor));
    }
  }

  const Shape& s_;
  TileState& state_;
  AttentionScratch& m_;
  const int32_t* positions_;
  const int depth_;
};

}  // namespace diptych
