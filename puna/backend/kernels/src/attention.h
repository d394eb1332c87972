// Attention of a few new tokens over a cache: turned by their positions, written, looked up.

#ifndef PUNA_ATTENTION_H_
#define PUNA_ATTENTION_H_

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace puna {
namespace PUNA_ISA {

// Places whose values are looked up for all heads before the next: they stay in the nearest cache.
constexpr int64_t kNearPlaces = 64;

// How keys and values are kept.
struct CacheF32 {
  typedef float Type;
  static PUNA_INLINE Floats read(const float* from) { return load<Floats>(from); }
};

struct CacheBF16 {
  typedef uint16_t Type;
  static PUNA_INLINE Floats read(const uint16_t* from) {
    return Floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
  }
};

struct CacheF16 {
  typedef uint16_t Type;
  static PUNA_INLINE Floats read(const uint16_t* from) { return halves_to_floats(from); }
};

// A head's features, turned: x · cos + (x with its halves exchanged) · sin. `room` is for H floats.
PUNA_INLINE void turn(const PunaAttention& a, const void* x, int64_t at, const float* cos,
                      const float* sin, float* __restrict room, float* __restrict to) {
  int64_t half = a.head_size / 2;
  read_floats(x, a.kind, at, a.head_size, room);
  for (int64_t h = 0; h < half; ++h) {
    to[h] = room[h] * cos[h] + room[half + h] * sin[h];
    to[half + h] = room[half + h] * cos[half + h] + room[h] * sin[half + h];
  }
}

// Sums of pairs of neighbouring lanes of a, then of b.
PUNA_INLINE Floats add_pairs(Floats a, Floats b) {
  Floats evens, odds;
  part_pairs(a, b, evens, odds);
  return evens + odds;
}

// `count` numbers of a cache as floats: where they are, or in `room`.
template <typename Cache>
PUNA_INLINE const float* as_floats(const typename Cache::Type* from, int64_t count, float* room) {
  if constexpr (std::is_same<typename Cache::Type, float>::value) return from;
  else {
    for (int64_t i = 0; i < count; i += kLanes) store(room + i, Cache::read(from + i));
    return room;
  }
}

// A query's products with the keys of kLanes places, a lane each.
PUNA_INLINE Floats score_places(const float* query, const float* keys, int64_t H) {
  Floats total[kLanes] = {};
  for (int64_t h = 0; h < H; h += kLanes) {
    Floats part = load<Floats>(query + h);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) total[i] += part * load<Floats>(keys + i * H + h);
  }
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) total[i] = add_pairs(total[2 * i], total[2 * i + 1]);
  return total[0];
}

// The values of places [begin, end), times G heads' weights, added to `sums`, `[G, H]`: each value is
// read once for all of them.
template <typename Cache, int G>
PUNA_INLINE void look_up(const float* weights, int64_t stride, const typename Cache::Type* values,
                         int64_t begin, int64_t end, int64_t H, float* sums) {
  for (int64_t h = 0; h < H; h += 16) {
    constexpr int kVectors = 16 / kLanes;
    Floats total[G][kVectors];
    for (int g = 0; g < G; ++g) std::memcpy(total[g], sums + g * H + h, sizeof total[g]);
    for (int64_t s = begin; s < end; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        Floats value = Cache::read(values + s * H + h + i * kLanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[g][i] += splat(weights[g * stride + s]) * value;
      }
    }
    for (int g = 0; g < G; ++g) std::memcpy(sums + g * H + h, total[g], sizeof total[g]);
  }
}

// The same for any number of heads, and for so many places at a time as stay near.
template <typename Cache>
PUNA_INLINE void look_up_all(const float* weights, int64_t stride,
                             const typename Cache::Type* values, int64_t live, int64_t H, int64_t G,
                             float* sums) {
  std::fill(sums, sums + G * H, 0.0f);
  for (int64_t begin = 0; begin < live; begin += kNearPlaces) {
    int64_t end = std::min(live, begin + kNearPlaces);
    const char* next = reinterpret_cast<const char*>(values + end * H);
    const char* last = reinterpret_cast<const char*>(values + std::min(live, end + kNearPlaces) * H);
    for (; next < last; next += 64) __builtin_prefetch(next);
    for (int64_t g = 0; g < G;) {
      const float* some = weights + g * stride;
      float* to = sums + g * H;
      switch (G - g) {
        case 1: look_up<Cache, 1>(some, stride, values, begin, end, H, to), g += 1; break;
        case 2: look_up<Cache, 2>(some, stride, values, begin, end, H, to), g += 2; break;
        case 3: look_up<Cache, 3>(some, stride, values, begin, end, H, to), g += 3; break;
        default: look_up<Cache, 4>(some, stride, values, begin, end, H, to), g += 4; break;
      }
    }
  }
}

// The greatest of the first `live` numbers, behind which there are infinitely small ones to the end
// of a vector; what is no number is passed over.
PUNA_INLINE float greatest(const float* numbers, int64_t live) {
  Floats most = splat(-INFINITY);
  for (int64_t s = 0; s < live; s += kLanes) {
    Floats some = load<Floats>(numbers + s);
    Words more = Words(some > most);
    most = Floats((Words(some) & more) | (Words(most) & ~more));
  }
  float lanes[kLanes];
  std::memcpy(lanes, &most, sizeof lanes);
  return *std::max_element(lanes, lanes + kLanes);
}

// One key and value head of one row, with all query heads that look at it. `scratch` holds the
// turned queries (then what comes out), the scores of each, a turned key, what the weights are
// multiplied by, and some keys as floats.
template <typename Cache>
void attend_head(const PunaAttention& a, int64_t row, int64_t head, float* scratch) {
  int64_t H = a.head_size, G = a.query_heads / a.key_heads, S = a.capacity;
  typedef typename Cache::Type Type;
  int64_t first = (row * a.key_heads + head) * S * H;
  const Type* keys = static_cast<const Type*>(a.keys) + first;
  const Type* values = static_cast<const Type*>(a.values) + first;
  float* query = scratch;                    // [G, H]
  float* scores = scratch + G * H;           // [G, padded]
  // As XLA's own update: what would stand beyond the end stands at the end.
  int64_t start = std::clamp<int64_t>(a.starts[row], 0, S - a.tokens);
  int64_t padded = (S + kLanes - 1) / kLanes * kLanes;
  float* turned = scores + G * padded;       // [H]
  float* inverses = turned + H;              // [G]
  float* converted = inverses + G;           // [kLanes, H]
  for (int64_t t = 0; t < a.tokens; ++t) {
    int64_t token = row * a.tokens + t, place = start + t;
    const float *cos = a.cos + token * H, *sin = a.sin + token * H;
    int64_t at = (token * a.key_heads + head) * H;
    turn(a, a.key, at, cos, sin, converted, turned);
    write_floats(a.keys, a.cache_kind, first + place * H, H, turned);
    read_floats(a.value, a.kind, at, H, turned);
    write_floats(a.values, a.cache_kind, first + place * H, H, turned);
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    int64_t token = row * a.tokens + t, live = start + t + 1;
    const float *cos = a.cos + token * H, *sin = a.sin + token * H;
    for (int64_t g = 0; g < G; ++g) {
      int64_t at = (token * a.query_heads + head * G + g) * H;
      turn(a, a.query, at, cos, sin, converted, query + g * H);
      for (int64_t h = 0; h < H; ++h) query[g * H + h] *= a.scale;
    }
    int64_t s = 0;
    for (; s + kLanes <= live; s += kLanes) {
      const float* near = as_floats<Cache>(keys + s * H, kLanes * H, converted);
      for (int64_t g = 0; g < G; ++g)
        store(scores + g * padded + s, score_places(query + g * H, near, H));
    }
    for (; s < live; ++s)
      for (int64_t g = 0; g < G; ++g) {
        Floats total{};
        for (int64_t h = 0; h < H; h += kLanes)
          total += Cache::read(keys + s * H + h) * load<Floats>(query + g * H + h);
        scores[g * padded + s] = sum(total);
      }
    for (int64_t g = 0; g < G; ++g) {
      float* score = scores + g * padded;
      for (int64_t s = live; s % kLanes != 0; ++s) score[s] = -INFINITY;
      float largest = greatest(score, live);
      Floats total{};
      for (int64_t s = 0; s < live; s += kLanes) {
        Floats weight = exponential(load<Floats>(score + s) - splat(largest));
        total += weight;
        store(score + s, weight);
      }
      float inverse = 1.0f / sum(total);
      if (!(largest < INFINITY)) inverse = NAN;  // as a score that is no number makes it, too
      inverses[g] = inverse;
    }
    look_up_all<Cache>(scores, padded, values, live, H, G, query);  // the queries are done with
    int64_t to = (token * a.query_heads + head * G) * H;
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t h = 0; h < H; h += kLanes)
        store(query + g * H + h, load<Floats>(query + g * H + h) * splat(inverses[g]));
    }
    write_floats(a.out, a.kind, to, G * H, query);
  }
}

inline int64_t attention_scratch(const PunaAttention& a) {
  int64_t G = a.query_heads / a.key_heads;
  int64_t padded = (a.capacity + kLanes - 1) / kLanes * kLanes;
  return G * a.head_size + G * padded + a.head_size + G + kLanes * a.head_size;
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
