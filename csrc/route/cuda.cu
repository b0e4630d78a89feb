// route on Hopper: a warp a token, its scores in registers. The contract: r1mega/ops/route.py.
//
// Lanes are dealt to groups: L lanes (a power of two) hold one group, kOwn neighbouring experts each, so that lane order is the order
// of the experts and of the groups. Scores are compared as integers. Each lane sorts its own once; the largest of the warp's heads is
// one redux, and the lanes that have it take it off: after top_k rounds it is the least key chosen, and what is chosen follows by one
// comparison an expert. Only a token with more experts of that key than places ranks them by index.
//
// Rows are zeroed 16 bytes a lane before they are computed, and the chosen few written over that. Counts are gathered in shared
// memory, then by integer atomics, whose order does not matter; the last block to finish sums them up to the offsets. What sets the
// counts to zero is a kernel that this one does not wait for until it adds to them.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "device.cuh"

namespace r1mega {
namespace {

constexpr int kZeroThreads = 256;
template <int kOwn>
constexpr bool kFew = kOwn <= 8;  // a lane's experts are sorted, and the next token's are loaded ahead
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

template <typename M>
__device__ __forceinline__ int num_bits(M mask) {
  if constexpr (sizeof(M) == 8) return __popcll(mask);
  return __popc(mask);
}

// order_key of a score that is not NaN.
__device__ __forceinline__ uint32_t number_key(float score) {
  const uint32_t bits = float_bits(score + 0.0f);  // -0 + 0 is 0
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// A lane's keys to be taken largest first. `head`: the largest of those left, 0 when none is.
template <int kOwn>
struct Queue {
  static constexpr int kSlots = !kFew<kOwn> || kOwn == 1 ? kOwn : kOwn == 2 ? 2 : kOwn <= 4 ? 4 : 8;
  uint32_t slot[kSlots];  // sorted where they are few: the head first
  Mask<kOwn> out = 0;     // else: those that were taken
  uint32_t head;

  __device__ __forceinline__ explicit Queue(const uint32_t (&key)[kOwn]) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) slot[j] = j < kOwn ? key[j] : 0u;
    if constexpr (kFew<kOwn>) {
      // A bitonic network: runs of `size` are in falling and rising order in turn. Slots that are 0 for good fold away.
#pragma unroll
      for (int size = 2; size <= kSlots; size *= 2) {
#pragma unroll
        for (int step = size / 2; step > 0; step /= 2) {
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if ((j & step) != 0) continue;
            const uint32_t more = max(slot[j], slot[j | step]), less = min(slot[j], slot[j | step]);
            slot[j] = (j & size) == 0 ? more : less;
            slot[j | step] = (j & size) == 0 ? less : more;
          }
        }
      }
      head = slot[0];
    } else {
      head = best_of<kOwn>(slot, out);
    }
  }

  // Takes the head off.
  __device__ __forceinline__ void take() {
    if constexpr (kFew<kOwn>) {
#pragma unroll
      for (int j = 0; j + 1 < kSlots; ++j) slot[j] = slot[j + 1];
      slot[kSlots - 1] = 0;
      head = slot[0];
    } else {
      out = with_first<kOwn>(slot, head, out);
      head = best_of<kOwn>(slot, out);
    }
  }
};

// The sum of the `count` best keys' scores among `lanes` neighbours (a power of two), best first; on each of them.
template <int kOwn>
__device__ __forceinline__ float group_score(Queue<kOwn> queue, int lanes, int count) {
  if (count <= 2) {
    uint32_t first = queue.head;
    queue.take();
    uint32_t second = queue.head;
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
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) {
    uint32_t most = queue.head;
    for (int step = 1; step < lanes; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    const unsigned having = __ballot_sync(kAllLanes, queue.head == most) & mine;
    sum = n == 0 ? key_score(most) : sum + key_score(most);
    if (lane == __ffs(having) - 1) queue.take();
  }
  return sum;
}

// Which of a lane's keys are among the `count` largest of all lanes' (there are so many that are not 0); of equal ones those of the
// lower lanes, and in a lane the first.
template <int kOwn>
__device__ __forceinline__ Mask<kOwn> choose(const uint32_t (&key)[kOwn], Queue<kOwn> queue, bool open, int count) {
  if (!open) queue.head = 0;
  uint32_t least;  // of the keys chosen, in the end
  int taken = 0;
  do {
    least = __reduce_max_sync(kAllLanes, queue.head);
    const bool mine = queue.head == least;
    taken += __popc(__ballot_sync(kAllLanes, mine));
    if (mine) queue.take();
  } while (taken < count);

  Mask<kOwn> chosen = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) chosen |= key[j] >= least ? Mask<kOwn>(1) << j : Mask<kOwn>(0);
  if (!open) chosen = 0;
  if (taken == count && !__any_sync(kAllLanes, queue.head == least)) return chosen;

  Mask<kOwn> equal = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) equal |= key[j] == least ? Mask<kOwn>(1) << j : Mask<kOwn>(0);
  equal &= chosen;
  chosen ^= equal;
  const int lane = threadIdx.x % kWarp, own = num_bits(equal);
  int up_to = own;  // equal ones of this lane and those before
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += lower;
  }
  int places = count - warp_sum(num_bits(chosen)) - (up_to - own);
  for (; equal != 0 && places > 0; equal &= equal - 1, --places) chosen |= equal & (~equal + 1);
  return chosen;
}

// The scores and the keys of a token's experts, `value` being logits before; `easy`: no bias is NaN.
template <int kOwn>
__device__ __forceinline__ void score_sigmoid(
    float (&value)[kOwn], uint32_t (&key)[kOwn], const float (&bias)[kOwn], bool easy) {
#pragma unroll
  for (int j = 0; j < kOwn; ++j) easy = easy && value[j] >= -87.0f;
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
  cudaTriggerProgrammaticLaunchCompletion();  // route_kernel may start
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
  load_own<float, kOwn>(args.bias + own_first, args.bias != nullptr ? held : 0, args.vector, 0.0f, bias);
  bool easy = true;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) easy = easy && bias[j] == bias[j];
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

  cudaGridDependencySynchronize();  // the counts are zeroed
  __syncthreads();
  for (int e = threadIdx.x; e < args.E; e += kThreads<kOwn>)
    if (count[e] != 0) atomicAdd(args.counts + e, static_cast<unsigned long long>(count[e]));
  __threadfence();  // this block's counts are there before it says so
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(args.arrived, 1ull) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
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
