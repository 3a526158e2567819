// One step of a Llama-like decoder on the CPU: any mix of prefill and decode rows against a paged KV pool.
//
// The step is a list of phases (cpu_team.h); what follows a product (rotary embedding and the KV write, the
// activation, the residual sum) is done on each panel while it is in the cache. Activations between products are
// bf16 in A tiles (cpu_matrix.h), the residual stream and every sum is float32. kernels/cpu_step.py is the only
// caller; it has checked every index.

#include "cpu_attention.h"
#include "cpu_heads.h"
#include "cpu_product.h"
#include "cpu_team.h"

namespace diptych {

enum PhaseKind { kEmbed, kProject, kAttend, kOutputProject, kPostNormalize, kMlpUp, kMlpDown, kNormalize, kHead };

constexpr int kInlineRows = 8;  // so few rows are normalised by the thread that ends the phase before

// What one thread needs of its own.
struct Worker {
  explicit Worker(const Shape& s) : attention(s), product(s), head(s.head_dim) {}
  AttentionScratch attention;
  ProductScratch product;
  Buffer<bf16> head;
  TileState tiles;
  alignas(FlushDenormals) unsigned char denormals[sizeof(FlushDenormals)];
};

template <Isa kIsa>
class Step final : public Job {
 public:
  Step(Model& model, Team& team, std::vector<Worker>& workers)
      : m_(model), s_(model.shape), team_(team), workers_(workers) {}

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
      case kOutputProject: return add_product(layer.matrix[kOutput], attended_, unit, worker);
      case kPostNormalize: return normalize(layer.vector[kPostNorm], unit * kTile, kTile);
      case kMlpUp: return mlp_up(layer.matrix[kGateUp], unit, worker);
      case kMlpDown: return add_product(layer.matrix[kDown], mlp_, unit, worker);
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
          tiles_.push_back({row, first, std::min(kPanel, total - first), head});
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

  template <class Finish>
  void multiply_unit(const Matrix& w, int width, const Buffer<bf16>& a, int rows, int unit, Worker& worker,
                     Finish finish) {
    product<kIsa>(w, split(w, width, rows), width, a.data(), rows, unit, worker.product, worker.tiles, finish);
  }

  void project(const Layer& layer, int index, int unit, Worker& worker) {
    HeadFinish heads(m_, b_, pool_, queries_.data(), worker.head.data());
    multiply_unit(layer.matrix[kQkv], s_.head_dim / kPanel, hidden_, b_.num_rows, unit, worker,
                  [&](int head, int row, int rows, float* sums) {
                    for (int r = 0; r < rows; r++) heads.finish(layer, index, head, row + r, sums + r * s_.head_dim);
                  });
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
    return PoolView(s_, pool_, b_.table(tile.first_token), layer, tile.head);
  }

  void add_product(const Matrix& w, const Buffer<bf16>& a, int unit, Worker& worker) {
    multiply_unit(w, 1, a, b_.num_rows, unit, worker, [&](int panel, int row, int rows, float* sums) {
      for (int r = 0; r < rows; r++) {
        float *x = residual(row + r) + panel * kPanel, *y = sums + r * kPanel;
        store(x, add(load(x), load(y)));
        store(x + kLanes, add(load(x + kLanes), load(y + kLanes)));
      }
    });
  }

  // A panel holds 16 gate columns and their 16 up columns.
  void mlp_up(const Matrix& w, int unit, Worker& worker) {
    multiply_unit(w, 1, hidden_, b_.num_rows, unit, worker, [&](int panel, int row, int rows, float* sums) {
      for (int r = 0; r < rows; r++) {
        const float* y = sums + r * kPanel;
        store_bf16(tile_at(mlp_, s_.intermediate_size, row + r, panel * kTile), mul(silu(load(y)), load(y + kLanes)));
      }
    });
  }

  void head(int unit, Worker& worker) {
    multiply_unit(m_.tail().matrix[kLmHead], 1, hidden_, b_.num_logits, unit, worker,
                  [&](int panel, int row, int rows, float* sums) {
                    const int first = panel * kPanel, columns = std::min(kPanel, s_.vocab_size - first);
                    float* out = b_.logits + (ptrdiff_t)row * s_.vocab_size + first;
                    for (int r = 0; r < rows; r++)
                      memcpy(out + (ptrdiff_t)r * s_.vocab_size, sums + r * kPanel, columns * sizeof(float));
                  });
  }

  Model& m_;
  const Shape& s_;
  bf16* pool_ = nullptr;
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
  Step<Isa::kAmx> amx_{model, team_, workers_};
#endif
#if defined(DIPTYCH_AVX512)
  Step<Isa::kAvx512> plain_{model, team_, workers_};
#else
  Step<Isa::kPortable> plain_{model, team_, workers_};
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

void diptych_bind(void* engine, bf16* pool, int64_t bytes) {
  prefer_large_pages(pool, bytes);
  ((Engine*)engine)->bind(pool);
}

int diptych_forward(void* engine, const Batch* batch) {
  try {
    ((Engine*)engine)->forward(*batch);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
