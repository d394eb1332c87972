// A few rows times a quantized matrix, in whole numbers.
//
// Each block of 32 inputs becomes 16-bit whole numbers with a scale of its own, so nothing is lost
// that bfloat16 would keep; of float32 inputs, what is left over becomes a second such row, whose
// result is added. The products of a block and their sum are exact. Then the block's sum is a
// float, times the weights' scale and the inputs'. What is added to every weight of a group is
// multiplied once, by the sum of the group's inputs.
//
// Weights are read a unit at a time: 32 bytes, so 64 inputs of 4 bits or 32 of 8. The lower half of
// the sums' lanes belongs to the unit's first half, which may have a scale of its own.

#ifndef PUNA_FEW_QUANTIZED_H_
#define PUNA_FEW_QUANTIZED_H_

#include <algorithm>

#include "weights.h"

namespace puna {
namespace PUNA_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kUnitBytes = 32;
constexpr int64_t kLargest = 32767;  // 8 · 32767 · 128, a lane's sum, is exact in 32 bits
constexpr int64_t kSegment = 256;    // blocks whose scales are prepared together

PUNA_INLINE int64_t groups_of(const PunaMatrix& m) { return (m.in + m.group - 1) / m.group; }
PUNA_INLINE int64_t blocks_of_unit(const PunaMatrix& m) { return m.kind == PUNA_U4 ? 2 : 1; }
// 4 bits without minima are about zero: 8 is taken from each.
PUNA_INLINE bool is_centred(const PunaMatrix& m) { return m.kind == PUNA_U4 && m.low == nullptr; }
PUNA_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The sums of a unit's products, as whole numbers and as floats.
#if defined(__AVX2__)
constexpr int kSums = 8;
#else
constexpr int kSums = 2;
#endif
typedef int32_t WholeSums __attribute__((vector_size(4 * kSums)));
typedef float Sums __attribute__((vector_size(4 * kSums)));

// A row of x, in floats: the whole numbers, two to a float; a scale for each block; the sums of
// groups, for minima, or of blocks, for weights about zero; and the inputs beyond the last whole
// block, as they are.
struct QuantizedLayout {
  int64_t blocks, units, scales, sums, tail, row;
  // Of the weights: groups of a row, blocks of a group, bytes of a row.
  int64_t groups, in_group, row_bytes;
  explicit QuantizedLayout(const PunaMatrix& m) {
    int64_t each = blocks_of_unit(m);
    groups = groups_of(m), in_group = std::max<int64_t>(1, m.group / kBlock);
    row_bytes = m.kind == PUNA_U4 ? (m.in + 1) / 2 : m.in;
    blocks = m.in / kBlock;
    units = (blocks + each - 1) / each;
    scales = units * each * kBlock / 2;
    sums = scales + whole_vectors(units * each);
    tail = sums + whole_vectors(is_centred(m) ? units * each : groups);
    row = (tail + m.in % kBlock + 15) / 16 * 16;
  }
};

// The largest size of `count` floats, a multiple of a block; infinite or no number if one is.
PUNA_INLINE float largest_of(const float* floats, int64_t count) {
  Ints most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    Ints size = Ints(load<Words>(floats + i) & 0x7fffffff);  // ordered as the floats are
    most = size > most ? size : most;
  }
  int32_t sizes[kLanes], bits = 0;
  std::memcpy(sizes, &most, sizeof most);
  for (int32_t size : sizes) bits = std::max(bits, size);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// Writes `count` floats, a multiple of a block, as whole numbers and returns their scale. Where they
// are not all finite, it is no number.
PUNA_INLINE float to_whole_numbers(const float* floats, int64_t count, int16_t* numbers) {
  float largest = largest_of(floats, count);
  if (!(largest < INFINITY)) {
    std::fill(numbers, numbers + count, int16_t{0});
    return NAN;
  }
  float scale = largest / kLargest, inverse = largest > 0.0f ? kLargest / largest : 0.0f;
  if (!(inverse < INFINITY)) scale = inverse = 0.0f;  // as good as zero
  const Floats nearest = splat(12582912.0f);  // 1.5 · 2^23: what is added to it loses its fraction
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats v = load<Floats>(floats + i) * splat(inverse);
    Ints whole = __builtin_convertvector((v + nearest) - nearest, Ints);
    auto narrow = __builtin_convertvector(whole, Shorts);
    std::memcpy(numbers + i, &narrow, sizeof narrow);
  }
  return scale;
}

// The sum of half a block.
PUNA_INLINE float sum_half(const float* half) {
  Floats total{};
  for (int i = 0; i < kBlock / 2; i += kLanes) total += load<Floats>(half + i);
  return sum(total);
}

// Where a unit's sums want a block's numbers, from its first place on: of 4 bits, each fourth
// number together; of 8, each second.
PUNA_INLINE void place_in_unit(bool is_4_bit, const int16_t* numbers, int16_t* to) {
#if defined(__AVX2__)
  const __m128i* from = reinterpret_cast<const __m128i*>(numbers);
  __m128i* places = reinterpret_cast<__m128i*>(to);
  __m128i eights[4];
  if (is_4_bit) {
    const __m128i fours = _mm_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0);
    for (int k = 0; k < 4; ++k) eights[k] = _mm_shuffle_epi8(_mm_loadu_si128(from + k), fours);
    __m128i a = _mm_unpacklo_epi32(eights[0], eights[1]), b = _mm_unpackhi_epi32(eights[0], eights[1]);
    __m128i c = _mm_unpacklo_epi32(eights[2], eights[3]), d = _mm_unpackhi_epi32(eights[2], eights[3]);
    _mm_storeu_si128(places, _mm_unpacklo_epi64(a, c));
    _mm_storeu_si128(places + 2, _mm_unpackhi_epi64(a, c));
    _mm_storeu_si128(places + 4, _mm_unpacklo_epi64(b, d));
    _mm_storeu_si128(places + 6, _mm_unpackhi_epi64(b, d));
  } else {
    const __m128i twos = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    for (int k = 0; k < 4; ++k) eights[k] = _mm_shuffle_epi8(_mm_loadu_si128(from + k), twos);
    for (int k = 0; k < 2; ++k) {
      _mm_storeu_si128(places + k, _mm_unpacklo_epi64(eights[2 * k], eights[2 * k + 1]));
      _mm_storeu_si128(places + 2 + k, _mm_unpackhi_epi64(eights[2 * k], eights[2 * k + 1]));
    }
  }
#else
  for (int i = 0; i < kBlock; ++i)
    to[is_4_bit ? i % 4 * 16 + i / 4 : i % 2 * 16 + i / 2] = numbers[i];
#endif
}

// `rest` takes what the whole numbers leave over; NULL where that is not wanted.
inline void prepare_quantized(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t row,
                              float* to, float* rest) {
  QuantizedLayout layout(m);
  int16_t* whole = reinterpret_cast<int16_t*>(to);
  std::fill(to + layout.scales, to + layout.row, 0.0f);
  if (layout.blocks % blocks_of_unit(m) != 0)  // the last unit is half empty
    std::fill(whole + (layout.units - 1) * 64, whole + layout.units * 64, int16_t{0});
  bool is_4_bit = m.kind == PUNA_U4;
  for (int64_t b = 0; b < layout.blocks; ++b) {
    float block[kBlock];
    int16_t numbers[kBlock];
    read_floats(x, x_kind, row * m.in + b * kBlock, kBlock, block);
    float scale = to_whole_numbers(block, kBlock, numbers);
    place_in_unit(is_4_bit, numbers, whole + (is_4_bit ? b / 2 * 64 + b % 2 * 8 : b * kBlock));
    if (rest != nullptr)
      for (int i = 0; i < kBlock; ++i)
        rest[b * kBlock + i] = scale == scale ? block[i] - scale * float(numbers[i]) : 0.0f;
    to[layout.scales + b] = scale;
    if (is_centred(m)) to[layout.sums + b] = sum_half(block) + sum_half(block + kBlock / 2);
    if (m.low != nullptr)
      for (int64_t h = 0; h < kBlock; h += kBlock / 2)
        to[layout.sums + (b * kBlock + h) / m.group] += sum_half(block + h);
  }
  for (int64_t k = layout.blocks * kBlock; k < m.in; ++k) {
    float value = read_float(x, x_kind, row * m.in + k);
    to[layout.tail + k - layout.blocks * kBlock] = value;
    if (m.low != nullptr) to[layout.sums + k / m.group] += value;
  }
}

// A unit of weights as 16-bit numbers, and its products with inputs in the order of
// `place_in_unit`.
#if defined(__AVX2__)
template <int32_t kind>
struct Unit {
  static constexpr int kInputs = kind == PUNA_U4 ? 64 : 32, kParts = kInputs / 16;
  __m256i parts[kParts];

  PUNA_INLINE explicit Unit(__m256i words) {
    if constexpr (kind == PUNA_U4) {
      __m256i low = _mm256_set1_epi16(15);
      parts[0] = _mm256_and_si256(words, low);
      parts[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
      parts[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
      parts[3] = _mm256_srli_epi16(words, 12);
    } else {
      parts[0] = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8);
      parts[1] = _mm256_srai_epi16(words, 8);
    }
  }
  PUNA_INLINE static Unit all(const char* from) {
    return Unit(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  PUNA_INLINE static Unit half(const char* from) {
    return Unit(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }

  PUNA_INLINE WholeSums times(const int16_t* x) const {
    const __m256i* inputs = reinterpret_cast<const __m256i*>(x);
    __m256i sum = _mm256_madd_epi16(parts[0], _mm256_loadu_si256(inputs));
    for (int i = 1; i < kParts; ++i)
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(parts[i], _mm256_loadu_si256(inputs + i)));
    return WholeSums(sum);
  }
};

PUNA_INLINE Sums spread(float f) { return Sums(_mm256_set1_ps(f)); }
// One for each half.
PUNA_INLINE Sums spread(const float* two) {
  __m256 both = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(two)));
  return Sums(_mm256_permutevar_ps(both, _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0)));
}
#else
template <int32_t kind>
struct Unit {
  static constexpr int kInputs = kind == PUNA_U4 ? 64 : 32;
  int16_t weights[kInputs];

  PUNA_INLINE Unit(const char* from, int64_t bytes) : weights{} {
    for (int64_t i = 0; i < bytes; ++i) {
      if constexpr (kind == PUNA_U4) {
        uint8_t byte = uint8_t(from[i]);
        int64_t at = i % 2 * 32 + i / 2;
        weights[at] = byte & 15;
        weights[at + 16] = byte >> 4;
      } else {
        weights[i % 2 * 16 + i / 2] = int8_t(from[i]);
      }
    }
  }
  PUNA_INLINE static Unit all(const char* from) { return Unit(from, kUnitBytes); }
  PUNA_INLINE static Unit half(const char* from) { return Unit(from, kUnitBytes / 2); }

  PUNA_INLINE WholeSums times(const int16_t* x) const {
    WholeSums sum{};
    for (int i = 0; i < kInputs; ++i) sum[i / 8 % 2] += int32_t{weights[i]} * x[i];
    return sum;
  }
};

PUNA_INLINE Sums spread(float f) { return Sums{f, f}; }
PUNA_INLINE Sums spread(const float* two) { return Sums{two[0], two[1]}; }
#endif

PUNA_INLINE float sum_of(Sums v) {
#if defined(__AVX2__)
  return sum_of_eight(v);
#else
  return v[0] + v[1];
#endif
}

// Adds a unit's products with M rows, each `x_row` floats and `scale_row` scales after the last.
template <int32_t kind, bool halves, int M>
PUNA_INLINE void add_unit(const Unit<kind>& weights, const int16_t* x, int64_t x_row,
                          const float* scale, int64_t scale_row, Sums* total) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    WholeSums sums = weights.times(x + 2 * i * x_row);
    const float* here = scale + i * scale_row;
    Sums factor = halves ? spread(here) : spread(*here);
    total[i] += factor * __builtin_convertvector(sums, Sums);
  }
}

// What a row's minima add: each times the sum of its group's inputs.
__attribute__((noinline)) inline float sum_of_lows(const PunaMatrix& m, int64_t out, const float* sums) {
  Floats total{};
  int64_t groups = groups_of(m);
  for (int64_t start = 0; start < groups; start += kSegment) {
    float lows[kSegment];
    int64_t count = std::min(kSegment, groups - start);
    read_floats(m.low, m.scale_kind, out * groups + start, count, lows);
    std::fill(lows + count, lows + whole_vectors(count), 0.0f);
    for (int64_t g = 0; g < count; g += kLanes)
      total += load<Floats>(lows + g) * load<Floats>(sums + start + g);
  }
  return sum(total);
}

// `count` numbers of blocks from those of groups, `times` blocks each; the first `skip` are left out.
PUNA_INLINE const float* repeat(const float* groups, int64_t times, int64_t skip, int64_t count,
                                float* to) {
  if (times == 2 && skip == 0) {
    for (int64_t b = 0; b < count; b += 2, ++groups) to[b] = to[b + 1] = *groups;
  } else if (times == 4 && skip == 0) {
    for (int64_t b = 0; b < count; b += 4, ++groups)
      to[b] = to[b + 1] = to[b + 2] = to[b + 3] = *groups;
  } else {
    for (int64_t b = 0, stop = times - skip; b < count; stop += times, ++groups) {
      int64_t end = std::min(stop, count);
      std::fill(to + b, to + end, *groups);
      b = end;
    }
  }
  return to;
}

// A row's scales for `count` blocks from `start` on, kSplit for each. It is called, not copied to
// each place: what is made of it takes minutes to compile else.
template <int64_t kSplit>
__attribute__((noinline)) const float* scales_of_blocks(const PunaMatrix& m,
                                                        const QuantizedLayout& layout, int64_t out,
                                                        int64_t start, int64_t count, float* raw,
                                                        float* repeated) {
  int64_t begin = out * layout.groups, in_group = layout.in_group;
  if (kSplit == 2 || in_group == 1) {
    read_floats(m.scale, m.scale_kind, begin + kSplit * start, kSplit * count, raw);
    return raw;
  }
  int64_t first = start / in_group;
  int64_t some = (start + count + in_group - 1) / in_group - first;
  read_floats(m.scale, m.scale_kind, begin + first, some, raw);
  return repeat(raw, in_group, start - first * in_group, count, repeated);
}

// How many scales are converted together at most.
constexpr int64_t kConverted = 2048;

// R results of each of M rows: from `out` on, `apart` from one to the next. `halves`: a scale for
// each half of a unit, as 4 bits always have it, and 8 bits in groups of 16. `converted`: the scales
// from `out` on as float32, where groups are blocks; else NULL.
template <int32_t kind, bool halves, int M, int R>
PUNA_INLINE void quantized_some(const PunaMatrix& m, const QuantizedLayout& layout,
                                const float* converted, const float* x, int64_t x_row, int64_t out,
                                int64_t apart, float* y, int64_t y_stride) {
  constexpr int64_t kEach = kind == PUNA_U4 ? 2 : 1;             // blocks of a unit
  constexpr int64_t kSplit = kind == PUNA_I8 && halves ? 2 : 1;  // scales of a block
  constexpr int64_t kScales = kSegment * kSplit;
  const int64_t groups = layout.groups;
  const bool centred = kind == PUNA_U4 && m.low == nullptr;
  // As far as the row that comes next in each stream.
  int64_t row_bytes = layout.row_bytes, apart_bytes = apart * row_bytes;
  int64_t ahead = row_bytes * (apart == 1 ? R : 1);
  const char* rows = static_cast<const char*>(m.data) + out * row_bytes;
  Sums total[R][M] = {};
  float taken[R][M] = {};  // by what centres the weights, where it is not in the totals
  for (int64_t start = 0; start < layout.blocks; start += kSegment) {
    int64_t count = std::min(kSegment, layout.blocks - start);
    // The scales of weights and inputs, multiplied; zero where a unit has no second half.
    float scales[R][M][kScales];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float raw[kScales + kLanes], repeated[kSegment + kLanes];
      const float* each = converted == nullptr
                              ? scales_of_blocks<kSplit>(m, layout, out + r * apart, start, count,
                                                         raw, repeated)
                              : converted + r * apart * groups + start;
      if constexpr (kSplit == 2) {
        for (int64_t h = 0; h < 2 * count; ++h)
          for (int i = 0; i < M; ++i)
            scales[r][i][h] = each[h] * x[i * x_row + layout.scales + start + h / 2];
        continue;
      }
      Floats common[M] = {};
      for (int64_t b = 0; b < count; b += kLanes) {
        Floats scale = load<Floats>(each + b);
        if (b + kLanes > count) scale = first_lanes(scale, count - b);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const float* inputs = x + i * x_row + start + b;
          store(scales[r][i] + b, scale * load<Floats>(inputs + layout.scales));
          if (centred) common[i] += scale * load<Floats>(inputs + layout.sums);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; centred && i < M; ++i) {
        if constexpr (kLanes == kSums)
          total[r][i] -= Sums(common[i]) * 8.0f;
        else
          taken[r][i] += 8.0f * sum(common[i]);
      }
    }
    const char* weights = rows + start / kEach * kUnitBytes;
    const int16_t* inputs = reinterpret_cast<const int16_t*>(x) + start * kBlock;
    const float* scale = scales[0][0];
    for (int64_t left = count / kEach; left > 0; --left) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(weights + r * apart_bytes + ahead);
        add_unit<kind, halves, M>(Unit<kind>::all(weights + r * apart_bytes), inputs, x_row,
                                  scale + r * M * kScales, kScales, total[r]);
      }
      weights += kUnitBytes;
      inputs += Unit<kind>::kInputs, scale += kEach * kSplit;
    }
    if (count % kEach == 0) continue;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      add_unit<kind, halves, M>(Unit<kind>::half(weights + r * apart_bytes), inputs, x_row,
                                scale + r * M * kScales, kScales, total[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    std::conditional_t<kind == PUNA_U4, ReadU4, ReadI8> reader(m, out + r * apart);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const float* row = x + i * x_row;
      float result = sum_of(total[r][i]);
      if constexpr (kLanes != kSums) result -= taken[r][i];
      if (m.low != nullptr) result += sum_of_lows(m, out + r * apart, row + layout.sums);
      for (int64_t k = layout.blocks * kBlock; k < m.in; ++k)
        result += read_float(m.scale, m.scale_kind, (out + r * apart) * groups + k / m.group) *
                  (reader.one(k) + centre(m)) * row[layout.tail + k - layout.blocks * kBlock];
      y[i * y_stride + r * apart] = result;
    }
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_FEW_QUANTIZED_H_
