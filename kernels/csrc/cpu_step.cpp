// One step of a Llama-like decoder on the CPU: any mix of prefill and decode rows against a paged KV pool.
//
// The step is a list of phases (cpu_team.h); what follows a product (rotary embedding and the KV write, the
// activation, the residual sum) is done on each panel while it is in the cache. Activations between products are
// bf16 in A tiles (cpu_matrix.h), the residual stream and every sum is float32. kernels/cpu_step.py is the only
// caller; it has checked every index.

#include <cmath>

#include "cpu_attention.h"
#include "cpu_team.h"

namespace diptych {

// Mirrored field by field by `_Batch` in kernels/cpu_step.py.
struct Batch {
  const int32_t *token_ids, *positions, *sequence_ids, *block_tables, *logits_rows;
  int32_t num_rows, max_blocks, num_logits;
  float* logits;
};

enum PhaseKind { kEmbed, kProject, kAttend, kOutputProject, kPostNormalize, kMlpUp, kMlpDown, kNormalize, kHead };

constexpr int kInlineRows = 8;    // so few rows are normalised by the thread that ends the phase before
constexpr int kRowGroup = 512;    // no more rows than this go through one panel of weights before the next is read
constexpr int kGroupBytes = 384 << 10;
constexpr int kUnitsPerThread = 8;
constexpr int kPieceSteps = 9;    // 18 KB of a panel, and as much of the rows that meet it

// A product cut into units: groups of items (columns) times groups of rows. With many rows both groups are of a size
// that stays in the second-level cache; units that share weights follow each other.
struct Split {
  int items_per_unit, row_group, row_groups, units;

  Split(const Matrix& w, int width, int rows, int threads) {
    const int items = w.panels() / width, row_bytes = w.depth * (int)sizeof(bf16);
    row_group = std::min(kRowGroup, std::max(kPanel, kGroupBytes / row_bytes / kPanel * kPanel));
    row_groups = (rows + row_group - 1) / row_group;
    items_per_unit = threads == 1 ? items : std::max(1, items * row_groups / (threads * kUnitsPerThread));
    if (row_groups > 1) items_per_unit = std::min(items_per_unit, std::max(1, kGroupBytes / row_bytes / kPanel / width));
    units = (items + items_per_unit - 1) / items_per_unit * row_groups;
  }
};

struct Worker {
  explicit Worker(const Shape& s) : attention(s), panel(kRowGroup * std::max(kPanel, (int)s.head_dim)) {}
  AttentionScratch attention;
  Buffer<float> panel;
  Buffer<bf16> head = Buffer<bf16>(512);
  TileState tiles;
  alignas(FlushDenormals) unsigned char denormals[sizeof(FlushDenormals)];
};

template <Isa kIsa>
class Step final : public Job {
 public:
  Step(Model& model, bf16* pool, Team& team, std::vector<Worker>& workers)
      : m_(model), s_(model.shape), pool_(pool), team_(team), workers_(workers) {}

  void run(const Batch& batch) {
    b_ = batch;
    reserve();
    list_tiles();
    list_phases();
    team_.run(*this, phases_);
  }

  void set_pool(bf16* pool) { pool_ = pool; }

  void enter(int thread) override { new (workers_[thread].denormals) FlushDenormals(); }

  void leave(int thread) override {
    release(workers_[thread].tiles);
    ((FlushDenormals*)workers_[thread].denormals)->~FlushDenormals();
  }

  void run_unit(const Phase& phase, int unit, int thread) override {
    const Layer& layer = m_.layers[phase.layer];
    Worker& worker = workers_[thread];
    switch (phase.kind) {
      case kEmbed: return embed(unit * kTile);
      case kProject: return project(layer, phase.layer, unit, worker);
      case kAttend: return attend(phase.layer, unit, worker);
      case kOutputProject: return add_product(layer.matrix[kOutput], attended_.data(), unit, worker);
      case kPostNormalize: return normalize(layer.vector[kPostNorm], unit * kTile, kTile);
      case kMlpUp: return mlp_up(layer.matrix[kGateUp], unit, worker);
      case kMlpDown: return add_product(layer.matrix[kDown], mlp_.data(), unit, worker);
      case kNormalize: return normalize_next(phase.layer, unit * kTile, kTile);
      case kHead: return head(unit, worker);
    }
  }

  void finish_phase(const Phase& phase) override {
    if (phase.kind == kOutputProject && b_.num_rows <= kInlineRows)
      normalize(m_.layers[phase.layer].vector[kPostNorm], 0, kInlineRows);
    if (phase.kind == kMlpDown && b_.num_rows <= kInlineRows) normalize_next(phase.layer + 1, 0, kInlineRows);
  }

 private:
  template <class T>
  static void grow(Buffer<T>& buffer, size_t count) {
    if (buffer.size() < count) buffer.resize(count);
  }

  void reserve() {
    size_t rows = (std::max(b_.num_rows, b_.num_logits) + kPanel - 1) / kPanel * kPanel;
    grow(residual_, rows * s_.hidden_size);
    grow(hidden_, rows * s_.hidden_size);
    grow(queries_, rows * s_.attention_size());
    grow(attended_, rows * s_.attention_size());
    grow(mlp_, rows * s_.intermediate_size);
  }

  void list_tiles() {
    tiles_.clear();
    for (int row = 0; row < b_.num_rows;) {
      int next = row + 1;
      while (next < b_.num_rows && b_.sequence_ids[next] == b_.sequence_ids[row]) next++;
      const int total = (next - row) * s_.group();
      for (int head = 0; head < s_.num_kv_heads; head++)
        for (int first = 0; first < total; first += kPanel)
          tiles_.push_back({row, first, std::min(kPanel, total - first), b_.sequence_ids[row], head});
      row = next;
    }
  }

  Split split(const Matrix& w, int width, int rows) const { return Split(w, width, rows, team_.num_threads()); }

  void list_phases() {
    const int rows = b_.num_rows, row_tiles = (rows + kTile - 1) / kTile;
    const bool inline_norm = rows <= kInlineRows;
    phases_.clear();
    phases_.push_back({kEmbed, 0, row_tiles});
    for (int l = 0; l < s_.num_layers; l++) {
      const Matrix* m = m_.layers[l].matrix;
      phases_.push_back({kProject, l, split(m[kQkv], s_.head_dim / kPanel, rows).units});
      phases_.push_back({kAttend, l, ((int)tiles_.size() + tiles_per_unit() - 1) / tiles_per_unit()});
      phases_.push_back({kOutputProject, l, split(m[kOutput], 1, rows).units});
      if (!inline_norm) phases_.push_back({kPostNormalize, l, row_tiles});
      phases_.push_back({kMlpUp, l, split(m[kGateUp], 1, rows).units});
      phases_.push_back({kMlpDown, l, split(m[kDown], 1, rows).units});
      if (!inline_norm && l + 1 < s_.num_layers) phases_.push_back({kNormalize, l + 1, row_tiles});
    }
    if (b_.num_logits == 0) return;
    if (!inline_norm) phases_.push_back({kNormalize, s_.num_layers, (b_.num_logits + kTile - 1) / kTile});
    phases_.push_back({kHead, s_.num_layers, split(m_.tail().matrix[kLmHead], 1, b_.num_logits).units});
  }

  float* residual(int row) { return residual_.data() + (ptrdiff_t)row * s_.hidden_size; }

  // Where columns column .. column + 15 of a row are in an activation of `depth` columns.
  static bf16* tile_at(Buffer<bf16>& tiles, int depth, int row, int column) {
    ptrdiff_t tile = (ptrdiff_t)(row / kTile) * (depth / 32) + column / 32;
    return tiles.data() + tile * kTileElements + row % kTile * 32 + column % 32;
  }

  void embed(int first) {
    for (int row = first; row < std::min(first + kTile, b_.num_rows); row++) {
      const bf16* in = m_.embedding + (ptrdiff_t)b_.token_ids[row] * s_.hidden_size;
      for (int k = 0; k < s_.hidden_size; k += kLanes) store(residual(row) + k, load_bf16(in + k));
    }
    normalize(m_.layers[0].vector[kInputNorm], first, kTile);
  }

  static Vec inverse_rms(const float* row, int size, float epsilon) {
    Vec even = fill(0), odd = fill(0);
    for (int k = 0; k < size; k += 2 * kLanes) {
      Vec x = load(row + k), y = load(row + k + kLanes);
      even = fma(x, x, even);
      odd = fma(y, y, odd);
    }
    return fill(1.f / std::sqrt(sum(add(even, odd)) / size + epsilon));
  }

  void normalize_row(const Buffer<float>& weight, int from, int to) {
    const float* row = residual(from);
    Vec scale = inverse_rms(row, s_.hidden_size, s_.rms_norm_eps);
    for (int k = 0; k < s_.hidden_size; k += kLanes)
      store_bf16(tile_at(hidden_, s_.hidden_size, to, k), mul(mul(load(row + k), scale), load(weight.data() + k)));
  }

  void normalize(const Buffer<float>& weight, int first, int count) {
    for (int row = first; row < std::min(first + count, b_.num_rows); row++) normalize_row(weight, row, row);
  }

  // Before the head only the rows whose logits are wanted go on, in the order asked for.
  void normalize_next(int layer, int first, int count) {
    if (layer < s_.num_layers) return normalize(m_.layers[layer].vector[kInputNorm], first, count);
    if (b_.num_rows <= kInlineRows) count = b_.num_logits;
    for (int i = first; i < std::min(first + count, b_.num_logits); i++)
      normalize_row(m_.tail().vector[kFinalNorm], b_.logits_rows[i], i);
  }

  // Multiplies a unit's rows by its items of `width` panels; `finish(item, row, rows, sums)` takes each result.
  // With many rows the depth is cut so that a piece of a panel stays in the first-level cache while they pass by.
  template <class Finish>
  void product(const Matrix& w, int width, const bf16* a, int all_rows, int unit, Worker& worker, Finish finish) {
    const int items = w.panels() / width;
    const Split cut = split(w, width, all_rows);
    const int first_item = unit / cut.row_groups * cut.items_per_unit;
    const int last_item = std::min(items, first_item + cut.items_per_unit);
    const int first_row = unit % cut.row_groups * cut.row_group;
    const int last_row = std::min(all_rows, first_row + cut.row_group);
    const int pieces = last_row - first_row <= kPanel ? 1 : (w.steps() + kPieceSteps - 1) / kPieceSteps;
    const int piece = (w.steps() + pieces - 1) / pieces;
    const ptrdiff_t block_sums = kPanel * kPanel * width;
    for (int item = first_item; item < last_item; item++) {
      for (int step = 0; step < w.steps(); step += piece)
        for (int j = 0; j < width; j++) {
          float* sums = worker.panel.data() + j * kPanel;
          const int steps = std::min(piece, w.steps() - step);
          for (int row = first_row; row < last_row; row += kPanel, sums += block_sums)
            multiply_piece(w, item * width + j, width, a, row, std::min(kPanel, last_row - row), first_row,
                           last_row, step, steps, sums, worker);
        }
      float* sums = worker.panel.data();
      for (int row = first_row; row < last_row; row += kPanel, sums += block_sums)
        finish(item, row, std::min(kPanel, last_row - row), sums);
    }
  }

  void multiply_piece(const Matrix& w, int panel, int width, const bf16* a, int row, int rows, int first_row,
                      int last_row, int first_step, int steps, float* sums, Worker& worker) {
    const ptrdiff_t a_tile = (ptrdiff_t)w.steps() * kTileElements;
    const int blocks = (last_row - first_row + kPanel - 1) / kPanel, lines = (kPanel + blocks - 1) / blocks;
    const bf16* in = a + row / kTile * a_tile + first_step * kTileElements;
    const bf16* weights = w.panel(panel) + first_step * 2 * kTileElements;
    const bf16* ahead = weights + width * w.panel_elements() + (row - first_row) / kPanel * lines * 32;
    const auto rows_of = [=](int step) { return in + step * kTileElements; };
    const auto columns_of = [=](int step) {
      const ptrdiff_t at = step * 2 * kTileElements;
      for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + at + i * 32, 0, 2);
      return weights + at;
    };
    const ptrdiff_t ldc = width * kPanel;
    if (first_step == 0)
      multiply<kIsa>(worker.tiles, rows, steps, kTile, rows_of, a_tile, columns_of, kTileElements, sums, ldc);
    else
      multiply<kIsa, true>(worker.tiles, rows, steps, kTile, rows_of, a_tile, columns_of, kTileElements, sums, ldc);
  }

  void project(const Layer& layer, int index, int unit, Worker& worker) {
    product(layer.matrix[kQkv], s_.head_dim / kPanel, hidden_.data(), b_.num_rows, unit, worker,
            [&](int head, int row, int rows, float* sums) {
              for (int r = 0; r < rows; r++) finish_head(layer, index, head, row + r, sums + r * s_.head_dim, worker);
            });
  }

  void finish_head(const Layer& layer, int index, int head, int row, float* v, Worker& worker) {
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
    bf16* out = query ? queries_.data() + (ptrdiff_t)row * s_.attention_size() + head * size : worker.head.data();
    for (int d = 0; d < size; d += kLanes) store_bf16(out + d, load(v + d));
    if (query) return;
    const int kv = head - s_.num_heads;  // keys of all heads, then values: the order of the pool
    bf16* tile = pool_ + slot_block(row) * s_.block_elements() + (index * 2 * s_.num_kv_heads + kv) * s_.tile_elements();
    key ? write_key(tile, b_.positions[row] % s_.tokens_per_block, out)
        : write_value(tile, b_.positions[row] % s_.tokens_per_block, out);
  }

  ptrdiff_t slot_block(int row) const {
    return table(b_.sequence_ids[row])[b_.positions[row] / s_.tokens_per_block];
  }
  const int32_t* table(int sequence) const { return b_.block_tables + (ptrdiff_t)sequence * b_.max_blocks; }

  void scale_head(const float* weight, float* v) const {
    Vec scale = inverse_rms(v, s_.head_dim, s_.rms_norm_eps);
    for (int d = 0; d < s_.head_dim; d += kLanes) store(v + d, mul(mul(load(v + d), scale), load(weight + d)));
  }

  void rotate(int position, float* v) const {
    const int half = s_.head_dim / 2;
    const float* cos = m_.tail().vector[kCos].data() + (ptrdiff_t)position * half;
    const float* sin = m_.tail().vector[kSin].data() + (ptrdiff_t)position * half;
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

  void attend(int layer, int unit, Worker& worker) {
    const int first = unit * tiles_per_unit(), last = std::min((int)tiles_.size(), first + tiles_per_unit());
    TileAttention<kIsa> attention(s_, worker.tiles, worker.attention, b_.positions);
    for (int i = first; i < last; i++) {
      const QueryTile* next = i + 1 < last ? &tiles_[i + 1] : nullptr;
      attention.run(tiles_[i], view(layer, tiles_[i]), next, view(layer, next ? *next : tiles_[i]), queries_.data(),
                    attended_.data());
    }
  }

  // Neighbouring tiles share keys or lie close in memory; a thread takes several, but not so many that others wait.
  int tiles_per_unit() const { return std::max(1, (int)tiles_.size() / (team_.num_threads() * kUnitsPerThread)); }

  PoolView view(int layer, const QueryTile& tile) const {
    return PoolView(s_, pool_, table(tile.sequence), layer, tile.head);
  }

  void add_product(const Matrix& w, const bf16* a, int unit, Worker& worker) {
    product(w, 1, a, b_.num_rows, unit, worker, [&](int panel, int row, int rows, float* sums) {
      for (int r = 0; r < rows; r++) {
        float *x = residual(row + r) + panel * kPanel, *y = sums + r * kPanel;
        store(x, add(load(x), load(y)));
        store(x + kLanes, add(load(x + kLanes), load(y + kLanes)));
      }
    });
  }

  // A panel holds 16 gate columns and their 16 up columns.
  void mlp_up(const Matrix& w, int unit, Worker& worker) {
    product(w, 1, hidden_.data(), b_.num_rows, unit, worker, [&](int panel, int row, int rows, float* sums) {
      for (int r = 0; r < rows; r++) {
        const float* y = sums + r * kPanel;
        store_bf16(tile_at(mlp_, s_.intermediate_size, row + r, panel * kTile), mul(silu(load(y)), load(y + kLanes)));
      }
    });
  }

  void head(int unit, Worker& worker) {
    product(m_.tail().matrix[kLmHead], 1, hidden_.data(), b_.num_logits, unit, worker,
            [&](int panel, int row, int rows, float* sums) {
              const int first = panel * kPanel, columns = std::min(kPanel, s_.vocab_size - first);
              for (int r = 0; r < rows; r++)
                memcpy(b_.logits + (ptrdiff_t)(row + r) * s_.vocab_size + first, sums + r * kPanel, columns * 4);
            });
  }

  Model& m_;
  const Shape& s_;
  bf16* pool_;
  Team& team_;
  std::vector<Worker>& workers_;
  Batch b_{};
  std::vector<Phase> phases_;
  std::vector<QueryTile> tiles_;
  Buffer<float> residual_;
  Buffer<bf16> hidden_, queries_, attended_, mlp_;
};

class Engine {
 public:
  Engine(const Shape& shape, int num_threads, Isa isa)
      : model(shape), team_(num_threads), workers_(num_threads, Worker(shape)), isa_(isa) {}

  void forward(const Batch& batch) {
#if defined(DIPTYCH_AMX)
    if (isa_ == Isa::kAmx) return amx_.run(batch);
#endif
    plain_.run(batch);
  }

  void bind(bf16* pool) {
    plain_.set_pool(pool);
#if defined(DIPTYCH_AMX)
    amx_.set_pool(pool);
#endif
  }

  Model model;

 private:
  Team team_;
  std::vector<Worker> workers_;
  const Isa isa_;
#if defined(DIPTYCH_AMX)
  Step<Isa::kAmx> amx_{model, nullptr, team_, workers_};
#endif
#if defined(DIPTYCH_AVX512)
  Step<Isa::kAvx512> plain_{model, nullptr, team_, workers_};
#else
  Step<Isa::kPortable> plain_{model, nullptr, team_, workers_};
#endif
};

}  // namespace diptych

using namespace diptych;

extern "C" {

// The best form that this build and this machine offer.
int diptych_isa() {
#if defined(DIPTYCH_AVX512)
  return (int)(request_amx() ? Isa::kAmx : Isa::kAvx512);
#else
  return (int)Isa::kPortable;
#endif
}

void* diptych_create(const Shape* shape, int num_threads, int isa) {
  try {
    return new Engine(*shape, num_threads, (Isa)isa);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void diptych_destroy(void* engine) { delete (Engine*)engine; }

void diptych_set_embedding(void* engine, const bf16* table) { ((Engine*)engine)->model.embedding = table; }

void diptych_set_vector(void* engine, int layer, int id, const float* data, int64_t count) {
  ((Engine*)engine)->model.layers[layer].vector[id].assign(data, data + count);
}

void diptych_set_matrix(void* engine, int layer, int id, const bf16* data) {
  const Matrix& m = ((Engine*)engine)->model.layers[layer].matrix[id];
  for (int panel = 0; panel < m.panels(); panel++) {
    if (id == kGateUp)
      pack_panel(m, panel, data, panel * kTile, m.rows / 2 + panel * kTile);
    else
      pack_panel(m, panel, data, panel * kPanel, panel * kPanel + kTile);
  }
}

void diptych_bind(void* engine, bf16* pool) { ((Engine*)engine)->bind(pool); }

int diptych_forward(void* engine, const Batch* batch) {
  try {
    ((Engine*)engine)->forward(*batch);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
