// route on Hopper: a warp a token, its scores in registers. The contract: r1mega/ops/route.py.
//
// Lanes are dealt to groups: L lanes (a power of two) hold one group, kOwn neighbouring experts each, so that lane order is
// the order of the experts and of the groups. How they are chosen: choose.cuh.
//
// Rows are zeroed 16 bytes a lane before they are computed, and the chosen few written over that. Counts are gathered in shared
// memory, then by integer atomics, whose order does not matter; the last block to finish sums them up to the offsets. What sets the
// counts to zero is a kernel that this one does not wait for until it adds to them.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "choose.cuh"
#include "device.cuh"

namespace r1mega {
namespace {

constexpr int kZeroThreads = 256;
template <int kOwn>
constexpr int kThreads = kFew<kOwn> ? 512 : 256;
template <int kOwn>
constexpr int kBlocks = kFew<kOwn> ? 2 : 1;  // of a processor: 64 registers a thread; few, for each adds its counts at the end

struct RouteArgs {
  const void* logits;  // [T, E]
  const float* bias;   // [E] or null
  void* probs;
  bool* map;
  unsigned long long* counts;   // [E], 0 once zero_counts is done
  unsigned long long* arrived;  // blocks that are done, 0 as well
  int64_t* offsets;             // [E]
  int64_t T;
  int E, groups, kept, group_size, group_best, top_k;
  int group_lanes;  // L
  bool vector;      // no access of a lane's experts is in part
  bool whole_rows;  // rows of probs and map are pieces of 16 bytes
  Score score;
  float scale;
};

// The scores and the keys of a token's experts, `value` being logits before; `easy`: no bias is NaN.
template <int kOwn>
__device__ __forceinline__ void score_sigmoid(
    float (&value)[kOwn], uint32_t (&key)[kOwn], const float (&bias)[kOwn], bool easy) {
#pragma unroll
  for (int j = 0; j < kOwn; ++j) easy &= value[j] >= -87.0f;
  if (easy) {  // the bits of sigmoid() without its tests: 1 + expf(-x) is below 2^126, so that its inverse is a normal number
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const float whole = 1.0f + expf(-value[j]);
      float inverse;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(whole));
      value[j] = fmaf(inverse, fmaf(-whole, inverse, 1.0f), inverse);
      key[j] = number_key(value[j] + bias[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      value[j] = sigmoid(value[j]);
      key[j] = order_key(value[j] + bias[j]);
    }
  }
}

// Zeros from a whole warp; `whole`: in pieces of 16 bytes.
template <typename T>
__device__ __forceinline__ void zero_row(T* to, int count, bool whole) {
  const int lane = threadIdx.x % kWarp;
  if (whole) {
    constexpr int kPiece = kVector<T>;
    for (int i = lane * kPiece; i < count; i += kWarp * kPiece) *reinterpret_cast<Vector<uint32_t, 4>*>(to + i) = {};
  } else {
    for (int i = lane; i < count; i += kWarp) to[i] = static_cast<T>(0.0f);
  }
}

// Inclusive sums of the counts, by a whole block.
template <int kThreads>
__device__ __forceinline__ void write_offsets(const RouteArgs& args) {
  __shared__ int64_t of_warp[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t before = 0;
  for (int first = 0; first < args.E; first += kThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    int64_t sum = e < args.E ? static_cast<int64_t>(__ldcg(args.counts + e)) : 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += lower;
    }
    if (lane == kWarp - 1) of_warp[warp] = sum;
    __syncthreads();
    sum += before;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) sum += of_warp[w];
      before += of_warp[w];
    }
    if (e < args.E) args.offsets[e] = sum;
    __syncthreads();  // of_warp is used again
  }
}

__global__ void __launch_bounds__(kZeroThreads) zero_counts(int64_t* counts, int64_t count) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // route_kernel may start
#endif
  for (int64_t i = threadIdx.x; i < count; i += kZeroThreads) counts[i] = 0;
}

template <typename T, int kOwn>
__global__ void __launch_bounds__(kThreads<kOwn>, kBlocks<kOwn>) route_kernel(const RouteArgs args) {
  constexpr int kWarps = kThreads<kOwn> / kWarp;
  __shared__ int count[kMostExperts];
  __shared__ bool last;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = lane / args.group_lanes, place = (lane % args.group_lanes) * kOwn;  // in the group
  const int held = group < args.groups ? max(0, min(kOwn, args.group_size - place)) : 0;
  const int own_first = held > 0 ? group * args.group_size + place : 0;
  const bool sigmoids = args.score == Score::kSigmoid;
  const T absent = static_cast<T>(sigmoids ? 0.0f : -std::numeric_limits<float>::infinity());  // adds nothing to a softmax
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  int64_t t = int64_t(blockIdx.x) * kWarps + warp;

  T ahead[kOwn];
  const auto load = [&](int64_t token) {
    const T* from = static_cast<const T*>(args.logits) + token * args.E + own_first;
    load_own<T, kOwn>(from, token < args.T ? held : 0, args.vector, absent, ahead);
  };
  if (kFew<kOwn>) load(t);
  float bias[kOwn];
  bool easy = true;
  const auto load_bias = [&] {
    load_own<float, kOwn>(args.bias + own_first, args.bias != nullptr ? held : 0, args.vector, 0.0f, bias);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) easy &= bias[j] == bias[j];
  };
  if (kFew<kOwn>) load_bias();
  for (int e = threadIdx.x; e < args.E; e += kThreads<kOwn>) count[e] = 0;
  __syncthreads();

  for (; t < args.T; t += stride) {
    T* probs = static_cast<T*>(args.probs) + t * args.E;
    bool* map = args.map + t * args.E;
    zero_row(probs, args.E, args.whole_rows);
    zero_row(map, args.E, args.whole_rows);
    float value[kOwn];  // the score that probabilities are made of
    uint32_t key[kOwn];
    if (!kFew<kOwn>) load(t);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) value[j] = static_cast<float>(ahead[j]);
    if (kFew<kOwn>) load(t + stride);
    if (sigmoids) {
      if (!kFew<kOwn>) load_bias();  // registers are short
      score_sigmoid<kOwn>(value, key, bias, easy);
    } else {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) key[j] = value[j] == value[j] ? number_key(value[j]) : kNanKey;
    }
    const auto drop_absent = [&](uint32_t (&of)[kOwn]) {
      if (held == kOwn) return;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) of[j] = j < held ? of[j] : 0u;
    };
    drop_absent(key);
    if (args.score == Score::kSoftmax) {
      float most = -std::numeric_limits<float>::infinity(), sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) most = fmaxf(most, value[j]);  // passes NaN over, which the sum then has
      most = warp_max(most);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        value[j] = expf(value[j] - most);
        sum += value[j];
      }
      const float inverse = 1.0f / warp_sum(sum);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) value[j] *= inverse;
    }

    const Queue<kOwn> queue(key);
    bool open = held > 0;  // this lane's experts can be chosen
    if (args.kept < args.groups) {
      float score;
      if (args.score == Score::kSoftmax) {
        uint32_t score_key[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) score_key[j] = value[j] == value[j] ? number_key(value[j]) : kNanKey;
        drop_absent(score_key);
        score = group_score<kOwn>(Queue<kOwn>(score_key), args.group_lanes, args.group_best);
      } else {
        score = group_score<kOwn>(queue, args.group_lanes, args.group_best);
      }
      const bool leads = group < args.groups && place == 0;
      const uint32_t group_key[1] = {leads ? order_key(score) : 0u};
      const unsigned kept = __ballot_sync(kAllLanes, choose<1>(group_key, Queue<1>(group_key), leads, args.kept) != 0);
      open = open && ((kept >> (lane - lane % args.group_lanes)) & 1) != 0;
    }
    const Mask<kOwn> chosen = choose<kOwn>(key, queue, open, args.top_k);

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
    } else if (sigmoids && args.top_k > 1) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if ((chosen >> j) & 1) sum += value[j];
      factor = args.scale / (warp_sum(sum) + 1e-20f);
    }
    __syncwarp();  // the zeros before what other lanes write over them
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (!((chosen >> j) & 1)) continue;
      probs[own_first + j] = static_cast<T>(value[j] * factor);
      map[own_first + j] = true;
      atomicAdd(&count[own_first + j], 1);
    }
  }

#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // the counts are zeroed
#endif
  __syncthreads();
  for (int e = threadIdx.x; e < args.E; e += kThreads<kOwn>)
    if (count[e] != 0) atomicAdd(args.counts + e, static_cast<unsigned long long>(count[e]));
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // this block's counts are there before it says so
    last = atomicAdd(args.arrived, 1ull) == gridDim.x - 1;
    __threadfence();  // and the others' before they are read
  }
  __syncthreads();
  if (!last) return;
  write_offsets<kThreads<kOwn>>(args);
}

// Launches a kernel that starts when all blocks of the one before have let it, and waits for that one by itself.
template <typename Kernel>
void launch_early(Kernel kernel, unsigned blocks, int threads, cudaStream_t stream, const RouteArgs& args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
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
  at::Tensor counts_and_arrived = at::empty({E + 1}, logits.options().dtype(at::kLong));  // zeroed as one
  at::Tensor counts = counts_and_arrived.narrow(0, 0, E), offsets = at::empty({E}, counts.options());
  int64_t* totals = counts_and_arrived.mutable_data_ptr<int64_t>();
  zero_counts<<<1, kZeroThreads, 0, stream>>>(totals, E + 1);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

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
  args.whole_rows = E % 16 == 0 && moves_whole(1, 1, {args.probs, args.map});
  with_types<5>(logits.scalar_type(), ceil_div(sizes.group_size, lanes), [&]<typename N, int kOwn>() {
    args.vector = moves_whole(kAtOnce<N, kOwn>, sizes.group_size, {args.logits, args.bias});
    launch_early(route_kernel<N, kOwn>, num_blocks(T, kThreads<kOwn> / kWarp, kBlocks<kOwn>), kThreads<kOwn>, stream, args);
  });
  return {probs, map, counts, offsets};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("route", route_cuda); }

}  // namespace r1mega
