// What each set of instructions offers, for dispatch.cpp to choose from.

#ifndef PUNA_KERNEL_TABLE_H_
#define PUNA_KERNEL_TABLE_H_

#include <cstdint>

#include "kernels.h"

namespace puna {

constexpr int64_t kQueryBlock = 64;  // queries of a head that are attended to together

// Scratch memory and the order of work are the caller's; see dispatch.cpp.
struct KernelTable {
  // How many rows of scratch stand for a row: first one of each row, then a second of each.
  int64_t (*few_parts)(const PunaMatrix& m, int32_t x_kind);
  // Floats of scratch that `few_prepare` fills for `rows` rows, and that `few` reads.
  int64_t (*few_scratch)(const PunaMatrix& m, int64_t rows);
  void (*few_prepare)(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                      float* scratch);
  // Results [begin, end) of few rows, each [rows, end - begin] in float32.
  void (*few)(const PunaMatrix& m, const float* scratch, int64_t rows, int64_t begin, int64_t end,
              float* y, int64_t y_stride);

  // Rows are taken in tiles of `tile`; `many_pack` puts one tile of x, all inputs, in its place.
  int64_t tile;
  int64_t (*many_scratch)(const PunaMatrix& m, int32_t x_kind, int64_t rows);
  void (*many_pack)(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                    int64_t which, float* scratch);
  // As `few`, with the results transposed: y [end - begin, tiles * tile].
  void (*many)(const PunaMatrix& m, int32_t x_kind, const float* scratch, int64_t rows,
               int64_t begin, int64_t end, float* y);
  // x [end - begin, tiles * tile] for inputs [begin, end), from y packed by `back_pack`.
  int64_t (*back_scratch)(const PunaMatrix& m, int32_t y_kind, int64_t rows);
  void (*back_pack)(const PunaMatrix& m, const void* y, int32_t y_kind, int64_t rows,
                    int64_t which, float* scratch);
  void (*back)(const PunaMatrix& m, int32_t y_kind, const float* scratch, int64_t rows,
               int64_t begin, int64_t end, float* x);

  // What `many` and `back` give of one tile, [count, stride], as rows: [tile, apart]. Beyond `count`,
  // up to a vector of each row is written over.
  void (*turn)(const float* y, int64_t stride, int64_t count, float* to, int64_t apart);
  // Writes `count` results of one row; with `up`, silu(y) * up. Or adds them to what is there.
  void (*finish)(const float* y, const float* up, int64_t count, void* to, int32_t kind, int64_t at,
                 bool add);
  void (*gate_back)(const void* gate, const void* up, const void* change, int32_t kind,
                    int64_t begin, int64_t end, void* gate_change, void* up_change);
  int64_t (*attention_scratch)(const PunaAttention& a);
  void (*attention)(const PunaAttention& a, int64_t row, int64_t head, float* scratch);
  int64_t (*full_scratch)(const PunaFullAttention& a, bool back);
  // A block of kQueryBlock queries, and all that is of one key head.
  void (*full_attention)(const PunaFullAttention& a, int64_t row, int64_t head, int64_t block,
                         float* scratch);
  void (*full_attention_back)(const PunaFullAttention& a, int64_t row, int64_t key_head,
                              float* scratch);
  void (*rms_norm)(const void* x, int32_t kind, const void* weight, int32_t weight_kind,
                   float epsilon, int64_t width, int64_t at, void* y);
  void (*rms_norm_back)(const void* x, int32_t kind, const void* weight, int32_t weight_kind,
                        float epsilon, int64_t width, int64_t at, const void* y_change,
                        void* x_change);
  float (*cross_entropy)(float* logits, int64_t width, int64_t label, float weight, bool gradient,
                         float* highest);
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
};

extern const KernelTable kPortableKernels;
#if defined(PUNA_X86)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
#endif

}  // namespace puna

#endif  // PUNA_KERNEL_TABLE_H_
