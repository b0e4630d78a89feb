// row_map: the checks that the kernels of all devices share. The contract is the docstring of r1mega/ops/row_map.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

namespace r1mega {

struct RowMapSizes {
  int64_t tokens;   // T
  int64_t experts;  // E
};

inline RowMapSizes check_row_map(const at::Tensor& routing_map, int64_t num_rows, int64_t width, int64_t multiple) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // `ends` are int32
  TORCH_CHECK_VALUE(routing_map.dim() == 2, "row_map: expected routing_map [T, E], got ", routing_map.dim(), " dimensions");
  TORCH_CHECK_VALUE(
      routing_map.scalar_type() == at::kBool, "row_map: expected routing_map of bool, got ", routing_map.scalar_type());
  TORCH_CHECK_VALUE(
      num_rows >= 0 && width >= 0, "row_map: expected sizes of at least 0, got num_rows ", num_rows, " and width ", width);
  TORCH_CHECK_VALUE(multiple >= 1, "row_map: expected a multiple of at least 1, got ", multiple);
  TORCH_CHECK_VALUE(
      num_rows <= kMost && multiple <= kMost && routing_map.size(0) <= kMost,
      "row_map: expected tokens, rows and multiple below 2^31, got ", routing_map.size(0), ", ", num_rows, " and ", multiple);
  return {routing_map.size(0), routing_map.size(1)};
}

inline int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace r1mega
