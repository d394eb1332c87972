// Many rows in bfloat16 times a matrix in bfloat16, or of whole numbers that bfloat16 keeps exactly,
// by instructions that multiply and add two pairs for each lane. Rows are as they came, in tiles of
// pairs: see many_quantized.h.

#ifndef PUNA_MANY_BF16_H_
#define PUNA_MANY_BF16_H_

#include "many_quantized.h"

namespace puna {
namespace PUNA_ISA {

#if defined(__AVX512BF16__)

PUNA_INLINE bool is_bf16(const PunaMatrix& m, int32_t x_kind) {
  return x_kind == PUNA_BF16 && (m.kind == PUNA_BF16 || is_whole(m, x_kind));
}

PUNA_INLINE bool is_bf16_back(const PunaMatrix& m, int32_t y_kind) {
  return y_kind == PUNA_BF16 && m.kind == PUNA_BF16;
}

// Pairs of bfloat16, multiplied and added in float32.
struct Bf16Dot {
  typedef Floats Sums;
  static constexpr bool kScaled = false;
  PUNA_INLINE static Floats add(Floats total, Ints a, Ints b) {
    return Floats(_mm512_dpbf16_ps(__m512(total), __m512bh(a), __m512bh(b)));
  }
  PUNA_INLINE static Floats floats(Floats total) { return total; }
};

// One tile of x [rows, n]; with `summed`, the sums of its blocks too.
PUNA_INLINE void pack_bf16(const void* x, int64_t rows, int64_t n, int64_t tile, bool summed,
                           float* scratch) {
  const uint16_t* numbers = static_cast<const uint16_t*>(x);
  int64_t tiles = tiles_of(rows), first = tile * kTile;
  int64_t here = std::min<int64_t>(kTile, rows - first);
  static_assert(kBlock == 2 * kLanes, "a vector has the pairs of a block");
  for (int64_t at = 0; at < n; at += kBlock) {
    WholeTile& to = *whole_tile(scratch, tiles, at / kDepth, tile);
    int64_t b = at % kDepth / kBlock, count = std::min(kBlock, n - at);
    for (int64_t some = 0; some < kTile; some += kLanes) {
      Floats square[kLanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, here - some); ++i) {
        const uint16_t* row = numbers + (first + some + i) * n + at;
        if (count == kBlock)
          square[i] = load<Floats>(row);
        else
          std::memcpy(square + i, row, 2 * count);
        if (!summed) continue;
        // The even numbers and the odd ones.
        Words pairs = Words(square[i]);
        to.sums[b * kTile + some + i] = sum(Floats(pairs << 16) + Floats(pairs & 0xffff0000));
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i)
        store(to.numbers + 2 * ((b * kBlock / 2 + i) * kTile + some), square[i]);
    }
  }
}

// A block of one result's weights as bfloat16, without scales; those beyond the last meet inputs
// that are zero. `table` has what 4 bits stand for.
template <int32_t kind>
PUNA_INLINE void widen_block(const char* bytes, __m512i table, uint16_t* to) {
  __m512i block;
  if constexpr (kind == PUNA_BF16) {
    block = _mm512_loadu_si512(bytes);
  } else if constexpr (kind == PUNA_U4) {
    __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    __m512i low = _mm512_and_si512(words, _mm512_set1_epi32(15));
    __m512i high = _mm512_slli_epi32(_mm512_srli_epi32(words, 4), 16);
    block = _mm512_permutexvar_epi16(_mm512_or_si512(low, high), table);
  } else {
    const int8_t* numbers = reinterpret_cast<const int8_t*>(bytes);
    block = __m512i(_mm512_cvtne2ps_pbh(__m512(bytes_to_floats(numbers + kLanes)),
                                        __m512(bytes_to_floats(numbers))));
  }
  _mm512_storeu_si512(to, block);
}

template <int32_t kind>
PUNA_INLINE void widen_bf16(const PunaMatrix& m, int64_t out, int64_t start, int64_t count,
                            __m512i table, uint16_t* to) {
  constexpr int64_t kBytes = kind == PUNA_BF16 ? 2 * kBlock : kind == PUNA_U4 ? kBlock / 2 : kBlock;
  int64_t row_bytes = kind == PUNA_BF16 ? 2 * m.in : kind == PUNA_U4 ? (m.in + 1) / 2 : m.in;
  int64_t at = start / kBlock * kBytes, left = row_bytes - at;
  const char* bytes = static_cast<const char*>(m.data) + out * row_bytes + at;
  for (int64_t k = 0; k < count; k += kBlock, bytes += kBytes, left -= kBytes) {
    char last[kBytes] = {};
    const char* from = bytes;
    if (left < kBytes) from = static_cast<char*>(std::memcpy(last, bytes, left));
    widen_block<kind>(from, table, to + k);
  }
}

template <int32_t kind, int kShared>
void many_bf16_of(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                  int64_t end, float* y) {
  uint16_t numbers[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) numbers[i] = to_bf16(float(i % 16) + centre(m));
  const __m512i table = _mm512_loadu_si512(numbers);
  constexpr bool kScaled = kind != PUNA_BF16;
  many_pairs<Bf16Dot, kShared>(
      m, scratch, rows, begin, end, y, kScaled,
      [&](int64_t out, int64_t start, int64_t count, int64_t r, WholeWeights& weights) {
        uint16_t* to = reinterpret_cast<uint16_t*>(weights.numbers[r]);
        widen_bf16<kind>(m, out, start, count, table, to);
        if (kScaled) read_scales(m, out, start, count, kShared, r, weights);
      });
}

inline void many_bf16(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                      int64_t end, float* y) {
  if (m.kind == PUNA_BF16)
    return many_bf16_of<PUNA_BF16, kDepth>(m, scratch, rows, begin, end, y);
  if (m.kind == PUNA_U4) return many_bf16_of<PUNA_U4, kBlock>(m, scratch, rows, begin, end, y);
  if (m.group < kBlock)
    return many_bf16_of<PUNA_I8, kBlock / 2>(m, scratch, rows, begin, end, y);
  if (m.group >= m.in && m.low == nullptr)
    return many_bf16_of<PUNA_I8, kDepth>(m, scratch, rows, begin, end, y);
  many_bf16_of<PUNA_I8, kBlock>(m, scratch, rows, begin, end, y);
}

inline void back_bf16(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                      int64_t end, float* x) {
  back_pairs<uint16_t, Bf16Dot, kDepth>(m, scratch, rows, begin, end, x);
}

#else

PUNA_INLINE bool is_bf16(const PunaMatrix&, int32_t) { return false; }
PUNA_INLINE bool is_bf16_back(const PunaMatrix&, int32_t) { return false; }
PUNA_INLINE void pack_bf16(const void*, int64_t, int64_t, int64_t, bool, float*) {}
inline void many_bf16(const PunaMatrix&, const float*, int64_t, int64_t, int64_t, float*) {}
inline void back_bf16(const PunaMatrix&, const float*, int64_t, int64_t, int64_t, float*) {}

#endif

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_BF16_H_
