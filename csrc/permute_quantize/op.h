// permute_quantize and its relatives: the checks that the kernels of all devices share. The contract is the docstrings of
// r1mega/ops/permute_quantize.py.

#pragma once

#include "../permute/op.h"
#include "../quantize/op.h"

namespace r1mega {

inline MoveSizes check_permute_quantize(
    const char* op, const at::Tensor& tokens, const at::Tensor& row_tokens, const at::Tensor& token_rows) {
  const MoveSizes sizes = check_tokens(op, tokens, row_tokens, token_rows);
  TORCH_CHECK_VALUE(
      tokens.scalar_type() == at::kBFloat16 || tokens.scalar_type() == at::kFloat,
      op, ": expected tokens of bfloat16 or float32, got ", tokens.scalar_type());
  return sizes;
}

}  // namespace r1mega
