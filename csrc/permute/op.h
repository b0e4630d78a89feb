// permute, unpermute and what belongs to them: the checks that the kernels of all devices share.
//
// The contract (formula, order, accumulation) is the docstring of r1mega/ops/permute.py. Sizes are int64 throughout.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

struct MoveSizes {
  int64_t tokens;  // T
  int64_t rows;    // R
  int64_t width;   // most rows of a token
  int64_t hidden;  // D
};

// What every movement is called with: the map both ways, on the device of the numbers that move.
inline MoveSizes check_move(
    const char* op, const at::Tensor& moved, const at::Tensor& row_tokens, const at::Tensor& token_rows) {
  TORCH_CHECK_VALUE(
      row_tokens.dim() == 1 && row_tokens.scalar_type() == at::kLong, op, ": expected row_tokens [R] of int64, got ",
      row_tokens.sizes(), " of ", row_tokens.scalar_type());
  TORCH_CHECK_VALUE(
      token_rows.dim() == 2 && token_rows.scalar_type() == at::kLong, op, ": expected token_rows [T, width] of int64, got ",
      token_rows.sizes(), " of ", token_rows.scalar_type());
  TORCH_CHECK_VALUE(
      row_tokens.device() == moved.device() && token_rows.device() == moved.device(), op, ": expected all on ", moved.device(),
      ", got row_tokens on ", row_tokens.device(), " and token_rows on ", token_rows.device());
  return {token_rows.size(0), row_tokens.size(0), token_rows.size(1), moved.size(1)};
}

inline MoveSizes check_tokens(
    const char* op, const at::Tensor& tokens, const at::Tensor& row_tokens, const at::Tensor& token_rows) {
  TORCH_CHECK_VALUE(tokens.dim() == 2, op, ": expected tokens [T, D], got ", tokens.dim(), " dimensions");
  const MoveSizes sizes = check_move(op, tokens, row_tokens, token_rows);
  TORCH_CHECK_VALUE(
      tokens.size(0) == sizes.tokens, op, ": expected a row of token_rows a token, ", tokens.size(0), ", got ", sizes.tokens);
  return sizes;
}

inline void check_row_probs(const char* op, const at::Tensor& rows, const at::Tensor& row_probs) {
  TORCH_CHECK_VALUE(
      row_probs.dim() == 1 && row_probs.size(0) == rows.size(0) && row_probs.is_floating_point(), op, ": expected row_probs of [",
      rows.size(0), "] and a floating type, got ", row_probs.sizes(), " of ", row_probs.scalar_type());
  TORCH_CHECK_VALUE(
      row_probs.device() == rows.device(), op, ": expected all on ", rows.device(), ", got row_probs on ", row_probs.device());
}

inline MoveSizes check_rows(
    const char* op, const at::Tensor& rows, const at::Tensor& row_tokens, const at::Tensor& token_rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2, op, ": expected rows [R, D], got ", rows.dim(), " dimensions");
  TORCH_CHECK_VALUE(rows.is_floating_point(), op, ": expected rows of a floating type, got ", rows.scalar_type());
  const MoveSizes sizes = check_move(op, rows, row_tokens, token_rows);
  TORCH_CHECK_VALUE(sizes.rows == rows.size(0), op, ": expected row_tokens of [", rows.size(0), "], got ", row_tokens.sizes());
  return sizes;
}

inline MoveSizes check_unpermute_backward(
    const at::Tensor& grad_tokens, const at::Tensor& rows, const at::Tensor& row_tokens, const at::Tensor& token_rows,
    const at::Tensor& row_probs) {
  const MoveSizes sizes = check_rows("unpermute_backward", rows, row_tokens, token_rows);
  check_row_probs("unpermute_backward", rows, row_probs);
  TORCH_CHECK_VALUE(
      grad_tokens.dim() == 2 && grad_tokens.size(0) == sizes.tokens && grad_tokens.size(1) == sizes.hidden &&
          grad_tokens.scalar_type() == rows.scalar_type() && grad_tokens.device() == rows.device(),
      "unpermute_backward: expected grad_tokens [", sizes.tokens, ", ", sizes.hidden, "] like rows, got ", grad_tokens.sizes(),
      " of ", grad_tokens.scalar_type());
  return sizes;
}

// Indices of a row: its token and its expert.
inline void check_row_indices(
    const char* op, const at::Tensor& moved, const at::Tensor& row_tokens, const at::Tensor& row_experts) {
  TORCH_CHECK_VALUE(
      row_tokens.dim() == 1 && row_tokens.scalar_type() == at::kLong && row_experts.scalar_type() == at::kInt &&
          row_experts.sizes() == row_tokens.sizes(),
      op, ": expected row_tokens [R] of int64 and row_experts [R] of int32, got ", row_tokens.sizes(), " of ",
      row_tokens.scalar_type(), " and ", row_experts.sizes(), " of ", row_experts.scalar_type());
  TORCH_CHECK_VALUE(
      row_tokens.device() == moved.device() && row_experts.device() == moved.device(), op, ": expected all on ", moved.device(),
      ", got row_tokens on ", row_tokens.device(), " and row_experts on ", row_experts.device());
}

inline void check_permute_probs(const at::Tensor& probs, const at::Tensor& row_tokens, const at::Tensor& row_experts) {
  TORCH_CHECK_VALUE(probs.dim() == 2, "permute_probs: expected probs [T, E], got ", probs.dim(), " dimensions");
  check_row_indices("permute_probs", probs, row_tokens, row_experts);
}

inline void check_permute_probs_backward(
    const at::Tensor& grad, const at::Tensor& row_tokens, const at::Tensor& row_experts, int64_t num_tokens, int64_t num_experts) {
  check_row_indices("permute_probs_backward", grad, row_tokens, row_experts);
  TORCH_CHECK_VALUE(
      grad.sizes() == row_tokens.sizes(), "permute_probs_backward: expected grad_row_probs of ", row_tokens.sizes(), ", got ",
      grad.sizes());
  TORCH_CHECK_VALUE(
      num_tokens >= 0 && num_experts >= 0, "permute_probs_backward: expected sizes of at least 0, got ", num_tokens, " tokens and ",
      num_experts, " experts");
}

}  // namespace r1mega
