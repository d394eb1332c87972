// Many rows times a quantized matrix, in whole numbers, which a processor multiplies twice as fast
// as floats. Rows and weights are what they are for a few rows: see few_quantized.h.

#ifndef PUNA_MANY_QUANTIZED_H_
#define PUNA_MANY_QUANTIZED_H_

#include <algorithm>

#include "few_quantized.h"
#include "many_rows.h"

namespace puna {
namespace PUNA_ISA {

// Whether rows of x are multiplied so: not float32, which needs two numbers for each input, nor
// where there are no instructions for it.
PUNA_INLINE bool is_whole(const PunaMatrix& m, int32_t x_kind) {
#if defined(__AVX2__)
  return is_quantized(m) && x_kind != PUNA_F32 && (m.group >= kBlock || m.low == nullptr);
#else
  (void)m, (void)x_kind;
  return false;
#endif
}

constexpr int64_t kBlocks = kDepth / kBlock;

// A tile of x for kDepth inputs: pairs of whole numbers [kDepth / 2][kTile][2], the blocks' scales
// [kBlocks][kTile] and sums [kBlocks][kTile].
struct WholeTile {
  int16_t numbers[kDepth * kTile];
  float scales[kBlocks * kTile], sums[kBlocks * kTile];
};

PUNA_INLINE WholeTile* whole_tile(float* scratch, int64_t tiles, int64_t depth, int64_t tile) {
  return reinterpret_cast<WholeTile*>(scratch) + depth * tiles + tile;
}

inline int64_t many_whole_scratch(const PunaMatrix& m, int64_t rows) {
  return whole_depth(m.in) / kDepth * tiles_of(rows) * int64_t{sizeof(WholeTile) / 4};
}

// Where the widened weights of a block have input `i`: 4 bits come apart by fours.
PUNA_INLINE int64_t place_in_block(const PunaMatrix& m, int64_t i) {
  return m.kind == PUNA_U4 ? i % 4 * 8 + i / 4 : i;
}

inline void many_whole_pack(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                            int64_t tile, float* scratch) {
  int64_t tiles = tiles_of(rows), first = tile * kTile;
  int64_t here = std::min<int64_t>(kTile, rows - first);
  for (int64_t depth = 0; depth * kDepth < m.in; ++depth) {
    WholeTile& to = *whole_tile(scratch, tiles, depth, tile);
    int64_t start = depth * kDepth, count = std::min(kDepth, m.in - start);
    if (here < kTile) std::memset(&to, 0, sizeof to);
    for (int64_t row = 0; row < here; ++row) {
      for (int64_t b = 0; b * kBlock < count; ++b) {
        float block[kBlock] = {};
        int16_t numbers[kBlock];
        int64_t at = start + b * kBlock;
        read_floats(x, x_kind, (first + row) * m.in + at, std::min(kBlock, m.in - at), block);
        to.scales[b * kTile + row] = to_whole_numbers(block, numbers);
        to.sums[b * kTile + row] = sum_half(block) + sum_half(block + kBlock / 2);
        for (int64_t i = 0; i < kBlock; ++i) {
          int64_t k = b * kBlock + place_in_block(m, i);
          to.numbers[(k / 2 * kTile + row) * 2 + k % 2] = numbers[i];
        }
      }
    }
  }
}

#if defined(__AVX2__)

// Pairs of 16-bit numbers, multiplied and added.
PUNA_INLINE Ints times_pairs(Ints a, Ints b) {
#if PUNA_LANES == 16
  return Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
  return Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
}

PUNA_INLINE Ints splat_pair(int32_t pair) { return Ints{} + pair; }

// Weights of kDepth inputs of some results, widened, and what they are scaled by.
struct WholeWeights {
  alignas(64) int16_t numbers[kResults][kDepth];
  float scales[kResults][2 * kBlocks], lows[kResults][kBlocks];
};

// One result's weights from input `start` on; those beyond the last meet inputs that are zero.
template <int32_t kind>
PUNA_INLINE void widen_whole(const PunaMatrix& m, int64_t out, int64_t start, int64_t count,
                             int64_t shared, int64_t r, WholeWeights& to) {
  constexpr int64_t kInputs = Unit<kind>::kInputs;
  int64_t row_bytes = kind == PUNA_U4 ? (m.in + 1) / 2 : m.in;
  const char* from = static_cast<const char*>(m.data) + out * row_bytes;
  int64_t at = kind == PUNA_U4 ? start / 2 : start, left = row_bytes - at;
  int16_t* numbers = to.numbers[r];
  for (int64_t k = 0; k < count; k += kInputs, at += kUnitBytes, left -= kUnitBytes) {
    char last[kUnitBytes] = {};
    const char* bytes = from + at;
    if (left < kUnitBytes) bytes = static_cast<char*>(std::memcpy(last, bytes, left));
    if constexpr (kind == PUNA_U4) {
      Unit<kind> unit = Unit<kind>::all(bytes);
      const __m256i eight = _mm256_set1_epi16(m.low == nullptr ? 8 : 0);
      for (int c = 0; c < 4; ++c) {
        __m256i part = _mm256_sub_epi16(unit.parts[c], eight);
        __m128i* first = reinterpret_cast<__m128i*>(numbers + k + 8 * c);
        _mm_storeu_si128(first, _mm256_castsi256_si128(part));
        _mm_storeu_si128(first + kBlock / 8, _mm256_extracti128_si256(part, 1));
      }
    } else {
      for (int half = 0; half < 2; ++half) {
        __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + half);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + k) + half,
                            _mm256_cvtepi8_epi16(some));
      }
    }
  }
  int64_t groups = groups_of(m);
  for (int64_t s = 0; s * shared < count; ++s)
    to.scales[r][s] =
        read_float(m.scale, m.scale_kind, out * groups + (start + s * shared) / m.group);
  for (int64_t b = 0; m.low != nullptr && b * kBlock < count; ++b)
    to.lows[r][b] = read_float(m.low, m.scale_kind, out * groups + (start + b * kBlock) / m.group);
}

// R results of a tile's rows, added to those of earlier depths unless this is the first. Inputs
// share a scale kShared at a time.
template <int R, int kShared>
PUNA_INLINE void multiply_whole(const PunaMatrix& m, const WholeWeights& weights,
                                const WholeTile& tile, int64_t depth, float* y, int64_t y_stride,
                                bool first) {
  for (int64_t s = 0; s * kShared < depth; ++s) {
    Ints total[R][2] = {};
    const int16_t* x = tile.numbers + s * kShared * kTile;
#pragma GCC unroll 4
    for (int p = 0; p < kShared / 2; ++p) {
      Ints a = load<Ints>(x + p * 2 * kTile), b = load<Ints>(x + p * 2 * kTile + kTile);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, weights.numbers[r] + s * kShared + 2 * p, sizeof pair);
        Ints both = splat_pair(pair);
        total[r][0] += times_pairs(a, both);
        total[r][1] += times_pairs(b, both);
      }
    }
    int64_t block = s * kShared / kBlock;
    for (int half = 0; half < 2; ++half) {
      int64_t at = block * kTile + half * kLanes;
      Floats scale = load<Floats>(tile.scales + at), sums = load<Floats>(tile.sums + at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* to = y + r * y_stride + half * kLanes;
        Floats value = first && s == 0 ? Floats{} : load<Floats>(to);
        value += splat(weights.scales[r][s]) * scale *
                 __builtin_convertvector(total[r][half], Floats);
        if (m.low != nullptr) value += splat(weights.lows[r][block]) * sums;
        store(to, value);
      }
    }
  }
}

template <int R, int kShared>
void multiply_whole_upto(int64_t results, const PunaMatrix& m, const WholeWeights& weights,
                         const WholeTile& tile, int64_t depth, float* y, int64_t y_stride,
                         bool first) {
  if (results == R)
    multiply_whole<R, kShared>(m, weights, tile, depth, y, y_stride, first);
  else if constexpr (R > 1)
    multiply_whole_upto<R - 1, kShared>(results, m, weights, tile, depth, y, y_stride, first);
}

template <int32_t kind, int kShared>
void many_whole_of(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                   int64_t end, float* y) {
  WholeWeights weights;
  int64_t tiles = tiles_of(rows), y_stride = tiles * kTile;
  for (int64_t depth = 0; depth * kDepth < m.in; ++depth) {
    int64_t start = depth * kDepth, count = std::min(kDepth, m.in - start);
    for (int64_t out = begin; out < end; out += kResults) {
      int64_t here = std::min<int64_t>(kResults, end - out);
      for (int64_t r = 0; r < here; ++r)
        widen_whole<kind>(m, out + r, start, count, kShared, r, weights);
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_whole_upto<kResults, kShared>(
            here, m, weights, *whole_tile(const_cast<float*>(scratch), tiles, depth, tile), count,
            y + (out - begin) * y_stride + tile * kTile, y_stride, depth == 0);
    }
  }
}

inline void many_whole(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                       int64_t end, float* y) {
  if (m.kind == PUNA_U4) return many_whole_of<PUNA_U4, kBlock>(m, scratch, rows, begin, end, y);
  if (m.group < kBlock)
    return many_whole_of<PUNA_I8, kBlock / 2>(m, scratch, rows, begin, end, y);
  many_whole_of<PUNA_I8, kBlock>(m, scratch, rows, begin, end, y);
}

#else

inline void many_whole(const PunaMatrix&, const float*, int64_t, int64_t, int64_t, float*) {}

#endif

// Any weights, as whole numbers or as floats: what a set of instructions offers.
inline int64_t any_scratch(const PunaMatrix& m, int32_t x_kind, int64_t rows) {
  return is_whole(m, x_kind) ? many_whole_scratch(m, rows) : many_scratch(m, rows);
}

inline void any_pack(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                     int64_t tile, float* scratch) {
  (is_whole(m, x_kind) ? many_whole_pack : many_pack)(m, x, x_kind, rows, tile, scratch);
}

inline void any_many(const PunaMatrix& m, int32_t x_kind, const float* scratch, int64_t rows,
                     int64_t begin, int64_t end, float* y) {
  (is_whole(m, x_kind) ? many_whole : many)(m, scratch, rows, begin, end, y);
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_QUANTIZED_H_
