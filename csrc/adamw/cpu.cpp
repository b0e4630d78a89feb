// adamw_ on a CPU: stretches of the tensors, widened to fp32, updated and rounded back. Bit for bit the reference of r1mega/ops/adamw.py.

#include "op.h"

#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kStretch = 1024;  // numbers at once: their fp32 forms stay in the first-level cache
constexpr int64_t kChunk = 16384;   // numbers a thread takes at least

// To the nearest, ties to even, NaN as torch's: written so that compilers vectorise it.
inline uint16_t rounded(float x) {
  const uint32_t bits = c10::bit_cast<uint32_t>(x);
  const uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : up);
}

inline float widened(uint16_t bits) { return c10::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// `held` or, for bf16, `wide` filled with its numbers.
float* widen(void* held, bool bf16, int64_t from, int64_t count, float* wide) {
  if (!bf16) return static_cast<float*>(held) + from;
  const auto* bits = static_cast<const uint16_t*>(held) + from;
  for (int64_t i = 0; i < count; ++i) wide[i] = widened(bits[i]);
  return wide;
}

void round_back(const float* wide, void* held, int64_t from, int64_t count) {
  auto* bits = static_cast<uint16_t*>(held) + from;
  for (int64_t i = 0; i < count; ++i) bits[i] = rounded(wide[i]);
}

struct Held {
  void *param, *grad, *exp_avg, *exp_avg_sq, *copy;
  int64_t count;
};

void update(const Held& held, bool bf16_param, bool bf16_grad, bool bf16_moments, const AdamwNumbers& n, int64_t begin, int64_t end) {
  float wide[4][kStretch];
  for (int64_t from = begin; from < end; from += kStretch) {
    const int64_t count = std::min(kStretch, end - from);
    float* __restrict__ p = widen(held.param, bf16_param, from, count, wide[0]);
    const float* __restrict__ g = widen(held.grad, bf16_grad, from, count, wide[1]);
    float* __restrict__ m = widen(held.exp_avg, bf16_moments, from, count, wide[2]);
    float* __restrict__ v = widen(held.exp_avg_sq, bf16_moments, from, count, wide[3]);
    for (int64_t i = 0; i < count; ++i) {
      const float grad = n.scales ? g[i] * n.grad_scale : g[i];
      m[i] = m[i] * n.beta1 + grad * n.rest1;
      v[i] = v[i] * n.beta2 + grad * grad * n.rest2;
      p[i] = p[i] * n.keep - m[i] * n.step_size / (std::sqrt(v[i]) * n.inverse_root + n.eps);
    }
    if (bf16_param) round_back(p, held.param, from, count);
    if (bf16_moments) {
      round_back(m, held.exp_avg, from, count);
      round_back(v, held.exp_avg_sq, from, count);
    }
    if (held.copy) round_back(p, held.copy, from, count);
  }
}

void adamw_cpu(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList copies,
    const at::Tensor& step, double lr, double beta1, double beta2, double eps, double weight_decay, std::optional<double> grad_scale) {
  check_adamw(params, grads, exp_avgs, exp_avg_sqs, copies, step);
  if (params.empty()) return;
  const AdamwRates rates{lr, beta1, beta2, eps, weight_decay, grad_scale};
  AdamwNumbers numbers = adamw_numbers(rates);
  const double now = step.scalar_type() == at::kLong ? static_cast<double>(*step.const_data_ptr<int64_t>()) : *step.const_data_ptr<float>();
  correct_bias(lr, beta1, beta2, now, &numbers.step_size, &numbers.inverse_root);
  const bool bf16_param = params[0].scalar_type() == at::kBFloat16, bf16_grad = grads[0].scalar_type() == at::kBFloat16;
  const bool bf16_moments = exp_avgs[0].scalar_type() == at::kBFloat16;
  std::vector<at::Tensor> contiguous;  // gradients that are not keep a contiguous form alive here
  std::vector<Held> held;
  std::vector<int64_t> chunks{0};  // before each tensor
  for (size_t i = 0; i < params.size(); ++i) {
    contiguous.push_back(grads[i].contiguous());
    held.push_back(
        {params[i].mutable_data_ptr(), const_cast<void*>(contiguous.back().const_data_ptr()), exp_avgs[i].mutable_data_ptr(),
         exp_avg_sqs[i].mutable_data_ptr(), copies.empty() ? nullptr : copies[i].mutable_data_ptr(), params[i].numel()});
    chunks.push_back(chunks.back() + (params[i].numel() + kChunk - 1) / kChunk);
  }
  at::parallel_for(0, chunks.back(), 1, [&](int64_t first, int64_t last) {
    auto tensor = std::upper_bound(chunks.begin(), chunks.end(), first) - chunks.begin() - 1;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      while (chunk >= chunks[tensor + 1]) ++tensor;
      const int64_t begin = (chunk - chunks[tensor]) * kChunk;
      update(held[tensor], bf16_param, bf16_grad, bf16_moments, numbers, begin, std::min(begin + kChunk, held[tensor].count));
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) { m.impl("adamw_", adamw_cpu); }

}  // namespace r1mega
