// adamw_: what the kernels of all devices are called with, and the checks that they share.
//
// The contract (formula, order of roundings) is the docstring of r1mega/ops/adamw.py. Every operation of a step is rounded by itself,
// so that all devices give the same bits: no fused multiply-add.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

namespace r1mega {

struct AdamwRates {
  double lr, beta1, beta2, eps, weight_decay;
  std::optional<double> grad_scale;
};

// The fp32 numbers of a step: each computed in double and rounded once.
struct AdamwNumbers {
  float keep;             // 1 - lr weight_decay
  float beta1, rest1;     // beta1, 1 - beta1
  float beta2, rest2;
  float eps;
  float grad_scale;
  bool scales;            // there is a grad_scale
  float step_size;        // lr / (1 - beta1^step)
  float inverse_root;     // 1 / sqrt(1 - beta2^step)
};

inline AdamwNumbers adamw_numbers(const AdamwRates& rates) {
  AdamwNumbers numbers{};
  numbers.keep = static_cast<float>(1.0 - rates.lr * rates.weight_decay);
  numbers.beta1 = static_cast<float>(rates.beta1);
  numbers.rest1 = static_cast<float>(1.0 - rates.beta1);
  numbers.beta2 = static_cast<float>(rates.beta2);
  numbers.rest2 = static_cast<float>(1.0 - rates.beta2);
  numbers.eps = static_cast<float>(rates.eps);
  numbers.scales = rates.grad_scale.has_value();
  numbers.grad_scale = static_cast<float>(rates.grad_scale.value_or(1.0));
  return numbers;
}

C10_HOST_DEVICE inline void correct_bias(double lr, double beta1, double beta2, double step, float* step_size, float* inverse_root) {
  *step_size = static_cast<float>(lr / (1.0 - pow(beta1, step)));
  *inverse_root = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, step)));
}

inline void check_adamw(
    const at::TensorList& params, const at::TensorList& grads, const at::TensorList& exp_avgs, const at::TensorList& exp_avg_sqs,
    const at::TensorList& copies, const at::Tensor& step) {
  TORCH_CHECK_VALUE(step.numel() == 1 && (step.scalar_type() == at::kFloat || step.scalar_type() == at::kLong),
                    "adamw_: expected step to be one number of float32 or int64, got ", step.sizes(), " of ", step.scalar_type());
  const size_t count = params.size();
  TORCH_CHECK_VALUE(
      grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && (copies.empty() || copies.size() == count),
      "adamw_: expected a grad and two moments a parameter, and as many copies or none, got ", grads.size(), ", ", exp_avgs.size(), ", ",
      exp_avg_sqs.size(), " and ", copies.size(), " for ", count, " parameters");
  if (count == 0) return;
  const auto check = [&](const char* name, const at::TensorList& list, at::ScalarType dtype, bool contiguous) {
    for (size_t i = 0; i < list.size(); ++i) {
      const at::Tensor& one = list[i];
      TORCH_CHECK_VALUE(one.scalar_type() == dtype && (dtype == at::kFloat || dtype == at::kBFloat16), "adamw_: expected all of ", name,
                        " of one dtype, float32 or bfloat16, got ", one.scalar_type(), " at ", i);
      TORCH_CHECK_VALUE(one.numel() == params[i].numel() && one.device() == params[0].device(), "adamw_: expected ", name, "[", i,
                        "] of ", params[i].numel(), " numbers on ", params[0].device(), ", got ", one.numel(), " on ", one.device());
      TORCH_CHECK_VALUE(!contiguous || one.is_contiguous(), "adamw_: expected ", name, " to be contiguous, got strides ", one.strides(),
                        " at ", i);
    }
  };
  check("params", params, params[0].scalar_type(), true);
  check("grads", grads, grads[0].scalar_type(), false);
  check("exp_avgs", exp_avgs, exp_avgs[0].scalar_type(), true);
  check("exp_avg_sqs", exp_avg_sqs, exp_avgs[0].scalar_type(), true);
  check("copies", copies, at::kBFloat16, true);
}

}  // namespace r1mega
