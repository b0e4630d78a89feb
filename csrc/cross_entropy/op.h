// cross_entropy and cross_entropy_backward_: the checks that all devices share.
//
// The contract (formula, accumulation) is the docstring of r1mega/ops/cross_entropy.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>

namespace r1mega {

struct LogitSizes {
  int64_t tokens;   // T
  int64_t columns;  // V
  int64_t stride;   // numbers from one token's logits to the next's
};

inline LogitSizes check_cross_entropy(const char* name, const at::Tensor& logits, const at::Tensor& targets) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.numel() == 0), name,
                    ": expected logits [T, V] with neighbours side by side, got ", logits.sizes(), " with strides ", logits.strides());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, name,
                    ": expected logits of bfloat16, float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong, name,
                    ": expected targets [", logits.size(0), "] of int64, got ", targets.sizes(), " of ", targets.scalar_type());
  TORCH_CHECK_VALUE(targets.device() == logits.device(), name, ": expected all on ", logits.device(), ", got ", targets.device());
  return {logits.size(0), logits.size(1), logits.stride(0)};
}

inline at::ScalarType wide_type(const at::Tensor& logits) { return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline LogitSizes check_cross_entropy_backward(
    const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& log_sum, const at::Tensor& grad) {
  const LogitSizes sizes = check_cross_entropy("cross_entropy_backward_", logits, targets);
  for (const at::Tensor& one : {log_sum, grad}) {
    TORCH_CHECK_VALUE(
        one.dim() == 1 && one.size(0) == sizes.tokens && one.scalar_type() == wide_type(logits) && one.device() == logits.device(),
        "cross_entropy_backward_: expected log_sum and grad [", sizes.tokens, "] of ", wide_type(logits), " on ", logits.device(), ", got ",
        one.sizes(), " of ", one.scalar_type(), " on ", one.device());
  }
  return sizes;
}

}  // namespace r1mega
