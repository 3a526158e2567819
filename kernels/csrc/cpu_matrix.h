// C = A * B on bf16 operands with float32 sums, for one panel of up to 32 rows and 32 columns.
//
// Three forms: AMX tiles, AVX-512 BF16 dot products, and compiler vectors. Within one form a row's sums are
// formed in the same order whatever the number of rows, so a row's result never depends on its neighbours.
//
//   A  tiles of 16 rows x 32 columns, 1 KB each: element (row, k) of a tile at row * 32 + k.
//   B  tiles of 16 k-pairs x 16 columns, 1 KB each: element (k, column) at (k / 2) * 32 + column * 2 + k % 2.
//   C  float32, row-major with `ldc` elements a row.
//
// `a(step)` gives the first A tile of a step (rows 16.. are `a_tile` elements on) and `b(step)` the left B tile
// (columns 16.. are `b_right` elements on). A step covers `pairs` k-pairs: 16, or 8 for tiles of half the depth.
#pragma once

#include "cpu_vector.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(DIPTYCH_AVX512) && defined(__linux__)
#define DIPTYCH_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diptych {

constexpr int kPanel = 32;              // rows and columns of one product
constexpr int kTile = 16;               // rows of an A tile, columns of a B tile
constexpr int kTileElements = 16 * 32;  // bf16 elements of any tile

enum class Isa : int { kPortable = 0, kAvx512 = 1, kAmx = 2 };

// What one thread's matrix unit is configured for.
struct TileState {
  int rows = 0;
  int pairs = 0;
};

#if defined(DIPTYCH_AMX)

inline bool request_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Tiles 0-3 hold C (two row halves x two column halves), 4-5 A, 6-7 B.
inline void configure(TileState& state, int rows, int pairs) {
  if (state.rows == rows && state.pairs == pairs) return;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  int upper = rows < kTile ? rows : kTile, lower = rows - upper;
  for (int tile : {0, 1, 4}) config.rows[tile] = upper;
  for (int tile : {2, 3, 5}) config.rows[tile] = lower ? lower : 1;
  for (int tile : {6, 7}) config.rows[tile] = pairs;
  for (int tile = 0; tile < 8; tile++) config.bytes[tile] = 64;
  config.bytes[4] = config.bytes[5] = pairs * 4;
  _tile_loadconfig(&config);
  state.rows = rows;
  state.pairs = pairs;
}

inline void release(TileState& state) {
  if (state.rows) _tile_release();
  state = TileState();
}

template <bool kSum, class A, class B>
inline void multiply_amx(TileState& state, int rows, int steps, int pairs, A a, ptrdiff_t a_tile, B b,
                         ptrdiff_t b_right, float* c, ptrdiff_t ldc) {
  configure(state, rows, pairs);
  asm volatile("" ::: "memory");  // the tile loads below do not tell the compiler that they read memory
  const bool lower = rows > kTile;
  if constexpr (kSum) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + kTile, ldc * 4);
    if (lower) {
      _tile_loadd(2, c + kTile * ldc, ldc * 4);
      _tile_loadd(3, c + kTile * ldc + kTile, ldc * 4);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (!lower) {
    for (int s = 0; s < steps; s++) {
      const bf16* bs = b(s);
      _tile_loadd(4, a(s), 64);
      _tile_loadd(6, bs, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, bs + b_right, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  } else {
    for (int s = 0; s < steps; s++) {
      const bf16 *as = a(s), *bs = b(s);
      _tile_loadd(4, as, 64);
      _tile_loadd(6, bs, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, bs + b_right, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, as + a_tile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, c + kTile * ldc, ldc * 4);
    _tile_stored(3, c + kTile * ldc + kTile, ldc * 4);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + kTile, ldc * 4);
}

#else

inline bool request_amx() { return false; }
inline void release(TileState&) {}

#endif

#if defined(DIPTYCH_AVX512)

template <int kRows, bool kSum, class A, class B>
inline void rows_avx512(int steps, int pairs, A a, ptrdiff_t first, B b, ptrdiff_t b_right, float* c,
                          ptrdiff_t ldc) {
  __m512 left[kRows], right[kRows];
  for (int r = 0; r < kRows; r++) {
    left[r] = kSum ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    right[r] = kSum ? _mm512_loadu_ps(c + r * ldc + kTile) : _mm512_setzero_ps();
  }
  for (int s = 0; s < steps; s++) {
    const bf16 *as = a(s) + first, *bs = b(s);
    for (int p = 0; p < pairs; p++) {
      __m512bh b0 = (__m512bh)_mm512_loadu_si512(bs + p * 32);
      __m512bh b1 = (__m512bh)_mm512_loadu_si512(bs + b_right + p * 32);
      for (int r = 0; r < kRows; r++) {
        int pair;
        memcpy(&pair, as + r * 32 + p * 2, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        left[r] = _mm512_dpbf16_ps(left[r], b0, x);
        right[r] = _mm512_dpbf16_ps(right[r], b1, x);
      }
    }
  }
  for (int r = 0; r < kRows; r++) {
    _mm512_storeu_ps(c + r * ldc, left[r]);
    _mm512_storeu_ps(c + r * ldc + kTile, right[r]);
  }
}

#endif

#if !defined(DIPTYCH_AVX512)

// One row block of 1 or 2 rows: eight sums and the widened operands fit the sixteen registers of AVX2.
template <int kRows, bool kSum, class A, class B>
inline void rows_portable(int steps, int pairs, A a, ptrdiff_t first, B b, ptrdiff_t b_right, float* c,
                          ptrdiff_t ldc) {
  Float8 sums[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < 4; j++) sums[r][j] = kSum ? load8(c + r * ldc + j * 8) : fill8(0.f);
  for (int s = 0; s < steps; s++) {
    const bf16 *as = a(s) + first, *bs = b(s);
    for (int p = 0; p < pairs; p++) {
      Float8 even[kRows], odd[kRows];
      for (int r = 0; r < kRows; r++) {
        uint32_t pair;
        memcpy(&pair, as + r * 32 + p * 2, 4);
        Uint8 both = Uint8{} + pair;
        even[r] = (Float8)(both << 16);
        odd[r] = (Float8)(both & 0xffff0000u);
      }
      for (int j = 0; j < 4; j++) {
        Uint8 both = load8((const uint32_t*)(bs + (j / 2) * b_right + p * 32 + (j % 2) * 16));
        Float8 low = (Float8)(both << 16), high = (Float8)(both & 0xffff0000u);
        for (int r = 0; r < kRows; r++) {
          sums[r][j] = even[r] * low + sums[r][j];
          sums[r][j] = odd[r] * high + sums[r][j];
        }
      }
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < 4; j++) memcpy(c + r * ldc + j * 8, &sums[r][j], 32);
}

#endif

template <Isa kIsa, bool kSum = false, class A, class B>
inline void multiply(TileState& state, int rows, int steps, int pairs, A a, ptrdiff_t a_tile, B b,
                     ptrdiff_t b_right, float* c, ptrdiff_t ldc) {
#if defined(DIPTYCH_AMX)
  if constexpr (kIsa == Isa::kAmx) return multiply_amx<kSum>(state, rows, steps, pairs, a, a_tile, b, b_right, c, ldc);
#endif
  for (int row = 0; row < rows;) {
    ptrdiff_t first = (row / kTile) * a_tile + (row % kTile) * 32;
    float* out = c + row * ldc;
    int left = (rows < (row / kTile + 1) * kTile ? rows : (row / kTile + 1) * kTile) - row;
#define DIPTYCH_ROWS(count, form)                                  \
  if (left >= count) {                                             \
    form<count, kSum>(steps, pairs, a, first, b, b_right, out, ldc); \
    row += count;                                                  \
    continue;                                                      \
  }
#if defined(DIPTYCH_AVX512)
    DIPTYCH_ROWS(8, rows_avx512)
    DIPTYCH_ROWS(4, rows_avx512)
    DIPTYCH_ROWS(3, rows_avx512)
    DIPTYCH_ROWS(2, rows_avx512)
    DIPTYCH_ROWS(1, rows_avx512)
#else
    DIPTYCH_ROWS(2, rows_portable)
    DIPTYCH_ROWS(1, rows_portable)
#endif
#undef DIPTYCH_ROWS
  }
  (void)state;
}

}  // namespace diptych
