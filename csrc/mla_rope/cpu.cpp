// mla_rope and its backward on a CPU: a token's heads one after another, each read and written once.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kGrain = 16384;  // numbers a thread takes at least

int64_t tokens_a_thread(const RopeSizes& n) {
  const int64_t width = n.query_heads * n.query_width() + n.key_heads * (n.both_width() + n.rope);
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
}

template <typename T>
void copy(const T* from, T* to, int64_t count) {
  if (count > 0) std::memcpy(to, from, count * sizeof(T));
}

// Pairs (2i, 2i + 1) turned by angle i; first numbers into the first half, second numbers into the second.
template <typename T, typename acc_t>
void turn(const T* __restrict__ pairs, const acc_t* __restrict__ cos, const acc_t* __restrict__ sin, T* __restrict__ to, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const acc_t first = pairs[2 * i], second = pairs[2 * i + 1];
    to[i] = static_cast<T>(first * cos[i] - second * sin[i]);
    to[half + i] = static_cast<T>(second * cos[i] + first * sin[i]);
  }
}

// The way back: halves to pairs, turned by minus the angle.
template <typename T, typename acc_t, typename out_t>
void turn_back(
    const T* __restrict__ halves, const acc_t* __restrict__ cos, const acc_t* __restrict__ sin, out_t* __restrict__ pairs,
    int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const acc_t first = halves[i], second = halves[half + i];
    pairs[2 * i] = static_cast<out_t>(first * cos[i] + second * sin[i]);
    pairs[2 * i + 1] = static_cast<out_t>(second * cos[i] - first * sin[i]);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mla_rope_cpu(
    const at::Tensor& query_any, const at::Tensor& both_any, const at::Tensor& shared_any, const at::Tensor& cos_any,
    const at::Tensor& sin_any, int64_t nope) {
  const RopeSizes n = check_mla_rope(query_any, both_any, shared_any, cos_any, sin_any, nope);
  const at::Tensor query = dense_last(query_any), both = dense_last(both_any), shared = dense_last(shared_any);
  const at::Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  at::Tensor turned = at::empty({n.sequence, n.batch, n.query_heads, n.query_width()}, query.options());
  at::Tensor key = at::empty({n.sequence, n.batch, n.key_heads, n.query_width()}, query.options());
  at::Tensor value = at::empty({n.sequence, n.batch, n.key_heads, n.value}, query.options());
  const RopeStrides of_query(query), of_both(both), of_shared(shared);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mla_rope", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t *queries = query.const_data_ptr<scalar_t>(), *pairs = both.const_data_ptr<scalar_t>();
    const scalar_t* keys = shared.const_data_ptr<scalar_t>();
    const acc_t *cosines = cos.const_data_ptr<acc_t>(), *sines = sin.const_data_ptr<acc_t>();
    scalar_t *to_query = turned.mutable_data_ptr<scalar_t>(), *to_key = key.mutable_data_ptr<scalar_t>();
    scalar_t* to_value = value.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n.tokens(), tokens_a_thread(n), [&](int64_t from, int64_t until) {
      std::vector<scalar_t> turned_key(n.rope);
      for (int64_t token = from; token < until; ++token) {
        const int64_t s = token / n.batch, b = token % n.batch;
        const acc_t *cos_s = cosines + s * n.half(), *sin_s = sines + s * n.half();
        for (int64_t h = 0; h < n.query_heads; ++h) {
          const scalar_t* in = queries + s * of_query.sequence + b * of_query.batch + h * of_query.head;
          scalar_t* out = to_query + (token * n.query_heads + h) * n.query_width();
          copy(in, out, nope);
          turn(in + nope, cos_s, sin_s, out + nope, n.half());
        }
        turn(keys + s * of_shared.sequence + b * of_shared.batch, cos_s, sin_s, turned_key.data(), n.half());
        for (int64_t h = 0; h < n.key_heads; ++h) {
          const scalar_t* in = pairs + s * of_both.sequence + b * of_both.batch + h * of_both.head;
          scalar_t* out = to_key + (token * n.key_heads + h) * n.query_width();
          copy(in, out, nope);
          copy(turned_key.data(), out + nope, n.rope);
          copy(in + nope, to_value + (token * n.key_heads + h) * n.value, n.value);
        }
      }
    });
  });
  return {turned, key, value};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mla_rope_backward_cpu(
    const at::Tensor& query_any, const at::Tensor& key_any, const at::Tensor& value_any, const at::Tensor& cos_any,
    const at::Tensor& sin_any, int64_t nope) {
  const RopeSizes n = check_mla_rope_backward(query_any, key_any, value_any, cos_any, sin_any, nope);
  const at::Tensor query = dense_last(query_any), key = dense_last(key_any), value = dense_last(value_any);
  const at::Tensor cos = cos_any.contiguous(), sin = sin_any.contiguous();
  at::Tensor to_query = at::empty({n.sequence, n.batch, n.query_heads, n.query_width()}, query.options());
  at::Tensor to_both = at::empty({n.sequence, n.batch, n.key_heads, n.both_width()}, query.options());
  at::Tensor to_shared = at::empty({n.sequence, n.batch, n.rope}, query.options());
  const RopeStrides of_query(query), of_key(key), of_value(value);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "mla_rope_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t *queries = query.const_data_ptr<scalar_t>(), *keys = key.const_data_ptr<scalar_t>();
    const scalar_t* values = value.const_data_ptr<scalar_t>();
    const acc_t *cosines = cos.const_data_ptr<acc_t>(), *sines = sin.const_data_ptr<acc_t>();
    scalar_t *out_query = to_query.mutable_data_ptr<scalar_t>(), *out_both = to_both.mutable_data_ptr<scalar_t>();
    scalar_t* out_shared = to_shared.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n.tokens(), tokens_a_thread(n), [&](int64_t from, int64_t until) {
      std::vector<acc_t> sum(n.rope);
      for (int64_t token = from; token < until; ++token) {
        const int64_t s = token / n.batch, b = token % n.batch;
        const acc_t *cos_s = cosines + s * n.half(), *sin_s = sines + s * n.half();
        for (int64_t h = 0; h < n.query_heads; ++h) {
          const scalar_t* in = queries + s * of_query.sequence + b * of_query.batch + h * of_query.head;
          scalar_t* out = out_query + (token * n.query_heads + h) * n.query_width();
          copy(in, out, nope);
          turn_back(in + nope, cos_s, sin_s, out + nope, n.half());
        }
        std::fill(sum.begin(), sum.end(), acc_t(0));
        for (int64_t h = 0; h < n.key_heads; ++h) {
          const scalar_t* of_own = keys + s * of_key.sequence + b * of_key.batch + h * of_key.head;
          scalar_t* out = out_both + (token * n.key_heads + h) * n.both_width();
          copy(of_own, out, nope);
          copy(values + s * of_value.sequence + b * of_value.batch + h * of_value.head, out + nope, n.value);
          for (int64_t i = 0; i < n.rope; ++i) sum[i] += static_cast<acc_t>(of_own[nope + i]);
        }
        turn_back(sum.data(), cos_s, sin_s, out_shared + token * n.rope, n.half());
      }
    });
  });
  return {to_query, to_both, to_shared};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("mla_rope", mla_rope_cpu);
  m.impl("mla_rope_backward", mla_rope_backward_cpu);
}

}  // namespace r1mega
