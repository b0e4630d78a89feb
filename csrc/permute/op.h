// permute and unpermute: what the kernels of all devices are called with, and the checks that they share.
//
// The contract (formula, order, accumulation) is the docstring of r1mega/ops/permute.py. Sizes are int64 throughout.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

struct PermuteSizes {
  int64_t tokens;   // T
  int64_t hidden;   // D
  int64_t experts;  // E
};

inline PermuteSizes check_permute(
    const at::Tensor& tokens, const at::Tensor& probs, const at::Tensor& routing_map, int64_t num_rows, int64_t width) {
  TORCH_CHECK_VALUE(tokens.dim() == 2, "permute: expected tokens [T, D], got ", tokens.dim(), " dimensions");
  TORCH_CHECK_VALUE(routing_map.dim() == 2, "permute: expected routing_map [T, E], got ", routing_map.dim(), " dimensions");
  TORCH_CHECK_VALUE(
      routing_map.scalar_type() == at::kBool, "permute: expected routing_map of bool, got ", routing_map.scalar_type());
  TORCH_CHECK_VALUE(
      probs.sizes() == routing_map.sizes(), "permute: expected probs of routing_map's shape ", routing_map.sizes(), ", got ",
      probs.sizes());
  TORCH_CHECK_VALUE(
      routing_map.size(0) == tokens.size(0), "permute: expected a row of routing_map a token, ", tokens.size(0), ", got ",
      routing_map.size(0));
  TORCH_CHECK_VALUE(num_rows >= 0 && width >= 0, "permute: expected sizes of at least 0, got num_rows ", num_rows, " and width ", width);
  return {tokens.size(0), tokens.size(1), routing_map.size(1)};
}

inline void check_unpermute(const at::Tensor& rows, const at::Tensor& token_rows, const at::Tensor& row_tokens) {
  TORCH_CHECK_VALUE(rows.dim() == 2, "unpermute: expected rows [R, D], got ", rows.dim(), " dimensions");
  TORCH_CHECK_VALUE(rows.is_floating_point(), "unpermute: expected rows of a floating type, got ", rows.scalar_type());
  TORCH_CHECK_VALUE(
      token_rows.dim() == 2 && token_rows.scalar_type() == at::kLong, "unpermute: expected token_rows [T, width] of int64, got ",
      token_rows.sizes(), " of ", token_rows.scalar_type());
  TORCH_CHECK_VALUE(
      row_tokens.dim() == 1 && row_tokens.size(0) == rows.size(0), "unpermute: expected row_tokens of [", rows.size(0), "], got ",
      row_tokens.sizes());
}

}  // namespace r1mega
