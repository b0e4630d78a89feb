// token_logprobs on a GPU: the two kernels over a piece of logits; the products are cuBLAS's. A block has a token's row of the piece.
//
// Pieces are of fp32 logits. The gradient is written over them: for a bf16 product as bf16 at the start of each row, so that a piece
// needs no second buffer.

#include "../common/device.cuh"
#include "op.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace r1mega {
namespace {

constexpr int64_t kPieceBytes = 256 << 20;
constexpr int kThreads = 256;

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

constexpr double kFarBelow = -1000.0;  // e^x is 0 in every type: where a logit is -inf, 0 times its distance is 0

template <typename T>
__device__ __forceinline__ T distance(T logit, T from) {
  const T d = logit - from;
  return d < T(kFarBelow) ? T(kFarBelow) : d;  // NaN stays
}

// Of some logits z: the largest, the sum of e^(z - largest), the sum of e^(z - largest) (z - largest).
template <typename T>
struct Sums {
  T largest, sum, weighted;
};

template <typename T>
__device__ __forceinline__ T finite_from(T largest) {
  return largest == -std::numeric_limits<T>::infinity() ? T(0) : largest;
}

// Symmetric, so that lanes that exchange their sums get the same bits.
template <typename T>
__device__ __forceinline__ Sums<T> combine(const Sums<T>& a, const Sums<T>& b) {
  const T most = max(a.largest, b.largest), from = finite_from(most);
  const T da = distance(a.largest, from), db = distance(b.largest, from);
  const T fa = exp_of(da), fb = exp_of(db);
  return {most, fa * a.sum + fb * b.sum, fa * (a.weighted + a.sum * da) + fb * (b.weighted + b.sum * db)};
}

template <typename T>
__device__ __forceinline__ Sums<T> block_combine(Sums<T> own, Sums<T>* shared) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Sums<T> other{
        __shfl_xor_sync(kAllLanes, own.largest, step), __shfl_xor_sync(kAllLanes, own.sum, step),
        __shfl_xor_sync(kAllLanes, own.weighted, step)};
    own = combine(own, other);
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = own;
  __syncthreads();
  Sums<T> total = shared[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total = combine(total, shared[warp]);
  return total;
}

constexpr int kPerThread = 16;  // logits a thread has in flight

template <typename T>
__global__ void __launch_bounds__(kThreads) fold_piece(
    const Piece piece, const int64_t* __restrict__ targets, T* __restrict__ state, T* __restrict__ logprobs, T* __restrict__ entropy,
    T* __restrict__ log_sum) {
  constexpr int kWide = kVector<T>, kLoads = kPerThread / kWide;
  __shared__ Sums<T> shared[kThreads / kWarp];
  const int64_t row = blockIdx.x, tokens = piece.tokens;
  const T* z = static_cast<const T*>(piece.logits) + row * piece.stride;
  const T scale = static_cast<T>(piece.scale);
  Sums<T> own{-std::numeric_limits<T>::infinity(), T(0), T(0)};
  // the stride is a multiple of 128, so that a row's last vector lies inside it; what is behind `count` does not count
  for (int64_t base = 0; base < piece.count; base += kThreads * kPerThread) {
    T value[kPerThread];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t from = base + (static_cast<int64_t>(j) * kThreads + threadIdx.x) * kWide;
      if (from < piece.count) {
        const auto loaded = load16(z + from);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          value[j * kWide + i] = from + i < piece.count ? loaded.value[i] * scale : -std::numeric_limits<T>::infinity();
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWide; ++i) value[j * kWide + i] = -std::numeric_limits<T>::infinity();
      }
    }
    T most = own.largest;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) most = max(most, value[i]);
    const T from = finite_from(most);
    const T moved = distance(own.largest, from), kept = exp_of(moved);
    own.weighted = kept * (own.weighted + own.sum * moved);
    own.sum *= kept;
    own.largest = most;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const T d = distance(value[i], from), e = exp_of(d);
      own.sum += e;
      own.weighted += e * d;
    }
  }
  const Sums<T> here = block_combine(own, shared);
  if (threadIdx.x != 0) return;
  const int64_t place = targets[row] - piece.first;
  T target = piece.is_first ? std::numeric_limits<T>::quiet_NaN() : state[3 * tokens + row];
  if (place >= 0 && place < piece.count) target = z[place] * scale;
  const Sums<T> total =
      piece.is_first ? here : combine(Sums<T>{state[row], state[tokens + row], state[2 * tokens + row]}, here);
  if (piece.is_last) {
    const T log_s = log(total.sum);
    logprobs[row] = (target - total.largest) - log_s;
    entropy[row] = log_s - total.weighted / total.sum;
    log_sum[row] = total.largest + log_s;
  } else {
    state[row] = total.largest;
    state[tokens + row] = total.sum;
    state[2 * tokens + row] = total.weighted;
    state[3 * tokens + row] = target;
  }
}

constexpr int kTurned = 8;  // logits a thread turns at once

// Out is the type of the gradient's numbers, T or the narrower bf16. A block goes through its row in order: between the reads of a
// stretch and its writes, which lie at or before it, all threads meet.
template <typename Out, typename T>
__global__ void __launch_bounds__(kThreads) turn_piece(
    const Piece piece, const int64_t* __restrict__ targets, const T* __restrict__ log_sum, const T* __restrict__ entropy,
    const T* __restrict__ grad_logprobs, const T* __restrict__ grad_entropy) {
  constexpr int kWide = kVector<T>, kLoads = kTurned / kWide, kNarrow = kVector<Out>, kStores = kTurned / kNarrow;
  constexpr int64_t kStretch = static_cast<int64_t>(kThreads) * kTurned;
  const int64_t row = blockIdx.x;
  T* z = static_cast<T*>(piece.logits) + row * piece.stride;
  Out* out = reinterpret_cast<Out*>(z);
  const T scale = static_cast<T>(piece.scale), lse = log_sum[row], h = entropy[row];
  const T g = grad_logprobs[row] * scale, k = grad_entropy[row] * scale;
  const int64_t place = targets[row] - piece.first, mine = static_cast<int64_t>(threadIdx.x) * kTurned;
  T next[kTurned];
  const auto load = [&](int64_t from) {
    if (from >= piece.count) return;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const auto loaded = load16(z + from + j * kWide);
#pragma unroll
      for (int i = 0; i < kWide; ++i) next[j * kWide + i] = loaded.value[i];
    }
  };
  load(mine);
  for (int64_t base = 0; base < piece.count; base += kStretch) {
    const int64_t from = base + mine;
    Vector<Out, kNarrow> turned[kStores];
    if (from < piece.count) {
#pragma unroll
      for (int i = 0; i < kTurned; ++i) {
        const T logp = distance(next[i] * scale, lse);
        T grad = -exp_of(logp) * (g + k * (logp + h));
        if (from + i == place) grad += g;
        turned[i / kNarrow].value[i % kNarrow] = static_cast<Out>(grad);
      }
    }
    load(from + kStretch);
    __syncthreads();
    if (from < piece.count) {
#pragma unroll
      for (int j = 0; j < kStores; ++j) store16(out + from + j * kNarrow, turned[j]);
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_cuda(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, int64_t num_tokens, double scale) {
  const c10::cuda::CUDAGuard device(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  return token_logprobs_of(
      hidden, weight, targets, num_tokens, scale, kPieceBytes,
      [&](const Piece& piece, const at::Tensor& targets, const at::Tensor& state, at::Tensor& logprobs, at::Tensor& entropy,
          at::Tensor& log_sum) {
        AT_DISPATCH_FLOATING_TYPES(state.scalar_type(), "token_logprobs", [&] {
          fold_piece<scalar_t><<<grid_of(piece.tokens), kThreads, 0, stream>>>(
              piece, targets.const_data_ptr<int64_t>(), state.mutable_data_ptr<scalar_t>(), logprobs.mutable_data_ptr<scalar_t>(),
              entropy.mutable_data_ptr<scalar_t>(), log_sum.mutable_data_ptr<scalar_t>());
        });
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

std::tuple<at::Tensor, at::Tensor> token_logprobs_backward_cuda(
    const at::Tensor& grad_logprobs, const at::Tensor& grad_entropy, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& targets, const at::Tensor& log_sum, const at::Tensor& entropy, int64_t num_tokens, double scale) {
  const c10::cuda::CUDAGuard device(hidden.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const bool bf16 = hidden.scalar_type() == at::kBFloat16;
  return token_logprobs_gradients(
      grad_logprobs, grad_entropy, hidden, weight, targets, log_sum, entropy, num_tokens, scale, kPieceBytes,
      [&](const Piece& piece, const at::Tensor& targets, const at::Tensor& log_sum, const at::Tensor& entropy,
          const at::Tensor& grad_logprobs, const at::Tensor& grad_entropy) {
        const auto launch = [&](auto out, auto number) {
          using Out = decltype(out);
          using T = decltype(number);
          turn_piece<Out, T><<<grid_of(piece.tokens), kThreads, 0, stream>>>(
              piece, targets.const_data_ptr<int64_t>(), log_sum.const_data_ptr<T>(), entropy.const_data_ptr<T>(),
              grad_logprobs.const_data_ptr<T>(), grad_entropy.const_data_ptr<T>());
        };
        if (bf16) {
          launch(__nv_bfloat16(), float());
        } else if (log_sum.scalar_type() == at::kFloat) {
          launch(float(), float());
        } else {
          launch(double(), double());
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("token_logprobs", token_logprobs_cuda);
  m.impl("token_logprobs_backward", token_logprobs_backward_cuda);
}

}  // namespace r1mega
