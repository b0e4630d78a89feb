// accumulate_grouped_quantized_ on a GPU: our kernel of grouped.cu on Hopper, elsewhere and for what that does not take a plain one.

#include "../common/device.cuh"
#include "grouped.h"
#include "op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <cuda_fp8.h>
#include <torch/library.h>

namespace r1mega {
namespace {

constexpr int kTile = 64;   // numbers of out a block has along each side
constexpr int kDepth = 32;  // rows of the batch at once

__device__ __forceinline__ float widen(uint8_t code) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); }

// A payload [M, R] and its scales, [R / 128, stride] in memory.
struct Side {
  const uint8_t* payload;
  const float* scales;
  int64_t stride, M;
};

// out[i] += (with `overwrite` =) left . right of expert i's rows, of any size, a block of rows after the other. A thread has 4 x 4
// numbers of a 64 x 64 tile. Grid: (tiles of K, tiles of N, experts).
__global__ void __launch_bounds__(256) add_plain(
    float* __restrict__ out, Side left, Side right, int64_t R, const int32_t* __restrict__ ends, int64_t tiles_n, bool overwrite) {
  __shared__ float a[kDepth][kTile + 1], b[kDepth][kTile + 1];
  const int64_t expert = blockIdx.z, k0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first = expert ? ends[expert - 1] / kBlock : 0, last = ends[expert] / kBlock;
  if (first >= last && !overwrite) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int64_t tile = blockIdx.y; tile < tiles_n; tile += gridDim.y) {
    const int64_t n0 = tile * kTile;
    float total[4][4] = {};
    for (int64_t block = first; block < last; ++block) {
      float sum[4][4] = {};
      for (int64_t row = block * kBlock; row < (block + 1) * kBlock; row += kDepth) {
        __syncthreads();
#pragma unroll
        for (int j = threadIdx.x; j < kDepth * kTile; j += 256) {
          const int64_t r = row + j % kDepth, n = n0 + j / kDepth, k = k0 + j / kDepth;
          a[j % kDepth][j / kDepth] = n < left.M ? widen(left.payload[n * R + r]) : 0.0f;
          b[j % kDepth][j / kDepth] = k < right.M ? widen(right.payload[k * R + r]) : 0.0f;
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
        const int64_t n = n0 + ty + 16 * i;
        const float upper = n < left.M ? left.scales[block * left.stride + n] : 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t k = k0 + tx + 16 * j;
          const float across = k < right.M ? right.scales[block * right.stride + k] : 0.0f;
          total[i][j] = fmaf(upper * across, sum[i][j], total[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t n = n0 + ty + 16 * i, k = k0 + tx + 16 * j;
        if (n >= left.M || k >= right.M) continue;
        float& to = out[(expert * left.M + n) * right.M + k];
        to = overwrite ? total[i][j] : to + total[i][j];
      }
    }
  }
}

// The scales themselves where they lie as row_scales of csrc/quantize/op.h has them, or a copy that does.
at::Tensor in_row_layout(const at::Tensor& scales) {
  const int64_t M = scales.size(0), padded = padded_rows(M);
  if ((M == 1 || scales.stride(0) == 1) && (scales.size(1) == 1 || scales.stride(1) == padded)) return scales;
  at::Tensor made = at::empty_strided({M, scales.size(1)}, {1, padded}, scales.options());
  made.copy_(scales);
  return made;
}

void accumulate_quantized_cuda(
    at::Tensor& out, const at::Tensor& left_any, const at::Tensor& left_scales, const at::Tensor& right_any,
    const at::Tensor& right_scales, const at::Tensor& ends_any, bool overwrite) {
  const auto [e, R, N, K] = check_accumulate_quantized(out, left_any, left_scales, right_any, right_scales, ends_any);
  TORCH_CHECK_VALUE(e <= 65535, "accumulate_grouped_quantized_: expected at most 65535 experts, got ", e);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard device(out.device());
  at::AutoDispatchBelowADInplaceOrView guard;
  if (R == 0) {
    if (overwrite) out.zero_();
    return;
  }
  const Operand left{left_any.contiguous(), in_row_layout(left_scales)}, right{right_any.contiguous(), in_row_layout(right_scales)};
  const at::Tensor ends = ends_any.contiguous();
  if (fits_quantized_wgmma(out, left, right)) {
    accumulate_quantized_wgmma(out, left, right, ends, overwrite);
    return;
  }
  const auto side = [](const Operand& one) {
    return Side{static_cast<const uint8_t*>(one.payload.const_data_ptr()), one.scales.const_data_ptr<float>(),
                padded_rows(one.payload.size(0)), one.payload.size(0)};
  };
  const int64_t tiles_n = ceil_div(N, kTile);
  const dim3 grid(grid_of(ceil_div(K, kTile)), grid_of(tiles_n, 65535), static_cast<unsigned>(e));
  add_plain<<<grid, 256, 0, c10::cuda::getCurrentCUDAStream()>>>(
      out.mutable_data_ptr<float>(), side(left), side(right), R, ends.const_data_ptr<int32_t>(), tiles_n, overwrite);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("accumulate_grouped_quantized_", accumulate_quantized_cuda); }

}  // namespace r1mega
