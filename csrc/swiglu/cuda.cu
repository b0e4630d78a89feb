// swiglu on Hopper: every input is read once and every output written once, 16 bytes at a time where rows allow it.
//
// The forward takes groups of numbers from the whole matrix in order. The backward gives a row to a warp or to a block, since the
// gradient of its probability is a sum over it; a thread's groups and the order of the sum depend on the width alone.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "device.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 256;     // of a forward block
constexpr int kRowThreads = 128;  // of a backward block: one row, or a row a warp
constexpr int kAtOnce = 2;        // groups whose loads a thread has in flight together
constexpr int64_t kWarpGroups = 64;      // rows of at most as many groups take a warp
constexpr int64_t kSmall = std::numeric_limits<uint32_t>::max();

// Item i of a matrix of `width` items a row: its row. 64-bit division is slow, and seldom needed.
__device__ __forceinline__ int64_t row_of(int64_t item, int64_t width, bool small) {
  return small ? static_cast<uint32_t>(item) / static_cast<uint32_t>(width) : item / width;
}

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const Vector<T, kCount>& values) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = values;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* __restrict__ hidden, const at::opmath_type<T>* __restrict__ probs, T* __restrict__ out, int64_t items, int64_t width,
    bool small) {
  using acc_t = at::opmath_type<T>;
  const int64_t groups = width / kCount;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kAtOnce) + threadIdx.x;
  Vector<T, kCount> gate[kAtOnce], up[kAtOnce];
  acc_t prob[kAtOnce];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t item = first + u * kThreads;
    if (item >= items) break;
    const int64_t row = row_of(item, groups, small), at = row * 2 * width + (item - row * groups) * kCount;
    gate[u] = load<T, kCount>(hidden + at);
    up[u] = load<T, kCount>(hidden + at + width);
    prob[u] = probs ? probs[row] : acc_t(1);
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t item = first + u * kThreads;
    if (item >= items) break;
    Vector<T, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      result.value[i] = static_cast<T>(activation<acc_t>(gate[u].value[i], up[u].value[i], prob[u]));
    }
    store(out + item * kCount, result);
  }
}

// The numbers of group `group` of a row; those beyond the row are 0.
template <bool kWide, typename T>
__device__ __forceinline__ Vector<T, kVector<T>> load_group(const T* row, int64_t group, int64_t width) {
  if constexpr (kWide) return load16(row + group * kVector<T>);
  Vector<T, kVector<T>> values;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const int64_t column = group * kVector<T> + i;
    values.value[i] = column < width ? row[column] : T(0);
  }
  return values;
}

template <bool kWide, typename T>
__device__ __forceinline__ void store_group(T* row, int64_t group, int64_t width, const Vector<T, kVector<T>>& values) {
  if constexpr (kWide) {
    store16(row + group * kVector<T>, values);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const int64_t column = group * kVector<T> + i;
      if (column < width) row[column] = values.value[i];
    }
  }
}

// The sum over the threads of a row, in one order. `partial` is free again after the barrier of the next call.
template <int kOfRow, typename acc_t>
__device__ __forceinline__ acc_t row_sum(acc_t value, acc_t* partial) {
  if constexpr (kOfRow == kWarp) return warp_sum(value);
  __syncthreads();
  return block_sum<kRowThreads>(value, partial);
}

template <typename T, bool kWide, int kOfRow>
__global__ void __launch_bounds__(kRowThreads) backward_kernel(
    const T* __restrict__ grad, const T* __restrict__ hidden, const at::opmath_type<T>* __restrict__ probs,
    T* __restrict__ grad_hidden, at::opmath_type<T>* __restrict__ grad_probs, int64_t rows, int64_t width) {
  using acc_t = at::opmath_type<T>;
  constexpr int kCount = kVector<T>, kRows = kRowThreads / kOfRow;
  __shared__ acc_t partial[kRowThreads / kWarp];
  const int lane = threadIdx.x % kOfRow;
  const int64_t groups = (width + kCount - 1) / kCount;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kOfRow; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const T *of_grad = grad + row * width, *of_gate = hidden + row * 2 * width, *of_up = of_gate + width;
    T *to_gate = grad_hidden + row * 2 * width, *to_up = to_gate + width;
    const acc_t prob = probs ? probs[row] : acc_t(1);
    acc_t sum = 0;
    for (int64_t first = lane; first < groups; first += kOfRow * kAtOnce) {
      Vector<T, kCount> own[kAtOnce], gate[kAtOnce], up[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t group = first + u * kOfRow;
        if (group >= groups) break;
        own[u] = load_group<kWide>(of_grad, group, width);
        gate[u] = load_group<kWide>(of_gate, group, width);
        up[u] = load_group<kWide>(of_up, group, width);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t group = first + u * kOfRow;
        if (group >= groups) break;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const acc_t gates = gate[u].value[i];
          const auto g = gradients<acc_t>(own[u].value[i], gates, up[u].value[i], prob, sigmoid_of(gates));
          gate[u].value[i] = static_cast<T>(g.gate);
          up[u].value[i] = static_cast<T>(g.up);
          sum += g.prob;
        }
        store_group<kWide>(to_gate, group, width, gate[u]);
        store_group<kWide>(to_up, group, width, up[u]);
      }
    }
    if (grad_probs == nullptr) continue;
    sum = row_sum<kOfRow>(sum, partial);
    if (lane == 0) grad_probs[row] = sum;
  }
}

// A block of 128 numbers that kLanes neighbours hold, as E4M3; all threads of the warp take part. `scale`: for the first of them.
__device__ __forceinline__ void quantize(
    const float (&numbers)[kGroup], bool power_of_two, bool valid, uint8_t* payload, float* scale) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) largest = max(largest, magnitude(numbers[i]));
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
  const float own = block_scale(largest, power_of_two), inverse = block_inverse(own);
  if (!valid) return;
  *reinterpret_cast<uint2*>(payload) = codes8(numbers, inverse);
  if (threadIdx.x % kLanes == 0) *scale = own;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(
    const T* __restrict__ hidden, Scales scales, const float* __restrict__ probs, uint8_t* __restrict__ payload,
    float* __restrict__ out_scales, int64_t out_stride, int64_t items, int64_t width, bool power_of_two, bool small) {
  const int64_t groups = width / kGroup;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kAtOnce) + threadIdx.x;
  Raw<T> gate[kAtOnce], up[kAtOnce];
  float gate_scale[kAtOnce], up_scale[kAtOnce], prob[kAtOnce];
  int64_t rows[kAtOnce];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    // beyond the end the last item again, so that whole warps find a block's largest number
    const int64_t item = min(first + u * kThreads, items - 1);
    const int64_t row = row_of(item, groups, small), group = item - row * groups;
    const T* from = hidden + row * 2 * width + group * kGroup;
    rows[u] = row;
    gate[u] = read_group(from);
    up[u] = read_group(from + width);
    gate_scale[u] = scales.at(row, group / kLanes);
    up_scale[u] = scales.at(row, (groups + group) / kLanes);
    prob[u] = probs ? probs[row] : 1.0f;
  }
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) {
    const int64_t item = first + u * kThreads;
    float gates[kGroup], ups[kGroup];
    widen(gate[u], gate_scale[u], gates);
    widen(up[u], up_scale[u], ups);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gates[i] = gates[i] * near_sigmoid(gates[i]) * ups[i] * prob[u];
    const int64_t block = (item - rows[u] * groups) / kLanes;
    quantize(gates, power_of_two, item < items, payload + item * kGroup, out_scales + block * out_stride + rows[u]);
  }
}

template <typename T, int kOfRow>
__global__ void __launch_bounds__(kRowThreads) backward_quantize_kernel(
    const at::BFloat16* __restrict__ grad, const T* __restrict__ hidden, Scales scales, const float* __restrict__ probs,
    at::BFloat16* __restrict__ grad_hidden, uint8_t* __restrict__ payload, float* __restrict__ out_scales, int64_t out_stride,
    float* __restrict__ grad_probs, at::BFloat16* __restrict__ recomputed, int64_t rows, int64_t width, bool power_of_two) {
  constexpr int kRows = kRowThreads / kOfRow;
  __shared__ float partial[kRowThreads / kWarp];
  const int lane = threadIdx.x % kOfRow;
  const int64_t groups = width / kGroup;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kOfRow; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const at::BFloat16* of_grad = grad + row * width;
    const T *of_gate = hidden + row * 2 * width, *of_up = of_gate + width;
    const float prob = probs ? probs[row] : 1.0f;
    float sum = 0.0f;
    for (int64_t base = 0; base < groups; base += kOfRow * kAtOnce) {  // the same turns for all lanes of a warp
      uint4 own[kAtOnce];
      Raw<T> gate[kAtOnce], up[kAtOnce];
      float gate_scale[kAtOnce], up_scale[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t group = min(base + u * kOfRow + lane, groups - 1);
        own[u] = read_group(of_grad + group * kGroup);
        gate[u] = read_group(of_gate + group * kGroup);
        up[u] = read_group(of_up + group * kGroup);
        gate_scale[u] = scales.at(row, group / kLanes);
        up_scale[u] = scales.at(row, (groups + group) / kLanes);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t group = base + u * kOfRow + lane;
        const bool valid = group < groups;
        float grads[kGroup], gates[kGroup], ups[kGroup], again[kGroup];
        widen(own[u], 1.0f, grads);
        widen(gate[u], gate_scale[u], gates);
        widen(up[u], up_scale[u], ups);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const auto g = gradients<float>(grads[i], gates[i], ups[i], prob, near_sigmoid(gates[i]));
          gates[i] = g.gate;
          ups[i] = g.up;
          again[i] = g.activation;
          if (valid) sum += g.prob;
        }
        const int64_t at = row * 2 * width + group * kGroup, block = group / kLanes;
        if (valid) {
          *reinterpret_cast<uint4*>(grad_hidden + at) = in_bf16(gates);
          *reinterpret_cast<uint4*>(grad_hidden + at + width) = in_bf16(ups);
          *reinterpret_cast<uint4*>(recomputed + row * width + group * kGroup) = in_bf16(again);
        }
        quantize(gates, power_of_two, valid, payload + at, out_scales + block * out_stride + row);
        quantize(ups, power_of_two, valid, payload + at + width, out_scales + (block + width / kBlock) * out_stride + row);
      }
    }
    if (grad_probs == nullptr) continue;
    sum = row_sum<kOfRow>(sum, partial);
    if (lane == 0) grad_probs[row] = sum;
  }
}

at::Tensor swiglu_cuda(const at::Tensor& hidden_any, const std::optional<at::Tensor>& probs_any) {
  const auto [R, F] = check_swiglu(hidden_any, probs_any);
  const c10::cuda::CUDAGuard guard(hidden_any.device());
  const at::Tensor hidden = hidden_any.contiguous();
  at::Tensor out = at::empty({R, F}, hidden.options());
  if (out.numel() == 0) return out;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "swiglu", [&, R = R, F = F] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto probs = probs_as(probs_any, c10::CppTypeToScalarType<acc_t>::value);
    const scalar_t* in = hidden.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const bool wide = fits16(in, F) && fits16(to, F);
    const int64_t items = wide ? R * (F / kVector<scalar_t>) : R * F;
    const unsigned blocks = grid_of(ceil_div(items, kThreads * kAtOnce));
    const auto kernel = wide ? forward_kernel<scalar_t, kVector<scalar_t>> : forward_kernel<scalar_t, 1>;
    kernel<<<blocks, kThreads, 0, stream>>>(in, pointer<acc_t>(probs), to, items, F, items <= kSmall);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_cuda(
    const at::Tensor& grad_any, const at::Tensor& hidden_any, const std::optional<at::Tensor>& probs_any) {
  const auto [R, F] = check_swiglu_backward(grad_any, hidden_any, probs_any);
  const c10::cuda::CUDAGuard guard(hidden_any.device());
  const at::Tensor grad = grad_any.contiguous(), hidden = hidden_any.contiguous();
  at::Tensor grad_hidden = at::empty({R, 2 * F}, hidden.options());
  std::optional<at::Tensor> grad_probs;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "swiglu_backward", [&, R = R, F = F] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto probs = probs_as(probs_any, c10::CppTypeToScalarType<acc_t>::value);
    if (probs) grad_probs = at::empty({R}, probs->options());
    if (R == 0) return;
    const scalar_t *own = grad.const_data_ptr<scalar_t>(), *in = hidden.const_data_ptr<scalar_t>();
    scalar_t* to = grad_hidden.mutable_data_ptr<scalar_t>();
    const bool wide = fits16(own, F) && fits16(in, F) && fits16(to, F);
    const bool warps = ceil_div(F, kVector<scalar_t>) <= kWarpGroups;
    const auto kernel = wide ? (warps ? backward_kernel<scalar_t, true, kWarp> : backward_kernel<scalar_t, true, kRowThreads>)
                             : (warps ? backward_kernel<scalar_t, false, kWarp> : backward_kernel<scalar_t, false, kRowThreads>);
    const unsigned blocks = grid_of(warps ? ceil_div(R, kRowThreads / kWarp) : R);
    acc_t* of_probs = grad_probs ? grad_probs->mutable_data_ptr<acc_t>() : nullptr;
    kernel<<<blocks, kRowThreads, 0, stream>>>(own, in, pointer<acc_t>(probs), to, of_probs, R, F);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_hidden, grad_probs_as(grad_probs, probs_any, hidden)};
}

std::tuple<at::Tensor, at::Tensor> swiglu_quantize_cuda(
    const at::Tensor& hidden_any, const std::optional<at::Tensor>& hidden_scales, const std::optional<at::Tensor>& probs_any,
    bool power_of_two) {
  const auto [R, F] = check_swiglu_quantize("swiglu_quantize", hidden_any, hidden_scales, probs_any);
  const c10::cuda::CUDAGuard guard(hidden_any.device());
  const at::Tensor hidden = aligned(hidden_any);
  const auto probs = probs_as(probs_any, at::kFloat);
  at::Tensor payload = payload_like(hidden, {R, F});
  at::Tensor scales = row_scales(R, F, hidden, R % 4 != 0);
  const int64_t items = R * (F / kGroup);
  if (items == 0) return {payload, scales};
  const unsigned blocks = grid_of(ceil_div(items, kThreads * kAtOnce));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&, F = F](auto* in) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    quantize_kernel<T><<<blocks, kThreads, 0, stream>>>(
        in, scales_of(hidden_scales), pointer<float>(probs), static_cast<uint8_t*>(payload.mutable_data_ptr()),
        scales.mutable_data_ptr<float>(), scales.stride(1), items, F, power_of_two, items <= kSmall);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  hidden_scales ? launch(static_cast<const uint8_t*>(hidden.const_data_ptr())) : launch(hidden.const_data_ptr<at::BFloat16>());
  return {payload, scales};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> swiglu_backward_quantize_cuda(
    const at::Tensor& grad_any, const at::Tensor& hidden_any, const std::optional<at::Tensor>& hidden_scales,
    const std::optional<at::Tensor>& probs_any, bool power_of_two) {
  const auto [R, F] = check_swiglu_backward_quantize("swiglu_backward_quantize", grad_any, hidden_any, hidden_scales, probs_any);
  const c10::cuda::CUDAGuard guard(hidden_any.device());
  const at::Tensor grad = aligned(grad_any), hidden = aligned(hidden_any);
  const auto probs = probs_as(probs_any, at::kFloat);
  std::optional<at::Tensor> grad_probs;
  if (probs) grad_probs = at::empty({R}, probs->options());
  at::Tensor grad_hidden = at::empty({R, 2 * F}, grad.options()), recomputed = at::empty({R, F}, grad.options());
  at::Tensor payload = payload_like(hidden, {R, 2 * F});
  at::Tensor scales = row_scales(R, 2 * F, hidden, R % 4 != 0);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&, R = R, F = F](auto* in) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    const bool warps = F / kGroup <= kWarpGroups;
    const auto kernel = warps ? backward_quantize_kernel<T, kWarp> : backward_quantize_kernel<T, kRowThreads>;
    kernel<<<grid_of(warps ? ceil_div(R, kRowThreads / kWarp) : R), kRowThreads, 0, stream>>>(
        grad.const_data_ptr<at::BFloat16>(), in, scales_of(hidden_scales), pointer<float>(probs),
        grad_hidden.mutable_data_ptr<at::BFloat16>(), static_cast<uint8_t*>(payload.mutable_data_ptr()),
        scales.mutable_data_ptr<float>(), scales.stride(1), grad_probs ? grad_probs->mutable_data_ptr<float>() : nullptr,
        recomputed.mutable_data_ptr<at::BFloat16>(), R, F, power_of_two);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (payload.numel() == 0) {
    if (grad_probs) grad_probs->zero_();
  } else {
    hidden_scales ? launch(static_cast<const uint8_t*>(hidden.const_data_ptr())) : launch(hidden.const_data_ptr<at::BFloat16>());
  }
  return {grad_hidden, payload, scales, grad_probs_as(grad_probs, probs_any, hidden), recomputed};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("swiglu", swiglu_cuda);
  m.impl("swiglu_backward", swiglu_backward_cuda);
  m.impl("swiglu_quantize", swiglu_quantize_cuda);
  m.impl("swiglu_backward_quantize", swiglu_backward_quantize_cuda);
}

}  // namespace r1mega
