// cross_entropy on a CPU: in fp32 (fp64 for fp64), threads over tokens.

#include "op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/wide.h"

namespace r1mega {
namespace {

constexpr int64_t kGrain = 16384;  // logits a thread takes at least
constexpr int kLanes = 8;          // sums side by side, so that a row's sum has one order that vectorises

// Below the smallest exponent e^x is 0, where exp_of has a number; NaN stays.
template <typename W>
inline W share_of(W distance) {
  const W value = exp_of(distance);
  return distance != distance ? distance : distance < W(-87) ? (sizeof(W) == 8 ? std::exp(distance) : W(0)) : value;
}

template <typename W>
R1MEGA_WIDE W largest_of(const W* z, int64_t count) {
  W top[kLanes];
  std::fill(top, top + kLanes, -std::numeric_limits<W>::infinity());
  const int64_t even = count / kLanes * kLanes;
  for (int64_t i = 0; i < even; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) top[j] = z[i + j] > top[j] ? z[i + j] : top[j];
  }
  W most = *std::max_element(top, top + kLanes);
  for (int64_t i = even; i < count; ++i) most = z[i] > most ? z[i] : most;
  return most;
}

template <typename W>
R1MEGA_WIDE W sum_of(const W* z, int64_t count, W from) {
  W sums[kLanes] = {};
  const int64_t even = count / kLanes * kLanes;
  for (int64_t i = 0; i < even; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += share_of(z[i + j] - from);
  }
  W sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += sums[j];
  for (int64_t i = even; i < count; ++i) sum += share_of(z[i] - from);
  return sum;
}

template <typename W>
R1MEGA_WIDE void turn(const W* z, W* out, int64_t count, W log_sum, W grad) {
  for (int64_t i = 0; i < count; ++i) out[i] = grad * share_of(z[i] - log_sum);
}

// `visit(number, wide)` with a number of the logits' type and one of the type that is computed in.
template <typename Visit>
void by_type(const at::Tensor& logits, Visit visit) {
  switch (logits.scalar_type()) {
    case at::kBFloat16: return visit(c10::BFloat16(), float());
    case at::kFloat: return visit(float(), float());
    default: return visit(double(), double());
  }
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_cpu(const at::Tensor& logits, const at::Tensor& targets_any, int64_t first) {
  const LogitSizes sizes = check_cross_entropy("cross_entropy", logits, targets_any);
  const at::Tensor targets = targets_any.contiguous();
  const auto options = logits.options().dtype(wide_type(logits));
  at::Tensor log_sum = at::empty({sizes.tokens}, options), target = at::empty({sizes.tokens}, options);
  by_type(logits, [&](auto number, auto wide) {
    using T = decltype(number);
    using W = decltype(wide);
    const T* data = static_cast<const T*>(logits.const_data_ptr());
    const int64_t* wanted = targets.const_data_ptr<int64_t>();
    W *sums = log_sum.mutable_data_ptr<W>(), *own = target.mutable_data_ptr<W>();
    at::parallel_for(0, sizes.tokens, std::max<int64_t>(1, kGrain / sizes.columns), [&](int64_t begin, int64_t end) {
      std::vector<W> buffer(std::is_same_v<T, W> ? 0 : sizes.columns);
      for (int64_t t = begin; t < end; ++t) {
        const W* z = widened(data + t * sizes.stride, buffer.data(), sizes.columns);
        const W most = largest_of(z, sizes.columns), from = most == -std::numeric_limits<W>::infinity() ? W(0) : most;
        // an infinite logit leaves no distribution: NaN
        sums[t] = most == std::numeric_limits<W>::infinity() ? most * W(0) : from + std::log(sum_of(z, sizes.columns, from));
        const int64_t place = wanted[t] - first;
        own[t] = place >= 0 && place < sizes.columns ? z[place] : W(0);
      }
    });
  });
  return {log_sum, target};
}

void cross_entropy_backward_cpu(
    at::Tensor& logits, const at::Tensor& targets_any, const at::Tensor& log_sum_any, const at::Tensor& grad_any, int64_t first) {
  const LogitSizes sizes = check_cross_entropy_backward(logits, targets_any, log_sum_any, grad_any);
  const at::Tensor targets = targets_any.contiguous(), log_sum = log_sum_any.contiguous(), grad = grad_any.contiguous();
  by_type(logits, [&](auto number, auto wide) {
    using T = decltype(number);
    using W = decltype(wide);
    T* data = static_cast<T*>(logits.mutable_data_ptr());
    const int64_t* wanted = targets.const_data_ptr<int64_t>();
    const W *sums = log_sum.const_data_ptr<W>(), *grads = grad.const_data_ptr<W>();
    at::parallel_for(0, sizes.tokens, std::max<int64_t>(1, kGrain / sizes.columns), [&](int64_t begin, int64_t end) {
      std::vector<W> buffer(std::is_same_v<T, W> ? 0 : sizes.columns);
      for (int64_t t = begin; t < end; ++t) {
        T* row = data + t * sizes.stride;
        const W* z = widened(row, buffer.data(), sizes.columns);
        W* out = place_for(row, buffer.data());
        const int64_t place = wanted[t] - first;
        const bool inside = place >= 0 && place < sizes.columns;
        const W own = inside ? grads[t] * (share_of(z[place] - sums[t]) - W(1)) : W(0);
        turn(z, out, sizes.columns, sums[t], grads[t]);
        if (inside) out[place] = own;
        narrow(out, row, sizes.columns);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_backward_", cross_entropy_backward_cpu);
}

}  // namespace r1mega
