// Reading a weight matrix as float32, a step of inputs at a time.

#ifndef PUNA_WEIGHTS_H_
#define PUNA_WEIGHTS_H_

#include "vector.h"

namespace puna {
namespace PUNA_ISA {

// Each reads a row of a matrix. `step` gives kStep weights from input k on, a multiple of kStep, as
// two vectors. Where `kInterleaved`, the first has those of even inputs and the second those of odd
// ones, as the halves of a word or of a byte come apart by themselves; else the first has those of
// the first kLanes inputs. `one` gives a single weight. Quantized weights come without scale; where
// `kScaled`, so do floats, which have one for the whole row.

struct ReadF32 {
  static constexpr bool kInterleaved = false, kQuantized = false;
  const float* row = nullptr;
  ReadF32() = default;
  ReadF32(const PunaMatrix& m, int64_t out) : row(static_cast<const float*>(m.data) + out * m.in) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    a = load<Floats>(row + k);
    b = load<Floats>(row + k + kLanes);
  }
  PUNA_INLINE float one(int64_t k) const { return row[k]; }
};

struct ReadBF16 {
  static constexpr bool kInterleaved = true, kQuantized = false;
  const uint16_t* row = nullptr;
  ReadBF16() = default;
  ReadBF16(const PunaMatrix& m, int64_t out)
      : row(static_cast<const uint16_t*>(m.data) + out * m.in) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    Words pairs = load<Words>(row + k);
    a = Floats(pairs << 16);
    b = Floats(pairs & 0xffff0000);
  }
  PUNA_INLINE float one(int64_t k) const { return from_bf16(row[k]); }
};

struct ReadF16 {
  static constexpr bool kInterleaved = false, kQuantized = false;
  const uint16_t* row = nullptr;
  ReadF16() = default;
  ReadF16(const PunaMatrix& m, int64_t out)
      : row(static_cast<const uint16_t*>(m.data) + out * m.in) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    a = halves_to_floats(row + k);
    b = halves_to_floats(row + k + kLanes);
  }
  PUNA_INLINE float one(int64_t k) const { return from_f16(row[k]); }
};

struct ReadI8 {
  static constexpr bool kInterleaved = false, kQuantized = true;
  const int8_t* row = nullptr;
  ReadI8() = default;
  ReadI8(const PunaMatrix& m, int64_t out) : row(static_cast<const int8_t*>(m.data) + out * m.in) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    a = bytes_to_floats(row + k);
    b = bytes_to_floats(row + k + kLanes);
  }
  PUNA_INLINE float one(int64_t k) const { return row[k]; }
};

struct ReadU4 {
  static constexpr bool kInterleaved = true, kQuantized = true;
  const uint8_t* row = nullptr;
  ReadU4() = default;
  ReadU4(const PunaMatrix& m, int64_t out)
      : row(static_cast<const uint8_t*>(m.data) + out * ((m.in + 1) / 2)) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    Words bytes = bytes_to_words(row + k / 2);
    a = __builtin_convertvector(Ints(bytes & 15), Floats);
    b = __builtin_convertvector(Ints(bytes >> 4), Floats);
  }
  PUNA_INLINE float one(int64_t k) const { return row[k / 2] >> (k % 2 * 4) & 15; }
};

struct ReadF8 {
  static constexpr bool kInterleaved = false, kQuantized = false;
  const uint8_t* row = nullptr;
  ReadF8() = default;
  ReadF8(const PunaMatrix& m, int64_t out) : row(static_cast<const uint8_t*>(m.data) + out * m.in) {}
  PUNA_INLINE void step(int64_t k, Floats& a, Floats& b) const {
    a = float8_to_floats(row + k);
    b = float8_to_floats(row + k + kLanes);
  }
  PUNA_INLINE float one(int64_t k) const { return from_float8(row[k]); }
};

template <typename Read>
constexpr bool kScaled = std::is_same<Read, ReadF8>::value;

// The input that stands at place i of a row whose steps are interleaved, up to the last whole step.
PUNA_INLINE int64_t interleaved(int64_t i) {
  int64_t within = i % kStep;
  return i - within + within % kLanes * 2 + within / kLanes;
}

// What is added to a weight's number before scaling: without minima, 4 bits stand for q - 8.
PUNA_INLINE float centre(const PunaMatrix& m) {
  return m.kind == PUNA_U4 && m.low == nullptr ? -8.0f : 0.0f;
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_WEIGHTS_H_
