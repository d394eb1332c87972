// The kernels for one set of instructions: compiled once for each, see CMakeLists.txt.

#include "attention.h"
#include "kernel_table.h"
#include "many_quantized.h"

namespace puna {
namespace PUNA_ISA {

static void finish(const float* y, const float* up, int64_t stride, int64_t count, void* to,
                   int32_t kind, int64_t at, bool add) {
  for (int64_t i = 0; i < count; ++i) {
    float value = y[i * stride];
    if (up != nullptr) value = value / (1.0f + std::exp(-value)) * up[i * stride];
    if (add) {  // as two steps would: the result is rounded, and then the sum
      float before = read_float(to, kind, at + i);
      write_float(to, kind, at + i, value);
      value = before + read_float(to, kind, at + i);
    }
    write_float(to, kind, at + i, value);
  }
}

static void rms_norm(const void* x, int32_t kind, const void* weight, int32_t weight_kind,
                     float epsilon, int64_t width, int64_t at, void* y) {
  float squares[8] = {};
  int64_t whole = width / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    for (int j = 0; j < 8; ++j) {
      float value = read_float(x, kind, at + i + j);
      squares[j] += value * value;
    }
  float total = 0.0f;
  for (int64_t i = whole; i < width; ++i) {
    float value = read_float(x, kind, at + i);
    total += value * value;
  }
  for (int j = 0; j < 8; ++j) total += squares[j];
  float inverse = 1.0f / std::sqrt(total / float(width) + epsilon);
  for (int64_t i = 0; i < width; ++i)
    write_float(y, kind, at + i,
                read_float(x, kind, at + i) * inverse * read_float(weight, weight_kind, i));
}

static uint64_t read(const uint8_t* data, int64_t bytes) {
  Words total[4] = {};
  int64_t i = 0;
  for (; i + 4 * int64_t{sizeof(Words)} <= bytes; i += 4 * sizeof(Words))
    for (int j = 0; j < 4; ++j) total[j] ^= load<Words>(data + i + j * sizeof(Words));
  uint64_t result = 0;
  for (; i < bytes; ++i) result += data[i];
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < kLanes; ++lane) result += total[j][lane];
  return result;
}

}  // namespace PUNA_ISA

const KernelTable PUNA_TABLE = {
    PUNA_ISA::few_parts, PUNA_ISA::few_scratch, PUNA_ISA::few_prepare, PUNA_ISA::few,
    PUNA_ISA::kTile, PUNA_ISA::any_scratch, PUNA_ISA::any_pack, PUNA_ISA::any_many,
    PUNA_ISA::back_scratch, PUNA_ISA::back_pack, PUNA_ISA::back,
    PUNA_ISA::finish, PUNA_ISA::attention_scratch, PUNA_ISA::attention, PUNA_ISA::rms_norm,
    PUNA_ISA::read,
};

}  // namespace puna
