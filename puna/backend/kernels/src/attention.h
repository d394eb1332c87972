// Attention of a few new tokens over a cache: turned by their positions, written, looked up.

#ifndef PUNA_ATTENTION_H_
#define PUNA_ATTENTION_H_

#include <algorithm>

#include "vector.h"

namespace puna {
namespace PUNA_ISA {

// How keys and values are kept.
struct CacheF32 {
  typedef float Type;
  static PUNA_INLINE Floats read(const float* from) { return load<Floats>(from); }
  static PUNA_INLINE void write(float* to, float value) { *to = value; }
};

struct CacheBF16 {
  typedef uint16_t Type;
  static PUNA_INLINE Floats read(const uint16_t* from) {
    return Floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
  }
  static PUNA_INLINE void write(uint16_t* to, float value) { *to = to_bf16(value); }
};

struct CacheF16 {
  typedef uint16_t Type;
  static PUNA_INLINE Floats read(const uint16_t* from) { return halves_to_floats(from); }
  static PUNA_INLINE void write(uint16_t* to, float value) { *to = to_f16(value); }
};

// A head's features, turned: x · cos + (x with its halves exchanged) · sin.
PUNA_INLINE void turn(const PunaAttention& a, const void* x, int64_t at, const float* cos,
                      const float* sin, float* to) {
  int64_t H = a.head_size;
  for (int64_t h = 0; h < H; ++h)
    to[h] = read_float(x, a.kind, at + h) * cos[h] +
            read_float(x, a.kind, at + (h + H / 2) % H) * sin[h];
}

// Sums of pairs of neighbouring lanes of a, then of b.
PUNA_INLINE Floats add_pairs(Floats a, Floats b) {
  Floats evens, odds;
  part_pairs(a, b, evens, odds);
  return evens + odds;
}

// A query's products with the keys of kLanes places, a lane each.
template <typename Cache>
PUNA_INLINE Floats score_places(const float* query, const typename Cache::Type* keys, int64_t H) {
  Floats total[kLanes] = {};
  for (int64_t h = 0; h < H; h += kLanes) {
    Floats part = load<Floats>(query + h);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) total[i] += part * Cache::read(keys + i * H + h);
  }
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) total[i] = add_pairs(total[2 * i], total[2 * i + 1]);
  return total[0];
}

// The values of all places, times G heads' weights: each value is read once for all of them.
template <typename Cache, int G>
PUNA_INLINE void look_up(const PunaAttention& a, const float* weights, int64_t stride,
                         const float* inverses, const typename Cache::Type* values, int64_t live,
                         int64_t to) {
  int64_t H = a.head_size;
  for (int64_t h = 0; h < H; h += 16) {
    constexpr int kVectors = 16 / kLanes;
    Floats total[G][kVectors] = {};
    for (int64_t s = 0; s < live; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        Floats value = Cache::read(values + s * H + h + i * kLanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[g][i] += splat(weights[g * stride + s]) * value;
      }
    }
    for (int g = 0; g < G; ++g) {
      float lanes[16];
      std::memcpy(lanes, total[g], sizeof lanes);
      for (int i = 0; i < 16; ++i)
        write_float(a.out, a.kind, to + g * H + h + i, lanes[i] * inverses[g]);
    }
  }
}

// One key and value head of one row, with all query heads that look at it. `scratch` holds the
// turned queries, the scores of each, a turned key, and what the weights are multiplied by.
template <typename Cache>
void attend_head(const PunaAttention& a, int64_t row, int64_t head, float* scratch) {
  int64_t H = a.head_size, G = a.query_heads / a.key_heads, S = a.capacity;
  typedef typename Cache::Type Type;
  Type* keys = static_cast<Type*>(a.keys) + (row * a.key_heads + head) * S * H;
  Type* values = static_cast<Type*>(a.values) + (row * a.key_heads + head) * S * H;
  float* query = scratch;                    // [G, H]
  float* scores = scratch + G * H;           // [G, padded]
  // As XLA's own update: what would stand beyond the end stands at the end.
  int64_t start = std::clamp<int64_t>(a.starts[row], 0, S - a.tokens);
  int64_t padded = (S + kLanes - 1) / kLanes * kLanes;
  float* turned = scores + G * padded;       // [H]
  float* inverses = turned + H;              // [G]
  for (int64_t t = 0; t < a.tokens; ++t) {
    int64_t token = row * a.tokens + t, place = start + t;
    const float *cos = a.cos + token * H, *sin = a.sin + token * H;
    int64_t at = (token * a.key_heads + head) * H;
    turn(a, a.key, at, cos, sin, turned);
    for (int64_t h = 0; h < H; ++h) {
      Cache::write(keys + place * H + h, turned[h]);
      Cache::write(values + place * H + h, read_float(a.value, a.kind, at + h));
    }
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    int64_t token = row * a.tokens + t, live = start + t + 1;
    const float *cos = a.cos + token * H, *sin = a.sin + token * H;
    for (int64_t g = 0; g < G; ++g) {
      turn(a, a.query, (token * a.query_heads + head * G + g) * H, cos, sin, query + g * H);
      for (int64_t h = 0; h < H; ++h) query[g * H + h] *= a.scale;
    }
    int64_t s = 0;
    for (; s + kLanes <= live; s += kLanes)
      for (int64_t g = 0; g < G; ++g)
        store(scores + g * padded + s, score_places<Cache>(query + g * H, keys + s * H, H));
    for (; s < live; ++s)
      for (int64_t g = 0; g < G; ++g) {
        Floats total{};
        for (int64_t h = 0; h < H; h += kLanes)
          total += Cache::read(keys + s * H + h) * load<Floats>(query + g * H + h);
        scores[g * padded + s] = sum(total);
      }
    for (int64_t g = 0; g < G; ++g) {
      float* score = scores + g * padded;
      float largest = *std::max_element(score, score + live);
      for (int64_t s = live; s % kLanes != 0; ++s) score[s] = -INFINITY;
      Floats total{};
      for (int64_t s = 0; s < live; s += kLanes) {
        Floats weight = exponential(load<Floats>(score + s) - splat(largest));
        total += weight;
        store(score + s, weight);
      }
      float inverse = 1.0f / sum(total);
      if (!(largest < INFINITY)) inverse = NAN;  // a score was no number
      inverses[g] = inverse;
    }
    int64_t to = (token * a.query_heads + head * G) * H;
    for (int64_t g = 0; g < G;) {
      const float* some = scores + g * padded;
      const float* by = inverses + g;
      switch (G - g) {
        case 1: look_up<Cache, 1>(a, some, padded, by, values, live, to + g * H), g += 1; break;
        case 2: look_up<Cache, 2>(a, some, padded, by, values, live, to + g * H), g += 2; break;
        case 3: look_up<Cache, 3>(a, some, padded, by, values, live, to + g * H), g += 3; break;
        default: look_up<Cache, 4>(a, some, padded, by, values, live, to + g * H), g += 4; break;
      }
    }
  }
}

inline int64_t attention_scratch(const PunaAttention& a) {
  int64_t G = a.query_heads / a.key_heads;
  int64_t padded = (a.capacity + kLanes - 1) / kLanes * kLanes;
  return G * a.head_size + G * padded + a.head_size + G;
}

inline void attention(const PunaAttention& a, int64_t row, int64_t head, float* scratch) {
  switch (a.cache_kind) {
    case PUNA_F32: return attend_head<CacheF32>(a, row, head, scratch);
    case PUNA_BF16: return attend_head<CacheBF16>(a, row, head, scratch);
    default: return attend_head<CacheF16>(a, row, head, scratch);
  }
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_ATTENTION_H_
