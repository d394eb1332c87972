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
constexpr int64_t kDepth = 512;

PUNA_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }
PUNA_INLINE int64_t whole_depth(int64_t n) { return (n + kDepth - 1) / kDepth * kDepth; }

// Packed: [depth / kDepth][tile][kDepth][kTile].
PUNA_INLINE float* packed_block(float* packed, int64_t tiles, int64_t block, int64_t tile) {
  return packed + (block * tiles + tile) * kDepth * kTile;
}

inline int64_t many_scratch(const PunaMatrix& m, int64_t rows) {
  return whole_depth(m.in) * tiles_of(rows) * kTile;
}

// One tile of x [rows, n]; what there is no row or no input for is zero.
template <typename Place>
PUNA_INLINE void pack_tile(const void* x, int32_t x_kind, int64_t rows, int64_t n, int64_t tile,
                           float* packed, Place place) {
  int64_t tiles = tiles_of(rows), first = tile * kTile;
  int64_t here = std::min<int64_t>(kTile, rows - first);
  for (int64_t block = 0; block * kDepth < n; ++block) {
    float* to = packed_block(packed, tiles, block, tile);
    int64_t start = block * kDepth, count = std::min(kDepth, n - start);
    if (here < kTile) std::fill(to, to + count * kTile, 0.0f);
    for (int64_t row = 0; row < here; ++row) {
      int64_t from = (first + row) * n;
      if (x_kind == PUNA_F32) {
        const float* source = static_cast<const float*>(x) + from;
        for (int64_t i = 0; i < count; ++i) to[i * kTile + row] = source[place(start + i)];
      } else {
        for (int64_t i = 0; i < count; ++i)
          to[i * kTile + row] = read_float(x, x_kind, from + place(start + i));
      }
    }
  }
}

inline void many_pack(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                      int64_t which, float* scratch) {
  int64_t whole = m.in / kStep * kStep;
  if (m.kind == PUNA_BF16 || m.kind == PUNA_U4)
    pack_tile(x, x_kind, rows, m.in, which, scratch,
              [whole](int64_t i) { return i < whole ? interleaved(i) : i; });
  else
    pack_tile(x, x_kind, rows, m.in, which, scratch, [](int64_t i) { return i; });
}

// Weights [begin, end) of a row as float32, scaled, in the order of the steps.
template <typename Read>
PUNA_INLINE void widen(const PunaMatrix& m, int64_t out, int64_t begin, int64_t end, float* to) {
  Read reader(m, out);
  int64_t whole = m.in / kStep * kStep, last = std::min(end, whole);
  if constexpr (!Read::kQuantized) {
    int64_t k = begin;
    for (; k < last; k += kStep) {
      Floats a, b;
      reader.step(k, a, b);
      store(to + k - begin, a);
      store(to + k - begin + kLanes, b);
    }
    for (; k < end; ++k) to[k - begin] = reader.one(k);
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

// R results of a tile's rows, added to those of earlier blocks unless this is the first.
template <int R>
PUNA_INLINE void multiply(const float* weights, int64_t stride, const float* x, int64_t depth,
                          float* y, int64_t y_stride, bool first) {
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
      Floats weight = splat(weights[r * stride + k]);
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

template <int R>
void multiply_upto(int64_t results, const float* weights, int64_t stride, const float* x,
                   int64_t depth, float* y, int64_t y_stride, bool first) {
  if (results == R)
    multiply<R>(weights, stride, x, depth, y, y_stride, first);
  else if constexpr (R > 1)
    multiply_upto<R - 1>(results, weights, stride, x, depth, y, y_stride, first);
}

// Sets of kResults results times every tile, a block of inputs at a time. `fill(start, count,
// first, results, to)` writes weights [results][kDepth] of inputs from `start`.
template <typename Fill>
PUNA_INLINE void multiply_all(const float* packed, int64_t rows, int64_t depth, int64_t results,
                              float* y, Fill fill) {
  alignas(64) float weights[kResults * kDepth];
  int64_t tiles = tiles_of(rows), y_stride = tiles * kTile;
  for (int64_t block = 0; block * kDepth < depth; ++block) {
    int64_t start = block * kDepth, count = std::min(kDepth, depth - start);
    for (int64_t some = 0; some < results; some += kResults) {
      int64_t here = std::min<int64_t>(kResults, results - some);
      fill(start, count, some, here, weights);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* x = packed_block(const_cast<float*>(packed), tiles, block, tile);
        multiply_upto<kResults>(here, weights, kDepth, x, count, y + some * y_stride + tile * kTile,
                                y_stride, block == 0);
      }
    }
  }
}

template <typename Read>
void many_of(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
             float* y) {
  multiply_all(packed, rows, m.in, end - begin, y,
               [&](int64_t start, int64_t count, int64_t first, int64_t results, float* to) {
                 for (int64_t r = 0; r < results; ++r)
                   widen<Read>(m, begin + first + r, start, start + count, to + r * kDepth);
               });
}

inline void many(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
                 float* y) {
  switch (m.kind) {
    case PUNA_F32: return many_of<ReadF32>(m, packed, rows, begin, end, y);
    case PUNA_BF16: return many_of<ReadBF16>(m, packed, rows, begin, end, y);
    case PUNA_F16: return many_of<ReadF16>(m, packed, rows, begin, end, y);
    case PUNA_I8: return many_of<ReadI8>(m, packed, rows, begin, end, y);
    default: return many_of<ReadU4>(m, packed, rows, begin, end, y);
  }
}

inline int64_t back_scratch(const PunaMatrix& m, int64_t rows) {
  return whole_depth(m.out) * tiles_of(rows) * kTile;
}

inline void back_pack(const PunaMatrix& m, const void* y, int32_t y_kind, int64_t rows,
                      int64_t which, float* scratch) {
  pack_tile(y, y_kind, rows, m.out, which, scratch, [](int64_t i) { return i; });
}

// The transposed product: the roles of inputs and outputs are exchanged, so a block of weights is
// widened row by row and stored column by column. `begin` is a multiple of the steps and groups.
template <typename Read>
void back_of(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
             float* x) {
  int64_t columns = end - begin, whole = m.in / kStep * kStep;
  // Not a std::vector: its functions, compiled here, could be linked in where these instructions
  // are missing.
  float* row = static_cast<float*>(std::malloc(4 * (columns + columns * kDepth)));
  float* block = row + columns;
  int64_t filled = -1;
  multiply_all(packed, rows, m.out, columns, x,
               [&](int64_t start, int64_t count, int64_t first, int64_t results, float* to) {
                 if (filled != start) {
                   for (int64_t out = 0; out < count; ++out) {
                     widen<Read>(m, start + out, begin, end, row);
                     for (int64_t i = 0; i < columns; ++i) {
                       int64_t k = Read::kInterleaved && begin + i < whole ? interleaved(i) : i;
                       block[k * kDepth + out] = row[i];
                     }
                   }
                   filled = start;
                 }
                 std::memcpy(to, block + first * kDepth, 4 * results * kDepth);
               });
  std::free(row);
}

inline void back(const PunaMatrix& m, const float* packed, int64_t rows, int64_t begin, int64_t end,
                 float* x) {
  switch (m.kind) {
    case PUNA_F32: return back_of<ReadF32>(m, packed, rows, begin, end, x);
    case PUNA_BF16: return back_of<ReadBF16>(m, packed, rows, begin, end, x);
    case PUNA_F16: return back_of<ReadF16>(m, packed, rows, begin, end, x);
    case PUNA_I8: return back_of<ReadI8>(m, packed, rows, begin, end, x);
    default: return back_of<ReadU4>(m, packed, rows, begin, end, x);
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_ROWS_H_
