// permute_quantize on a GPU: a block has a token, quantises it in registers and stores its bytes to each of its rows.
//
// A thread holds kEach times 16 neighbours, so that eight lanes have a block of 128 and the bytes of a row are one 16-byte store.
// Scales go through a scratch tensor, a token's side by side: as [D / 128, R4] they would be four bytes here and there for each
// row. A second kernel, of which a warp has 32 neighbouring rows, gathers them from the L2 by row_tokens and writes whole lines.

#include "op.h"

#include <torch/library.h>

#include <tuple>

#include "../common/fp8.cuh"
#include "../common/stream.cuh"
#include "../permute/padding.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 256;            // of a block, at most
constexpr int kEach = 2;                 // pieces of a thread
constexpr int kPiece = 16;               // numbers of a piece
constexpr int kLanes = kBlock / kPiece;  // that share a scale
constexpr int kScaleThreads = 128;       // rows of a block that gathers scales
constexpr int kScales = 8;               // of a row that a thread gathers

struct Move {
  const int64_t* __restrict__ row_tokens;
  const int64_t* __restrict__ token_rows;
  uint8_t* __restrict__ payload;
  float* __restrict__ token_scales;  // [T, pitch], pitch a multiple of kScales
  int64_t T, R, width, D, pitch;
  bool power_of_two;
};

// Scales [blocks, R4] of rows from their tokens'; of padding, a block of zeros', and 0 where there is no row. A thread has a row
// and, by blockIdx.y, kScales of its scales.
__global__ void __launch_bounds__(kScaleThreads) gather_scales_kernel(
    const Move move, float* __restrict__ scales, int64_t R4, int64_t blocks) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x; r < R4; r += step) {
    const int64_t t = r < move.R ? move.row_tokens[r] : -1;
    const float rest = r < move.R ? block_scale(0, move.power_of_two) : 0.0f;
    for (int64_t b = static_cast<int64_t>(blockIdx.y) * kScales; b < blocks; b += static_cast<int64_t>(gridDim.y) * kScales) {
      Vector<float, 4> part[kScales / 4];
#pragma unroll
      for (int i = 0; i < kScales / 4; ++i) {
        if (t >= 0 && t < move.T) {
          part[i] = load16(move.token_scales + t * move.pitch + b + 4 * i);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) part[i].value[j] = rest;
        }
      }
#pragma unroll
      for (int j = 0; j < kScales; ++j) {
        if (b + j < blocks) scales[(b + j) * R4 + r] = part[j / 4].value[j % 4];
      }
    }
  }
}

// D is a multiple of 16, tokens and payload are aligned.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) permute_quantize_kernel(const scalar_t* __restrict__ tokens, const Move move) {
  constexpr int kLoads = kPiece / kVector<scalar_t>;
  const int lane = threadIdx.x % kWarp;
  const int64_t pieces = move.D / kPiece;
  const int64_t seen = first_seen(move.row_tokens, move.R);
  for (int64_t t = blockIdx.x; t < move.T; t += gridDim.x) {
    for (int64_t first = threadIdx.x; first - threadIdx.x < pieces; first += kEach * blockDim.x) {
      Vector<scalar_t, kVector<scalar_t>> part[kEach][kLoads];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t p = first + i * blockDim.x;
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          if (p < pieces) {
            part[i][l] = load16_once(tokens + t * move.D + p * kPiece + l * kVector<scalar_t>);
          } else {
#pragma unroll
            for (int j = 0; j < kVector<scalar_t>; ++j) part[i][l].value[j] = scalar_t(0.0f);
          }
        }
      }
      // on its way with the numbers
      const int64_t first_row = lane < move.width ? move.token_rows[t * move.width + lane] : -1;
      uint4 bytes[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        float x[kPiece];
        uint32_t largest = 0;
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          x[j] = static_cast<float>(part[i][j / kVector<scalar_t>].value[j % kVector<scalar_t>]);
          largest = max(largest, magnitude(x[j]));
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
        const float scale = block_scale(largest, move.power_of_two), inverse = block_inverse(scale);
        const int64_t p = first + i * blockDim.x;
        if (p < pieces && p % kLanes == 0) move.token_scales[t * move.pitch + p / kLanes] = scale;
        uint32_t word[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float* four = x + 4 * w;
          word[w] = codes4(four[0] * inverse, four[1] * inverse, four[2] * inverse, four[3] * inverse);
        }
        bytes[i] = uint4{word[0], word[1], word[2], word[3]};
      }
      for (int64_t batch = 0; batch < move.width; batch += kWarp) {
        int64_t mine = first_row;
        if (batch > 0) mine = batch + lane < move.width ? move.token_rows[t * move.width + batch + lane] : -1;
        const int most = static_cast<int>(min(static_cast<int64_t>(kWarp), move.width - batch));
        for (int k = 0; k < most; ++k) {
          const int64_t r = __shfl_sync(kAllLanes, mine, k);
          if (r < 0 || r >= move.R) continue;
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int64_t p = first + i * blockDim.x;
            if (p < pieces) __stcs(reinterpret_cast<uint4*>(move.payload + r * move.D) + p, bytes[i]);
          }
        }
      }
    }
  }
  clear_padding(reinterpret_cast<uint4*>(move.payload), move.row_tokens, move.R, pieces, seen);
}

// Any D: a warp a block of 128.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) permute_quantize_any_kernel(const scalar_t* __restrict__ tokens, const Move move) {
  constexpr int kOwn = kBlock / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t seen = first_seen(move.row_tokens, move.R);
  for (int64_t t = blockIdx.x; t < move.T; t += gridDim.x) {
    for (int64_t b = warp; b * kBlock < move.D; b += kThreads / kWarp) {
      float x[kOwn];
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t d = b * kBlock + i * kWarp + lane;
        x[i] = d < move.D ? static_cast<float>(tokens[t * move.D + d]) : 0.0f;
        largest = max(largest, magnitude(x[i]));
      }
      const float scale = block_scale(warp_max(largest), move.power_of_two), inverse = block_inverse(scale);
      uint8_t byte[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) byte[i] = to_e4m3(x[i], inverse);
      for (int64_t k = 0; k < move.width; ++k) {
        const int64_t r = move.token_rows[t * move.width + k];
        if (r < 0 || r >= move.R) continue;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int64_t d = b * kBlock + i * kWarp + lane;
          if (d < move.D) move.payload[r * move.D + d] = byte[i];
        }
      }
      if (lane == 0) move.token_scales[t * move.pitch + b] = scale;
    }
  }
  clear_padding(move.payload, move.row_tokens, move.R, move.D, seen);
}

std::tuple<at::Tensor, at::Tensor> permute_quantize_cuda(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows_any, bool power_of_two) {
  const auto [T, R, width, D] = check_permute_quantize("permute_quantize", tokens_any, row_tokens_any, token_rows_any);
  const c10::cuda::CUDAGuard guard(tokens_any.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const at::Tensor token_rows = token_rows_any.contiguous();
  const int64_t R4 = padded_rows(R), blocks = ceil_div(D, kBlock), pitch = ceil_div(blocks, kScales) * kScales;
  const at::Tensor payload = payload_like(tokens, {R, D}), scales = row_scales(R, D, tokens, false);
  if (R > 0 && D > 0) {
    const at::Tensor token_scales = at::empty({T, pitch}, scales.options());
    const Move move{
        row_tokens.const_data_ptr<int64_t>(), token_rows.const_data_ptr<int64_t>(),
        static_cast<uint8_t*>(payload.mutable_data_ptr()), token_scales.mutable_data_ptr<float>(), T, R, width, D, pitch, power_of_two};
    const unsigned grid = grid_of(std::max(T, ceil_div(R, 16)));  // padding rows are spread over many blocks
    const auto launch = [&, D = D](auto number) {
      using scalar_t = decltype(number);
      const scalar_t* in = tokens.const_data_ptr<scalar_t>();
      if (D % kPiece == 0 && fits16(in, D)) {
        permute_quantize_kernel<scalar_t><<<grid, threads_for(D / kPiece, kEach, kThreads), 0, stream>>>(in, move);
      } else {
        permute_quantize_any_kernel<scalar_t><<<grid, kThreads, 0, stream>>>(in, move);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    tokens.scalar_type() == at::kFloat ? launch(float{}) : launch(c10::BFloat16{});
    const dim3 gather_grid(grid_of(ceil_div(R4, kScaleThreads)), grid_of(pitch / kScales, 65535));
    gather_scales_kernel<<<gather_grid, kScaleThreads, 0, stream>>>(move, scales.mutable_data_ptr<float>(), R4, blocks);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {payload, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("permute_quantize", permute_quantize_cuda); }

}  // namespace r1mega
