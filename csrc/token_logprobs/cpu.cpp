// token_logprobs on a CPU: the two kernels over a piece of logits, in fp32 (fp64 for fp64).

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>
#include <torch/library.h>

#include <cmath>
#include <type_traits>

namespace r1mega {
namespace {

constexpr int64_t kPieceBytes = 8 << 20;  // what a core's last-level cache holds beside the operands
constexpr int64_t kGrain = 16384;         // logits a thread takes at least

// e^x for x of at most 0 in a form that compilers vectorise, to about 2 units in the last place; 0 below -87, NaN for NaN.
inline float exp_of(float x) {
  const float held = x < -87.0f ? -87.0f : x;
  const float n = held * 1.44269504f - 0.5f;
  const int32_t whole = static_cast<int32_t>(n == n ? n : 0.0f);  // to the nearest, since x is not above 0; NaN has no integer
  const float power = static_cast<float>(whole);
  const float r = (held - power * 0.693145752f) - power * 1.42860677e-6f;  // ln 2 in two parts: the first product is exact
  float sum = 1.0f / 720.0f + r * (1.0f / 5040.0f);
  sum = 1.0f / 120.0f + r * sum;
  sum = 1.0f / 24.0f + r * sum;
  sum = 1.0f / 6.0f + r * sum;
  sum = 0.5f + r * sum;
  sum = 1.0f + r * (1.0f + r * sum);
  const float scale = c10::bit_cast<float>((whole + 127) << 23);
  return x < -87.0f ? 0.0f : sum * scale;
}

inline double exp_of(double x) { return std::exp(x); }

constexpr double kFarBelow = -1000.0;  // e^x is 0 in every type: where a logit is -inf, 0 times its distance is 0

template <typename T>
inline T distance(T logit, T from) {
  const T d = logit - from;
  return d < T(kFarBelow) ? T(kFarBelow) : d;
}

// Eight sums side by side, so that a row's sum has one order that vectorises.
constexpr int kLanes = 8;

template <typename T>
void fold_row(const T* z, int64_t count, T scale, T& largest, T& sum, T& weighted) {
  T top[kLanes];
  std::fill(top, top + kLanes, -std::numeric_limits<T>::infinity());
  const int64_t even = count / kLanes * kLanes;
  for (int64_t i = 0; i < even; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) top[j] = z[i + j] > top[j] ? z[i + j] : top[j];
  }
  T most = *std::max_element(top, top + kLanes);
  for (int64_t i = even; i < count; ++i) most = z[i] > most ? z[i] : most;
  most *= scale;  // above 0
  const T from = most == -std::numeric_limits<T>::infinity() ? T(0) : most;
  T sums[kLanes] = {}, products[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const T d = distance(z[i + j] * scale, from), e = exp_of(d);
      sums[j] += e;
      products[j] += e * d;
    }
  }
  T s = 0, w = 0;
  for (int j = 0; j < kLanes; ++j) s += sums[j], w += products[j];
  for (int64_t i = even; i < count; ++i) {
    const T d = distance(z[i] * scale, from), e = exp_of(d);
    s += e;
    w += e * d;
  }
  largest = most;
  sum = s;
  weighted = w;
}

template <typename T>
void fold(const Piece& piece, const int64_t* targets, T* state, T* logprobs, T* entropy, T* log_sum) {
  const int64_t rows = piece.tokens, grain = std::max<int64_t>(1, kGrain / piece.count);
  const T scale = static_cast<T>(piece.scale);
  T *largest = state, *sum = state + rows, *weighted = state + 2 * rows, *target = state + 3 * rows;
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* z = static_cast<const T*>(piece.logits) + t * piece.stride;
      T m, s, w;
      fold_row(z, piece.count, scale, m, s, w);
      if (!piece.is_first) {
        const T most = m > largest[t] ? m : largest[t];
        const T from = most == -std::numeric_limits<T>::infinity() ? T(0) : most;
        const T before = distance(largest[t], from), now = distance(m, from);
        const T kept = std::exp(before), added = std::exp(now);
        w = kept * (weighted[t] + sum[t] * before) + added * (w + s * now);
        s = kept * sum[t] + added * s;
        m = most;
      }
      largest[t] = m;
      sum[t] = s;
      weighted[t] = w;
      const int64_t own = targets[t] - piece.first;
      if (own >= 0 && own < piece.count) target[t] = z[own] * scale;
      if (piece.is_last) {
        const T log_s = std::log(s);
        logprobs[t] = (target[t] - m) - log_s;
        entropy[t] = log_s - w / s;
        log_sum[t] = m + log_s;
      }
    }
  });
}

template <typename T>
void turn(
    const Piece& piece, const int64_t* targets, const T* log_sum, const T* entropy, const T* grad_logprobs, const T* grad_entropy) {
  const T scale = static_cast<T>(piece.scale);
  at::parallel_for(0, piece.tokens, std::max<int64_t>(1, kGrain / piece.count), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* z = static_cast<T*>(piece.logits) + t * piece.stride;
      const T lse = log_sum[t], h = entropy[t], g = grad_logprobs[t] * scale, k = grad_entropy[t] * scale;
      for (int64_t i = 0; i < piece.count; ++i) {
        const T logp = distance(z[i] * scale, lse);
        z[i] = -exp_of(logp) * (g + k * (logp + h));
      }
      const int64_t own = targets[t] - piece.first;
      if (own >= 0 && own < piece.count) z[own] += g;
    }
  });
}

void check_targets(const at::Tensor& targets_any, int64_t num_tokens) {
  const at::Tensor targets = targets_any.contiguous();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < targets.numel(); ++t) {
    TORCH_CHECK_INDEX(target[t] >= 0 && target[t] < num_tokens, "token_logprobs: expected targets from 0 to ", num_tokens - 1, ", got ",
                      target[t]);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, int64_t num_tokens, double scale) {
  if (targets.scalar_type() == at::kLong) check_targets(targets, num_tokens);
  return token_logprobs_of(
      hidden, weight, targets, num_tokens, scale, kPieceBytes,
      [](const Piece& piece, const at::Tensor& targets, const at::Tensor& state, at::Tensor& logprobs, at::Tensor& entropy,
         at::Tensor& log_sum) {
        AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "token_logprobs", [&] {
          fold<scalar_t>(piece, targets.const_data_ptr<int64_t>(), state.mutable_data_ptr<scalar_t>(), logprobs.mutable_data_ptr<scalar_t>(),
                         entropy.mutable_data_ptr<scalar_t>(), log_sum.mutable_data_ptr<scalar_t>());
        });
      });
}

std::tuple<at::Tensor, at::Tensor> token_logprobs_backward_cpu(
    const at::Tensor& grad_logprobs, const at::Tensor& grad_entropy, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& targets, const at::Tensor& log_sum, const at::Tensor& entropy, int64_t num_tokens, double scale) {
  return token_logprobs_gradients(
      grad_logprobs, grad_entropy, hidden, weight, targets, log_sum, entropy, num_tokens, scale, kPieceBytes,
      [](const Piece& piece, const at::Tensor& targets, const at::Tensor& log_sum, const at::Tensor& entropy,
         const at::Tensor& grad_logprobs, const at::Tensor& grad_entropy) {
        AT_DISPATCH_FLOATING_TYPES(log_sum.scalar_type(), "token_logprobs_backward", [&] {
          turn<scalar_t>(piece, targets.const_data_ptr<int64_t>(), log_sum.const_data_ptr<scalar_t>(), entropy.const_data_ptr<scalar_t>(),
                         grad_logprobs.const_data_ptr<scalar_t>(), grad_entropy.const_data_ptr<scalar_t>());
        });
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("token_logprobs", token_logprobs_cpu);
  m.impl("token_logprobs_backward", token_logprobs_backward_cpu);
}

}  // namespace r1mega
