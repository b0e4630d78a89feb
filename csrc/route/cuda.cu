// route and route_backward on Hopper: a warp a token, its scores in registers. The contract: r1mega/ops/route.py.
//
// Lanes are dealt to groups: L lanes (a power of two) hold one group, kOwn neighbouring experts each, so that lane order is the order
// of the experts and of the groups. A group's score is a butterfly over L lanes; the best expert of all is one redux over the warp,
// and the lowest lane that has it is the lowest expert. Counts are gathered in shared memory, then by integer atomics, whose order
// does not matter; the last block to finish sums them up to the offsets.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "../common/device.cuh"
#include "op.h"

namespace r1mega {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMostExperts = 1024, kMostChosen = 32, kMostGroups = 32;

struct RouteArgs {
  const void* logits;  // [T, E]
  const float* bias;   // [E] or null
  void* probs;
  bool* map;
  unsigned long long* counts;   // [E], 0 at the start
  unsigned long long* arrived;  // blocks that are done, 0 at the start
  int64_t* offsets;             // [E]
  int64_t T;
  int E, groups, kept, group_size, group_best, top_k;
  int group_lanes;  // L
  bool vector;      // each lane holds kOwn experts or none, and can move them 16 bytes at a time
  Score score;
  float scale;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The numbers that fit one access of at most 16 bytes, of kOwn neighbours.
template <typename T, int kOwn>
constexpr int kAtOnce = kOwn < kVector<T> ? kOwn : kVector<T>;

// kOwn neighbours as floats; `held` of them are there, all or none where `vector`.
template <typename T, int kOwn>
__device__ __forceinline__ void load_own(const T* from, int held, bool vector, float (&value)[kOwn]) {
  constexpr int kStep = kAtOnce<T, kOwn>;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) value[j] = 0.0f;
  if (vector) {
    if (held == 0) return;
#pragma unroll
    for (int j = 0; j < kOwn; j += kStep) {
      const auto part = *reinterpret_cast<const Vector<T, kStep>*>(from + j);
#pragma unroll
      for (int i = 0; i < kStep; ++i) value[j + i] = static_cast<float>(part.value[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (j < held) value[j] = static_cast<float>(from[j]);
  }
}

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

template <int kOwn>
using Mask = std::conditional_t<(kOwn > 32), uint64_t, uint32_t>;

// The largest key of those that are not in `out`.
template <int kOwn>
__device__ __forceinline__ uint32_t best_of(const uint32_t (&key)[kOwn], Mask<kOwn> out) {
  uint32_t best = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) best = max(best, (out >> j) & 1 ? 0u : key[j]);
  return best;
}

// `out` and the first key of this size that is not in it.
template <int kOwn>
__device__ __forceinline__ Mask<kOwn> with_first(const uint32_t (&key)[kOwn], uint32_t size, Mask<kOwn> out) {
  Mask<kOwn> found = 0;
#pragma unroll
  for (int j = kOwn - 1; j >= 0; --j)
    if (key[j] == size && !((out >> j) & 1)) found = Mask<kOwn>(1) << j;
  return out | found;
}

// The sum of the `count` best keys' scores among `lanes` neighbours (a power of two), best first; on each of them.
template <int kOwn>
__device__ __forceinline__ float group_score(const uint32_t (&key)[kOwn], int lanes, int count) {
  if (count <= 2) {
    uint32_t first = 0, second = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      second = max(second, min(first, key[j]));
      first = max(first, key[j]);
    }
    for (int step = 1; step < lanes; step *= 2) {
      const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, step);
      const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, step);
      second = max(min(first, other_first), max(second, other_second));
      first = max(first, other_first);
    }
    return count == 1 ? key_score(first) : key_score(first) + key_score(second);
  }
  const int lane = threadIdx.x % kWarp;
  const unsigned mine = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1) << (lane & ~(lanes - 1));
  Mask<kOwn> out = 0;
  uint32_t own = best_of<kOwn>(key, out);
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) {
    uint32_t most = own;
    for (int step = 1; step < lanes; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    const unsigned having = __ballot_sync(kAllLanes, own == most) & mine;
    sum = n == 0 ? key_score(most) : sum + key_score(most);
    if (lane == __ffs(having) - 1) {
      out = with_first<kOwn>(key, most, out);
      own = best_of<kOwn>(key, out);
    }
  }
  return sum;
}

template <typename T, int kOwn>
__global__ void __launch_bounds__(kThreads) route_kernel(const RouteArgs args) {
  __shared__ int count[kMostExperts];
  __shared__ bool last;
  for (int e = threadIdx.x; e < args.E; e += kThreads) count[e] = 0;
  __syncthreads();

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / args.group_lanes, place = (lane % args.group_lanes) * kOwn;  // in the group
  const int held = group < args.groups ? max(0, min(kOwn, args.group_size - place)) : 0;
  const int own_first = held > 0 ? group * args.group_size + place : 0;

  for (int64_t t = int64_t(blockIdx.x) * kWarps + warp; t < args.T; t += int64_t(gridDim.x) * kWarps) {
    const int64_t at = t * args.E + own_first;
    float value[kOwn];  // the score that probabilities are made of
    uint32_t key[kOwn];
    load_own<T, kOwn>(static_cast<const T*>(args.logits) + at, held, args.vector, value);
    if (args.score == Score::kSigmoid) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        value[j] = sigmoid(value[j]);
        const float bias = args.bias != nullptr && j < held ? __ldg(args.bias + own_first + j) : 0.0f;
        key[j] = j < held ? order_key(value[j] + bias) : 0u;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) key[j] = j < held ? order_key(value[j]) : 0u;
    }
    if (args.score == Score::kSoftmax) {
      float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (j < held) most = fmaxf(most, value[j]);  // passes NaN over, which the sum then has
      most = warp_max(most);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        value[j] = j < held ? expf(value[j] - most) : 0.0f;
        sum += value[j];
      }
      const float inverse = 1.0f / warp_sum(sum);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) value[j] *= inverse;
    }

    bool open = held > 0;  // this lane's experts can be chosen
    if (args.kept < args.groups) {
      uint32_t own;
      if (args.score == Score::kSoftmax) {
        uint32_t score_key[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) score_key[j] = j < held ? order_key(value[j]) : 0u;
        own = order_key(group_score<kOwn>(score_key, args.group_lanes, args.group_best));
      } else {
        own = order_key(group_score<kOwn>(key, args.group_lanes, args.group_best));
      }
      int better = 0;  // groups that come before this one
      for (int other = 0; other < args.groups; ++other) {
        const uint32_t theirs = __shfl_sync(kAllLanes, own, other * args.group_lanes);
        better += theirs > own || (theirs == own && other < group);
      }
      open = open && better < args.kept;
    }

    Mask<kOwn> chosen = 0;
    uint32_t own = open ? best_of<kOwn>(key, chosen) : 0u;
    for (int k = 0; k < args.top_k; ++k) {
      const uint32_t most = __reduce_max_sync(kAllLanes, own);
      if (lane == __ffs(__ballot_sync(kAllLanes, own == most)) - 1) {
        chosen = with_first<kOwn>(key, most, chosen);
        own = best_of<kOwn>(key, chosen);
      }
    }

    float factor = args.scale;
    if (args.score == Score::kTopkSoftmax) {
      float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if ((chosen >> j) & 1) most = fmaxf(most, value[j]);
      most = warp_max(most);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (!((chosen >> j) & 1)) continue;
        value[j] = expf(value[j] - most);
        sum += value[j];
      }
      factor = args.scale / warp_sum(sum);
    } else if (args.score == Score::kSigmoid && args.top_k > 1) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if ((chosen >> j) & 1) sum += value[j];
      factor = args.scale / (warp_sum(sum) + 1e-20f);
    }
    store_own<T, kOwn>(static_cast<T*>(args.probs) + at, held, args.vector, [&](int j) {
      return static_cast<T>((chosen >> j) & 1 ? value[j] * factor : 0.0f);
    });
    store_own<bool, kOwn>(args.map + at, held, args.vector, [&](int j) { return static_cast<bool>((chosen >> j) & 1); });
    for (Mask<kOwn> left = chosen; left != 0; left &= left - 1) {
      const int j = kOwn > 32 ? __ffsll(static_cast<long long>(left)) - 1 : __ffs(static_cast<int>(left)) - 1;
      atomicAdd(&count[own_first + j], 1);
    }
  }

  __syncthreads();
  for (int e = threadIdx.x; e < args.E; e += kThreads)
    if (count[e] != 0) atomicAdd(args.counts + e, static_cast<unsigned long long>(count[e]));
  __threadfence();  // this block's counts are there before it says so
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(args.arrived, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!last || warp != 0) return;
  __threadfence();
  int64_t before = 0;
  for (int first = 0; first < args.E; first += kWarp) {
    const int e = first + lane;
    int64_t sum = e < args.E ? static_cast<int64_t>(__ldcg(args.counts + e)) : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += lower;
    }
    sum += before;
    if (e < args.E) args.offsets[e] = sum;
    before = __shfl_sync(kAllLanes, sum, kWarp - 1);
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
    float mask[kOwn], grad[kOwn], value[kOwn];
    load_own<uint8_t, kOwn>(reinterpret_cast<const uint8_t*>(args.map) + at, held, args.vector, mask);
    const bool all = args.score == Score::kSoftmax;
    if (all) load_own<T, kOwn>(logits, held, args.vector, value);
    float most = -std::numeric_limits<float>::infinity(), sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool chosen = mask[j] != 0.0f;
      grad[j] = chosen ? static_cast<float>(grads[j]) * args.scale : 0.0f;
      if (!all) value[j] = chosen ? static_cast<float>(logits[j]) : 0.0f;
      if (all ? j < held : chosen) most = fmaxf(most, value[j]);
    }
    const bool sigmoids = args.score == Score::kSigmoid;
    if (!sigmoids) most = warp_max(most);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool counted = all ? j < held : mask[j] != 0.0f;
      value[j] = !counted ? 0.0f : sigmoids ? sigmoid(value[j]) : expf(value[j] - most);
      sum += value[j];
    }
    const float inverse = 1.0f / (warp_sum(sum) + (sigmoids ? 1e-20f : 0.0f));
#pragma unroll
    for (int j = 0; j < kOwn; ++j) dot += mask[j] != 0.0f ? grad[j] * (value[j] * inverse) : 0.0f;
    dot = warp_sum(dot);
    store_own<T, kOwn>(static_cast<T*>(args.out) + at, held, args.vector, [&](int j) {
      if (all) return static_cast<T>((grad[j] - dot) * (value[j] * inverse));
      if (mask[j] == 0.0f) return static_cast<T>(0.0f);
      if (!sigmoids) return static_cast<T>((grad[j] - dot) * (value[j] * inverse));
      const float of_score = args.top_k > 1 ? (grad[j] - dot) * inverse : grad[j];
      return static_cast<T>(of_score * (1.0f - value[j]) * value[j]);
    });
  }
}

void check_device(const char* op, const at::Tensor& logits, int64_t top_k, int64_t groups) {
  TORCH_CHECK_VALUE(
      logits.scalar_type() != at::kDouble, op, ": expected logits of float32 or bfloat16 on a GPU, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(
      logits.size(1) <= kMostExperts && top_k <= kMostChosen && groups <= kMostGroups, op, ": expected on a GPU at most ", kMostExperts,
      " experts, a top_k of ", kMostChosen, " and ", kMostGroups, " groups, got ", logits.size(1), ", ", top_k, " and ", groups);
}

// Calls `run` with T and the experts of a lane, rounded up to a power of two, as constants.
template <typename Run>
void with_types(at::ScalarType type, int64_t own, Run run) {
  const auto sized = [&](auto zero) {
    using T = decltype(zero);
    if (own <= 1) return run.template operator()<T, 1>();
    if (own <= 2) return run.template operator()<T, 2>();
    if (own <= 4) return run.template operator()<T, 4>();
    if (own <= 8) return run.template operator()<T, 8>();
    if (own <= 16) return run.template operator()<T, 16>();
    if (own <= 32) return run.template operator()<T, 32>();
    return run.template operator()<T, 64>();  // a number of groups that is not a power of two leaves lanes idle
  };
  if (type == at::kFloat) return sized(float{});
  sized(__nv_bfloat16{});
}

// Whether lanes of `own` experts are full or empty in groups of `size`, and can be moved 16 bytes at a time.
bool moves_whole(int own, int64_t size, std::initializer_list<const void*> tensors) {
  if (size % own != 0) return false;
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
  return true;
}

unsigned num_blocks(int64_t tokens) {
  int device = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return grid_of(ceil_div(tokens, kWarps), 8 * processors);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_cuda(
    const at::Tensor& logits_any, const std::optional<at::Tensor>& bias_any, int64_t top_k, int64_t num_groups,
    int64_t topk_groups, std::string_view score_function, double scale) {
  const RouteSizes sizes = check_route(logits_any, bias_any, top_k, num_groups, topk_groups, score_function);
  check_device("route", logits_any, top_k, sizes.groups);
  const c10::cuda::CUDAGuard guard(logits_any.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t T = sizes.tokens, E = sizes.experts;
  const at::Tensor logits = logits_any.contiguous();
  const at::Tensor bias = bias_any.has_value() ? bias_any->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor probs = at::empty({T, E}, logits.options());
  at::Tensor map = at::empty({T, E}, logits.options().dtype(at::kBool));
  at::Tensor counts_and_arrived = at::empty({E + 1}, logits.options().dtype(at::kLong));  // one memset for both
  at::Tensor counts = counts_and_arrived.narrow(0, 0, E), offsets = at::empty({E}, counts.options());
  int64_t* totals = counts_and_arrived.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(cudaMemsetAsync(totals, 0, (E + 1) * sizeof(int64_t), stream));

  int lanes = kWarp;  // of a group
  while (lanes * sizes.groups > kWarp) lanes /= 2;
  RouteArgs args{};
  args.logits = logits.const_data_ptr();
  args.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  args.probs = probs.mutable_data_ptr();
  args.map = map.mutable_data_ptr<bool>();
  args.counts = reinterpret_cast<unsigned long long*>(totals);
  args.arrived = args.counts + E;
  args.offsets = offsets.mutable_data_ptr<int64_t>();
  args.T = T;
  args.E = static_cast<int>(E);
  args.groups = static_cast<int>(sizes.groups);
  args.kept = static_cast<int>(sizes.kept);
  args.group_size = static_cast<int>(sizes.group_size);
  args.group_best = static_cast<int>(sizes.group_best);
  args.top_k = static_cast<int>(top_k);
  args.group_lanes = lanes;
  args.score = sizes.score;
  args.scale = static_cast<float>(scale);
  with_types(logits.scalar_type(), ceil_div(sizes.group_size, lanes), [&]<typename N, int kOwn>() {
    args.vector = moves_whole(kOwn, sizes.group_size, {args.logits, args.probs, args.map});
    route_kernel<N, kOwn><<<num_blocks(T), kThreads, 0, stream>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {probs, map, counts, offsets};
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
    route_backward_kernel<N, kOwn><<<num_blocks(T), kThreads, 0, stream>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("route", route_cuda);
  m.impl("route_backward", route_backward_cuda);
}

}  // namespace r1mega
