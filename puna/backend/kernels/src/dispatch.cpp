// The C interface: which instructions, how the work is cut, and who does it.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace puna {
namespace {

// Bytes of weights that a thread takes at a time.
constexpr int64_t kChunkBytes = 128 << 10;
// Many rows: so many at once, whose inputs stay in the second cache, and so many results a chunk,
// or inputs of the transposed product: a multiple of every step, and of the sets of results.
constexpr int64_t kRowsAtOnce = 256;
constexpr int64_t kManyResults = 96;
constexpr int64_t kBackInputs = 96;
constexpr int64_t kNumbers = 16 << 10;  // that a thread changes at a time, one by one
constexpr int64_t kMostTile = 32;  // rows of a tile, with the longest vectors

struct Named {
  const char* name;
  const KernelTable* table;
  bool (*available)();
};

#if defined(PUNA_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Named kInstructions[] = {
#if defined(PUNA_X86)
    {"avx512bf16", &kAvx512Bf16Kernels,
     [] {
       return has_avx512() && __builtin_cpu_supports("avx512vnni") &&
              __builtin_cpu_supports("avx512bf16");
     }},
    {"avx512", &kAvx512Kernels, has_avx512},
    {"avx2", &kAvx2Kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", &kPortableKernels, [] { return true; }},
};

const Named* best() {
  for (const Named& candidate : kInstructions)
    if (candidate.available()) return &candidate;
  return nullptr;
}

std::atomic<const Named*> chosen{nullptr};

const Named& instructions() {
  const Named* now = chosen.load(std::memory_order_relaxed);
  if (now == nullptr) chosen.store(now = best(), std::memory_order_relaxed);
  return *now;
}

thread_local Scratch prepared, computed;

char* at(void* data, int32_t kind, int64_t index) {
  return static_cast<char*>(data) + index * (kind == PUNA_F32 ? 4 : 2);
}

const char* problem_of(const PunaMatrix& m) {
  if (m.data == nullptr || m.out < 1 || m.in < 1) return "a matrix is empty";
  if (is_float(m.kind)) return nullptr;
  if (m.kind != PUNA_I8 && m.kind != PUNA_U4 && m.kind != PUNA_F8)
    return "a matrix is of no known kind";
  if (m.scale == nullptr || !is_float(m.scale_kind)) return "a quantized matrix has no scale";
  if (m.kind == PUNA_F8 && (m.group < m.in || m.low != nullptr))
    return "a matrix of float8 has more than a scale for each row";
  bool sixteen = m.group == 16 && m.kind == PUNA_I8 && m.low == nullptr;
  if (m.group < 1 || (m.group < m.in && m.group % 32 != 0 && !sixteen))
    return "a group is neither a multiple of 32 nor all inputs";
  return nullptr;
}

// Results of a chunk, and how many chunks a matrix has.
int64_t few_chunk(const PunaMatrix& m) {
  int64_t results = kChunkBytes / row_bytes(m) / 8 * 8;
  return std::clamp<int64_t>(results, 8, kMostResults);
}

// Writes what `many` or `back` made of `rows` rows: `count` results of each, from place `at` on and
// `apart` from one row to the next.
void finish_rows(const KernelTable& kernels, const float* values, const float* ups, int64_t rows,
                 int64_t count, void* to, int32_t kind, int64_t at, int64_t apart) {
  constexpr int64_t kMost = std::max(kManyResults, kBackInputs);
  float turned[2][kMostTile * kMost];
  int64_t tile = kernels.tile, stride = chunks(rows, tile) * tile;
  for (int64_t first = 0; first < rows; first += tile) {
    kernels.turn(values + first, stride, count, turned[0], kMost);
    if (ups != nullptr) kernels.turn(ups + first, stride, count, turned[1], kMost);
    for (int64_t j = 0; j < std::min(tile, rows - first); ++j)
      kernels.finish(turned[0] + j * kMost, ups == nullptr ? nullptr : turned[1] + j * kMost, count,
                     to, kind, at + (first + j) * apart, false);
  }
}

// Calls `body(row)` for rows of `width` numbers; few of them are left to this thread alone.
template <typename Body>
void each_row(const PunaThreads& threads, int64_t rows, int64_t width, Body body) {
  int64_t together = std::max<int64_t>(1, kNumbers / width);
  auto some = [&](int64_t chunk) {
    for (int64_t row = chunk * together; row < std::min(rows, (chunk + 1) * together); ++row)
      body(row);
  };
  if (rows <= together) return some(0);
  parallel(threads, chunks(rows, together), some);
}

struct Call {
  const KernelTable& kernels;
  const PunaThreads& threads;
  const PunaMatrix* matrices;
  int count;
  int64_t rows;
  void* const* y;
  int32_t y_kind;
  bool gated;

  // Calls `body(matrix, begin, end)` for every chunk of the results.
  template <typename Body>
  void each_chunk(int64_t (*size)(const PunaMatrix&), Body body) const {
    int64_t all = 0;
    int asked = gated ? 1 : count;
    for (int i = 0; i < asked; ++i) all += chunks(matrices[i].out, size(matrices[i]));
    parallel(threads, all, [&](int64_t chunk) {
      int i = 0;
      for (int64_t here; chunk >= (here = chunks(matrices[i].out, size(matrices[i]))); ++i)
        chunk -= here;
      int64_t each = size(matrices[i]);
      body(i, chunk * each, std::min(matrices[i].out, (chunk + 1) * each));
    });
  }

  void few(const void* x, int32_t x_kind) const {
    const PunaMatrix& first = matrices[0];
    int64_t parts = kernels.few_parts(first, x_kind), all = rows * parts;
    float* scratch = prepared.floats(kernels.few_scratch(first, all));
    kernels.few_prepare(first, x, x_kind, rows, scratch);
    each_chunk(few_chunk, [&](int i, int64_t begin, int64_t end) {
      few_results(kernels, matrices + i, gated, scratch, rows, parts, begin, end, y[i], y_kind, false);
    });
  }

  void many(const void* x, int32_t x_kind, int64_t row) const {
    const PunaMatrix& first = matrices[0];
    int64_t tiles = chunks(rows, kernels.tile), stride = tiles * kernels.tile;
    float* scratch = prepared.floats(kernels.many_scratch(first, x_kind, rows));
    parallel(threads, tiles,
             [&](int64_t tile) { kernels.many_pack(first, x, x_kind, rows, tile, scratch); });
    each_chunk([](const PunaMatrix&) { return kManyResults; },
               [&](int i, int64_t begin, int64_t end) {
                 float* values = computed.floats(2 * kManyResults * stride);
                 float* ups = gated ? values + kManyResults * stride : nullptr;
                 kernels.many(matrices[i], x_kind, scratch, rows, begin, end, values);
                 if (gated) kernels.many(matrices[1], x_kind, scratch, rows, begin, end, ups);
                 finish_rows(kernels, values, ups, rows, end - begin, y[i], y_kind,
                             row * matrices[i].out + begin, matrices[i].out);
               });
  }
};

}  // namespace

const KernelTable& kernels() { return *instructions().table; }

int64_t row_bytes(const PunaMatrix& m) {
  switch (m.kind) {
    case PUNA_F32: return 4 * m.in;
    case PUNA_I8:
    case PUNA_F8: return m.in;
    case PUNA_U4: return (m.in + 1) / 2;
    default: return 2 * m.in;
  }
}

const char* problem(const PunaMatrix* matrices, int count, bool gated) {
  for (int i = 0; i < count; ++i) {
    const PunaMatrix &m = matrices[i], &first = matrices[0];
    if (const char* why = problem_of(m)) return why;
    if (m.in != first.in || m.kind != first.kind || (m.low == nullptr) != (first.low == nullptr) ||
        (!is_float(m.kind) && m.group != first.group))
      return "matrices that are multiplied together differ in kind";
    if (gated && m.out != first.out) return "gate and up differ in size";
  }
  return nullptr;
}

void few_results(const KernelTable& kernels, const PunaMatrix* m, bool gated, const float* scratch,
                 int64_t rows, int64_t parts, int64_t begin, int64_t end, void* y, int32_t y_kind,
                 bool add) {
  float values[2 * kFewRows * kMostResults], ups[2 * kFewRows * kMostResults];
  kernels.few(m[0], scratch, rows * parts, begin, end, values, kMostResults);
  if (gated) kernels.few(m[1], scratch, rows * parts, begin, end, ups, kMostResults);
  for (int64_t row = 0; row < rows; ++row) {
    float *value = values + row * kMostResults, *up = ups + row * kMostResults;
    for (int64_t j = 0; parts == 2 && j < end - begin; ++j) {
      value[j] += value[rows * kMostResults + j];
      if (gated) up[j] += up[rows * kMostResults + j];
    }
    kernels.finish(value, gated ? up : nullptr, end - begin, y, y_kind, row * m[0].out + begin, add);
  }
}

}  // namespace puna

using namespace puna;

extern "C" {

const char* puna_linear(const PunaThreads* threads, const void* x, int32_t x_kind, int64_t rows,
                        const PunaMatrix* matrices, int32_t count, void* const* y, int32_t y_kind,
                        int32_t gated) {
  if (!is_float(x_kind) || !is_float(y_kind)) return "rows and results are floats";
  if (count < 1 || (gated && count != 2)) return "there is no such number of matrices";
  if (const char* why = problem(matrices, count, gated != 0)) return why;
  if (rows <= kFewRows) {
    if (rows > 0)
      Call{*instructions().table, *threads, matrices, count, rows, y, y_kind, gated != 0}.few(
          x, x_kind);
    return nullptr;
  }
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    int64_t here = std::min(kRowsAtOnce, rows - row);
    const void* from = at(const_cast<void*>(x), x_kind, row * matrices[0].in);
    Call{*instructions().table, *threads, matrices, count, here, y, y_kind, gated != 0}.many(
        from, x_kind, row);
  }
  return nullptr;
}

const char* puna_linear_transposed(const PunaThreads* threads, const void* y, int32_t y_kind,
                                   int64_t rows, const PunaMatrix* matrix, void* x,
                                   int32_t x_kind) {
  if (!is_float(x_kind) || !is_float(y_kind)) return "rows and results are floats";
  if (const char* why = problem(matrix, 1, false)) return why;
  const KernelTable& kernels = *instructions().table;
  const PunaMatrix& m = *matrix;
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    int64_t here = std::min(kRowsAtOnce, rows - row);
    int64_t tiles = chunks(here, kernels.tile), stride = tiles * kernels.tile;
    float* scratch = prepared.floats(kernels.back_scratch(m, y_kind, here));
    const void* from = at(const_cast<void*>(y), y_kind, row * m.out);
    parallel(*threads, tiles,
             [&](int64_t tile) { kernels.back_pack(m, from, y_kind, here, tile, scratch); });
    parallel(*threads, chunks(m.in, kBackInputs), [&](int64_t chunk) {
      int64_t begin = chunk * kBackInputs, end = std::min(m.in, begin + kBackInputs);
      float* values = computed.floats(kBackInputs * stride);
      kernels.back(m, y_kind, scratch, here, begin, end, values);
      finish_rows(kernels, values, nullptr, here, end - begin, x, x_kind, row * m.in + begin, m.in);
    });
  }
  return nullptr;
}

const char* puna_attention(const PunaThreads* threads, const PunaAttention* attention) {
  const PunaAttention& a = *attention;
  if (!is_float(a.kind) || !is_float(a.cache_kind)) return "heads and cache are floats";
  if (a.key_heads < 1 || a.query_heads % a.key_heads != 0 || a.head_size % 16 != 0)
    return "the heads are of no such number or size";
  if (a.tokens > a.capacity) return "the new tokens are more than the cache holds";
  const KernelTable& kernels = *instructions().table;
  parallel(*threads, a.rows * a.key_heads, [&](int64_t i) {
    float* scratch = computed.floats(kernels.attention_scratch(a));
    kernels.attention(a, i / a.key_heads, i % a.key_heads, scratch);
  });
  return nullptr;
}

static const char* problem_of(const PunaFullAttention& a) {
  if (!is_float(a.kind)) return "heads are floats";
  if (a.key_heads < 1 || a.query_heads % a.key_heads != 0) return "the heads are of no such number";
  for (int64_t i = 0; i < a.rows * a.tokens; ++i)
    if (a.firsts[i] < 0 || a.lasts[i] > a.places) return "a token looks at places that are none";
  return nullptr;
}

const char* puna_full_attention(const PunaThreads* threads, const PunaFullAttention* attention) {
  const PunaFullAttention& a = *attention;
  if (const char* why = problem_of(a)) return why;
  const KernelTable& kernels = *instructions().table;
  int64_t blocks = chunks(a.tokens, kQueryBlock), heads = a.rows * a.query_heads;
  parallel(*threads, heads * blocks, [&](int64_t i) {  // the last blocks take longest
    float* scratch = computed.floats(kernels.full_scratch(a, false));
    int64_t head = i % heads;
    kernels.full_attention(a, head / a.query_heads, head % a.query_heads, blocks - 1 - i / heads,
                           scratch);
  });
  return nullptr;
}

const char* puna_full_attention_back(const PunaThreads* threads, const PunaFullAttention* attention) {
  const PunaFullAttention& a = *attention;
  if (const char* why = problem_of(a)) return why;
  const KernelTable& kernels = *instructions().table;
  parallel(*threads, a.rows * a.key_heads, [&](int64_t i) {
    float* scratch = computed.floats(kernels.full_scratch(a, true));
    kernels.full_attention_back(a, i / a.key_heads, i % a.key_heads, scratch);
  });
  return nullptr;
}

void puna_rms_norm(const PunaThreads* threads, const void* x, int32_t kind, const void* weight,
                   int32_t weight_kind, float epsilon, int64_t rows, int64_t width, void* y) {
  const KernelTable& kernels = *instructions().table;
  each_row(*threads, rows, width, [&](int64_t row) {
    kernels.rms_norm(x, kind, weight, weight_kind, epsilon, width, row * width, y);
  });
}

void puna_rms_norm_back(const PunaThreads* threads, const void* x, int32_t kind,
                        const void* weight, int32_t weight_kind, float epsilon, int64_t rows,
                        int64_t width, const void* y_change, void* x_change) {
  const KernelTable& kernels = *instructions().table;
  each_row(*threads, rows, width, [&](int64_t row) {
    kernels.rms_norm_back(x, kind, weight, weight_kind, epsilon, width, row * width, y_change,
                          x_change);
  });
}

const char* puna_gate_back(const PunaThreads* threads, const void* gate, const void* up,
                           const void* change, int32_t kind, int64_t count, void* gate_change,
                           void* up_change) {
  if (!is_float(kind)) return "gate and up are floats";
  const KernelTable& kernels = *instructions().table;
  parallel(*threads, chunks(count, kNumbers), [&](int64_t chunk) {
    int64_t begin = chunk * kNumbers, end = std::min(count, begin + kNumbers);
    kernels.gate_back(gate, up, change, kind, begin, end, gate_change, up_change);
  });
  return nullptr;
}

const char* puna_cross_entropy(const PunaThreads* threads, float* logits, int64_t rows,
                               int64_t width, const int64_t* labels, const float* weights,
                               int32_t gradient, float* losses, float* highest) {
  for (int64_t row = 0; row < rows; ++row)
    if (labels[row] < 0 || labels[row] >= width) return "a label is none of the logits'";
  const KernelTable& kernels = *instructions().table;
  parallel(*threads, rows, [&](int64_t row) {
    losses[row] = kernels.cross_entropy(logits + row * width, width, labels[row], weights[row],
                                        gradient != 0, highest + row);
  });
  return nullptr;
}

uint64_t puna_read(const PunaThreads* threads, const void* data, int64_t bytes) {
  const KernelTable& kernels = *instructions().table;
  std::atomic<uint64_t> total{0};
  parallel(*threads, chunks(bytes, kChunkBytes), [&](int64_t chunk) {
    int64_t begin = chunk * kChunkBytes, count = std::min(kChunkBytes, bytes - begin);
    total += kernels.read(static_cast<const uint8_t*>(data) + begin, count);
  });
  return total;
}

const char* puna_instructions(void) { return instructions().name; }

int puna_use_instructions(const char* name) {
  for (const Named& candidate : kInstructions) {
    if (std::strcmp(candidate.name, name) == 0 && candidate.available()) {
      chosen.store(&candidate, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}

}  // extern "C"
