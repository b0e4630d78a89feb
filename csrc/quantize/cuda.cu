// Quantisation to block-scaled E4M3 on Hopper. Bit for bit the plain-torch reference of r1mega/ops/quantize.py. The kernel that all
// of it has in common is in kernel.cuh.

#include "kernel.cuh"

#include <torch/library.h>

#include <tuple>

namespace r1mega {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <Scales kByRow, bool kTurned>
void launch_numbers(const at::Tensor& x, const Stack& stack, bool power_of_two, const Out& out, const Out& turned) {
  if (x.scalar_type() == at::kFloat) {
    launch<kByRow, kTurned>(numbers<float>(x), stack, power_of_two, out, turned);
  } else {
    launch<kByRow, kTurned>(numbers<__nv_bfloat16>(x), stack, power_of_two, out, turned);
  }
}

Pair quantize_rows_cuda(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_rows", x_any);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor x = x_any.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor payload = payload_like(x, {M, K}), scales = row_scales(M, K, x, false);
  launch_numbers<Scales::kOfRows, false>(x, {1, M, K}, power_of_two, out_of(payload, scales), {});
  return {payload, scales};
}

Pair quantize_columns_cuda(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_columns", x_any);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor x = x_any.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor payload = payload_like(x, {K, M}), scales = row_scales(K, M, x, false);
  launch_numbers<Scales::kNone, true>(x, {1, M, K}, power_of_two, {}, out_of(payload, scales));
  return {payload, scales};
}

Four quantize_both_cuda(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_both", x_any);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor x = x_any.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor payload = payload_like(x, {M, K}), scales = row_scales(M, K, x, false);
  const at::Tensor payload_t = payload_like(x, {K, M}), scales_t = row_scales(K, M, x, false);
  launch_numbers<Scales::kOfRows, true>(x, {1, M, K}, power_of_two, out_of(payload, scales), out_of(payload_t, scales_t));
  return {payload, scales, payload_t, scales_t};
}

Four quantize_blocks_cuda(const at::Tensor& x_any, bool power_of_two, bool transposed) {
  const Stack stack = check_stack("quantize_blocks", x_any);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor x = x_any.contiguous();
  const int64_t N = stack.rows, K = stack.columns, down = blocks_of(N), across = blocks_of(K);
  const auto sizes = [&](int64_t rows, int64_t columns) {
    return x.dim() == 3 ? std::vector<int64_t>{stack.count, rows, columns} : std::vector<int64_t>{rows, columns};
  };
  const auto none = std::vector<int64_t>{0};
  const auto floats = x.options().dtype(at::kFloat);
  const at::Tensor payload = payload_like(x, sizes(N, K)), scales = at::empty(sizes(down, across), floats);
  const at::Tensor payload_t = payload_like(x, transposed ? sizes(K, N) : none);
  const at::Tensor scales_t = at::empty(transposed ? sizes(across, down) : none, floats);
  if (transposed) {
    launch_numbers<Scales::kOfTile, true>(x, stack, power_of_two, out_of(payload, scales), out_of(payload_t, scales_t));
  } else {
    launch_numbers<Scales::kOfTile, false>(x, stack, power_of_two, out_of(payload, scales), {});
  }
  return {payload, scales, payload_t, scales_t};
}

Quantized quantized(const at::Tensor& payload, const at::Tensor& scales, int bytes) {
  return {static_cast<const uint8_t*>(payload.const_data_ptr()), payload.size(1), alignment(payload, payload.size(1)) >= bytes,
          scales.const_data_ptr<float>(), scales.stride(0), scales.stride(1)};
}

Pair requantize_columns_cuda(const at::Tensor& payload_any, const at::Tensor& scales, bool power_of_two) {
  check_quantized("requantize_columns", payload_any, scales);
  const c10::cuda::CUDAGuard guard(payload_any.device());
  const at::Tensor payload = payload_any.contiguous();
  const int64_t M = payload.size(0), K = payload.size(1);
  const at::Tensor payload_t = payload_like(payload, {K, M}), scales_t = row_scales(K, M, payload, false);
  launch<Scales::kNone, true>(quantized(payload, scales, 8), {1, M, K}, power_of_two, {}, out_of(payload_t, scales_t));
  return {payload_t, scales_t};
}

constexpr int kBytes = 16;  // of payload that a thread reads back

template <typename T>
__global__ void __launch_bounds__(256) dequantize_kernel(Quantized from, int64_t rows, T* __restrict__ out, int64_t chunks) {
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * chunks; item += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = item / chunks, column = item % chunks * kBytes, at = row * from.columns + column;
    const float factor = from.scales[row * from.row_stride + column / kBlock * from.block_stride];
    Quantized::Chunk half[2] = {};
    if (from.aligned) {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from.payload + at));
      half[0] = {words.x, words.y}, half[1] = {words.z, words.w};
    } else {
      for (int j = 0; j < kBytes && column + j < from.columns; ++j) {
        half[j / 8].word[j / 4 % 2] |= static_cast<uint32_t>(from.payload[at + j]) << (j % 4 * 8);
      }
    }
    Vector<T, kVector<T>> result[kBytes / kVector<T>];
#pragma unroll
    for (int j = 0; j < kBytes; ++j) {
      const float product = from.value(half[j / 8], j % 8, factor);
      T& to = result[j / kVector<T>].value[j % kVector<T>];
      if constexpr (sizeof(T) == 2) {
        to = product == product ? __float2bfloat16_rn(product) : __ushort_as_bfloat16(0x7fc0);
      } else {
        to = product == product ? product : bits_float(0x7fc00000u);
      }
    }
    if (from.aligned) {
#pragma unroll
      for (int v = 0; v < kBytes / kVector<T>; ++v) store16(out + at + v * kVector<T>, result[v]);
    } else {
#pragma unroll
      for (int j = 0; j < kBytes; ++j) {
        if (column + j < from.columns) out[at + j] = result[j / kVector<T>].value[j % kVector<T>];
      }
    }
  }
}

at::Tensor dequantize_rows_cuda(const at::Tensor& payload_any, const at::Tensor& scales, at::ScalarType dtype) {
  check_dequantize(payload_any, scales, dtype);
  const c10::cuda::CUDAGuard guard(payload_any.device());
  const at::Tensor payload = payload_any.contiguous();
  const int64_t M = payload.size(0), K = payload.size(1), chunks = ceil_div(K, kBytes);
  const at::Tensor x = at::empty({M, K}, payload.options().dtype(dtype));
  if (x.numel() == 0) return x;
  const Quantized from = quantized(payload, scales, kBytes);
  const unsigned grid = grid_of(ceil_div(M * chunks, 256));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (dtype == at::kFloat) {
    dequantize_kernel<float><<<grid, 256, 0, stream>>>(from, M, x.mutable_data_ptr<float>(), chunks);
  } else {
    dequantize_kernel<__nv_bfloat16>
        <<<grid, 256, 0, stream>>>(from, M, reinterpret_cast<__nv_bfloat16*>(x.mutable_data_ptr()), chunks);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return x;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("quantize_rows", quantize_rows_cuda);
  m.impl("quantize_columns", quantize_columns_cuda);
  m.impl("quantize_both", quantize_both_cuda);
  m.impl("quantize_blocks", quantize_blocks_cuda);
  m.impl("dequantize_rows", dequantize_rows_cuda);
  m.impl("requantize_columns", requantize_columns_cuda);
}

}  // namespace r1mega
