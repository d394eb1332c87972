// The cross-entropy of a row of logits and its gradient, while the row is in the processor's cache.

#ifndef PUNA_LOSS_H_
#define PUNA_LOSS_H_

#include <algorithm>
#include <cmath>

#include "vector.h"

namespace puna {
namespace PUNA_ISA {

// Calls `change` with vectors of the row, in place, the last of them filled up with -infinity.
template <typename Change>
PUNA_INLINE void each_vector(float* row, int64_t width, Change change) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(row + i, change(load<Floats>(row + i)));
  if (i == width) return;
  float last[kLanes];
  std::fill(last, last + kLanes, -INFINITY);
  std::copy(row + i, row + width, last);
  store(last, change(load<Floats>(last)));
  std::copy(last, last + (width - i), row + i);
}

// Returns the loss; `highest` becomes the greatest logit. Logits become the gradient by them, times
// `weight`, or are lost.
static float cross_entropy(float* logits, int64_t width, int64_t label, float weight, bool gradient,
                           float* highest) {
  float own = logits[label];
  Floats most = splat(-INFINITY), total{};
  Words unknown{};  // a comparison would lose what is no number
  each_vector(logits, width, [&](Floats v) {
    most = v > most ? v : most;
    unknown |= Words(v != v);
    return v;
  });
  float largest = -INFINITY;
  bool is_known = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = std::max(largest, most[lane]);
    is_known = is_known && unknown[lane] == 0;
  }
  if (!is_known || !(std::fabs(largest) < INFINITY)) largest = NAN;
  *highest = largest;
  each_vector(logits, width, [&](Floats v) {
    Floats power = exponential(v - splat(largest));
    total += power;
    return power;
  });
  float all = sum(total);
  if (gradient) {
    Floats share = splat(weight / all);
    each_vector(logits, width, [&](Floats power) { return power * share; });
    logits[label] -= weight;
  }
  return (std::log(all) + largest - own) * weight;
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_LOSS_H_
