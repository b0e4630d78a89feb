// swiglu and its relatives: what the kernels of all devices are called with, and the checks that they share.
//
// The contract (formulas, accumulation, rounding) is in the docstrings of r1mega/ops/swiglu.py. Sizes are int64 throughout.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>

#include "../quantize/op.h"

namespace r1mega {

struct SwigluSizes {
  int64_t rows;   // R
  int64_t width;  // F
};

inline void check_probs(const char* op, const at::Tensor& hidden, const std::optional<at::Tensor>& probs) {
  if (!probs.has_value()) return;
  TORCH_CHECK_VALUE(
      probs->dim() == 1 && probs->size(0) == hidden.size(0), op, ": expected probs [", hidden.size(0), "], one a row, got ",
      probs->sizes());
  TORCH_CHECK_VALUE(probs->is_floating_point(), op, ": expected probs of a floating type, got ", probs->scalar_type());
  TORCH_CHECK_VALUE(
      probs->device() == hidden.device(), op, ": expected probs on ", hidden.device(), " with hidden, got ", probs->device());
}

inline SwigluSizes check_hidden(const char* op, const at::Tensor& hidden) {
  TORCH_CHECK_VALUE(hidden.dim() == 2, op, ": expected hidden [R, 2F], got ", hidden.dim(), " dimensions");
  TORCH_CHECK_VALUE(
      hidden.size(1) % 2 == 0, op, ": expected hidden of an even width, gate columns then up columns, got ", hidden.size(1));
  return {hidden.size(0), hidden.size(1) / 2};
}

inline void check_grad(const char* op, const at::Tensor& grad, const SwigluSizes& sizes, const at::Tensor& hidden) {
  TORCH_CHECK_VALUE(
      grad.dim() == 2 && grad.size(0) == sizes.rows && grad.size(1) == sizes.width, op, ": expected grad [", sizes.rows, ", ",
      sizes.width, "], got ", grad.sizes());
  TORCH_CHECK_VALUE(
      grad.device() == hidden.device(), op, ": expected grad on ", hidden.device(), " with hidden, got ", grad.device());
}

inline SwigluSizes check_swiglu(const at::Tensor& hidden, const std::optional<at::Tensor>& probs) {
  const SwigluSizes sizes = check_hidden("swiglu", hidden);
  check_probs("swiglu", hidden, probs);
  return sizes;
}

inline SwigluSizes check_swiglu_backward(
    const at::Tensor& grad, const at::Tensor& hidden, const std::optional<at::Tensor>& probs) {
  const SwigluSizes sizes = check_hidden("swiglu_backward", hidden);
  check_probs("swiglu_backward", hidden, probs);
  check_grad("swiglu_backward", grad, sizes, hidden);
  TORCH_CHECK_VALUE(
      grad.scalar_type() == hidden.scalar_type(), "swiglu_backward: expected grad of hidden's dtype ", hidden.scalar_type(),
      ", got ", grad.scalar_type());
  return sizes;
}

// hidden in bf16, or in E4M3 with its row scales
inline SwigluSizes check_swiglu_quantize(
    const char* op, const at::Tensor& hidden, const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& probs) {
  const SwigluSizes sizes = check_hidden(op, hidden);
  check_probs(op, hidden, probs);
  TORCH_CHECK_VALUE(sizes.width % kBlock == 0, op, ": expected F, half of hidden's width, a multiple of ", kBlock, ", got ", sizes.width);
  if (!scales.has_value()) {
    TORCH_CHECK_VALUE(
        hidden.scalar_type() == at::kBFloat16, op, ": expected hidden of BFloat16, or of Float8_e4m3fn with its scales, got ",
        hidden.scalar_type());
    return sizes;
  }
  TORCH_CHECK_VALUE(
      hidden.scalar_type() == at::kFloat8_e4m3fn, op, ": expected hidden of Float8_e4m3fn with hidden_scales, got ",
      hidden.scalar_type());
  TORCH_CHECK_VALUE(
      scales->dim() == 2 && scales->size(0) == sizes.rows && scales->size(1) == 2 * sizes.width / kBlock, op,
      ": expected hidden_scales [", sizes.rows, ", ", 2 * sizes.width / kBlock, "], got ", scales->sizes());
  TORCH_CHECK_VALUE(
      scales->scalar_type() == at::kFloat && scales->device() == hidden.device(), op, ": expected hidden_scales of Float on ",
      hidden.device(), ", got ", scales->scalar_type(), " on ", scales->device());
  return sizes;
}

inline SwigluSizes check_swiglu_backward_quantize(
    const char* op, const at::Tensor& grad, const at::Tensor& hidden, const std::optional<at::Tensor>& scales,
    const std::optional<at::Tensor>& probs) {
  const SwigluSizes sizes = check_swiglu_quantize(op, hidden, scales, probs);
  check_grad(op, grad, sizes, hidden);
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kBFloat16, op, ": expected grad of BFloat16, got ", grad.scalar_type());
  return sizes;
}

// Probabilities as the kernels read them, or none.
inline std::optional<at::Tensor> probs_as(const std::optional<at::Tensor>& probs, at::ScalarType dtype) {
  if (!probs.has_value()) return std::nullopt;
  return probs->to(dtype).contiguous();
}

// What a backward returns for the probabilities: their gradient in their dtype, or an empty tensor.
inline at::Tensor grad_probs_as(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& probs, const at::Tensor& hidden) {
  if (!probs.has_value()) return at::empty({0}, hidden.options().dtype(at::kFloat));
  return grad->to(probs->scalar_type());
}

}  // namespace r1mega
