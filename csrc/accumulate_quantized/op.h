// accumulate_grouped_quantized_: the checks that all devices share.
//
// The contract (formula, accumulation, layouts) is the docstring of r1mega/ops/accumulate_quantized.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../common/fp8.h"

namespace r1mega {

struct QuantizedSizes {
  int64_t experts;  // e
  int64_t rows;     // R, a multiple of kBlock
  int64_t left;     // N
  int64_t right;    // K
};

inline QuantizedSizes check_accumulate_quantized(
    const at::Tensor& out, const at::Tensor& left, const at::Tensor& left_scales, const at::Tensor& right,
    const at::Tensor& right_scales, const at::Tensor& ends) {
  constexpr const char* name = "accumulate_grouped_quantized_";
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat, name, ": expected out of float32, got ", out.scalar_type());
  TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2, name, ": expected matrices left [N, R] and right [K, R], got ", left.sizes(),
                    " and ", right.sizes());
  TORCH_CHECK_VALUE(left.scalar_type() == at::kFloat8_e4m3fn && right.scalar_type() == at::kFloat8_e4m3fn, name,
                    ": expected left and right of float8_e4m3fn, got ", left.scalar_type(), " and ", right.scalar_type());
  const int64_t N = left.size(0), K = right.size(0), R = left.size(1);
  TORCH_CHECK_VALUE(right.size(1) == R, name, ": expected as many columns in right as in left, ", R, ", got ", right.size(1));
  TORCH_CHECK_VALUE(R % kBlock == 0, name, ": expected a multiple of ", kBlock, " columns in left and right, got ", R);
  const auto check_scales = [&](const char* which, const at::Tensor& scales, int64_t width) {
    const std::vector<int64_t> sizes{width, R / kBlock};
    TORCH_CHECK_VALUE(scales.scalar_type() == at::kFloat && scales.sizes() == at::IntArrayRef(sizes), name, ": expected ", which,
                      " ", at::IntArrayRef(sizes), " of float32, got ", scales.sizes(), " of ", scales.scalar_type());
  };
  check_scales("left_scales", left_scales, N);
  check_scales("right_scales", right_scales, K);
  TORCH_CHECK_VALUE(ends.dim() == 1 && ends.scalar_type() == at::kInt, name, ": expected ends [e] of int32, got ", ends.sizes(), " of ",
                    ends.scalar_type());
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(0) == ends.size(0) && out.size(1) == N && out.size(2) == K, name,
                    ": expected out of [", ends.size(0), ", ", N, ", ", K, "], got ", out.sizes());
  TORCH_CHECK_VALUE(out.is_contiguous(), name, ": expected out to be contiguous, got strides ", out.strides());
  for (const at::Tensor& one : {left, left_scales, right, right_scales, ends})
    TORCH_CHECK_VALUE(one.device() == out.device(), name, ": expected all on ", out.device(), ", got ", one.device());
  return {ends.size(0), R, N, K};
}

}  // namespace r1mega
