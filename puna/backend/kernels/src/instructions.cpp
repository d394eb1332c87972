// The kernels for one set of instructions: compiled once for each, see CMakeLists.txt.

#include <algorithm>

#include "attention.h"
#include "full_attention.h"
#include "kernel_table.h"
#include "loss.h"
#include "many.h"

namespace puna {
namespace PUNA_ISA {

constexpr int64_t kSome = 256;  // numbers that are read, changed and written at a time

PUNA_INLINE Floats sigmoid_of(Floats value) {
  Words sign = Words(value) & 0x80000000;
  Floats power = exponential(Floats(Words(value) | 0x80000000));  // of -|x|
  Floats top = Words(sign) != 0 ? power : splat(1.0f);
  return top / (splat(1.0f) + power);
}

// silu(x) * up, in place.
static void gate(float* x, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats value = load<Floats>(x + i);
    store(x + i, value * sigmoid_of(value) * load<Floats>(up + i));
  }
}

// What y = silu(gate) * up asks of gate and up for a change of y: numbers [begin, end).
static void gate_back(const void* gate, const void* up, const void* change, int32_t kind,
                      int64_t begin, int64_t end, void* gate_change, void* up_change) {
  for (int64_t start = begin; start < end; start += kSome) {
    float gates[kSome], ups[kSome], changes[kSome];
    int64_t count = std::min(kSome, end - start);
    read_floats(gate, kind, start, count, gates);
    read_floats(up, kind, start, count, ups);
    read_floats(change, kind, start, count, changes);
    for (int64_t i = count; i % kLanes != 0; ++i) gates[i] = ups[i] = changes[i] = 0.0f;
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats value = load<Floats>(gates + i), dy = load<Floats>(changes + i);
      Floats sigmoid = sigmoid_of(value), silu = value * sigmoid;
      store(gates + i, dy * load<Floats>(ups + i) * (sigmoid + silu * (splat(1.0f) - sigmoid)));
      store(ups + i, dy * silu);
    }
    write_floats(gate_change, kind, start, count, gates);
    write_floats(up_change, kind, start, count, ups);
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

// With n = x / root and root² = mean(x²) + epsilon: dx = (w · dy - n · mean(n · w · dy)) / root.
static void rms_norm_back(const void* x, int32_t kind, const void* weight, int32_t weight_kind,
                          float epsilon, int64_t width, int64_t at, const void* y_change,
                          void* x_change) {
  float values[kSome], weights[kSome], changes[kSome];
  // Reads some of the row; `changes` are those of y times the weights.
  auto read_some = [&](int64_t start) {
    int64_t some = std::min(kSome, width - start);
    read_floats(x, kind, at + start, some, values);
    read_floats(weight, weight_kind, start, some, weights);
    read_floats(y_change, kind, at + start, some, changes);
    for (int64_t i = some; i % kLanes != 0; ++i) values[i] = weights[i] = changes[i] = 0.0f;
    for (int64_t i = 0; i < some; i += kLanes)
      store(changes + i, load<Floats>(changes + i) * load<Floats>(weights + i));
    return some;
  };
  Floats squares{}, products{};
  for (int64_t start = 0; start < width; start += kSome) {
    int64_t some = read_some(start);
    for (int64_t i = 0; i < some; i += kLanes) {
      Floats value = load<Floats>(values + i);
      squares += value * value;
      products += value * load<Floats>(changes + i);
    }
  }
  float inverse = 1.0f / std::sqrt(sum(squares) / float(width) + epsilon);
  float along = sum(products) / float(width) * inverse * inverse * inverse;
  for (int64_t start = 0; start < width; start += kSome) {
    int64_t some = read_some(start);
    for (int64_t i = 0; i < some; i += kLanes)
      store(changes + i, load<Floats>(changes + i) * splat(inverse) -
                             load<Floats>(values + i) * splat(along));
    write_floats(x_change, kind, at + start, some, changes);
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
    PUNA_ISA::any_back_scratch, PUNA_ISA::any_back_pack, PUNA_ISA::any_back,
    PUNA_ISA::turn, PUNA_ISA::finish, PUNA_ISA::gate_back,
    PUNA_ISA::attention_scratch, PUNA_ISA::attention,
    PUNA_ISA::full_scratch, PUNA_ISA::full_attention, PUNA_ISA::full_attention_back,
    PUNA_ISA::rms_norm, PUNA_ISA::rms_norm_back,
    PUNA_ISA::cross_entropy, PUNA_ISA::read,
};

}  // namespace puna
