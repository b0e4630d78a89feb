// permute, unpermute and their backward passes on a GPU: each byte is read and written once, past the caches.
//
// A block has a token. permute holds pieces of it in registers and stores them to each of its rows; unpermute has pieces of up to
// kBatch rows in flight and sums them in the order of the experts; its backward pass reads a token's gradient and its rows, and
// writes the rows' gradients while it sums their dot products. Padding rows are found in row_tokens by the same blocks, each of which
// looks at every gridDim-th row. Row numbers outside [0, R) are passed over.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/stream.cuh"
#include "padding.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kEach = 4;       // pieces that a thread of permute holds
constexpr int kBatch = 8;      // rows that are in flight together
constexpr int kBlocks = 3;     // with kBatch rows a processor has at least: 80 KiB in flight

template <typename Unit>
__global__ void __launch_bounds__(kThreads) permute_kernel(
    const Unit* __restrict__ tokens, const int64_t* __restrict__ row_tokens, const int64_t* __restrict__ token_rows,
    Unit* __restrict__ rows, int64_t T, int64_t R, int64_t width, int64_t pieces) {
  const int lane = threadIdx.x % kWarp;
  const int64_t seen = first_seen(row_tokens, R);
  for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
    for (int64_t first = threadIdx.x; first - threadIdx.x < pieces; first += kEach * blockDim.x) {
      Unit held[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t p = first + i * blockDim.x;
        if (p < pieces) held[i] = __ldcs(tokens + t * pieces + p);
      }
      for (int64_t batch = 0; batch < width; batch += kWarp) {
        const int64_t mine = batch + lane < width ? token_rows[t * width + batch + lane] : -1;
        const int most = static_cast<int>(min(static_cast<int64_t>(kWarp), width - batch));
        for (int k = 0; k < most; ++k) {
          const int64_t r = __shfl_sync(kAllLanes, mine, k);
          if (r < 0 || r >= R) continue;
          Unit* to = rows + r * pieces;
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int64_t p = first + i * blockDim.x;
            if (p < pieces) __stcs(to + p, held[i]);
          }
        }
      }
    }
  }
  clear_padding(rows, row_tokens, R, pieces, seen);
}

// Blocks for T tokens and R rows, of which any may be padding: a block clears few of them.
unsigned grid_for(int64_t T, int64_t R) { return grid_of(std::max(T, ceil_div(R, 16))); }

template <typename Unit>
void launch_permute(const at::Tensor& tokens, const at::Tensor& row_tokens, const at::Tensor& token_rows, at::Tensor& rows, int64_t bytes) {
  const int64_t T = tokens.size(0), R = rows.size(0), pieces = bytes / static_cast<int64_t>(sizeof(Unit));
  permute_kernel<Unit><<<grid_for(T, R), threads_for(pieces, kEach, kThreads), 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<const Unit*>(tokens.const_data_ptr()), row_tokens.const_data_ptr<int64_t>(),
      token_rows.const_data_ptr<int64_t>(), static_cast<Unit*>(rows.mutable_data_ptr()), T, R, token_rows.size(1), pieces);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor permute_cuda(const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows_any) {
  const MoveSizes sizes = check_tokens("permute", tokens_any, row_tokens_any, token_rows_any);
  const c10::cuda::CUDAGuard guard(tokens_any.device());
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const at::Tensor token_rows = token_rows_any.contiguous();
  at::Tensor rows = at::empty({sizes.rows, sizes.hidden}, tokens.options());
  const int64_t bytes = sizes.hidden * static_cast<int64_t>(tokens.element_size());
  if (bytes == 0 || sizes.rows == 0) return rows;
  const auto aligned = reinterpret_cast<uintptr_t>(tokens.const_data_ptr()) | static_cast<uintptr_t>(bytes);  // rows are
  if (aligned % 16 == 0) {
    launch_permute<uint4>(tokens, row_tokens, token_rows, rows, bytes);
  } else if (aligned % 4 == 0) {
    launch_permute<unsigned int>(tokens, row_tokens, token_rows, rows, bytes);
  } else if (aligned % 2 == 0) {
    launch_permute<unsigned short>(tokens, row_tokens, token_rows, rows, bytes);
  } else {
    launch_permute<unsigned char>(tokens, row_tokens, token_rows, rows, bytes);
  }
  return rows;
}

// kTo: from probs [T, E] of these strides to rows; otherwise back, into zeros.
template <typename Unit, bool kTo>
__global__ void __launch_bounds__(kThreads) probs_kernel(
    const Unit* __restrict__ from, const int64_t* __restrict__ row_tokens, const int32_t* __restrict__ row_experts,
    Unit* __restrict__ to, int64_t R, int64_t T, int64_t E, int64_t stride_t, int64_t stride_e) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; r < R; r += step) {
    const int64_t t = row_tokens[r], e = row_experts[r];
    const bool found = t >= 0 && t < T && e >= 0 && e < E;
    const int64_t place = t * stride_t + e * stride_e;
    if constexpr (kTo) {
      to[r] = found ? from[place] : Unit(0);
    } else if (found) {
      to[place] = from[r];
    }
  }
}

template <bool kTo>
void launch_probs(
    const at::Tensor& from, const at::Tensor& row_tokens, const at::Tensor& row_experts, const at::Tensor& to, int64_t T, int64_t E,
    int64_t stride_t, int64_t stride_e) {
  const int64_t R = row_tokens.size(0);
  if (R == 0) return;
  const auto launch = [&](auto unit) {
    using Unit = decltype(unit);
    probs_kernel<Unit, kTo><<<grid_of(ceil_div(R, kThreads)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        static_cast<const Unit*>(from.const_data_ptr()), row_tokens.const_data_ptr<int64_t>(),
        row_experts.const_data_ptr<int32_t>(), static_cast<Unit*>(to.mutable_data_ptr()), R, T, E, stride_t, stride_e);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  switch (from.element_size()) {
    case 2: return launch(uint16_t{});
    case 4: return launch(uint32_t{});
    case 8: return launch(uint64_t{});
    default: TORCH_CHECK_VALUE(false, "permute_probs: expected probs of 2, 4 or 8 bytes, got ", from.scalar_type());
  }
}

at::Tensor permute_probs_cuda(const at::Tensor& probs, const at::Tensor& row_tokens, const at::Tensor& row_experts) {
  check_permute_probs(probs, row_tokens, row_experts);
  const c10::cuda::CUDAGuard guard(probs.device());
  at::Tensor row_probs = at::empty({row_tokens.size(0)}, probs.options());
  launch_probs<true>(
      probs, row_tokens.contiguous(), row_experts.contiguous(), row_probs, probs.size(0), probs.size(1), probs.stride(0),
      probs.stride(1));
  return row_probs;
}

at::Tensor permute_probs_backward_cuda(
    const at::Tensor& grad, const at::Tensor& row_tokens, const at::Tensor& row_experts, int64_t T, int64_t E) {
  check_permute_probs_backward(grad, row_tokens, row_experts, T, E);
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor grad_probs = at::zeros({T, E}, grad.options());
  launch_probs<false>(grad.contiguous(), row_tokens.contiguous(), row_experts.contiguous(), grad_probs, T, E, E, 1);
  return grad_probs;
}

// Rounded each: a product that is fused into its sum would give other bits than the reference.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

// What one access brings, unopened: 16-bit numbers would take a register each while they wait.
template <typename T, int kCount>
using Raw = std::conditional_t<kCount == 1, Vector<T, 1>, uint4>;

template <typename T, int kCount>
__device__ __forceinline__ Raw<T, kCount> load_once(const T* from) {
  if constexpr (kCount == 1) {
    return {{*from}};
  } else {
    return __ldcs(reinterpret_cast<const uint4*>(from));
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> opened(const Raw<T, kCount>& raw) {
  Vector<T, kCount> values;
  static_assert(sizeof(values) == sizeof(raw));
  memcpy(&values, &raw, sizeof(raw));
  return values;
}

template <typename T, int kCount>
__device__ __forceinline__ void store_once(T* to, const Vector<T, kCount>& values) {
  if constexpr (kCount == 1) {
    *to = values.value[0];
  } else {
    store16_once(to, values);
  }
}

// Up to kBatch rows of a token from its slot `first`, -1 where there is none, and their factors.
template <typename acc_t>
struct Batch {
  int64_t row[kBatch];
  acc_t weight[kBatch];
  bool full;  // all are there: their loads are then issued without a branch

  __device__ __forceinline__ void load(const int64_t* token_rows, const acc_t* row_probs, int64_t first, int64_t width, int64_t R) {
    full = true;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t r = first + k < width ? token_rows[first + k] : -1;
      row[k] = r < R ? r : -1;
      full = full && row[k] >= 0;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) weight[k] = row_probs == nullptr ? acc_t(1) : row[k] >= 0 ? row_probs[row[k]] : acc_t(0);
  }

  template <typename scalar_t, int kCount>
  __device__ __forceinline__ void parts(Raw<scalar_t, kCount> (&part)[kBatch], const scalar_t* rows, int64_t D) const {
    if (full) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) part[k] = load_once<scalar_t, kCount>(rows + row[k] * D);
    } else {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (row[k] >= 0) part[k] = load_once<scalar_t, kCount>(rows + row[k] * D);
      }
    }
  }
};

template <typename scalar_t, typename acc_t, int kCount, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocks) unpermute_kernel(
    const scalar_t* __restrict__ rows, const int64_t* __restrict__ token_rows, const acc_t* __restrict__ row_probs,
    scalar_t* __restrict__ tokens, int64_t T, int64_t R, int64_t width, int64_t D) {
  for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
    Batch<acc_t> batch;
    int64_t loaded = -1;
    for (int64_t d = threadIdx.x * kCount; d < D; d += blockDim.x * kCount) {
      acc_t sum[kCount] = {};
      for (int64_t first = 0; first < width; first += kBatch) {
        if (loaded != first) batch.load(token_rows + t * width, kWeighted ? row_probs : nullptr, loaded = first, width, R);
        Raw<scalar_t, kCount> part[kBatch];
        batch.template parts<scalar_t, kCount>(part, rows + d, D);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (batch.row[k] < 0) continue;
          const auto row = opened<scalar_t, kCount>(part[k]);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const auto value = static_cast<acc_t>(row.value[j]);
            sum[j] = add(sum[j], kWeighted ? multiply(value, batch.weight[k]) : value);
          }
        }
      }
      Vector<scalar_t, kCount> total;
#pragma unroll
      for (int j = 0; j < kCount; ++j) total.value[j] = static_cast<scalar_t>(sum[j]);
      store_once<scalar_t, kCount>(tokens + t * D + d, total);
    }
  }
}

at::Tensor unpermute_cuda(
    const at::Tensor& rows_any, const at::Tensor& token_rows_any, const at::Tensor& row_tokens,
    const std::optional<at::Tensor>& row_probs) {
  const auto [T, R, width, D] = check_rows("unpermute", rows_any, row_tokens, token_rows_any);
  if (row_probs) check_row_probs("unpermute", rows_any, *row_probs);
  const c10::cuda::CUDAGuard guard(rows_any.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor rows = rows_any.contiguous(), token_rows = token_rows_any.contiguous();
  at::Tensor tokens = at::empty({T, D}, rows.options());
  if (T == 0 || D == 0) return tokens;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute", [&, T = T, R = R, width = width, D = D] {
        using acc_t = at::opmath_type<scalar_t>;
        const at::Tensor weights = row_probs ? row_probs->to(c10::CppTypeToScalarType<acc_t>::value).contiguous() : at::Tensor();
        const acc_t* weight = row_probs ? weights.const_data_ptr<acc_t>() : nullptr;
        const scalar_t* in = rows.const_data_ptr<scalar_t>();
        scalar_t* out = tokens.mutable_data_ptr<scalar_t>();
        const auto launch = [&]<int kCount, bool kWeighted>() {
          unpermute_kernel<scalar_t, acc_t, kCount, kWeighted>
              <<<grid_of(T), threads_for(ceil_div(D, kCount), kEach, kThreads), 0, stream>>>(
                  in, token_rows.const_data_ptr<int64_t>(), weight, out, T, R, width, D);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        };
        constexpr int kMany = kVector<scalar_t>;
        if (fits16(in, D)) {
          weight ? launch.template operator()<kMany, true>() : launch.template operator()<kMany, false>();
        } else {
          weight ? launch.template operator()<1, true>() : launch.template operator()<1, false>();
        }
      });
  return tokens;
}

template <typename scalar_t, typename acc_t, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks) unpermute_backward_kernel(
    const scalar_t* __restrict__ grad_tokens, const scalar_t* __restrict__ rows, const int64_t* __restrict__ row_tokens,
    const int64_t* __restrict__ token_rows, const acc_t* __restrict__ row_probs, scalar_t* __restrict__ grad_rows,
    acc_t* __restrict__ dots, int64_t T, int64_t R, int64_t width, int64_t D) {
  __shared__ acc_t partial[kBatch][kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t t = blockIdx.x; t < T; t += gridDim.x) {
    for (int64_t first = 0; first < width; first += kBatch) {
      Batch<acc_t> batch;
      batch.load(token_rows + t * width, row_probs, first, width, R);
      acc_t dot[kBatch] = {};
      for (int64_t d = threadIdx.x * kCount; d < D; d += blockDim.x * kCount) {
        const auto raw_grad = load_once<scalar_t, kCount>(grad_tokens + t * D + d);
        Raw<scalar_t, kCount> part[kBatch];
        batch.template parts<scalar_t, kCount>(part, rows + d, D);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (batch.row[k] < 0) continue;
          const auto grad = opened<scalar_t, kCount>(raw_grad), row = opened<scalar_t, kCount>(part[k]);
          Vector<scalar_t, kCount> out;
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const auto g = static_cast<acc_t>(grad.value[j]);
            dot[k] += g * static_cast<acc_t>(row.value[j]);
            out.value[j] = static_cast<scalar_t>(g * batch.weight[k]);
          }
          store_once<scalar_t, kCount>(grad_rows + batch.row[k] * D + d, out);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const acc_t sum = warp_sum(dot[k]);
        if (lane == 0) partial[k][warp] = sum;
      }
      __syncthreads();
      if (threadIdx.x < kBatch && first + threadIdx.x < width) {
        const int64_t r = token_rows[t * width + first + threadIdx.x];
        acc_t sum = 0;
        for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += partial[threadIdx.x][w];
        if (r >= 0 && r < R) dots[r] = sum;
      }
      __syncthreads();
    }
  }
  for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
    if (row_tokens[r] >= 0) continue;
    for (int64_t d = threadIdx.x; d < D; d += blockDim.x) grad_rows[r * D + d] = scalar_t(0.0f);
    if (threadIdx.x == 0) dots[r] = 0;
  }
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_cuda(
    const at::Tensor& grad_any, const at::Tensor& rows_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows_any,
    const at::Tensor& row_probs) {
  const auto [T, R, width, D] = check_unpermute_backward(grad_any, rows_any, row_tokens_any, token_rows_any, row_probs);
  const c10::cuda::CUDAGuard guard(rows_any.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor grad_tokens = grad_any.contiguous(), rows = rows_any.contiguous();
  const at::Tensor row_tokens = row_tokens_any.contiguous(), token_rows = token_rows_any.contiguous();
  at::Tensor grad_rows = at::empty({R, D}, rows.options()), dots;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute_backward", [&, T = T, R = R, width = width, D = D] {
        using acc_t = at::opmath_type<scalar_t>;
        const at::Tensor weights = row_probs.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
        dots = at::empty({R}, weights.options());
        if (R == 0) return;
        const scalar_t *grad = grad_tokens.const_data_ptr<scalar_t>(), *in = rows.const_data_ptr<scalar_t>();
        const auto launch = [&]<int kCount>() {
          unpermute_backward_kernel<scalar_t, acc_t, kCount>
              <<<grid_for(T, R), threads_for(ceil_div(D, kCount), kEach, kThreads), 0, stream>>>(
                  grad, in, row_tokens.const_data_ptr<int64_t>(), token_rows.const_data_ptr<int64_t>(),
                  weights.const_data_ptr<acc_t>(), grad_rows.mutable_data_ptr<scalar_t>(), dots.mutable_data_ptr<acc_t>(), T, R,
                  width, D);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        };
        if (fits16(in, D) && fits16(grad, D)) {
          launch.template operator()<kVector<scalar_t>>();
        } else {
          launch.template operator()<1>();
        }
      });
  return {grad_rows, dots.to(row_probs.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("permute", permute_cuda);
  m.impl("permute_probs", permute_probs_cuda);
  m.impl("permute_probs_backward", permute_probs_backward_cuda);
  m.impl("unpermute", unpermute_cuda);
  m.impl("unpermute_backward", unpermute_backward_cuda);
}

}  // namespace r1mega
