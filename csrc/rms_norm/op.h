// RMSNorm: what the kernels of all devices are called with, the checks that they share, and the order of their sums.
//
// The contract is the docstring of r1mega/ops/rms_norm.py. Sums have one order on all devices, so that they have the same bits:
// over a row, 8 neighbours (halves first), then 32 of those (halves first), then the row's pieces of 256 (halves first, filled up with
// zeros to 64); over rows, 8 one after the other, 4 of those one after the other, then those groups of 32 rows: every 32nd one after
// the other, and the 32 sums (halves first).

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

namespace r1mega {

constexpr int kPiece = 256;       // numbers of a row that one warp sums
constexpr int kMostPieces = 64;
constexpr int kRowRun = 8;        // rows summed one after the other
constexpr int kRowRuns = 4;       // runs of a group
constexpr int kRowGroup = kRowRun * kRowRuns;
constexpr int kGroupLanes = 32;   // sums over groups at a time

// Leading dimensions as one: [rows, width], of any distance between rows and neighbours beside each other.
inline at::Tensor as_rows(const at::Tensor& x) {
  const at::Tensor lined = x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
  const at::Tensor rows = lined.reshape({x.numel() / x.size(-1), x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

inline void check_rms_norm(const char* op, const at::Tensor& x, const at::Tensor& weight, bool doubles) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": expected x [..., D], got no dimension");
  TORCH_CHECK_VALUE(
      dtype == at::kBFloat16 || dtype == at::kFloat || (doubles && dtype == at::kDouble), op, ": expected x of bf16",
      doubles ? ", fp32 or fp64" : " or fp32", ", got ", dtype);
  TORCH_CHECK_VALUE(
      x.size(-1) >= 1 && x.size(-1) <= kPiece * kMostPieces, op, ": expected a width of 1 to ", kPiece * kMostPieces, ", got ",
      x.size(-1));
  TORCH_CHECK_VALUE(
      weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": expected weight [", x.size(-1), "], got ", weight.sizes());
  TORCH_CHECK_VALUE(
      weight.is_floating_point() && weight.element_size() > 1 && (doubles || weight.scalar_type() != at::kDouble), op,
      ": expected weight of bf16 or fp32, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(
      weight.device() == x.device(), op, ": expected weight on the device of x, ", x.device(), ", got ", weight.device());
}

inline void check_rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd) {
  check_rms_norm("rms_norm_backward", x, weight, true);
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "rms_norm_backward: expected grad ", x.sizes(), " of ",
      x.scalar_type(), ", got ", grad.sizes(), " of ", grad.scalar_type());
  const auto wanted = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(
      rstd.numel() == x.numel() / x.size(-1) && rstd.scalar_type() == wanted, "rms_norm_backward: expected rstd ",
      x.sizes().slice(0, x.dim() - 1), " of ", wanted, ", got ", rstd.sizes(), " of ", rstd.scalar_type());
}

inline at::Tensor rstd_like(const at::Tensor& x) {
  return at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

}  // namespace r1mega
