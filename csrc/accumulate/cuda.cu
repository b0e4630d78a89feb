// accumulate_product_ and accumulate_grouped_ on a GPU.
//
// A product of bf16 matrices goes straight into out (cuBLAS with an fp32 result and beta 1). Products by expert go through our kernel
// of grouped.cu on Hopper; for widths that it does not take through torch's grouped_mm, which takes the experts' ends from the device
// and rounds to bf16, in pieces of out's rows so that the rounded products stay small, and a kernel that adds a piece; and what
// grouped_mm does not take (fp32, widths that are no multiple of 8) through a plain tiled kernel.

#include "../common/device.cuh"
#include "grouped.h"
#include "op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/addmm.h>
#include <torch/library.h>

namespace r1mega {
namespace {

constexpr int64_t kPieceBytes = 128 << 20;  // of rounded products at once
constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // 16-byte reads of products in flight

__device__ __forceinline__ bool is_empty(const int32_t* ends, int64_t expert) {
  return ends[expert] == (expert ? ends[expert - 1] : 0);
}

// out[i, first + n, k] += products[i, n, k] for the experts with rows, or with `overwrite` = products[i, n, k], and 0 for the others.
// `block` numbers of an expert lie in a row in both, at the distances `out_stride` and `block`. Grid: (chunks, experts).
template <bool kWide>
__global__ void __launch_bounds__(kThreads) add_products(
    float* __restrict__ out, const __nv_bfloat16* __restrict__ products, const int32_t* __restrict__ ends, int64_t block,
    int64_t out_stride, bool overwrite) {
  const int64_t expert = blockIdx.y;
  const bool empty = is_empty(ends, expert);  // what grouped_mm leaves there does not count
  if (empty && !overwrite) return;
  out += expert * out_stride;
  products += expert * block;
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, threads = gridDim.x * static_cast<int64_t>(kThreads);
  if constexpr (kWide) {
    const int64_t vectors = block / 8;
    for (int64_t from = thread; from < vectors; from += threads * kPerThread) {
      Vector<__nv_bfloat16, 8> given[kPerThread];
      Vector<float, 4> sum[kPerThread][2];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t v = from + j * threads;
        if (v >= vectors) continue;
        given[j] = empty ? Vector<__nv_bfloat16, 8>{} : load16(products + v * 8);
        sum[j][0] = overwrite ? Vector<float, 4>{} : load16(out + v * 8);
        sum[j][1] = overwrite ? Vector<float, 4>{} : load16(out + v * 8 + 4);
      }
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t v = from + j * threads;
        if (v >= vectors) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[j][i / 4].value[i % 4] += __bfloat162float(given[j].value[i]);
        store16(out + v * 8, sum[j][0]);
        store16(out + v * 8 + 4, sum[j][1]);
      }
    }
  } else {
    for (int64_t i = thread; i < block; i += threads)
      out[i] = (overwrite ? 0.0f : out[i]) + (empty ? 0.0f : __bfloat162float(products[i]));
  }
}

constexpr int kTile = 64;   // numbers of out a block has along each side
constexpr int kDepth = 16;  // rows of left and right at once

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// out[i] += (with `overwrite` =) left[rows i]^T right[rows i] of any size, in fp32 throughout. A thread has 4 x 4 numbers of a 64 x 64 tile.
// Grid: (tiles of K, tiles of N, experts).
template <typename T>
__global__ void __launch_bounds__(256) add_grouped_plain(
    float* __restrict__ out, const T* __restrict__ left, const T* __restrict__ right, const int32_t* __restrict__ ends, int64_t N,
    int64_t K, int64_t tiles_n, bool overwrite) {
  __shared__ float a[kDepth][kTile], b[kDepth][kTile];
  const int64_t expert = blockIdx.z, k0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first = expert ? ends[expert - 1] : 0, end = ends[expert];
  if (first == end && !overwrite) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int64_t tile = blockIdx.y; tile < tiles_n; tile += gridDim.y) {
    const int64_t n0 = tile * kTile;
    float sum[4][4] = {};
    for (int64_t row = first; row < end; row += kDepth) {
      __syncthreads();
#pragma unroll
      for (int j = threadIdx.x; j < kDepth * kTile; j += 256) {
        const int64_t r = row + j / kTile, n = n0 + j % kTile, k = k0 + j % kTile;
        a[j / kTile][j % kTile] = r < end && n < N ? widen(left[r * N + n]) : 0.0f;
        b[j / kTile][j % kTile] = r < end && k < K ? widen(right[r * K + k]) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[d][ty + 16 * i], b[d][tx + 16 * j], sum[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t n = n0 + ty + 16 * i, k = k0 + tx + 16 * j;
        if (n >= N || k >= K) continue;
        float& to = out[(expert * N + n) * K + k];
        to = overwrite ? sum[i][j] : to + sum[i][j];
      }
    }
  }
}

void accumulate_product_cuda(at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool overwrite) {
  check_accumulate_product(out, left, right);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard device(out.device());
  at::AutoDispatchBelowADInplaceOrView guard;
  if (left.size(0) == 0) {
    if (overwrite) out.zero_();
    return;
  }
  const at::Tensor left_t = left.t();
  const int beta = overwrite ? 0 : 1;  // at 0 what lies in out is not read
  if (left.scalar_type() == at::kFloat) {
    at::addmm_out(out, out, left_t, right, beta);
  } else {
    at::addmm_outf(out, left_t, right, at::kFloat, beta, 1, out);
  }
}

// Expects what follows a CUDAGuard and checks.
void add_grouped_rounded(
    at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends, GroupedSizes sizes, bool overwrite) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t e = sizes.experts, N = sizes.left, K = sizes.right;
  const int64_t piece = std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(1, e * K * 2) / 128 * 128, 128, std::max<int64_t>(N, 128));
  for (int64_t first = 0; first < N; first += piece) {
    const int64_t count = std::min(piece, N - first);
    const at::Tensor products = at::_grouped_mm(left.slice(1, first, first + count).t(), right, ends).contiguous();
    float* to = out.mutable_data_ptr<float>() + first * K;
    const auto* from = static_cast<const __nv_bfloat16*>(products.const_data_ptr());
    const int64_t block = count * K;
    const dim3 grid(grid_of(ceil_div(block, kThreads * 8 * kPerThread)), static_cast<unsigned>(e));
    if (fits16(to, N * K) && fits16(from, block)) {
      add_products<true><<<grid, kThreads, 0, stream>>>(to, from, ends.const_data_ptr<int32_t>(), block, N * K, overwrite);
    } else {
      add_products<false><<<grid, kThreads, 0, stream>>>(to, from, ends.const_data_ptr<int32_t>(), block, N * K, overwrite);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void accumulate_grouped_cuda(
    at::Tensor& out, const at::Tensor& left_any, const at::Tensor& right_any, const at::Tensor& ends_any, bool overwrite) {
  const GroupedSizes sizes = check_accumulate_grouped(out, left_any, right_any, ends_any);
  const auto [e, R, N, K] = sizes;
  TORCH_CHECK_VALUE(e <= 65535, "accumulate_grouped_: expected at most 65535 experts, got ", e);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard device(out.device());
  at::AutoDispatchBelowADInplaceOrView guard;
  if (R == 0) {
    if (overwrite) out.zero_();
    return;
  }
  const at::Tensor left = left_any.contiguous(), right = right_any.contiguous(), ends = ends_any.contiguous();
  const bool bf16 = left.scalar_type() == at::kBFloat16;
  if (fits_wgmma(out, left, right)) {
    accumulate_grouped_wgmma(out, left, right, ends, overwrite);
    return;
  }
  if (bf16 && fits16(static_cast<const __nv_bfloat16*>(left.const_data_ptr()), N) &&
      fits16(static_cast<const __nv_bfloat16*>(right.const_data_ptr()), K)) {
    add_grouped_rounded(out, left, right, ends, sizes, overwrite);
    return;
  }
  const int64_t tiles_n = ceil_div(N, kTile);
  const dim3 grid(grid_of(ceil_div(K, kTile)), grid_of(tiles_n, 65535), static_cast<unsigned>(e));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  float* to = out.mutable_data_ptr<float>();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  if (bf16) {
    add_grouped_plain<<<grid, 256, 0, stream>>>(
        to, static_cast<const __nv_bfloat16*>(left.const_data_ptr()), static_cast<const __nv_bfloat16*>(right.const_data_ptr()), end, N,
        K, tiles_n, overwrite);
  } else {
    add_grouped_plain<<<grid, 256, 0, stream>>>(
        to, left.const_data_ptr<float>(), right.const_data_ptr<float>(), end, N, K, tiles_n, overwrite);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("accumulate_product_", accumulate_product_cuda);
  m.impl("accumulate_grouped_", accumulate_grouped_cuda);
}

}  // namespace r1mega
