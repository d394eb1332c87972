// The kernels for one set of instructions: compiled once for each, see CMakeLists.txt.

#include <algorithm>

#include "attention.h"
#include "kernel_table.h"
#include "many_quantized.h"

namespace puna {
namespace PUNA_ISA {

constexpr int64_t kSome = 256;  // numbers that are read, changed and written at a time

// silu(x) * up, in place.
static void gate(float* x, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats value = load<Floats>(x + i);
    Words sign = Words(value) & 0x80000000;
    Floats power = exponential(Floats(Words(value) | 0x80000000));  // of -|x|
    Floats top = Words(sign) != 0 ? power : splat(1.0f);
    store(x + i, value * (top / (splat(1.0f) + power)) * load<Floats>(up + i));
  }
}

static void finish(const float* y, const float* up, int64_t count, void* to, int32_t kind,
                   int64_t at, bool add) {
  if (up == nullptr && !add) return write_floats(to, kind, at, count, y);
  for (int64_t start = 0; start < count; start += kSome) {
    float values[kSome], others[kSome];
    int64_t some = std::min(kSome, count - start);
    std::memcpy(values, y + start, 4 * some);
    if (up != nullptr) {
      std::memcpy(others, up + start, 4 * some);
      for (int64_t i = some; i % kLanes != 0; ++i) values[i] = others[i] = 0.0f;
      gate(values, others, some);
    }
    if (add) {  // as two steps would: the result is rounded, and then the sum
      read_floats(to, kind, at + start, some, others);
      write_floats(to, kind, at + start, some, values);
      read_floats(to, kind, at + start, some, values);
      for (int64_t i = 0; i < some; ++i) values[i] += others[i];
    }
    write_floats(to, kind, at + start, some, values);
  }
}

static void rms_norm(const void* x, int32_t kind, const void* weight, int32_t weight_kind,
                     float epsilon, int64_t width, int64_t at, void* y) {
  float values[kSome], weights[kSome];
  Floats squares{};
  for (int64_t start = 0; start < width; start += kSome) {
    int64_t some = std::min(kSome, width - start);
    read_floats(x, kind, at + start, some, values);
    for (int64_t i = some; i % kLanes != 0; ++i) values[i] = 0.0f;
    for (int64_t i = 0; i < some; i += kLanes) squares += load<Floats>(values + i) * load<Floats>(values + i);
  }
  float inverse = 1.0f / std::sqrt(sum(squares) / float(width) + epsilon);
  for (int64_t start = 0; start < width; start += kSome) {
    int64_t some = std::min(kSome, width - start);
    read_floats(x, kind, at + start, some, values);
    read_floats(weight, weight_kind, start, some, weights);
    for (int64_t i = 0; i < some; ++i) values[i] = values[i] * inverse * weights[i];
    write_floats(y, kind, at + start, some, values);
  }
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
    PUNA_ISA::turn, PUNA_ISA::finish, PUNA_ISA::attention_scratch, PUNA_ISA::attention, PUNA_ISA::rms_norm,
    PUNA_ISA::read,
};

}  // namespace puna
