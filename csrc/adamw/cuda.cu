// adamw_ on a GPU: one launch for up to 256 tensors, whose addresses travel in the kernel's arguments: nothing is copied to the device,
// and a CUDA graph keeps them. A block has 8192 numbers of one tensor, a thread 8 at a time.

#include "../common/device.cuh"
#include "op.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace r1mega {
namespace {

constexpr int kTensors = 256;  // a launch: 12 KiB of arguments, of the 32 KiB that a kernel may have
constexpr int kThreads = 256;
constexpr int kWide = 8;
constexpr int64_t kChunk = 4 * kThreads * kWide;

struct Table {
  void* param[kTensors];
  const void* grad[kTensors];
  void* exp_avg[kTensors];
  void* exp_avg_sq[kTensors];
  __nv_bfloat16* copy[kTensors];
  int64_t count[kTensors];
  int32_t end[kTensors];  // blocks of the tensors up to this one
  bool aligned[kTensors];
  int tensors;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// `many` numbers of the kWide from `from` on; a whole vector in 16-byte reads.
template <typename T>
__device__ __forceinline__ void load(const T* from, int many, bool whole, float* to) {
  if (whole) {
#pragma unroll
    for (int j = 0; j < kWide / kVector<T>; ++j) {
      const auto vector = load16(from + j * kVector<T>);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) to[j * kVector<T> + i] = widen(vector.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) to[i] = i < many ? widen(from[i]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store(T* to, int many, bool whole, const float* from) {
  if (whole) {
#pragma unroll
    for (int j = 0; j < kWide / kVector<T>; ++j) {
      Vector<T, kVector<T>> vector;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) vector.value[i] = static_cast<T>(from[j * kVector<T> + i]);
      store16(to + j * kVector<T>, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if (i < many) to[i] = static_cast<T>(from[i]);
    }
  }
}

template <typename P, typename G, typename M>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Table table, AdamwNumbers n, const float* __restrict__ corrections) {
  int low = 0, high = table.tensors - 1;  // the first tensor whose blocks end behind this one
  const auto block = static_cast<int32_t>(blockIdx.x);
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (corrections) {
    n.step_size = corrections[0];
    n.inverse_root = corrections[1];
  }
  const int64_t begin = (block - (low ? table.end[low - 1] : 0)) * kChunk, count = table.count[low];
  const int64_t end = begin + kChunk < count ? begin + kChunk : count;
  P* param = static_cast<P*>(table.param[low]);
  const G* grad = static_cast<const G*>(table.grad[low]);
  M *exp_avg = static_cast<M*>(table.exp_avg[low]), *exp_avg_sq = static_cast<M*>(table.exp_avg_sq[low]);
  __nv_bfloat16* copy = table.copy[low];
  const bool aligned = table.aligned[low];
  for (int64_t from = begin + threadIdx.x * kWide; from < end; from += kThreads * kWide) {
    const int many = static_cast<int>(end - from < kWide ? end - from : kWide);
    const bool whole = aligned && many == kWide;
    float p[kWide], g[kWide], m[kWide], v[kWide];
    load(param + from, many, whole, p);
    load(grad + from, many, whole, g);
    load(exp_avg + from, many, whole, m);
    load(exp_avg_sq + from, many, whole, v);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {  // each operation rounded by itself, as on a CPU
      const float scaled = n.scales ? __fmul_rn(g[i], n.grad_scale) : g[i];
      m[i] = __fadd_rn(__fmul_rn(m[i], n.beta1), __fmul_rn(scaled, n.rest1));
      v[i] = __fadd_rn(__fmul_rn(v[i], n.beta2), __fmul_rn(__fmul_rn(scaled, scaled), n.rest2));
      const float root = __fadd_rn(__fmul_rn(__fsqrt_rn(v[i]), n.inverse_root), n.eps);
      p[i] = __fsub_rn(__fmul_rn(p[i], n.keep), __fdiv_rn(__fmul_rn(m[i], n.step_size), root));
    }
    store(param + from, many, whole, p);
    store(exp_avg + from, many, whole, m);
    store(exp_avg_sq + from, many, whole, v);
    if (copy) store(copy + from, many, whole, p);
  }
}

__global__ void corrections_of(const void* step, bool is_long, double lr, double beta1, double beta2, float* corrections) {
  const double now = is_long ? static_cast<double>(*static_cast<const int64_t*>(step)) : *static_cast<const float*>(step);
  correct_bias(lr, beta1, beta2, now, corrections, corrections + 1);
}

template <typename P, typename G, typename M>
void launch(const Table& table, const AdamwNumbers& numbers, const float* corrections, cudaStream_t stream) {
  update<P, G, M><<<static_cast<unsigned>(table.end[table.tensors - 1]), kThreads, 0, stream>>>(table, numbers, corrections);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename P, typename G>
void launch_moments(bool bf16, const Table& table, const AdamwNumbers& numbers, const float* corrections, cudaStream_t stream) {
  bf16 ? launch<P, G, __nv_bfloat16>(table, numbers, corrections, stream) : launch<P, G, float>(table, numbers, corrections, stream);
}

void adamw_cuda(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, at::TensorList copies,
    const at::Tensor& step, double lr, double beta1, double beta2, double eps, double weight_decay, std::optional<double> grad_scale) {
  check_adamw(params, grads, exp_avgs, exp_avg_sqs, copies, step);
  if (params.empty()) return;
  TORCH_CHECK_VALUE(step.is_cpu() || step.device() == params[0].device(), "adamw_: expected step on ", params[0].device(),
                    " or a CPU, got ", step.device());
  const c10::cuda::CUDAGuard device(params[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AdamwNumbers numbers = adamw_numbers({lr, beta1, beta2, eps, weight_decay, grad_scale});
  const bool is_long = step.scalar_type() == at::kLong;
  at::Tensor corrections;
  const float* corrected = nullptr;
  if (step.is_cpu()) {
    const double now = is_long ? static_cast<double>(*step.const_data_ptr<int64_t>()) : *step.const_data_ptr<float>();
    correct_bias(lr, beta1, beta2, now, &numbers.step_size, &numbers.inverse_root);
  } else {
    corrections = at::empty({2}, params[0].options().dtype(at::kFloat));
    corrections_of<<<1, 1, 0, stream>>>(step.const_data_ptr(), is_long, lr, beta1, beta2, corrections.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    corrected = corrections.const_data_ptr<float>();
  }
  const bool bf16_param = params[0].scalar_type() == at::kBFloat16, bf16_grad = grads[0].scalar_type() == at::kBFloat16;
  const bool bf16_moments = exp_avgs[0].scalar_type() == at::kBFloat16;
  std::vector<at::Tensor> contiguous;  // gradients that are not keep a contiguous form alive until the launches
  Table table;
  table.tensors = 0;
  const auto flush = [&] {
    if (table.tensors == 0) return;
    if (bf16_param) {
      bf16_grad ? launch_moments<__nv_bfloat16, __nv_bfloat16>(bf16_moments, table, numbers, corrected, stream)
                : launch_moments<__nv_bfloat16, float>(bf16_moments, table, numbers, corrected, stream);
    } else {
      bf16_grad ? launch_moments<float, __nv_bfloat16>(bf16_moments, table, numbers, corrected, stream)
                : launch_moments<float, float>(bf16_moments, table, numbers, corrected, stream);
    }
    table.tensors = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].numel() == 0) continue;
    const int64_t before = table.tensors ? table.end[table.tensors - 1] : 0, blocks = ceil_div(params[i].numel(), kChunk);
    TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "adamw_: expected tensors of at most 2^44 numbers, got ", params[i].numel());
    if (table.tensors == kTensors || before + blocks > std::numeric_limits<int32_t>::max()) flush();
    const int at = table.tensors++;
    contiguous.push_back(grads[i].contiguous());
    table.param[at] = params[i].mutable_data_ptr();
    table.grad[at] = contiguous.back().const_data_ptr();
    table.exp_avg[at] = exp_avgs[i].mutable_data_ptr();
    table.exp_avg_sq[at] = exp_avg_sqs[i].mutable_data_ptr();
    table.copy[at] = copies.empty() ? nullptr : static_cast<__nv_bfloat16*>(copies[i].mutable_data_ptr());
    table.count[at] = params[i].numel();
    table.end[at] = static_cast<int32_t>((at ? table.end[at - 1] : 0) + blocks);
    table.aligned[at] = true;
    for (const void* pointer : {static_cast<const void*>(table.param[at]), table.grad[at], static_cast<const void*>(table.exp_avg[at]),
                                static_cast<const void*>(table.exp_avg_sq[at]), static_cast<const void*>(table.copy[at])}) {
      table.aligned[at] = table.aligned[at] && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    }
  }
  flush();
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("adamw_", adamw_cuda); }

}  // namespace r1mega
