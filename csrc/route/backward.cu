// route_backward on Hopper: a warp a token, its experts in registers. The contract: r1mega/ops/route.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "device.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T, int kOwn, typename Of>
__device__ __forceinline__ void store_own(T* to, int held, bool vector, Of of) {
  constexpr int kStep = kAtOnce<T, kOwn>;
  if (vector) {
    if (held == 0) return;
#pragma unroll
    for (int j = 0; j < kOwn; j += kStep) {
      Vector<T, kStep> part;
#pragma unroll
      for (int i = 0; i < kStep; ++i) part.value[i] = of(j + i);
      *reinterpret_cast<Vector<T, kStep>*>(to + j) = part;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (j < held) to[j] = of(j);
  }
}

struct GradArgs {
  const void *grad, *logits;
  const bool* map;
  void* out;
  int64_t T;
  int E, top_k;
  bool vector;
  Score score;
  float scale;
};

// Only chosen experts' gradients and logits are read, but for softmax, which needs all logits.
template <typename T, int kOwn>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(const GradArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int own_first = min(lane * kOwn, args.E), held = min(kOwn, args.E - own_first);
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t t = first; t < args.T; t += int64_t(gridDim.x) * kWarps) {
    const int64_t at = t * args.E + own_first;
    const T* grads = static_cast<const T*>(args.grad) + at;
    const T* logits = static_cast<const T*>(args.logits) + at;
    uint8_t mask[kOwn];
    T logit[kOwn];
    float grad[kOwn], value[kOwn];
    load_own<uint8_t, kOwn>(reinterpret_cast<const uint8_t*>(args.map) + at, held, args.vector, 0, mask);
    const bool all = args.score == Score::kSoftmax;
    if (all) {
      load_own<T, kOwn>(logits, held, args.vector, static_cast<T>(0.0f), logit);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) value[j] = static_cast<float>(logit[j]);
    }
    float most = -std::numeric_limits<float>::infinity(), sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool chosen = mask[j] != 0;
      grad[j] = chosen ? static_cast<float>(grads[j]) * args.scale : 0.0f;
      if (!all) value[j] = chosen ? static_cast<float>(logits[j]) : 0.0f;
      if (all ? j < held : chosen) most = fmaxf(most, value[j]);
    }
    const bool sigmoids = args.score == Score::kSigmoid;
    if (!sigmoids) most = warp_max(most);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool counted = all ? j < held : mask[j] != 0;
      value[j] = !counted ? 0.0f : sigmoids ? sigmoid(value[j]) : expf(value[j] - most);
      sum += value[j];
    }
    const float inverse = 1.0f / (warp_sum(sum) + (sigmoids ? 1e-20f : 0.0f));
#pragma unroll
    for (int j = 0; j < kOwn; ++j) dot += mask[j] != 0 ? grad[j] * (value[j] * inverse) : 0.0f;
    dot = warp_sum(dot);
    store_own<T, kOwn>(static_cast<T*>(args.out) + at, held, args.vector, [&](int j) {
      if (all) return static_cast<T>((grad[j] - dot) * (value[j] * inverse));
      if (mask[j] == 0) return static_cast<T>(0.0f);
      if (!sigmoids) return static_cast<T>((grad[j] - dot) * (value[j] * inverse));
      const float of_score = args.top_k > 1 ? (grad[j] - dot) * inverse : grad[j];
      return static_cast<T>(of_score * (1.0f - value[j]) * value[j]);
    });
  }
}

at::Tensor route_backward_cuda(
    const at::Tensor& grad_any, const at::Tensor& logits_any, const at::Tensor& map_any, std::string_view score_function,
    int64_t top_k, double scale) {
  const Score score = check_route_backward(grad_any, logits_any, map_any, score_function, top_k);
  check_device("route_backward", logits_any, top_k, 1);
  const c10::cuda::CUDAGuard guard(logits_any.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor grad = grad_any.contiguous(), logits = logits_any.contiguous(), map = map_any.contiguous();
  at::Tensor out = at::empty(logits.sizes(), logits.options());
  const int64_t T = logits.size(0), E = logits.size(1);
  if (T == 0) return out;
  GradArgs args{};
  args.grad = grad.const_data_ptr();
  args.logits = logits.const_data_ptr();
  args.map = map.const_data_ptr<bool>();
  args.out = out.mutable_data_ptr();
  args.T = T;
  args.E = static_cast<int>(E);
  args.top_k = static_cast<int>(top_k);
  args.score = score;
  args.scale = static_cast<float>(scale);
  with_types(logits.scalar_type(), ceil_div(E, kWarp), [&]<typename N, int kOwn>() {
    args.vector = moves_whole(kOwn, E, {args.logits, args.map, args.out});
    route_backward_kernel<N, kOwn><<<num_blocks(T, kWarps, 8), kThreads, 0, stream>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("route_backward", route_backward_cuda); }

}  // namespace r1mega
