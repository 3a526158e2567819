// What happens to one head of one row after the query-key-value product: bias, norm, rotary embedding, and its place
// among the queries or in the pool.
#pragma once

#include <cmath>

#include "cpu_model.h"

namespace diptych {

// 1 / root mean square of `size` values, a multiple of 32.
inline Vec inverse_rms(const float* row, int size, float epsilon) {
  Vec even = fill(0), odd = fill(0);
  for (int k = 0; k < size; k += 2 * kLanes) {
    Vec x = load(row + k), y = load(row + k + kLanes);
    even = fma(x, x, even);
    odd = fma(y, y, odd);
  }
  return fill(1.f / std::sqrt(sum(add(even, odd)) / size + epsilon));
}

class HeadFinish {
 public:
  // `spare` has room for one head.
  HeadFinish(const Model& model, const Batch& batch, bf16* pool, bf16* queries, bf16* spare)
      : model_(model), s_(model.shape), b_(batch), pool_(pool), queries_(queries), spare_(spare) {}

  void finish(const Layer& layer, int index, int head, int row, float* v) {
    const int size = s_.head_dim;
    if (s_.qkv_bias) {
      const float* bias = layer.vector[kQkvBias].data() + head * size;
      for (int d = 0; d < size; d += kLanes) store(v + d, add(load(v + d), load(bias + d)));
    }
    const bool query = head < s_.num_heads, key = !query && head < s_.num_heads + s_.num_kv_heads;
    if (query || key) {
      if (s_.qk_norm) scale_head(layer.vector[query ? kQueryNorm : kKeyNorm].data(), v);
      rotate(b_.positions[row], v);
    }
    bf16* out = query ? queries_ + (ptrdiff_t)row * s_.attention_size() + head * size : spare_;
    for (int d = 0; d < size; d += kLanes) store_bf16(out + d, load(v + d));
    if (query) return;
    const int kv = head - s_.num_heads;  // keys of all heads, then values: the order of the pool
    const int tile = index * 2 * s_.num_kv_heads + kv, slot = b_.positions[row] % s_.tokens_per_block;
    bf16* to = pool_ + block_of(row) * s_.block_elements() + tile * s_.tile_elements();
    key ? write_key(to, slot, out) : write_value(to, slot, out);
  }

 private:
  ptrdiff_t block_of(int row) const { return b_.table(row)[b_.positions[row] / s_.tokens_per_block]; }

  void scale_head(const float* weight, float* v) const {
    Vec scale = inverse_rms(v, s_.head_dim, s_.rms_norm_eps);
    for (int d = 0; d < s_.head_dim; d += kLanes) store(v + d, mul(mul(load(v + d), scale), load(weight + d)));
  }

  void rotate(int position, float* v) const {
    const int half = s_.head_dim / 2;
    const float* cos = model_.tail().vector[kCos].data() + (ptrdiff_t)position * half;
    const float* sin = model_.tail().vector[kSin].data() + (ptrdiff_t)position * half;
    for (int d = 0; d < half; d += kLanes) {
      Vec x = load(v + d), y = load(v + half + d), c = load(cos + d), s = load(sin + d);
      store(v + d, sub(mul(x, c), mul(y, s)));
      store(v + half + d, fma(y, c, mul(x, s)));
    }
  }

  // K tile: [tokens / 16][head_dim / 2][16][2]
  void write_key(bf16* tile, int slot, const bf16* v) const {
    bf16* out = tile + slot / kTile * kTile * s_.head_dim + slot % kTile * 2;
    for (int d = 0; d < s_.head_dim; d += 2) memcpy(out + d * kTile, v + d, 4);
  }

  // V tile: [head_dim / 16][tokens / 2][16][2]; the other token of a pair may be another thread's to write
  void write_value(bf16* tile, int slot, const bf16* v) const {
    for (int d = 0; d < s_.head_dim; d += kTile) {
      bf16* out = tile + d * s_.tokens_per_block + slot / 2 * 32 + slot % 2;
      for (int i = 0; i < kTile; i++) out[i * 2] = v[d + i];
    }
  }

  const Model& model_;
  const Shape& s_;
  const Batch& b_;
  bf16* pool_;
  bf16* queries_;
  bf16* spare_;
};

}  // namespace diptych
