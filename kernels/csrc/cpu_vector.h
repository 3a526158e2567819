// Sixteen floats as one value, for AVX-512 and, through compiler vectors, for any other CPU.
// Knows nothing of models or matrices. All element-wise arithmetic of the step is written on `Vec`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace diptych {

using bf16 = uint16_t;

constexpr int kLanes = 16;
constexpr float kMasked = -__builtin_inff();

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DIPTYCH_AVX512 1

using Vec = __m512;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec fill(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }

inline Vec load_bf16(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_bf16(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

// Lanes first <= i < last keep their value, the others become minus infinity.
inline Vec keep_lanes(Vec v, int first, int last) {
  uint32_t below_last = last >= kLanes ? 0xffffu : (1u << last) - 1;
  uint32_t from_first = first <= 0 ? 0xffffu : 0xffffu << first;
  return _mm512_mask_blend_ps((__mmask16)(below_last & from_first), fill(kMasked), v);
}

// 1 / v to about one unit in the last place, without the slow divider.
inline Vec reciprocal(Vec v) {
  Vec r = _mm512_rcp14_ps(v);
  Vec refined = mul(r, _mm512_fnmadd_ps(v, r, fill(2.f)));
  return refined;
}

inline Vec round_to_integer(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }

#else

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

struct Vec {
  Float8 a, b;
};

inline Float8 load8(const float* p) {
  Float8 v;
  memcpy(&v, p, 32);
  return v;
}
inline Uint8 load8(const uint32_t* p) {
  Uint8 v;
  memcpy(&v, p, 32);
  return v;
}
inline Float8 fill8(float x) { return Float8{x, x, x, x, x, x, x, x}; }
inline Float8 select8(Int8 mask, Float8 yes, Float8 no) { return (Float8)((mask & (Int8)yes) | (~mask & (Int8)no)); }

inline Vec load(const float* p) { return {load8(p), load8(p + 8)}; }
inline void store(float* p, Vec v) {
  memcpy(p, &v.a, 32);
  memcpy(p + 8, &v.b, 32);
}
inline Vec fill(float x) { return {fill8(x), fill8(x)}; }
inline Vec add(Vec x, Vec y) { return {x.a + y.a, x.b + y.b}; }
inline Vec sub(Vec x, Vec y) { return {x.a - y.a, x.b - y.b}; }
inline Vec mul(Vec x, Vec y) { return {x.a * y.a, x.b * y.b}; }
inline Vec fma(Vec x, Vec y, Vec z) { return {x.a * y.a + z.a, x.b * y.b + z.b}; }
inline Vec maximum(Vec x, Vec y) { return {select8(x.a > y.a, x.a, y.a), select8(x.b > y.b, x.b, y.b)}; }
inline Vec minimum(Vec x, Vec y) { return {select8(x.a < y.a, x.a, y.a), select8(x.b < y.b, x.b, y.b)}; }
inline float sum(Vec v) {
  Float8 s = v.a + v.b;
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}
inline float largest(Vec v) {
  Float8 m = select8(v.a > v.b, v.a, v.b);
  float best = m[0];
  for (int i = 1; i < 8; i++) best = m[i] > best ? m[i] : best;
  return best;
}

inline Vec load_bf16(const bf16* p) {
  Short8 x, y;
  memcpy(&x, p, 16);
  memcpy(&y, p + 8, 16);
  return {(Float8)(__builtin_convertvector(x, Uint8) << 16), (Float8)(__builtin_convertvector(y, Uint8) << 16)};
}
inline Short8 round_bf16(Float8 v) {
  Uint8 bits = (Uint8)v;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Short8);
}
inline void store_bf16(bf16* p, Vec v) {
  Short8 x = round_bf16(v.a), y = round_bf16(v.b);
  memcpy(p, &x, 16);
  memcpy(p + 8, &y, 16);
}

inline Vec keep_lanes(Vec v, int first, int last) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; i++)
    if (i < first || i >= last) lanes[i] = kMasked;
  return load(lanes);
}

inline Vec reciprocal(Vec v) { return {1.f / v.a, 1.f / v.b}; }

inline Float8 round8(Float8 v) {
  const Float8 magic = fill8(12582912.f);  // 1.5 * 2^23: adding it leaves no bits for the fraction
  return (v + magic) - magic;
}
inline Vec round_to_integer(Vec v) { return {round8(v.a), round8(v.b)}; }
inline Float8 scale8(Float8 v, Float8 n) {
  Int8 tiny = n < -126.f;
  Int8 exponent = (__builtin_convertvector(n, Int8) + 127) << 23;
  return (Float8)(~tiny & (Int8)(v * (Float8)exponent));
}
inline Vec scale_by_power(Vec v, Vec n) { return {scale8(v.a, n.a), scale8(v.b, n.b)}; }

#endif

// 2^x to 3 parts in a million. Exactly 1 at 0 and exactly 0 far below, minus infinity included: a masked score has
// no weight at all.
inline Vec exp2(Vec x) {
  x = minimum(maximum(x, fill(-200.f)), fill(127.f));
  Vec n = round_to_integer(x);
  Vec f = sub(x, n);
  Vec p = fill(0.009582853f);
  p = fma(p, f, fill(0.055906426f));
  p = fma(p, f, fill(0.24024099f));
  p = fma(p, f, fill(0.69312419f));
  p = fma(p, f, fill(1.f));
  return scale_by_power(p, n);
}

inline Vec silu(Vec x) {
  Vec e = exp2(mul(x, fill(-1.44269504f)));
  return mul(x, reciprocal(add(e, fill(1.f))));
}

// Denormals cost hundreds of cycles and mean nothing here; the matrix unit flushes them anyway.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Tiles and vectors are read a cache line at a time.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), kLine); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace diptych
