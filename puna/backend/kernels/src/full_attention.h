// Attention of all tokens of a sequence at once, and its gradients.
//
// A block of queries meets the keys that any of them looks at. Scores lie transposed, [key][query],
// as products of many rows come: a vector has one key's scores of several queries, which are weighed
// without being moved. What each query looks at is a range of keys.

#ifndef PUNA_FULL_ATTENTION_H_
#define PUNA_FULL_ATTENTION_H_

#include <algorithm>
#include <cmath>

#include "kernel_table.h"
#include "many.h"

namespace puna {
namespace PUNA_ISA {

constexpr int64_t kQueries = kQueryBlock;  // of a block

// Weights of attention are rounded where that makes products faster, as rows of bfloat16 are.
PUNA_INLINE int32_t weights_kind(int32_t kind) {
  PunaMatrix m{};
  m.kind = kind;
  return is_bf16_back(m, kind) ? kind : int32_t{PUNA_F32};
}

PUNA_INLINE PunaMatrix rows_as_matrix(const void* data, int32_t kind, int64_t first, int64_t rows,
                                      int64_t width) {
  const char* from = static_cast<const char*>(data) + first * width * (kind == PUNA_F32 ? 4 : 2);
  return PunaMatrix{from, nullptr, nullptr, rows, width, width, kind, 0};
}

// Room for whole sets of results, of either kind.
constexpr int64_t kSet = 12;
static_assert(kSet % kResults == 0 && kSet % kWholeResults == 0 && kQueries % kTile == 0);
PUNA_INLINE int64_t room(int64_t n) { return (n + kSet - 1) / kSet * kSet; }

// Scratch of a call, in floats, laid out one after another.
struct FullScratch {
  float *queries, *scores, *changes, *packed, *results, *turned, *by_keys;
  float *key_changes, *value_changes;
  int64_t total;

  FullScratch(const PunaFullAttention& a, float* from, bool back) {
    const int64_t S = a.places, H = a.head_size, stride = tiles_of(S) * kTile;
    PunaMatrix keys = rows_as_matrix(nullptr, a.kind, 0, S, H);
    PunaMatrix queries_m = rows_as_matrix(nullptr, a.kind, 0, kQueries, H);
    int32_t kind = weights_kind(a.kind);
    total = 0;
    auto take = [&](int64_t floats) {
      float* here = from == nullptr ? nullptr : from + total;
      total += (floats + 15) / 16 * 16;
      return here;
    };
    queries = take(any_scratch(keys, a.kind, kQueries));
    scores = take(room(S) * kQueries);
    packed = take(any_back_scratch(keys, kind, kQueries));
    results = take(room(H) * std::max(kQueries, back ? stride : 0));
    turned = take(kTile * whole_vectors(H));
    changes = by_keys = key_changes = value_changes = nullptr;
    if (back) {
      changes = take(room(S) * kQueries);
      by_keys = take(S * kQueries + any_back_scratch(queries_m, kind, S));
      key_changes = take(H * stride);
      value_changes = take(H * stride);
    }
  }
};

inline int64_t full_scratch(const PunaFullAttention& a, bool back) {
  return FullScratch(a, nullptr, back).total;
}

// A block of one head's queries, and the keys [first, last) that some of them look at.
struct Queries {
  int64_t row, head, key_head;  // of the batch, of the queries, of the keys
  int64_t start, count, stride;
  int64_t first, last;
  alignas(64) int32_t from[kQueries], until[kQueries];  // each one's range, less `first`

  Queries(const PunaFullAttention& a, int64_t row, int64_t head, int64_t block)
      : row(row), head(head), key_head(head / (a.query_heads / a.key_heads)) {
    start = block * kQueries, count = std::min(kQueries, a.tokens - start);
    stride = tiles_of(count) * kTile;
    first = a.places, last = 0;
    const int64_t place = row * a.tokens + start;
    const int32_t *firsts = a.firsts + place, *lasts = a.lasts + place;
    for (int64_t i = 0; i < count; ++i) {
      if (firsts[i] >= lasts[i]) continue;
      first = std::min<int64_t>(first, firsts[i]), last = std::max<int64_t>(last, lasts[i]);
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      bool looks = i < count && firsts[i] < lasts[i];
      from[i] = looks ? int32_t(firsts[i] - first) : 0;
      until[i] = looks ? int32_t(lasts[i] - first) : 0;
    }
  }

  int64_t keys() const { return std::max<int64_t>(0, last - first); }
  // Where its first row is in an array of the queries' shape.
  int64_t place(const PunaFullAttention& a) const {
    return (row * a.query_heads + head) * a.tokens + start;
  }
  int64_t first_key(const PunaFullAttention& a) const {
    return (row * a.key_heads + key_head) * a.places + first;
  }
  // Of queries from `some` on, which look at key k.
  PUNA_INLINE Words looking(int64_t k, int64_t some) const {
    Ints key = Ints{} + int32_t(k);
    return Words(key >= load<Ints>(from + some)) & Words(key < load<Ints>(until + some));
  }
};

// Products of a block's rows of `x` with the keys or values that are looked at: [key][query].
inline void scores_of(const PunaFullAttention& a, const Queries& q, const void* x, const void* keys,
                      float* scratch, float* to) {
  PunaMatrix m = rows_as_matrix(keys, a.kind, q.first_key(a), q.keys(), a.head_size);
  PunaMatrix rows = rows_as_matrix(x, a.kind, q.place(a), q.count, a.head_size);
  for (int64_t tile = 0; tile < tiles_of(q.count); ++tile)
    any_pack(m, rows.data, a.kind, q.count, tile, scratch);
  any_many(m, a.kind, scratch, q.count, 0, q.keys(), to);
}

// Numbers [key][query] as rows, one for each query, that a transposed product takes.
inline void pack_turned(const float* numbers, int64_t n, int64_t stride, int32_t kind,
                        float* scratch) {
  const int64_t tiles = stride / kTile;
#if defined(__AVX512BF16__)
  if (kind == PUNA_BF16) {
    auto bits = [&](int64_t k, int64_t at) {
      if (k >= n) return __m512i{};
      __m256bh half = _mm512_cvtneps_pbh(__m512(load<Floats>(numbers + k * stride + at)));
      return _mm512_cvtepu16_epi32(__m256i(half));
    };
    for (int64_t k = 0; k < whole_blocks(n); k += 2) {
      for (int64_t at = 0; at < stride; at += kLanes) {
        WholeTile& to = *whole_tile(scratch, tiles, k / kDepth, at / kTile);
        __m512i pairs = _mm512_or_si512(bits(k, at), _mm512_slli_epi32(bits(k + 1, at), 16));
        _mm512_storeu_si512(to.numbers + k % kDepth * kTile + 2 * (at % kTile), pairs);
      }
    }
    return;
  }
#endif
  (void)kind;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* to = packed_block(scratch, tiles, k / kDepth, tile) + k % kDepth * kTile;
      std::memcpy(to, numbers + k * stride + tile * kTile, 4 * kTile);
    }
  }
}

// Results [feature][row] as rows of an array of `kind`, from its row `place` on.
inline void write_turned(const float* results, int64_t stride, int64_t rows, int64_t width,
                         float* turned, void* to, int32_t kind, int64_t place) {
  int64_t apart = whole_vectors(width);
  for (int64_t first = 0; first < rows; first += kTile) {
    turn(results + first, stride, width, turned, apart);
    for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - first); ++i)
      write_floats(to, kind, (place + first + i) * width, width, turned + i * apart);
  }
}

// One block of queries.
inline void full_attention(const PunaFullAttention& a, int64_t row, int64_t head, int64_t block,
                           float* memory) {
  const FullScratch scratch(a, memory, false);
  const Queries q(a, row, head, block);
  const int64_t n = q.keys(), H = a.head_size;
  const int32_t kind = weights_kind(a.kind);
  float inverses[kQueries];
  if (n > 0) scores_of(a, q, a.query, a.key, scratch.queries, scratch.scores);
  for (int64_t some = 0; some < q.stride; some += kLanes) {
    Floats most = splat(-INFINITY), total{};
    float* scores = scratch.scores + some;
    for (int64_t k = 0; k < n; ++k) {
      Floats score = load<Floats>(scores + k * q.stride) * splat(a.scale);
      Floats higher = score > most ? score : most;
      most = q.looking(k, some) != 0 ? higher : most;
    }
    for (int64_t k = 0; k < n; ++k) {
      Floats score = load<Floats>(scores + k * q.stride) * splat(a.scale);
      Floats weight = Floats(Words(exponential(score - most)) & q.looking(k, some));
      store(scores + k * q.stride, weight);
      total += weight;
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      bool looks = q.until[some + i] > q.from[some + i];
      inverses[some + i] = looks ? 1.0f / total[i] : 0.0f;
      if (some + i < q.count)
        a.log_sums[q.place(a) + some + i] = looks ? most[i] + std::log(total[i]) : INFINITY;
    }
  }
  PunaMatrix values = rows_as_matrix(a.value, a.kind, q.first_key(a), n, H);
  if (n > 0) {
    pack_turned(scratch.scores, n, q.stride, kind, scratch.packed);
    any_back(values, kind, scratch.packed, q.count, 0, H, scratch.results);
  }
  for (int64_t h = 0; h < H; ++h) {
    float* results = scratch.results + h * q.stride;
    for (int64_t some = 0; some < q.stride; some += kLanes) {
      Floats result = load<Floats>(results + some) * load<Floats>(inverses + some);
      store(results + some, n == 0 ? Floats{} : result);
    }
  }
  write_turned(scratch.results, q.stride, q.count, H, scratch.turned, a.out, a.kind, q.place(a));
}

// Adds, for each key, the sum over a block's queries of its numbers [key][query] times their rows.
inline void add_by_keys(const PunaFullAttention& a, const Queries& q, const float* numbers,
                        const void* rows, const FullScratch& scratch, float* to) {
  const int64_t n = q.keys(), H = a.head_size, stride = tiles_of(n) * kTile;
  const int64_t to_stride = tiles_of(a.places) * kTile;
  const int32_t kind = weights_kind(a.kind);
  PunaMatrix m = rows_as_matrix(rows, a.kind, q.place(a), q.count, H);
  float* packed = scratch.by_keys + a.places * kQueries;
  for (int64_t k = 0; k < n; ++k)
    write_floats(scratch.by_keys, kind, k * q.count, q.count, numbers + k * q.stride);
  for (int64_t tile = 0; tile < tiles_of(n); ++tile)
    any_back_pack(m, scratch.by_keys, kind, n, tile, packed);
  any_back(m, kind, packed, n, 0, H, scratch.results);
  for (int64_t h = 0; h < H; ++h) {
    const float* more = scratch.results + h * stride;
    float* sums = to + h * to_stride + q.first;
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes)
      store(sums + k, load<Floats>(sums + k) + load<Floats>(more + k));
    for (; k < n; ++k) sums[k] += more[k];
  }
}

// The gradients of a key head and of the queries that look at it.
inline void full_attention_back(const PunaFullAttention& a, int64_t row, int64_t key_head,
                                float* memory) {
  const FullScratch scratch(a, memory, true);
  const int64_t S = a.places, H = a.head_size, stride = tiles_of(S) * kTile;
  const int64_t group = a.query_heads / a.key_heads;
  const int32_t kind = weights_kind(a.kind);
  std::fill(scratch.key_changes, scratch.key_changes + H * stride, 0.0f);
  std::fill(scratch.value_changes, scratch.value_changes + H * stride, 0.0f);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t block = 0; block * kQueries < a.tokens; ++block) {
      const Queries q(a, row, head, block);
      const int64_t n = q.keys();
      alignas(64) float log_sums[kQueries], along[kQueries];
      for (int64_t i = 0; i < kQueries; ++i) {
        log_sums[i] = i < q.count ? a.log_sums[q.place(a) + i] : INFINITY;
        along[i] = 0.0f;
        for (int64_t h = 0; i < q.count && h < H; ++h)
          along[i] += read_float(a.out, a.kind, (q.place(a) + i) * H + h) *
                      read_float(a.out_change, a.kind, (q.place(a) + i) * H + h);
      }
      if (n > 0) {
        scores_of(a, q, a.query, a.key, scratch.queries, scratch.scores);
        scores_of(a, q, a.out_change, a.value, scratch.queries, scratch.changes);
      }
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t some = 0; some < q.stride; some += kLanes) {
          float* score = scratch.scores + k * q.stride + some;
          float* change = scratch.changes + k * q.stride + some;
          Floats power = load<Floats>(score) * splat(a.scale) - load<Floats>(log_sums + some);
          Floats weight = Floats(Words(exponential(power)) & q.looking(k, some));
          store(score, weight);
          Floats by_weight = load<Floats>(change) - load<Floats>(along + some);
          store(change, weight * by_weight * splat(a.scale));
        }
      }
      if (n > 0) {
        add_by_keys(a, q, scratch.scores, a.out_change, scratch, scratch.value_changes);
        add_by_keys(a, q, scratch.changes, a.query, scratch, scratch.key_changes);
        pack_turned(scratch.changes, n, q.stride, kind, scratch.packed);
        PunaMatrix keys = rows_as_matrix(a.key, a.kind, q.first_key(a), n, H);
        any_back(keys, kind, scratch.packed, q.count, 0, H, scratch.results);
      } else {
        std::fill(scratch.results, scratch.results + H * q.stride, 0.0f);
      }
      write_turned(scratch.results, q.stride, q.count, H, scratch.turned, a.query_change, a.kind,
                   q.place(a));
    }
  }
  int64_t place = (row * a.key_heads + key_head) * S;
  write_turned(scratch.key_changes, stride, S, H, scratch.turned, a.key_change, a.kind, place);
  write_turned(scratch.value_changes, stride, S, H, scratch.turned, a.value_change, a.kind, place);
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_FULL_ATTENTION_H_
