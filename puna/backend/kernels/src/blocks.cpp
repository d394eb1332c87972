// All blocks of a model in one call, for a few new tokens.
//
// A block is five phases, each cut into pieces. A thread takes the pieces of its own share one after
// another, as they lie in memory, and then those that others have not come to. Who finds none left
// waits until those that others have are done, and goes on to the next phase: so threads stay
// together without being called and dismissed for every product, and one that comes late, or never,
// is not waited for.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace puna {
namespace {

constexpr int kPhases = 5;  // queries, keys and values; attention; out; gate and up; down
// Pieces of a phase for each thread, and the bytes of weights of each.
constexpr int64_t kPieces = 16, kLeastBytes = 16 << 10, kMostBytes = 128 << 10;
constexpr int64_t kAheadBytes = 8 << 10;

struct alignas(64) Counter {
  std::atomic<int64_t> count{0};
};

thread_local Scratch between, prepared, normed, computed;

class Walk {
 public:
  Walk(const PunaBlocks& all, int threads)
      : all_(all),
        threads_(threads),
        rows_(all.rows * all.tokens),
        counters_(kPhases * all.count * (threads + 1)) {
    const PunaBlock& b = all.blocks[0];
    int64_t query = rows_ * b.query.out, key = rows_ * b.key.out, hidden = rows_ * b.gate.out;
    char* memory = reinterpret_cast<char*>(between.floats(2 * query + 2 * key + hidden));
    auto take = [&](int64_t count) { return std::exchange(memory, memory + 4 * count); };
    query_ = take(query), key_ = take(key), value_ = take(key);
    attended_ = take(query), hidden_ = take(hidden);
  }

  // What each thread does.
  void walk() {
    int64_t phase = 0, me = joined_.fetch_add(1) % threads_;
    for (int64_t i = 0; i < all_.count; ++i) {
      const PunaBlock& b = all_.blocks[i];
      const PunaMatrix heads[] = {b.query, b.key, b.value}, gated[] = {b.gate, b.up};
      void* const projected[] = {query_, key_, value_};
      products(phase++, me, heads, 3, false, all_.x, b.attention_norm, projected, false);
      attention(phase++, me, i);
      products(phase++, me, &b.out, 1, false, attended_, nullptr, &all_.x, true);
      products(phase++, me, gated, 2, true, all_.x, b.mlp_norm, &hidden_, false);
      products(phase++, me, &b.down, 1, false, hidden_, nullptr, &all_.x, true);
    }
  }

 private:
  // `begin(piece)` before a thread's first piece, `piece(piece)` for each.
  template <typename Begin, typename Piece>
  void take(int64_t phase, int64_t me, int64_t pieces, const Begin& begin, const Piece& piece) {
    Counter* shares = &counters_[phase * (threads_ + 1)];
    std::atomic<int64_t>& done = shares[threads_].count;
    int64_t mine = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      int64_t share = (me + i) % threads_;
      int64_t first = pieces * share / threads_, count = pieces * (share + 1) / threads_ - first;
      std::atomic<int64_t>& next = shares[share].count;
      while (next.load(std::memory_order_relaxed) < count) {
        int64_t at = next.fetch_add(1, std::memory_order_relaxed);
        if (at >= count) break;
        // Only who has a piece may look at what the phase reads: it is not over then.
        if (mine++ == 0) begin(first + at);
        piece(first + at);
      }
    }
    done.fetch_add(mine, std::memory_order_acq_rel);
    for (int spins = 0; done.load(std::memory_order_acquire) < pieces;)
      ++spins < 4000 ? pause() : std::this_thread::yield();
  }

  // y = x times matrices, with x normalised first where there is a weight for that.
  void products(int64_t phase, int64_t me, const PunaMatrix* m, int count, bool gated, const void* x,
                const void* norm, void* const* y, bool add) {
    int64_t bytes = 0, pieces = 0, each[3] = {};
    for (int i = 0; i < count; ++i) bytes += m[i].out * row_bytes(m[i]);
    int64_t piece_bytes = std::clamp(bytes / (threads_ * kPieces), kLeastBytes, kMostBytes);
    int asked = gated ? 1 : count;
    for (int i = 0; i < asked; ++i) {
      int64_t results = piece_bytes / (row_bytes(m[i]) * (gated ? 2 : 1)) / 8 * 8;
      each[i] = std::clamp<int64_t>(results, 8, kMostResults);
      pieces += chunks(m[i].out, each[i]);
    }
    int64_t parts = kernels_.few_parts(m[0], all_.kind);
    float* scratch = prepared.floats(kernels_.few_scratch(m[0], rows_ * parts));
    auto find = [&](int64_t& piece) {
      int i = 0;
      for (int64_t here; piece >= (here = chunks(m[i].out, each[i])); ++i) piece -= here;
      return i;
    };
    auto begin = [&](int64_t piece) {
      // What the piece will read is on its way while its rows are prepared.
      int i = find(piece);
      const char* weights = static_cast<const char*>(m[i].data) + piece * each[i] * row_bytes(m[i]);
      for (int64_t at = 0; at < kAheadBytes; at += 64) __builtin_prefetch(weights + at);
      const void* from = x;
      if (norm != nullptr) {
        void* to = normed.floats(rows_ * all_.width);
        for (int64_t row = 0; row < rows_; ++row)
          kernels_.rms_norm(x, all_.kind, norm, all_.norm_kind, all_.epsilon, all_.width,
                            row * all_.width, to);
        from = to;
      }
      kernels_.few_prepare(m[0], from, all_.kind, rows_, scratch);
    };
    take(phase, me, pieces, begin, [&](int64_t piece) {
      int i = find(piece);
      int64_t from = piece * each[i], to = std::min(m[i].out, from + each[i]);
      few_results(kernels_, m + i, gated, scratch, rows_, parts, from, to, y[i], all_.kind, add);
    });
  }

  void attention(int64_t phase, int64_t me, int64_t block) {
    PunaAttention a{};
    a.query = query_, a.key = key_, a.value = value_, a.out = attended_;
    a.cos = all_.cos, a.sin = all_.sin, a.starts = all_.starts;
    a.keys = all_.keys[block], a.values = all_.values[block];
    a.rows = all_.rows, a.tokens = all_.tokens, a.capacity = all_.capacity;
    a.query_heads = all_.query_heads, a.key_heads = all_.key_heads, a.head_size = all_.head_size;
    a.scale = all_.scale, a.kind = all_.kind, a.cache_kind = all_.cache_kind;
    float* scratch = computed.floats(kernels_.attention_scratch(a));
    take(phase, me, a.rows * a.key_heads, [](int64_t) {}, [&](int64_t i) {
      kernels_.attention(a, i / a.key_heads, i % a.key_heads, scratch);
    });
  }

  const PunaBlocks& all_;
  const KernelTable& kernels_ = kernels();
  const int64_t threads_, rows_;
  std::vector<Counter> counters_;  // of each phase, each thread's share, and what is done
  std::atomic<int64_t> joined_{0};
  void *query_, *key_, *value_, *attended_, *hidden_;
};

const char* problem(const PunaBlocks& all) {
  if (!is_float(all.kind) || !is_float(all.norm_kind) || !is_float(all.cache_kind))
    return "tokens, norms and cache are floats";
  if (all.count < 1 || all.rows * all.tokens > kFewRows) return "no blocks, or too many tokens";
  if (all.key_heads < 1 || all.query_heads % all.key_heads != 0 || all.head_size % 16 != 0)
    return "the heads are of no such number or size";
  if (all.tokens > all.capacity) return "the new tokens are more than the cache holds";
  int64_t query = all.query_heads * all.head_size, key = all.key_heads * all.head_size;
  for (int64_t i = 0; i < all.count; ++i) {
    const PunaBlock& b = all.blocks[i];
    const PunaMatrix heads[] = {b.query, b.key, b.value}, gated[] = {b.gate, b.up};
    const char* found[] = {puna::problem(heads, 3, false), puna::problem(&b.out, 1, false),
                           puna::problem(gated, 2, true), puna::problem(&b.down, 1, false)};
    for (const char* why : found)
      if (why != nullptr) return why;
    if (b.query.in != all.width || b.query.out != query || b.key.out != key || b.value.out != key ||
        b.out.in != query || b.out.out != all.width || b.gate.in != all.width ||
        b.down.in != b.gate.out || b.gate.out != all.blocks[0].gate.out || b.down.out != all.width)
      return "the matrices of a block do not fit together";
  }
  return nullptr;
}

}  // namespace
}  // namespace puna

using namespace puna;

extern "C" const char* puna_blocks(const PunaThreads* threads, const PunaBlocks* blocks) {
  if (const char* why = problem(*blocks)) return why;
  if (blocks->rows * blocks->tokens == 0) return nullptr;
  int count = std::max(1, threads->threads);
  Walk walk(*blocks, count);
  auto task = [](void* data) { static_cast<Walk*>(data)->walk(); };
  if (count == 1)
    walk.walk();
  else
    (threads->run == nullptr ? run_own : threads->run)(threads->context, count - 1, task, &walk);
  return nullptr;
}
