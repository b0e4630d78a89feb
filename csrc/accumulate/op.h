// accumulate_product_ and accumulate_grouped_: the checks that all devices share.
//
// The contract (formula, accumulation, rounding) is the docstring of r1mega/ops/accumulate.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

// `name` is the op's own, for the messages.
inline void check_operands(const char* name, const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat, name, ": expected out of float32, got ", out.scalar_type());
  TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2, name, ": expected matrices left [M, N] and right [M, K], got ",
                    left.sizes(), " and ", right.sizes());
  TORCH_CHECK_VALUE(left.size(0) == right.size(0), name, ": expected as many rows in right as in left, ", left.size(0), ", got ",
                    right.size(0));
  TORCH_CHECK_VALUE(
      left.scalar_type() == right.scalar_type() && (left.scalar_type() == at::kFloat || left.scalar_type() == at::kBFloat16), name,
      ": expected left and right both of float32 or both of bfloat16, got ", left.scalar_type(), " and ", right.scalar_type());
  TORCH_CHECK_VALUE(left.device() == out.device() && right.device() == out.device(), name, ": expected all on ", out.device(),
                    ", got ", left.device(), " and ", right.device());
}

inline void check_accumulate_product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  check_operands("accumulate_product_", out, left, right);
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == left.size(1) && out.size(1) == right.size(1),
                    "accumulate_product_: expected out of [", left.size(1), ", ", right.size(1), "], got ", out.sizes());
}

struct GroupedSizes {
  int64_t experts;  // e
  int64_t rows;     // R
  int64_t left;     // N
  int64_t right;    // K
};

inline GroupedSizes check_accumulate_grouped(
    const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends) {
  check_operands("accumulate_grouped_", out, left, right);
  TORCH_CHECK_VALUE(ends.dim() == 1 && ends.scalar_type() == at::kInt, "accumulate_grouped_: expected ends [e] of int32, got ",
                    ends.sizes(), " of ", ends.scalar_type());
  TORCH_CHECK_VALUE(ends.device() == out.device(), "accumulate_grouped_: expected ends on ", out.device(), ", got ", ends.device());
  TORCH_CHECK_VALUE(
      out.dim() == 3 && out.size(0) == ends.size(0) && out.size(1) == left.size(1) && out.size(2) == right.size(1),
      "accumulate_grouped_: expected out of [", ends.size(0), ", ", left.size(1), ", ", right.size(1), "], got ", out.sizes());
  TORCH_CHECK_VALUE(out.is_contiguous(), "accumulate_grouped_: expected out to be contiguous, got strides ", out.strides());
  return {ends.size(0), left.size(0), left.size(1), right.size(1)};
}

}  // namespace r1mega
