// What the calls of the C interface share.

#ifndef PUNA_DISPATCH_H_
#define PUNA_DISPATCH_H_

#include <cstdint>
#include <cstdlib>

#include "kernel_table.h"

namespace puna {

// Up to so many rows, a product is bound by reading the weights.
constexpr int64_t kFewRows = 8;
// Results of a few rows that are computed at a time, at most.
constexpr int64_t kMostResults = 256;

// The kernels in use.
const KernelTable& kernels();

inline bool is_float(int32_t kind) {
  return kind == PUNA_F32 || kind == PUNA_BF16 || kind == PUNA_F16;
}

inline int64_t chunks(int64_t all, int64_t each) { return (all + each - 1) / each; }

int64_t row_bytes(const PunaMatrix& m);

// What is wrong with matrices that are multiplied together; NULL where nothing is.
const char* problem(const PunaMatrix* matrices, int count, bool gated);

// Results [begin, end) of a few rows and a matrix, or of gate and up, from prepared rows: written to
// y [rows, out], or added to it.
void few_results(const KernelTable& kernels, const PunaMatrix* m, bool gated, const float* scratch,
                 int64_t rows, int64_t parts, int64_t begin, int64_t end, void* y, int32_t y_kind,
                 bool add);

// Each thread's own memory, kept between calls: what a caller prepares, and what a chunk computes.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(memory_);
      size_ = (count + 1023) / 1024 * 1024;
      memory_ = static_cast<float*>(std::aligned_alloc(64, 4 * size_));
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace puna

#endif  // PUNA_DISPATCH_H_
