// Quantisation to block-scaled E4M3: what the kernels of all devices are called with, and the checks that they share.
//
// The contract (formula, layouts, special values) is the docstring of r1mega/ops/quantize.py. Sizes are int64 throughout.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <vector>

#include "../common/fp8.h"

namespace r1mega {

inline int64_t blocks_of(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Scales of a matrix [M, K] in the row layout, [M, ceil(K/128)] of strides (1, M4): M4 is M rounded up to a multiple of 4. The caller
// fills what memory holds, [ceil(K/128), M4], entries of the pad with 0, unless `zeros`.
inline at::Tensor row_scales(int64_t M, int64_t K, const at::Tensor& like, bool zeros) {
  const std::vector<int64_t> sizes{blocks_of(K), padded_rows(M)};
  const auto options = like.options().dtype(at::kFloat);
  const at::Tensor memory = zeros ? at::zeros(sizes, options) : at::empty(sizes, options);
  return memory.t().narrow(0, 0, M);
}

inline at::Tensor payload_like(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kFloat8_e4m3fn).memory_format(at::MemoryFormat::Contiguous));
}

inline void check_numbers(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat, op, ": expected x of bf16 or fp32, got ", x.scalar_type());
}

inline void check_matrix(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": expected x [M, K], got ", x.dim(), " dimensions");
  check_numbers(op, x);
}

struct Stack {
  int64_t count;    // matrices
  int64_t rows;     // N
  int64_t columns;  // K
};

inline Stack check_stack(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, op, ": expected x [N, K] or [E, N, K], got ", x.dim(), " dimensions");
  check_numbers(op, x);
  return {x.dim() == 3 ? x.size(0) : 1, x.size(-2), x.size(-1)};
}

inline void check_quantized(const char* op, const at::Tensor& payload, const at::Tensor& scales) {
  TORCH_CHECK_VALUE(payload.dim() == 2, op, ": expected payload [M, K], got ", payload.dim(), " dimensions");
  TORCH_CHECK_VALUE(
      payload.scalar_type() == at::kFloat8_e4m3fn, op, ": expected payload of float8_e4m3fn, got ", payload.scalar_type());
  const std::vector<int64_t> sizes{payload.size(0), blocks_of(payload.size(1))};
  TORCH_CHECK_VALUE(
      scales.scalar_type() == at::kFloat && scales.sizes() == at::IntArrayRef(sizes), op, ": expected scales ", at::IntArrayRef(sizes),
      " of fp32, got ", scales.sizes(), " of ", scales.scalar_type());
  TORCH_CHECK_VALUE(
      scales.device() == payload.device(), op, ": expected scales on the payload's device ", payload.device(), ", got ",
      scales.device());
}

inline void check_dequantize(const at::Tensor& payload, const at::Tensor& scales, at::ScalarType dtype) {
  check_quantized("dequantize_rows", payload, scales);
  TORCH_CHECK_VALUE(
      dtype == at::kBFloat16 || dtype == at::kFloat, "dequantize_rows: expected a dtype of bf16 or fp32, got ", dtype);
}

}  // namespace r1mega
