// cross_entropy on a GPU: a block has a token's logits and reads them once; its backward writes the gradient in their place.

#include "op.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../common/stream.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 2;  // 16-byte pieces that a thread has in flight

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// The largest of some logits and the sum of e^(z - largest). A largest of -inf stands for none.
template <typename W>
struct Sum {
  W largest, sum;
};

template <typename W>
__device__ __forceinline__ W finite_from(W largest) {
  return largest == -std::numeric_limits<W>::infinity() ? W(0) : largest;
}

// max() of CUDA leaves NaN out; sums carry it.
template <typename W>
__device__ __forceinline__ Sum<W> combine(const Sum<W>& a, const Sum<W>& b) {
  const W most = max(a.largest, b.largest), from = finite_from(most);
  return {most, a.sum * exp_of(a.largest - from) + b.sum * exp_of(b.largest - from)};
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) log_sum_kernel(
    const T* __restrict__ logits, const int64_t* __restrict__ targets, typename Wide<T>::type* __restrict__ log_sum,
    typename Wide<T>::type* __restrict__ target, int64_t T_, int64_t V, int64_t stride, int64_t first) {
  using W = typename Wide<T>::type;
  constexpr int kWide = kAligned ? kVector<T> : 1;
  constexpr W kNone = -std::numeric_limits<W>::infinity();
  __shared__ Sum<W> partial[kThreads / kWarp];
  for (int64_t row = blockIdx.x; row < T_; row += gridDim.x) {
    const T* z = logits + row * stride;
    Sum<W> own{kNone, W(0)};
    for (int64_t base = 0; base < V; base += static_cast<int64_t>(kThreads) * kWide * kLoads) {
      W value[kLoads * kWide];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int64_t from = base + (static_cast<int64_t>(l) * kThreads + threadIdx.x) * kWide;
        if constexpr (kAligned) {
          if (from < V) {
            const auto loaded = load16(z + from);
#pragma unroll
            for (int i = 0; i < kWide; ++i) value[l * kWide + i] = static_cast<W>(loaded.value[i]);
          } else {
#pragma unroll
            for (int i = 0; i < kWide; ++i) value[l * kWide + i] = kNone;
          }
        } else {
          value[l] = from < V ? static_cast<W>(z[from]) : kNone;
        }
      }
      W most = own.largest;
#pragma unroll
      for (int i = 0; i < kLoads * kWide; ++i) most = max(most, value[i]);
      const W from = finite_from(most);
      own.sum *= exp_of(own.largest - from);
      own.largest = most;
#pragma unroll
      for (int i = 0; i < kLoads * kWide; ++i) own.sum += exp_of(value[i] - from);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Sum<W> other{__shfl_xor_sync(kAllLanes, own.largest, step), __shfl_xor_sync(kAllLanes, own.sum, step)};
      own = combine(own, other);
    }
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      Sum<W> total = partial[0];
      for (int warp = 1; warp < kThreads / kWarp; ++warp) total = combine(total, partial[warp]);
      log_sum[row] = total.largest == std::numeric_limits<W>::infinity() ? total.largest * W(0) : total.largest + log_of(total.sum);
      const int64_t place = targets[row] - first;
      target[row] = place >= 0 && place < V ? static_cast<W>(z[place]) : W(0);
    }
    __syncthreads();  // before the next row's partials
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) gradient_kernel(
    T* __restrict__ logits, const int64_t* __restrict__ targets, const typename Wide<T>::type* __restrict__ log_sum,
    const typename Wide<T>::type* __restrict__ grad, int64_t T_, int64_t V, int64_t stride, int64_t first) {
  using W = typename Wide<T>::type;
  constexpr int kWide = kAligned ? kVector<T> : 1;
  for (int64_t row = blockIdx.x; row < T_; row += gridDim.x) {
    T* z = logits + row * stride;
    const W lse = log_sum[row], g = grad[row];
    const int64_t place = targets[row] - first;
    const auto turned = [&](T logit, int64_t column) {
      const W share = exp_of(static_cast<W>(logit) - lse);
      return static_cast<T>(g * (column == place ? share - W(1) : share));
    };
    for (int64_t from = static_cast<int64_t>(threadIdx.x) * kWide; from < V; from += static_cast<int64_t>(kThreads) * kWide) {
      if constexpr (kAligned) {
        auto values = load16(z + from);
#pragma unroll
        for (int i = 0; i < kWide; ++i) values.value[i] = turned(values.value[i], from + i);
        store16(z + from, values);
      } else {
        z[from] = turned(z[from], from);
      }
    }
  }
}

// `launch(number, aligned)` with a number of the logits' type and whether 16 bytes can be taken at once.
template <typename Launch>
void by_type(const at::Tensor& logits, const LogitSizes& sizes, Launch launch) {
  const auto with = [&](auto number) {
    using T = decltype(number);
    const T* data = static_cast<const T*>(logits.const_data_ptr());
    if (sizes.columns % kVector<T> == 0 && fits16(data, sizes.tokens > 1 ? sizes.stride : kVector<T>)) {
      launch(number, std::true_type());
    } else {
      launch(number, std::false_type());
    }
  };
  switch (logits.scalar_type()) {
    case at::kBFloat16: return with(__nv_bfloat16());
    case at::kFloat: return with(float());
    default: return with(double());
  }
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_cuda(const at::Tensor& logits, const at::Tensor& targets_any, int64_t first) {
  const LogitSizes sizes = check_cross_entropy("cross_entropy", logits, targets_any);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor targets = targets_any.contiguous();
  const auto options = logits.options().dtype(wide_type(logits));
  at::Tensor log_sum = at::empty({sizes.tokens}, options), target = at::empty({sizes.tokens}, options);
  if (sizes.tokens == 0) return {log_sum, target};
  by_type(logits, sizes, [&](auto number, auto aligned) {
    using T = decltype(number);
    using W = typename Wide<T>::type;
    log_sum_kernel<T, decltype(aligned)::value><<<grid_of(sizes.tokens), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<const T*>(logits.const_data_ptr()), targets.const_data_ptr<int64_t>(), log_sum.mutable_data_ptr<W>(),
        target.mutable_data_ptr<W>(), sizes.tokens, sizes.columns, sizes.stride, first);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {log_sum, target};
}

void cross_entropy_backward_cuda(
    at::Tensor& logits, const at::Tensor& targets_any, const at::Tensor& log_sum_any, const at::Tensor& grad_any, int64_t first) {
  const LogitSizes sizes = check_cross_entropy_backward(logits, targets_any, log_sum_any, grad_any);
  if (sizes.tokens == 0) return;
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor targets = targets_any.contiguous(), log_sum = log_sum_any.contiguous(), grad = grad_any.contiguous();
  by_type(logits, sizes, [&](auto number, auto aligned) {
    using T = decltype(number);
    using W = typename Wide<T>::type;
    gradient_kernel<T, decltype(aligned)::value><<<grid_of(sizes.tokens), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<T*>(logits.mutable_data_ptr()), targets.const_data_ptr<int64_t>(), log_sum.const_data_ptr<W>(),
        grad.const_data_ptr<W>(), sizes.tokens, sizes.columns, sizes.stride, first);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("cross_entropy", cross_entropy_cuda);
  m.impl("cross_entropy_backward_", cross_entropy_backward_cuda);
}

}  // namespace r1mega
