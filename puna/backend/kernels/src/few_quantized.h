// A few rows times a quantized matrix, in whole numbers.
//
// Each block of 32 inputs becomes 16-bit whole numbers with a scale of its own, so nothing is lost
// that bfloat16 would keep; of float32 inputs, what is left over becomes a second such row, whose
// result is added. The products of a block and their sum are exact. Then the block's sum is a
// float, times the weights' scale and the inputs'. What is added to every weight of a group is
// multiplied once, by the sum of the group's inputs.

#ifndef PUNA_FEW_QUANTIZED_H_
#define PUNA_FEW_QUANTIZED_H_

#include <algorithm>

#include "weights.h"

namespace puna {
namespace PUNA_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kLargest = 32767;  // 4 · 32767 · 128, a lane's sum, is exact as a float too
constexpr int64_t kSegment = 256;    // blocks whose scales are prepared together

PUNA_INLINE int64_t groups_of(const PunaMatrix& m) { return (m.in + m.group - 1) / m.group; }

// A row of x, in floats: the whole numbers, two to a float; a scale for each block; the sum of each
// group, for minima; and the inputs beyond the last whole block, as they are.
struct QuantizedLayout {
  int64_t blocks, scales, sums, tail, row;
  explicit QuantizedLayout(const PunaMatrix& m) {
    blocks = m.in / kBlock;
    scales = blocks * kBlock / 2;
    sums = scales + blocks;
    tail = sums + groups_of(m);
    row = (tail + m.in % kBlock + 15) / 16 * 16;
  }
};

// `rest` takes what the whole numbers leave over; NULL where that is not wanted.
inline void prepare_quantized(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t row,
                              float* to, float* rest) {
  QuantizedLayout layout(m);
  int16_t* whole = reinterpret_cast<int16_t*>(to);
  std::fill(to + layout.sums, to + layout.tail, 0.0f);
  for (int64_t b = 0; b < layout.blocks; ++b) {
    float block[kBlock], largest = 0.0f, sum = 0.0f;
    for (int i = 0; i < kBlock; ++i) block[i] = read_float(x, x_kind, row * m.in + b * kBlock + i);
    for (int i = 0; i < kBlock; ++i) {
      largest = std::max(largest, std::fabs(block[i]));
      sum += block[i];
    }
    float scale = largest / kLargest, inverse = largest > 0.0f ? kLargest / largest : 0.0f;
    if (!(inverse <= 3.4e38f)) scale = inverse = 0.0f;  // as good as zero
    if (!(largest <= 3.4e38f) || sum != sum) scale = sum - sum + largest * 0.0f;  // not a number
    int16_t numbers[kBlock];
    for (int i = 0; i < kBlock; ++i)
      numbers[i] = int16_t(scale == scale ? std::nearbyintf(block[i] * inverse) : 0.0f);
    for (int i = 0; i < kBlock; ++i) {
      int place = m.kind == PUNA_U4 ? i / 2 + i % 2 * int(kBlock) / 2 : i;
      whole[b * kBlock + place] = numbers[i];
    }
    if (rest != nullptr)
      for (int i = 0; i < kBlock; ++i)
        rest[b * kBlock + i] = scale == scale ? block[i] - scale * float(numbers[i]) : 0.0f;
    to[layout.scales + b] = scale;
    if (m.low != nullptr) to[layout.sums + b * kBlock / m.group] += sum;
  }
  for (int64_t k = layout.blocks * kBlock; k < m.in; ++k) {
    float value = read_float(x, x_kind, row * m.in + k);
    to[layout.tail + k - layout.blocks * kBlock] = value;
    if (m.low != nullptr) to[layout.sums + k / m.group] += value;
  }
}

// The sum of the products of a block's weights and M rows' inputs, in lanes.
#if defined(__AVX2__)
typedef float Partial __attribute__((vector_size(32)));
PUNA_INLINE Partial splat_partial(float f) { return Partial{f, f, f, f, f, f, f, f}; }
PUNA_INLINE float sum_partial(Partial v) {
  float l[8];
  std::memcpy(l, &v, sizeof v);
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

struct BlockI8 {
  __m256i first, second;
  PUNA_INLINE BlockI8(const void* data, int64_t b) {
    const __m128i* from = reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(data) + 32 * b);
    first = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
    second = _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1));
  }
};

struct BlockU4 {
  __m256i first, second;
  PUNA_INLINE BlockU4(const void* data, int64_t b) {
    const __m128i* from =
        reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(data) + 16 * b);
    __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
    first = _mm256_and_si256(bytes, _mm256_set1_epi16(15));
    second = _mm256_srli_epi16(bytes, 4);
  }
};

// The same about zero: the products are smaller, so less is lost than by taking 8 away at the end.
struct BlockCentred4 : BlockU4 {
  PUNA_INLINE BlockCentred4(const void* data, int64_t b) : BlockU4(data, b) {
    first = _mm256_sub_epi16(first, _mm256_set1_epi16(8));
    second = _mm256_sub_epi16(second, _mm256_set1_epi16(8));
  }
};

template <typename Block>
PUNA_INLINE Partial times(const Block& weights, const int16_t* x) {
  const __m256i* inputs = reinterpret_cast<const __m256i*>(x);
  __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(weights.first, _mm256_loadu_si256(inputs)),
                                 _mm256_madd_epi16(weights.second, _mm256_loadu_si256(inputs + 1)));
  return Partial(_mm256_cvtepi32_ps(sum));
}
#else
typedef float Partial;
PUNA_INLINE Partial splat_partial(float f) { return f; }
PUNA_INLINE float sum_partial(Partial v) { return v; }

struct BlockI8 {
  int16_t weights[kBlock];
  PUNA_INLINE BlockI8(const void* data, int64_t b) {
    for (int i = 0; i < kBlock; ++i) weights[i] = static_cast<const int8_t*>(data)[kBlock * b + i];
  }
};

struct BlockU4 {
  int16_t weights[kBlock];
  PUNA_INLINE BlockU4(const void* data, int64_t b) {
    const uint8_t* bytes = static_cast<const uint8_t*>(data) + kBlock / 2 * b;
    for (int i = 0; i < kBlock / 2; ++i) {
      weights[i] = bytes[i] & 15;
      weights[i + kBlock / 2] = bytes[i] >> 4;
    }
  }
};

struct BlockCentred4 : BlockU4 {
  PUNA_INLINE BlockCentred4(const void* data, int64_t b) : BlockU4(data, b) {
    for (int16_t& weight : weights) weight -= 8;
  }
};

template <typename Block>
PUNA_INLINE Partial times(const Block& block, const int16_t* x) {
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) sum += int32_t{block.weights[i]} * x[i];
  return float(sum);
}
#endif

// Scales [begin, begin + count) of a row of weights as float32.
PUNA_INLINE void read_scales(const void* from, int32_t kind, int64_t begin, int64_t count,
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
    for (; i < count; ++i) to[i] = from_bf16(bits[i]);
  }
}

// R results of each of M rows.
template <typename Read, typename Block, int M, int R>
PUNA_INLINE void quantized_some(const PunaMatrix& m, const float* x, int64_t x_row, int64_t out,
                                float* y, int64_t y_stride) {
  QuantizedLayout layout(m);
  int64_t groups = groups_of(m), in_group = std::max<int64_t>(1, m.group / kBlock);
  Partial total[R][M] = {};
  float rest[R][M] = {};
  for (int64_t start = 0; start < layout.blocks || start == 0; start += kSegment) {
    int64_t count = std::min(kSegment, layout.blocks - start), end = start + count;
    // The scales of weights and inputs, multiplied.
    float scales[R][M][kSegment], raw[kSegment + 1], low[kSegment + 1];
    int64_t first = start / in_group;
    int64_t last = end == layout.blocks ? groups : end / in_group, some = last - first;
    for (int r = 0; r < R; ++r) {
      read_scales(m.scale, m.scale_kind, (out + r) * groups + first, some, raw);
      if (m.low != nullptr)
        read_scales(m.low, m.scale_kind, (out + r) * groups + first, some, low);
      for (int i = 0; i < M; ++i) {
        const float* inputs = x + i * x_row + layout.scales + start;
        const float* sums = x + i * x_row + layout.sums + first;
        if (in_group == 1)
          for (int64_t b = 0; b < count; ++b) scales[r][i][b] = raw[b] * inputs[b];
        else
          for (int64_t b = 0, g = 0; b < count; ++g)
            for (int64_t stop = std::min(count, (first + g + 1) * in_group - start); b < stop; ++b)
              scales[r][i][b] = raw[g] * inputs[b];
        if (m.low != nullptr)
          for (int64_t g = 0; g < some; ++g) rest[r][i] += low[g] * sums[g];
      }
    }
    const char* rows[R];
    constexpr int64_t kBytes = std::is_same<Read, ReadU4>::value ? kBlock / 2 : kBlock;
    int64_t row_bytes = m.kind == PUNA_U4 ? (m.in + 1) / 2 : m.in;
    for (int r = 0; r < R; ++r) rows[r] = static_cast<const char*>(m.data) + (out + r) * row_bytes;
    const int16_t* numbers = reinterpret_cast<const int16_t*>(x);
    for (int64_t b = 0; b < count; ++b) {
      prefetch<kBytes * R>(rows[0] + R * row_bytes + (start + b) * kBytes * R);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Block weights(rows[r], start + b);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
          total[r][i] += splat_partial(scales[r][i][b]) *
                         times(weights, numbers + 2 * i * x_row + (start + b) * kBlock);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    Read reader(m, out + r);
    for (int i = 0; i < M; ++i) {
      float result = sum_partial(total[r][i]) + rest[r][i];
      for (int64_t k = layout.blocks * kBlock; k < m.in; ++k)
        result += read_float(m.scale, m.scale_kind, (out + r) * groups + k / m.group) *
                  (reader.one(k) + centre(m)) * x[i * x_row + layout.tail + k - layout.blocks * kBlock];
      y[i * y_stride + r] = result;
    }
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_FEW_QUANTIZED_H_
