// Many rows times any matrix: as pairs of bfloat16, in whole numbers or as floats, whichever a set of
// instructions is best at.

#ifndef PUNA_MANY_H_
#define PUNA_MANY_H_

#include "many_bf16.h"

namespace puna {
namespace PUNA_ISA {

inline int64_t any_scratch(const PunaMatrix& m, int32_t x_kind, int64_t rows) {
  bool pairs = is_bf16(m, x_kind) || is_whole(m, x_kind);
  return pairs ? whole_scratch(m.in, rows) : many_scratch(m, rows);
}

inline void any_pack(const PunaMatrix& m, const void* x, int32_t x_kind, int64_t rows,
                     int64_t tile, float* scratch) {
  if (is_bf16(m, x_kind))
    pack_bf16(x, rows, m.in, tile, m.low != nullptr, scratch);
  else if (is_whole(m, x_kind))
    pack_whole<kBlock>(x, x_kind, rows, m.in, tile, m.kind == PUNA_U4, m.low != nullptr, nullptr,
                       scratch);
  else
    many_pack(m, x, x_kind, rows, tile, scratch);
}

inline void any_many(const PunaMatrix& m, int32_t x_kind, const float* scratch, int64_t rows,
                     int64_t begin, int64_t end, float* y) {
  auto way = is_bf16(m, x_kind) ? many_bf16 : is_whole(m, x_kind) ? many_whole : many;
  way(m, scratch, rows, begin, end, y);
}

inline int64_t any_back_scratch(const PunaMatrix& m, int32_t y_kind, int64_t rows) {
  bool pairs = is_bf16_back(m, y_kind) || is_whole_back(m, y_kind);
  return pairs ? whole_scratch(m.out, rows) : back_scratch(m, rows);
}

inline void any_back_pack(const PunaMatrix& m, const void* y, int32_t y_kind, int64_t rows,
                          int64_t tile, float* scratch) {
  if (is_bf16_back(m, y_kind))
    pack_bf16(y, rows, m.out, tile, false, scratch);
  else if (is_whole_back(m, y_kind))
    pack_whole<kBackShared>(y, y_kind, rows, m.out, tile, false, false, &m, scratch);
  else
    back_pack(m, y, y_kind, rows, tile, scratch);
}

inline void any_back(const PunaMatrix& m, int32_t y_kind, const float* scratch, int64_t rows,
                     int64_t begin, int64_t end, float* x) {
  auto way = is_bf16_back(m, y_kind) ? back_bf16 : is_whole_back(m, y_kind) ? back_whole : back;
  way(m, scratch, rows, begin, end, x);
}

}  // namespace PUNA_ISA
}  // namespace puna

#endif  // PUNA_MANY_H_
