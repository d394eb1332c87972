// A few rows times a matrix: each weight is read once, from memory, and used for all rows.
//
// Every result is one vector of partial sums, filled in the order of the inputs: it is the same,
// bit for bit, however many rows go together.

#ifndef PUNA_FEW_ROWS_H_
#define PUNA_FEW_ROWS_H_

#include <algorithm>

#include "few_quantized.h"
#include "weights.h"

namespace puna {
namespace PUNA_ISA {

PUNA_INLINE bool is_quantized(const PunaMatrix& m) {
  return m.kind == PUNA_I8 || m.kind == PUNA_U4;
}

// There is nothing to know about rows beside weights that are floats.
struct FloatLayout {
  explicit FloatLayout(const PunaMatrix&) {}
};
PUNA_INLINE int64_t groups_in(const FloatLayout&) { return 0; }
PUNA_INLINE int64_t groups_in(const QuantizedLayout& layout) { return layout.groups; }

// Floats of scratch for a row of x.
PUNA_INLINE int64_t few_row(const PunaMatrix& m) {
  return is_quantized(m) ? QuantizedLayout(m).row : (m.in + kStep - 1) / kStep * kStep;
}

// How many rows of scratch a row of x becomes; their results are added.
inline int64_t few_parts(const PunaMatrix& m, int32_t x_kind) {
  return is_quantized(m) && x_kind == PUNA_F32 ? 2 : 1;
}

// For one row's rest there is room behind.
inline int64_t few_scratch(const PunaMatrix& m, int64_t rows) { return few_row(m) * rows + m.in; }

inline void few_prepare(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                        float* scratch) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = scratch + row * few_row(m);
    if (is_quantized(m)) {
      bool two = few_parts(m, x_kind) == 2;
      float* rest = two ? scratch + 2 * rows * few_row(m) : nullptr;
      prepare_quantized(m, x, x_kind, row, to, rest);
      if (two) {
        QuantizedLayout layout(m);
        float* second = scratch + (rows + row) * few_row(m);
        std::fill(rest + layout.blocks * kBlock, rest + m.in, 0.0f);
        prepare_quantized(m, rest, PUNA_F32, 0, second, nullptr);
        // What is added to every weight of a group is in the first row whole.
        std::fill(second + layout.sums, second + layout.tail, 0.0f);
      }
      continue;
    }
    read_floats(x, x_kind, row * m.in, m.in, to);
    if (m.kind != PUNA_BF16) continue;
    for (int64_t k = 0; k < m.in / kStep * kStep; k += kStep) {  // as the weights come apart
      Floats evens, odds;
      part_pairs(load<Floats>(to + k), load<Floats>(to + k + kLanes), evens, odds);
      store(to + k, evens);
      store(to + k + kLanes, odds);
    }
  }
}

// R results of each of M rows: from `out` on, `apart` from one to the next.
template <typename Read, int M, int R>
PUNA_INLINE void floats_some(const PunaMatrix& m, const float* x, int64_t x_row, int64_t out,
                             int64_t apart, float* y, int64_t y_stride) {
  Read readers[R];
  Floats total[R][M] = {};
  for (int r = 0; r < R; ++r) readers[r] = Read(m, out + r * apart);
  int64_t whole = m.in / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep) {
    constexpr int64_t kBytes = sizeof *readers[0].row * kStep;
    if (apart == 1) prefetch<kBytes * R>(readers[0].row + R * m.in + k * R);
    else for (int r = 0; r < R; ++r) __builtin_prefetch(readers[r].row + m.in + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats a, b;
      readers[r].step(k, a, b);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        total[r][i] += a * load<Floats>(x + i * x_row + k);
        total[r][i] += b * load<Floats>(x + i * x_row + k + kLanes);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float scale = 1;
    if constexpr (kScaled<Read>) scale = read_float(m.scale, m.scale_kind, out + r * apart);
    for (int i = 0; i < M; ++i) {
      float result = sum(total[r][i]);
      for (int64_t k = whole; k < m.in; ++k) result += readers[r].one(k) * x[i * x_row + k];
      if constexpr (kScaled<Read>) result *= scale;
      y[i * y_stride + r * apart] = result;
    }
  }
}

template <typename Read, int M, int R, typename Layout>
PUNA_INLINE void few_some(const PunaMatrix& m, const Layout& layout, const float* converted,
                          const float* x, int64_t x_row, int64_t out, int64_t apart, float* y,
                          int64_t y_stride) {
  if constexpr (std::is_same<Read, ReadI8>::value) {
    if (m.group < kBlock)
      quantized_some<PUNA_I8, true, M, R>(m, layout, converted, x, x_row, out, apart, y, y_stride);
    else
      quantized_some<PUNA_I8, false, M, R>(m, layout, converted, x, x_row, out, apart, y, y_stride);
  } else if constexpr (std::is_same<Read, ReadU4>::value) {
    quantized_some<PUNA_U4, true, M, R>(m, layout, converted, x, x_row, out, apart, y, y_stride);
  } else {
    floats_some<Read, M, R>(m, x, x_row, out, apart, y, y_stride);
  }
}

// `converted`: of quantized weights, perhaps the scales of these results; see `quantized_some`.
template <typename Read, int M, typename Layout>
void few_results(const PunaMatrix& m, const Layout& layout, const float* converted, const float* x,
                 int64_t x_row, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  // As many results at once as there are registers for their sums, and for other rows' latency.
  constexpr int R = M == 1 ? 4 : Read::kQuantized ? 2 : 3;
  auto scales = [&](int64_t out) {
    return converted == nullptr ? nullptr : converted + (out - begin) * groups_in(layout);
  };
  int64_t out = begin;
  if constexpr (M == 1) {  // R streams through the weights, each as long as can be
    int64_t each = (end - begin) / R;
    for (; out < begin + each; ++out)
      few_some<Read, M, R>(m, layout, scales(out), x, x_row, out, each, y + out - begin, y_stride);
    out = begin + each * R;
  }
  for (; out + R <= end; out += R)
    few_some<Read, M, R>(m, layout, scales(out), x, x_row, out, 1, y + out - begin, y_stride);
  for (; out < end; ++out)
    few_some<Read, M, 1>(m, layout, scales(out), x, x_row, out, 1, y + out - begin, y_stride);
}

// The same, with scales converted for as many results as fit.
template <typename Read, int M, typename Layout>
PUNA_INLINE void few_range(const PunaMatrix& m, const Layout& layout, const float* x, int64_t x_row,
                           int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if constexpr (Read::kQuantized) {
    int64_t groups = layout.groups, some = kConverted / groups / 4 * 4;
    if (m.group == kBlock && some > 0) {
      alignas(64) float converted[kConverted + kLanes];
      for (int64_t out = begin; out < end; out += some) {
        int64_t here = std::min(some, end - out);
        read_floats(m.scale, m.scale_kind, out * groups, here * groups, converted);
        store(converted + here * groups, Floats{});
        few_results<Read, M>(m, layout, converted, x, x_row, out, out + here, y + out - begin,
                             y_stride);
      }
      return;
    }
  }
  few_results<Read, M>(m, layout, nullptr, x, x_row, begin, end, y, y_stride);
}

template <typename Read>
void few_all(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin, int64_t end,
             float* y, int64_t y_stride) {
  int64_t x_row = few_row(m);
  const std::conditional_t<Read::kQuantized, QuantizedLayout, FloatLayout> layout(m);
  // More than four rows: some results for four of them, then for the next, with the weights near.
  constexpr int64_t kNear = Read::kQuantized ? 4 : 6;
  for (int64_t some = begin; some < end; some += rows > 4 ? kNear : end - begin) {
    int64_t until = rows > 4 ? std::min(end, some + kNear) : end;
    for (int64_t row = 0; row < rows;) {
      const float* x = scratch + row * x_row;
      float* to = y + row * y_stride + some - begin;
      int64_t left = rows - row;
      if (left >= 4) {
        few_range<Read, 4>(m, layout, x, x_row, some, until, to, y_stride), row += 4;
      } else if (left == 3) {
        few_range<Read, 3>(m, layout, x, x_row, some, until, to, y_stride), row += 3;
      } else if (left == 2) {
        few_range<Read, 2>(m, layout, x, x_row, some, until, to, y_stride), row += 2;
      } else {
        few_range<Read, 1>(m, layout, x, x_row, some, until, to, y_stride), row += 1;
      }
    }
  }
}

inline void few(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin, int64_t end,
                float* y, int64_t y_stride) {
  switch (m.kind) {
    case PUNA_F32: return few_all<ReadF32>(m, scratch, rows, begin, end, y, y_stride);
    case PUNA_BF16: return few_all<ReadBF16>(m, scratch, rows, begin, end, y, y_stride);
    case PUNA_F16: return few_all<ReadF16>(m, scratch, rows, begin, end, y, y_stride);
    case PUNA_F8: return few_all<ReadF8>(m, scratch, rows, begin, end, y, y_stride);
    case PUNA_I8: return few_all<ReadI8>(m, scratch, rows, begin, end, y, y_stride);
    default: return few_all<ReadU4>(m, scratch, rows, begin, end, y, y_stride);
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_FEW_ROWS_H_
