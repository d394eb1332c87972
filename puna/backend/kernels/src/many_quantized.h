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

// Whether rows of y are multiplied so with the transpose: where no scale is of some inputs alone.
PUNA_INLINE bool is_whole_back(const PunaMatrix& m, int32_t y_kind) {
  return is_whole(m, y_kind) && m.kind == PUNA_I8 && m.low == nullptr && m.group >= m.in;
}

constexpr int64_t kBlocks = kDepth / kBlock;
// Of the transposed product: so many products of 8 and 16 bits, summed, are exact in 32 bits.
constexpr int64_t kBackShared = 128;
// Results that are summed at once: their products need registers too before they are added.
constexpr int kWholeResults = kLanes == 16 ? 12 : 4;

PUNA_INLINE int64_t whole_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// A tile of x for kDepth inputs: pairs of whole numbers [kDepth / 2][kTile][2], the blocks' scales
// [kBlocks][kTile] and sums [kBlocks][kTile].
struct WholeTile {
  int16_t numbers[kDepth * kTile];
  float scales[kBlocks * kTile], sums[kBlocks * kTile];
};

PUNA_INLINE WholeTile* whole_tile(float* scratch, int64_t tiles, int64_t depth, int64_t tile) {
  return reinterpret_cast<WholeTile*>(scratch) + depth * tiles + tile;
}

PUNA_INLINE int64_t whole_scratch(int64_t n, int64_t rows) {
  return whole_depth(n) / kDepth * tiles_of(rows) * int64_t{sizeof(WholeTile) / 4};
}

// One tile of x [rows, n], whose numbers share a scale kShared at a time. With `by_fours`, the inputs
// of a block stand as 4 bits come apart; with `summed`, there are the sums of blocks. With `scaled`,
// each input is one of that matrix's results, and its scale is multiplied in.
template <int64_t kShared>
void pack_whole(const void* x, int32_t x_kind, int64_t rows, int64_t n, int64_t tile, bool by_fours,
                bool summed, const PunaMatrix* scaled, float* scratch) {
  int64_t tiles = tiles_of(rows), first = tile * kTile;
  int64_t here = std::min<int64_t>(kTile, rows - first);
  for (int64_t at = 0; at < n; at += kShared) {
    WholeTile& to = *whole_tile(scratch, tiles, at / kDepth, tile);
    int64_t start = at % kDepth, count = std::min(kShared, n - at);
    int16_t numbers[kTile][kShared] = {};
    float factors[kShared];
    if (scaled != nullptr) read_floats(scaled->scale, scaled->scale_kind, at, count, factors);
    float* scales = to.scales + start / kBlock * kTile;
    for (int64_t row = 0; row < kTile; ++row) scales[row] = 0.0f;
    for (int64_t row = 0; row < here; ++row) {
      float floats[kShared] = {};
      read_floats(x, x_kind, (first + row) * n + at, count, floats);
      for (int64_t i = 0; scaled != nullptr && i < count; ++i) floats[i] *= factors[i];
      int16_t in_order[kShared];
      scales[row] = to_whole_numbers(floats, kShared, by_fours ? in_order : numbers[row]);
      for (int64_t b = 0; summed && b < kShared / kBlock; ++b)
        to.sums[(start / kBlock + b) * kTile + row] =
            sum_half(floats + b * kBlock) + sum_half(floats + b * kBlock + kBlock / 2);
      for (int64_t i = 0; by_fours && i < kShared; ++i)
        numbers[row][i / kBlock * kBlock + i % 4 * 8 + i % kBlock / 4] = in_order[i];
    }
    // A pair of numbers is moved as a float is, without being looked at.
    for (int64_t pair = 0; pair < kShared / 2; pair += kLanes) {
      for (int64_t some = 0; some < kTile; some += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load<Floats>(numbers[some + i] + 2 * pair);
        transpose(square);
        for (int i = 0; i < kLanes; ++i)
          store(to.numbers + 2 * ((start / 2 + pair + i) * kTile + some), square[i]);
      }
    }
  }
}

#if defined(__AVX2__)

// Pairs of 16-bit whole numbers, multiplied and added; those of x have a scale for each block.
struct WholeDot {
  typedef Ints Sums;
  static constexpr bool kScaled = true;
  PUNA_INLINE static Ints add(Ints total, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return Ints(_mm512_dpwssd_epi32(__m512i(total), __m512i(a), __m512i(b)));
#elif PUNA_LANES == 16
    return total + Ints(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
    return total + Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
  }
  PUNA_INLINE static Floats floats(Ints total) { return __builtin_convertvector(total, Floats); }
};

PUNA_INLINE Ints splat_pair(int32_t pair) { return Ints{} + pair; }

// What the weights of kDepth inputs of some results are scaled by.
struct WholeScales {
  float scales[kWholeResults][2 * kBlocks], lows[kWholeResults][kBlocks];
  bool has_lows;
};

// The same weights, widened.
struct WholeWeights : WholeScales {
  alignas(64) int16_t numbers[kWholeResults][kDepth];
};

// Result `out` becomes the r-th; inputs from `start` on share a scale `shared` at a time.
PUNA_INLINE void read_scales(const PunaMatrix& m, int64_t out, int64_t start, int64_t count,
                             int64_t shared, int64_t r, WholeScales& to) {
  int64_t groups = groups_of(m);
  for (int64_t s = 0; s * shared < count; ++s)
    to.scales[r][s] =
        read_float(m.scale, m.scale_kind, out * groups + (start + s * shared) / m.group);
  for (int64_t b = 0; m.low != nullptr && b * kBlock < count; ++b)
    to.lows[r][b] = read_float(m.low, m.scale_kind, out * groups + (start + b * kBlock) / m.group);
}

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
  read_scales(m, out, start, count, shared, r, to);
}

// kWholeResults results of a tile's rows, added to those of earlier depths unless this is the first.
// Inputs share a scale kShared at a time. The pair p of result r stands at `r * kAcross + p * kAlong`;
// without scales, the weights are the numbers themselves.
template <typename Dot, int kShared, int64_t kAcross, int64_t kAlong>
void multiply_pairs(const int16_t* weights, const WholeScales* scales, const WholeTile& tile,
                    int64_t depth, float* y, int64_t y_stride, bool first) {
  constexpr int R = kWholeResults;
  for (int64_t s = 0; s * kShared < depth; ++s) {
    typename Dot::Sums total[R][2] = {};
    const int16_t* x = tile.numbers + s * kShared * kTile;
    const int16_t* some = weights + s * kShared * kAlong;
    // A block's inputs may be in another order: it is multiplied to its end.
    int64_t pairs = std::min<int64_t>(kShared, whole_blocks(depth - s * kShared)) / 2;
#pragma GCC unroll 4
    for (int64_t p = 0; p < pairs; ++p) {
      Ints a = load<Ints>(x + p * 2 * kTile), b = load<Ints>(x + p * 2 * kTile + kTile);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, some + 2 * (r * kAcross + p * kAlong), sizeof pair);
        Ints both = splat_pair(pair);
        total[r][0] = Dot::add(total[r][0], a, both);
        total[r][1] = Dot::add(total[r][1], b, both);
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
        Floats all = Dot::floats(total[r][half]);
        if (Dot::kScaled) all *= scale;
        value += scales == nullptr ? all : splat(scales->scales[r][s]) * all;
        if (scales != nullptr && scales->has_lows) value += splat(scales->lows[r][block]) * sums;
        store(to, value);
      }
    }
  }
}

// Results [begin, end) of all rows. `widen(out, start, count, r, weights)` makes result `out`, with its
// inputs from `start` on, the r-th of the weights; they have scales if `scaled`.
template <typename Dot, int kShared, typename Widen>
PUNA_INLINE void many_pairs(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                            int64_t end, float* y, bool scaled, Widen widen) {
  WholeWeights weights{};
  weights.has_lows = m.low != nullptr;
  int64_t tiles = tiles_of(rows), y_stride = tiles * kTile;
  for (int64_t depth = 0; depth * kDepth < m.in; ++depth) {
    int64_t start = depth * kDepth, count = std::min(kDepth, m.in - start);
    for (int64_t out = begin; out < end; out += kWholeResults) {
      int64_t here = std::min<int64_t>(kWholeResults, end - out);
      for (int64_t r = 0; r < here; ++r) widen(out + r, start, count, r, weights);
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_pairs<Dot, kShared, kDepth / 2, 1>(
            weights.numbers[0], scaled ? &weights : nullptr,
            *whole_tile(const_cast<float*>(scratch), tiles, depth, tile), count,
            y + (out - begin) * y_stride + tile * kTile, y_stride, depth == 0);
    }
  }
}

template <int32_t kind, int kShared>
void many_whole_of(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                   int64_t end, float* y) {
  many_pairs<WholeDot, kShared>(
      m, scratch, rows, begin, end, y, true,
      [&](int64_t out, int64_t start, int64_t count, int64_t r, WholeWeights& weights) {
        widen_whole<kind>(m, out, start, count, kShared, r, weights);
      });
}

inline void many_whole(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                       int64_t end, float* y) {
  if (m.kind == PUNA_U4) return many_whole_of<PUNA_U4, kBlock>(m, scratch, rows, begin, end, y);
  if (m.group < kBlock)
    return many_whole_of<PUNA_I8, kBlock / 2>(m, scratch, rows, begin, end, y);
  many_whole_of<PUNA_I8, kBlock>(m, scratch, rows, begin, end, y);
}

// Two rows' weights of 16 inputs, interleaved: eight pairs in each of two vectors.
PUNA_INLINE void pair_rows(const int8_t* even, const int8_t* odd, __m256i pairs[2]) {
  __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
  pairs[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
  pairs[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
}

PUNA_INLINE void pair_rows(const uint16_t* even, const uint16_t* odd, __m256i pairs[2]) {
  __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
  __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
  __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
  pairs[0] = _mm256_permute2x128_si256(low, high, 0x20);
  pairs[1] = _mm256_permute2x128_si256(low, high, 0x31);
}

// Inputs [begin, end) of results [start, start + count), as pairs of results: for each set of
// kWholeResults inputs [kDepth / 2][kWholeResults]. A result beyond the last is zero.
template <typename T>
void pair_weights(const PunaMatrix& m, int64_t start, int64_t count, int64_t begin, int64_t end,
                  int16_t* to) {
  const T* rows = static_cast<const T*>(m.data) + start * m.in;
  constexpr int64_t kInputs = 16, kTogether = 4, kAhead = 16;
  static_assert(kWholeResults % kTogether == 0, "pairs are stored by fours");
  for (int64_t out = 0; out < whole_blocks(count); out += 2) {
    int16_t* set = to + out * kWholeResults;
    int64_t place = 0;
    for (int64_t i = begin; i < end; i += kInputs) {
      for (int r = 0; r < 2; ++r) __builtin_prefetch(rows + (out + kAhead + r) * m.in + i);
      T ends[2][kInputs] = {};
      const T* from[2];
      for (int r = 0; r < 2; ++r) {
        from[r] = rows + (out + r) * m.in + i;
        if (out + r < count && i + kInputs <= m.in) continue;
        if (out + r < count) std::memcpy(ends[r], from[r], (m.in - i) * sizeof(T));
        from[r] = ends[r];
      }
      __m256i pairs[2];
      pair_rows(from[0], from[1], pairs);
      for (int64_t k = 0; k < kInputs && i + k < end; k += kTogether) {
        __m128i four = k % 8 == 0 ? _mm256_castsi256_si128(pairs[k / 8])
                                  : _mm256_extracti128_si256(pairs[k / 8], 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(set + 2 * place), four);
        place += kTogether;
        if (place == kWholeResults) place = 0, set += kDepth * kWholeResults;
      }
    }
  }
}

// The transposed product, where no weight has a scale: of 8 bits it is multiplied into y.
template <typename T, typename Dot, int kShared>
void back_pairs(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin, int64_t end,
                float* x) {
  int64_t tiles = tiles_of(rows), x_stride = tiles * kTile;
  int64_t sets = (end - begin + kWholeResults - 1) / kWholeResults;
  int16_t* pairs = static_cast<int16_t*>(std::calloc(sets * kWholeResults * kDepth, 2));
  for (int64_t depth = 0; depth * kDepth < m.out; ++depth) {
    int64_t start = depth * kDepth, count = std::min(kDepth, m.out - start);
    pair_weights<T>(m, start, count, begin, end, pairs);
    for (int64_t set = 0; set < sets; ++set) {
      int64_t first = set * kWholeResults;
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_pairs<Dot, kShared, 1, kWholeResults>(
            pairs + first * kDepth, nullptr,
            *whole_tile(const_cast<float*>(scratch), tiles, depth, tile), count,
            x + first * x_stride + tile * kTile, x_stride, depth == 0);
    }
  }
  std::free(pairs);
}

inline void back_whole(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin,
                       int64_t end, float* x) {
  back_pairs<int8_t, WholeDot, kBackShared>(m, scratch, rows, begin, end, x);
}

#else

inline void many_whole(const PunaMatrix&, const float*, int64_t, int64_t, int64_t, float*) {}
inline void back_whole(const PunaMatrix&, const float*, int64_t, int64_t, int64_t, float*) {}

#endif

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_QUANTIZED_H_
