// Many rows times a matrix, or times its transpose: a block of weights becomes float32 in the
// processor's cache, and is then used for all rows.
//
// Rows of x lie in tiles of kTile: for each input the kTile rows' values side by side, so that a
// vector holds one input of several rows, and a weight multiplies it as a whole.

#ifndef PUNA_MANY_ROWS_H_
#define PUNA_MANY_ROWS_H_

#include <algorithm>
#include <cstdlib>

#include "few_rows.h"

namespace puna {
namespace PUNA_ISA {

constexpr int kTile = 2 * kLanes;
// Results that are summed at once, each in two vectors: with the two of x, what the registers hold.
constexpr int kResults = kLanes == 16 ? 12 : 6;
// Inputs that are multiplied before the next ones are converted: a multiple of every step, group
// and set of results matters not, but a whole number of steps does.
constexpr int64_t kDepth = 256;

PUNA_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
PUNA_INLINE int64_t whole_depth(int64_t n) { return (n + kDepth - 1) / kDepth * kDepth; }

// Packed: [depth / kDepth][tile][kDepth][kTile].
PUNA_INLINE float* packed_block(float* packed, int64_t tiles, int64_t block, int64_t tile) {
  return packed + (block * tiles + tile) * kDepth * kTile;
}

inline int64_t many_scratch(const PunaMatrix& m, int64_t rows) {
  return whole_depth(m.in) * tiles_of(rows) * kTile;
}

// One tile of x [rows, n]; what there is no row or no input for is zero. With `split`, the inputs of
// each whole step stand as interleaved weights do.
PUNA_INLINE void pack_tile(const void* x, int32_t x_kind, int64_t rows, int64_t n, int64_t tile,
                           bool split, float* packed) {
  int64_t tiles = tiles_of(rows), first = tile * kTile, whole = n / kStep * kStep;
  int64_t here = std::min<int64_t>(kTile, rows - first);
  for (int64_t start = 0; start < n; start += kStep) {
    float* to = packed_block(packed, tiles, start / kDepth, tile) + start % kDepth * kTile;
    int64_t count = std::min<int64_t>(kStep, n - start);
    float values[kTile][kStep] = {};
    for (int64_t row = 0; row < here; ++row)
      read_floats(x, x_kind, (first + row) * n + start, count, values[row]);
    for (int64_t half = 0; half < count; half += kLanes) {
      for (int64_t some = 0; some < kTile; some += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load<Floats>(values[some + i] + half);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - half); ++i) {
          int64_t k = half + i;
          if (split && start < whole) k = k / 2 + k % 2 * kLanes;
          store(to + k * kTile + some, square[i]);
        }
      }
    }
  }
}

inline void many_pack(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                      int64_t which, float* scratch) {
  pack_tile(x, x_kind, rows, m.in, which, m.kind == PUNA_BF16 || m.kind == PUNA_U4, scratch);
}

// Results [count, stride] of a tile's rows, as rows: [kTile, apart].
inline void turn(const float* y, int64_t stride, int64_t count, float* to, int64_t apart) {
  for (int64_t start = 0; start < count; start += kLanes) {
    int64_t some = std::min<int64_t>(kLanes, count - start);
    for (int64_t rows = 0; rows < kTile; rows += kLanes) {
      Floats square[kLanes] = {};
      for (int64_t i = 0; i < some; ++i) square[i] = load<Floats>(y + (start + i) * stride + rows);
      transpose(square);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (rows + i) * apart + start, square[i]);
    }
  }
}

// Weights [begin, end) of a row as float32, scaled, in the order of the steps.
template <typename Read>
PUNA_INLINE void widen(const PunaMatrix& m, int64_t out, int64_t begin, int64_t end, float* to) {
  Read reader(m, out);
  int64_t whole = m.in / kStep * kStep, last = std::min(end, whole);
  if constexpr (!Read::kQuantized) {
    float scale = 1;
    if constexpr (kScaled<Read>) scale = read_float(m.scale, m.scale_kind, out);
    int64_t k = begin;
    for (; k < last; k += kStep) {
      Floats a, b;
      reader.step(k, a, b);
      if constexpr (kScaled<Read>) a *= splat(scale), b *= splat(scale);
      store(to + k - begin, a);
      store(to + k - begin + kLanes, b);
    }
    for (; k < end; ++k) to[k - begin] = kScaled<Read> ? scale * reader.one(k) : reader.one(k);
    return;
  }
  int64_t groups = groups_of(m);
  for (int64_t k = begin; k < end;) {
    int64_t g = k / m.group, group_end = std::min(end, (g + 1) * m.group);
    float scale = read_float(m.scale, m.scale_kind, out * groups + g);
    float low = m.low == nullptr ? centre(m) * scale
                                 : read_float(m.low, m.scale_kind, out * groups + g);
    if constexpr (std::is_same<Read, ReadI8>::value) {  // a group may end within a step
      for (; k + kLanes <= group_end; k += kLanes)
        store(to + k - begin, bytes_to_floats(reader.row + k) * splat(scale) + splat(low));
    } else {
      for (; k < std::min(group_end, whole); k += kStep) {
        Floats a, b;
        reader.step(k, a, b);
        store(to + k - begin, a * splat(scale) + splat(low));
        store(to + k - begin + kLanes, b * splat(scale) + splat(low));
      }
    }
    for (; k < group_end; ++k) to[k - begin] = scale * reader.one(k) + low;
  }
}

// The first `count` floats, in the order of interleaved steps, are put in that of the inputs.
PUNA_INLINE void join_steps(float* floats, int64_t count) {
  for (float* at = floats; at < floats + count; at += kStep) {
    Floats a, b;
    join_pairs(load<Floats>(at), load<Floats>(at + kLanes), a, b);
    store(at, a);
    store(at + kLanes, b);
  }
}

// kResults results of a tile's rows, added to those of earlier blocks unless this is the first. The
// weight of result r and input k stands at `r * kAcross + k * kAlong`.
template <int64_t kAcross, int64_t kAlong>
void multiply(const float* weights, const float* x, int64_t depth, float* y, int64_t y_stride,
              bool first) {
  constexpr int R = kResults;
  Floats total[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    total[r][0] = first ? Floats{} : load<Floats>(y + r * y_stride);
    total[r][1] = first ? Floats{} : load<Floats>(y + r * y_stride + kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats a = load<Floats>(x + k * kTile), b = load<Floats>(x + k * kTile + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Floats weight = splat(weights[r * kAcross + k * kAlong]);
      total[r][0] += weight * a;
      total[r][1] += weight * b;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(y + r * y_stride, total[r][0]);
    store(y + r * y_stride + kLanes, total[r][1]);
  }
}

// Sets of kResults results times every tile, a block of inputs at a time. The last set is computed
// whole, with whatever stands there: y has room for it. `weights(start, count, first, results)`
// gives where those of inputs from `start` are, as `multiply` takes them.
template <int64_t kAcross, int64_t kAlong, typename Weights>
PUNA_INLINE void multiply_all(const float* packed, int64_t rows, int64_t depth, int64_t results,
                              float* y, Weights weights) {
  int64_t tiles = tiles_of(rows), y_stride = tiles * kTile;
  for (int64_t block = 0; block * kDepth < depth; ++block) {
    int64_t start = block * kDepth, count = std::min(kDepth, depth - start);
    for (int64_t some = 0; some < results; some += kResults) {
      int64_t here = std::min<int64_t>(kResults, results - some);
      const float* from = weights(start, count, some, here);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* x = packed_block(const_cast<float*>(packed), tiles, block, tile);
        multiply<kAcross, kAlong>(from, x, count, y + some * y_stride + tile * kTile, y_stride,
                                  block == 0);
      }
    }
  }
}

template <typename Read>
void many_of(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
             float* y) {
  alignas(64) float weights[kResults * kDepth] = {};
  multiply_all<kDepth, 1>(packed, rows, m.in, end - begin, y,
                          [&](int64_t start, int64_t count, int64_t first, int64_t results) {
                            for (int64_t r = 0; r < results; ++r)
                              widen<Read>(m, begin + first + r, start, start + count,
                                          weights + r * kDepth);
                            return weights;
                          });
}

inline void many(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
                 float* y) {
  switch (m.kind) {
    case PUNA_F32: return many_of<ReadF32>(m, packed, rows, begin, end, y);
    case PUNA_BF16: return many_of<ReadBF16>(m, packed, rows, begin, end, y);
    case PUNA_F16: return many_of<ReadF16>(m, packed, rows, begin, end, y);
    case PUNA_F8: return many_of<ReadF8>(m, packed, rows, begin, end, y);
    case PUNA_I8: return many_of<ReadI8>(m, packed, rows, begin, end, y);
    default: return many_of<ReadU4>(m, packed, rows, begin, end, y);
  }
}

inline int64_t back_scratch(const PunaMatrix& m, int64_t rows) {
  return whole_depth(m.out) * tiles_of(rows) * kTile;
}

inline void back_pack(const PunaMatrix& m, const void* y, int32_t y_kind, int64_t rows,
                      int64_t which, float* scratch) {
  pack_tile(y, y_kind, rows, m.out, which, false, scratch);
}

// The transposed product: the roles of inputs and outputs are exchanged. A block of weights is
// widened row by row, each cut into sets of kResults, [set][kDepth][kResults]. `begin` is a multiple
// of the steps and groups.
template <typename Read>
void back_of(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
             float* x) {
  int64_t columns = end - begin, whole = std::clamp<int64_t>(m.in / kStep * kStep - begin, 0, columns);
  int64_t sets = (columns + kResults - 1) / kResults;
  // Not a std::vector: its functions, compiled here, could be linked in where these instructions
  // are missing.
  float* row = static_cast<float*>(std::calloc(sets * kResults * (kDepth + 1), 4));
  float* block = row + sets * kResults;
  int64_t filled = -1;
  multiply_all<1, kResults>(
      packed, rows, m.out, columns, x,
      [&](int64_t start, int64_t count, int64_t first, int64_t) -> const float* {
        for (int64_t out = 0; out < count && filled != start; ++out) {
          widen<Read>(m, start + out, begin, end, row);
          if constexpr (Read::kInterleaved) join_steps(row, whole);
          for (int64_t set = 0; set < sets; ++set)
            std::memcpy(block + (set * kDepth + out) * kResults, row + set * kResults,
                        4 * kResults);
        }
        filled = start;
        return block + first * kDepth;
      });
  std::free(row);
}

inline void back(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
                 float* x) {
  switch (m.kind) {
    case PUNA_F32: return back_of<ReadF32>(m, packed, rows, begin, end, x);
    case PUNA_BF16: return back_of<ReadBF16>(m, packed, rows, begin, end, x);
    case PUNA_F16: return back_of<ReadF16>(m, packed, rows, begin, end, x);
    case PUNA_F8: return back_of<ReadF8>(m, packed, rows, begin, end, x);
    case PUNA_I8: return back_of<ReadI8>(m, packed, rows, begin, end, x);
    default: return back_of<ReadU4>(m, packed, rows, begin, end, x);
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_ROWS_H_
