// Activations times a packed weight, cut into units for the threads and into pieces for the caches.
#pragma once

#include <algorithm>

#include "cpu_model.h"

namespace diptych {

constexpr int kRowGroup = 512;          // at most so many rows go through a panel before the next is read
constexpr int kGroupBytes = 640 << 10;  // of rows, and of panels: what the second-level cache is asked to hold
constexpr int kPieceSteps = 9;          // 18 KB of a panel, and as much of the rows that meet it
constexpr int kUnitsPerThread = 8;

// A product cut into units: groups of items (columns) times groups of rows. With many rows both groups are of a size
// that stays in the second-level cache; units that share weights follow each other.
struct Split {
  int items_per_unit, row_group, row_groups, units;

  Split(const Matrix& w, int width, int rows, int threads) {
    const int items = w.panels() / width, row_bytes = w.depth * (int)sizeof(bf16);
    row_group = std::min(kRowGroup, std::max(kPanel, kGroupBytes / row_bytes / kPanel * kPanel));
    row_groups = (rows + row_group - 1) / row_group;
    items_per_unit = threads == 1 ? items : std::max(1, items * row_groups / (threads * kUnitsPerThread));
    const int cached_items = std::max(1, kGroupBytes / row_bytes / kPanel / width);
    if (row_groups > 1) items_per_unit = std::min(items_per_unit, cached_items);
    units = (items + items_per_unit - 1) / items_per_unit * row_groups;
  }
};

struct ProductScratch {
  explicit ProductScratch(const Shape& s) : sums(kRowGroup * std::max(kPanel, (int)s.head_dim)) {}
  Buffer<float> sums;
};

template <Isa kIsa>
inline void multiply_piece(const Matrix& w, int panel, int width, const bf16* a, int row, int rows, int first_row,
                           int last_row, int first_step, int steps, float* sums, TileState& state) {
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
    multiply<kIsa>(state, rows, steps, kTile, rows_of, a_tile, columns_of, kTileElements, sums, ldc);
  else
    multiply<kIsa, true>(state, rows, steps, kTile, rows_of, a_tile, columns_of, kTileElements, sums, ldc);
}

// Multiplies a unit's rows by its items of `width` panels; `finish(item, row, rows, sums)` takes each result.
// With many rows the depth is cut so that a piece of a panel stays in the first-level cache while they pass by.
template <Isa kIsa, class Finish>
void product(const Matrix& w, const Split& cut, int width, const bf16* a, int all_rows, int unit,
             ProductScratch& scratch, TileState& state, Finish finish) {
  const int items = w.panels() / width;
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
        float* sums = scratch.sums.data() + j * kPanel;
        const int steps = std::min(piece, w.steps() - step);
        for (int row = first_row; row < last_row; row += kPanel, sums += block_sums)
          multiply_piece<kIsa>(w, item * width + j, width, a, row, std::min(kPanel, last_row - row), first_row,
                               last_row, step, steps, sums, state);
      }
    float* sums = scratch.sums.data();
    for (int row = first_row; row < last_row; row += kPanel, sums += block_sums)
      finish(item, row, std::min(kPanel, last_row - row), sums);
  }
}

}  // namespace diptych
