// Vectors of float32 and the conversions into them, for the instructions that a file is compiled
// with: PUNA_LANES is how many floats a vector holds.

#ifndef PUNA_VECTOR_H_
#define PUNA_VECTOR_H_

#include <cmath>
#include <type_traits>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define PUNA_INLINE inline __attribute__((always_inline))

namespace puna {
namespace PUNA_ISA {

constexpr int kLanes = PUNA_LANES;
// What one step along the inputs takes: two vectors.
constexpr int kStep = 2 * kLanes;

typedef float Floats __attribute__((vector_size(4 * PUNA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * PUNA_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * PUNA_LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * PUNA_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * PUNA_LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(PUNA_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(PUNA_LANES)));

template <typename V, typename T>
PUNA_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
PUNA_INLINE void store(T* to, Floats v) {
  std::memcpy(to, &v, sizeof v);
}

// Rows are short, and the processor's own prefetching ends with a page and begins anew: so what comes
// next is asked for.
template <int64_t bytes>
PUNA_INLINE void prefetch(const void* from) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

PUNA_INLINE Floats splat(float f) {
#if PUNA_LANES == 16
  return Floats{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f};
#elif PUNA_LANES == 8
  return Floats{f, f, f, f, f, f, f, f};
#else
  return Floats{f, f, f, f};
#endif
}

// The first `count` lanes; zeros in the others.
PUNA_INLINE Floats first_lanes(Floats v, int64_t count) {
#if PUNA_LANES == 16
  const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif PUNA_LANES == 8
  const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7};
#else
  const Ints lanes{0, 1, 2, 3};
#endif
  return Floats(Words(v) & Words(lanes < int32_t(count)));
}

#if defined(__AVX2__)
PUNA_INLINE float sum_of_eight(__m256 v) {
  __m256 twos = _mm256_hadd_ps(v, v), fours = _mm256_hadd_ps(twos, twos);
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}
#endif

// The lanes' sum, always in the same order.
PUNA_INLINE float sum(Floats v) {
#if defined(__AVX2__) && PUNA_LANES == 8
  return sum_of_eight(__m256(v));
#else
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// The even and the odd lanes of a, then of b.
PUNA_INLINE void part_pairs(Floats a, Floats b, Floats& evens, Floats& odds) {
#if defined(__clang__)
  float both[2 * kLanes], even[kLanes], odd[kLanes];
  std::memcpy(both, &a, sizeof a);
  std::memcpy(both + kLanes, &b, sizeof b);
  for (int i = 0; i < kLanes; ++i) even[i] = both[2 * i], odd[i] = both[2 * i + 1];
  evens = load<Floats>(even), odds = load<Floats>(odd);
#else
#if PUNA_LANES == 16
  const Ints even{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif PUNA_LANES == 8
  const Ints even{0, 2, 4, 6, 8, 10, 12, 14};
#else
  const Ints even{0, 2, 4, 6};
#endif
  evens = __builtin_shuffle(a, b, even), odds = __builtin_shuffle(a, b, even + 1);
#endif
}

// The inverse: lanes of both by turns, first into a, then into b.
PUNA_INLINE void join_pairs(Floats evens, Floats odds, Floats& a, Floats& b) {
#if defined(__clang__)
  float both[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) both[2 * i] = evens[i], both[2 * i + 1] = odds[i];
  a = load<Floats>(both), b = load<Floats>(both + kLanes);
#else
#if PUNA_LANES == 16
  const Ints first{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif PUNA_LANES == 8
  const Ints first{0, 8, 1, 9, 2, 10, 3, 11};
#else
  const Ints first{0, 4, 1, 5};
#endif
  a = __builtin_shuffle(evens, odds, first), b = __builtin_shuffle(evens, odds, first + kLanes / 2);
#endif
}

// kLanes vectors as a square of numbers, rows and columns exchanged.
PUNA_INLINE void transpose(Floats* v) {
#if defined(__clang__)
  float from[kLanes][kLanes], to[kLanes][kLanes];
  std::memcpy(from, v, sizeof from);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) to[i][j] = from[j][i];
  std::memcpy(v, to, sizeof to);
#else
#if PUNA_LANES == 16
  const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif PUNA_LANES == 8
  const Ints lanes{0, 1, 2, 3, 4, 5, 6, 7};
#else
  const Ints lanes{0, 1, 2, 3};
#endif
  // Squares of half the size are exchanged across the diagonal, then those within them.
#pragma GCC unroll 4
  for (int size = kLanes / 2; size > 0; size /= 2) {
    const Ints right = (lanes & size) != 0;
    const Ints upper = (right & ((lanes ^ size) + kLanes)) | (~right & lanes);
    const Ints lower = (right & (lanes + kLanes)) | (~right & (lanes ^ size));
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & size) continue;
      Floats a = v[i], b = v[i + size];
      v[i] = __builtin_shuffle(a, b, upper);
      v[i + size] = __builtin_shuffle(a, b, lower);
    }
  }
#endif
}

// e to the power of each lane, for numbers up to 0; of float32's accuracy, and 0 below -87.
PUNA_INLINE Floats exponential(Floats x) {
  Words tiny = Words(x < splat(-87.0f));
  Floats power = x * splat(1.44269504f);
  // The nearest whole number, by what an addition of 1.5 · 2^23 leaves in the lowest bits.
  Floats shifted = power + splat(12582912.0f);
  Floats whole = shifted - splat(12582912.0f);
  Floats rest = x - whole * splat(0.693145752f) - whole * splat(1.42860677e-6f);
  Floats sum = splat(1.9875691500e-4f);
  sum = sum * rest + splat(1.3981999507e-3f);
  sum = sum * rest + splat(8.3334519073e-3f);
  sum = sum * rest + splat(4.1665795894e-2f);
  sum = sum * rest + splat(1.6666665459e-1f);
  sum = sum * rest + splat(5.0000001201e-1f);
  sum = sum * rest * rest + rest + splat(1.0f);
  Words exponent = (Words(shifted) - Words(splat(12582912.0f)) + 127) << 23;
  return Floats(Words(sum * Floats(exponent)) & ~tiny);
}

PUNA_INLINE float from_bf16(uint16_t bits) {
  uint32_t word = uint32_t{bits} << 16;
  float f;
  std::memcpy(&f, &word, sizeof f);
  return f;
}

PUNA_INLINE uint16_t to_bf16(float f) {
  uint32_t word;
  std::memcpy(&word, &f, sizeof f);
  if ((word & 0x7fffffff) > 0x7f800000) return uint16_t((word >> 16) | 0x40);  // not a number
  return uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);                 // ties to even
}

PUNA_INLINE float from_f16(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  uint32_t word = uint32_t(bits & 0x7fff) << 13;
  // Exponents of 15 bits' bias become 127's by a product, which subnormal numbers survive.
  float f;
  std::memcpy(&f, &word, sizeof f);
  f *= 0x1p112f;
  std::memcpy(&word, &f, sizeof f);
  if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000;
  word |= uint32_t(bits & 0x8000) << 16;
  std::memcpy(&f, &word, sizeof f);
  return f;
#endif
}

PUNA_INLINE uint16_t to_f16(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t word;
  std::memcpy(&word, &f, sizeof f);
  uint32_t sign = (word >> 16) & 0x8000;
  word &= 0x7fffffff;
  if (word > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (word >= 0x47800000) return uint16_t(sign | 0x7c00);
  if (word < 0x38800000) {  // subnormal: let the addition of a half round
    float half;
    std::memcpy(&half, &word, sizeof half);
    half += 0.5f;
    std::memcpy(&word, &half, sizeof half);
    return uint16_t(sign | (word - 0x3f000000));
  }
  word += 0xc8000fff + ((word >> 13) & 1);
  return uint16_t(sign | (word >> 13));
#endif
}

PUNA_INLINE float read_float(const void* data, int32_t kind, int64_t i) {
  if (kind == PUNA_F32) return static_cast<const float*>(data)[i];
  uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kind == PUNA_BF16 ? from_bf16(bits) : from_f16(bits);
}

PUNA_INLINE Floats halves_to_floats(const uint16_t* from) {
#if defined(__AVX512F__) && PUNA_LANES == 16
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__) && PUNA_LANES == 8
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Words bits = __builtin_convertvector(load<Halves>(from), Words);
  Floats f = Floats((bits & 0x7fff) << 13) * splat(0x1p112f);
  Words infinite = Words((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return Floats(Words(f) | infinite | ((bits & 0x8000) << 16));
#endif
}

PUNA_INLINE Floats bytes_to_floats(const int8_t* from) {
#if defined(__AVX512F__) && PUNA_LANES == 16
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__) && PUNA_LANES == 8
  __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<SignedBytes>(from), Ints), Floats);
#endif
}

PUNA_INLINE Words bytes_to_words(const uint8_t* from) {
#if defined(__AVX512F__) && PUNA_LANES == 16
  return Words(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__) && PUNA_LANES == 8
  return Words(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<Bytes>(from), Words);
#endif
}

// e4m3: a sign, 4 bits of exponent, 3 of mantissa, moved to where float32 has them. No step makes a
// subnormal float32, which XLA's threads take for zero.
PUNA_INLINE Floats float8_to_floats(const uint8_t* from) {
  Words bytes = bytes_to_words(from);
  Words tiny = Words((bytes & 0x78) == 0);  // their exponent is 1, and they lack its leading 1
  Words bits = ((bytes & 0x7f) << 20) + (Words(splat(0x1p-7f)) + (tiny & 0x800000));
  Floats size = Floats(bits) - Floats(tiny & Words(splat(0x1p-6f)));
  return Floats(Words(size) | (bytes & 0x80) << 24);
}

PUNA_INLINE float from_float8(uint8_t byte) {
  int exponent = byte >> 3 & 15, mantissa = byte & 7;
  float size = exponent == 0 ? float(mantissa) * 0x1p-9f
                             : float(8 + mantissa) * float(1 << exponent) * 0x1p-10f;
  return byte & 0x80 ? -size : size;
}

// Floats [begin, begin + count) of any kind, as float32.
PUNA_INLINE void read_floats(const void* from, int32_t kind, int64_t begin, int64_t count,
                             float* to) {
  if (kind == PUNA_F32) {
    std::memcpy(to, static_cast<const float*>(from) + begin, 4 * count);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from) + begin;
  int64_t i = 0;
  if (kind == PUNA_F16) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, halves_to_floats(bits + i));
    for (; i < count; ++i) to[i] = from_f16(bits[i]);
  } else {
    for (; i + kLanes <= count; i += kLanes)
      store(to + i, Floats(__builtin_convertvector(load<Halves>(bits + i), Words) << 16));
    for (; i < count; ++i) to[i] = from_bf16(bits[i]);
  }
}

// The inverse: `count` floats, rounded to the nearest, from place `begin` on.
PUNA_INLINE void write_floats(void* to, int32_t kind, int64_t begin, int64_t count,
                              const float* from) {
  if (kind == PUNA_F32) {
    std::memcpy(static_cast<float*>(to) + begin, from, 4 * count);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(to) + begin;
  int64_t i = 0;
  for (; kind == PUNA_BF16 && i + kLanes <= count; i += kLanes) {
    Words word = load<Words>(from + i);
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    Words number = Words((word & 0x7fffffff) <= 0x7f800000);  // else it stays none
    Words wide = (rounded & number) | (((word >> 16) | 0x40) & ~number);
    Halves narrow = __builtin_convertvector(wide, Halves);
    std::memcpy(bits + i, &narrow, sizeof narrow);
  }
  for (; i < count; ++i) bits[i] = kind == PUNA_BF16 ? to_bf16(from[i]) : to_f16(from[i]);
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_VECTOR_H_
