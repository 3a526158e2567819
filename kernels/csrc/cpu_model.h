// The packed weights of one model and its shape. Packs once; knows nothing of steps or threads.
#pragma once

#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#include "cpu_matrix.h"

namespace diptych {

// Mirrored field by field by `Shape` in kernels/cpu_library.py.
struct Shape {
  int32_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
  int32_t tokens_per_block, max_positions, sliding_window;  // sliding_window 0: none
  int32_t qk_norm, qkv_bias;
  float rms_norm_eps, attention_scale;

  int group() const { return num_heads / num_kv_heads; }
  int attention_size() const { return num_heads * head_dim; }
  int qkv_heads() const { return num_heads + 2 * num_kv_heads; }
  ptrdiff_t tile_elements() const { return (ptrdiff_t)tokens_per_block * head_dim; }
  ptrdiff_t block_elements() const { return num_layers * 2 * num_kv_heads * tile_elements(); }
};

// Mirrored field by field by `Batch` in kernels/cpu_library.py.
struct Batch {
  const int32_t *token_ids, *positions, *sequence_ids, *block_tables, *logits_rows;
  int32_t num_rows, max_blocks, num_logits;
  float* logits;

  const int32_t* table(int row) const { return block_tables + (ptrdiff_t)sequence_ids[row] * max_blocks; }
};

// Where the system grants them: reading hundreds of megabytes through 4 KB pages waits for page tables. A hint: it
// fails where the memory does not begin on a page, and that does no harm.
inline void prefer_large_pages(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  (void)!madvise(p, bytes, MADV_HUGEPAGE);
#endif
}

class Arena {
 public:
  explicit Arena(size_t bytes) : bytes_(round_up(bytes) + kPage) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    prefer_large_pages(base_, bytes_);
    next_ = round_up((size_t)base_);
  }
  ~Arena() { munmap(base_, bytes_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* take(size_t bytes) {
    void* p = (void*)next_;
    next_ += aligned(bytes);
    return p;
  }
  static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

 private:
  static constexpr size_t kPage = 2 << 20;
  static size_t round_up(size_t n) { return (n + kPage - 1) & ~(kPage - 1); }

  void* base_;
  size_t bytes_, next_;
};

// [N/32][K/32][2] B tiles (see cpu_matrix.h): the panels that one product streams are contiguous.
struct Matrix {
  bf16* data = nullptr;
  int rows = 0, depth = 0;  // rows is the weight's N, depth its K

  int panels() const { return (rows + kPanel - 1) / kPanel; }
  int steps() const { return depth / 32; }
  ptrdiff_t panel_elements() const { return (ptrdiff_t)steps() * 2 * kTileElements; }
  const bf16* panel(int index) const { return data + index * panel_elements(); }
  size_t bytes() const { return Arena::aligned(panels() * panel_elements() * sizeof(bf16)); }
};

// One panel: columns 0-15 from weight rows left.., columns 16-31 from right..; rows at or past `end` are zero.
inline void pack_panel(const Matrix& m, int panel, const bf16* source, int left, int right) {
  bf16* out = m.data + panel * m.panel_elements();
  for (int step = 0; step < m.steps(); step++) {
    for (int half = 0; half < 2; half++, out += kTileElements) {
      for (int column = 0; column < kTile; column++) {
        int row = (half ? right : left) + column;
        const bf16* in = source + (ptrdiff_t)row * m.depth + step * 32;
        for (int pair = 0; pair < 16; pair++) {
          uint32_t both = 0;
          if (row < m.rows) memcpy(&both, in + pair * 2, 4);
          memcpy(out + pair * 32 + column * 2, &both, 4);
        }
      }
    }
  }
}

enum MatrixId { kQkv, kOutput, kGateUp, kDown, kLmHead, kNumMatrices };
enum VectorId { kInputNorm, kPostNorm, kQkvBias, kQueryNorm, kKeyNorm, kFinalNorm, kCos, kSin, kNumVectors };

struct Layer {
  Matrix matrix[kNumMatrices];
  Buffer<float> vector[kNumVectors];
};

class Model {
 public:
  explicit Model(const Shape& s) : shape(s), layers(s.num_layers + 1), arena_(layout()) {
    for (Layer& layer : layers)
      for (Matrix& m : layer.matrix)
        if (m.rows) m.data = (bf16*)arena_.take(m.bytes());
  }

  // What belongs to no layer (final norm, head, rotary tables) sits behind the last layer.
  const Layer& tail() const { return layers.back(); }

  const Shape shape;
  std::vector<Layer> layers;
  const bf16* embedding = nullptr;

 private:
  size_t layout() {
    size_t total = 0;
    for (int l = 0; l <= shape.num_layers; l++) {
      Matrix* m = layers[l].matrix;
      if (l == shape.num_layers) {
        m[kLmHead] = {nullptr, shape.vocab_size, shape.hidden_size};
      } else {
        m[kQkv] = {nullptr, shape.qkv_heads() * shape.head_dim, shape.hidden_size};
        m[kOutput] = {nullptr, shape.hidden_size, shape.attention_size()};
        m[kGateUp] = {nullptr, 2 * shape.intermediate_size, shape.hidden_size};
        m[kDown] = {nullptr, shape.hidden_size, shape.intermediate_size};
      }
      for (int i = 0; i < kNumMatrices; i++) total += m[i].bytes();
    }
    return total;
  }

  Arena arena_;
};

}  // namespace diptych
