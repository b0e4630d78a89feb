// Quantisation to block-scaled E4M3 on a CPU: the readable kernels. Bit for bit the plain-torch reference of r1mega/ops/quantize.py.

#include "tile.h"

#include <c10/util/Float8_e4m3fn.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The fp32 number of each E4M3 code; NaN as 0x7fc00000.
const std::array<float, 256>& e4m3_values() {
  static const auto table = [] {
    std::array<float, 256> values{};
    for (int code = 0; code < 256; ++code) {
      values[code] = (code & 0x7f) == 0x7f ? bits_float(0x7fc00000u) : c10::detail::fp8e4m3fn_to_fp32_value(static_cast<uint8_t>(code));
    }
    return values;
  }();
  return table;
}

struct Quantized {
  const uint8_t* payload;
  int64_t columns;
  const float* scales;
  int64_t row_stride, block_stride;
  float scale(int64_t row, int64_t column) const { return scales[row * row_stride + column / kBlock * block_stride]; }
  // of one block only
  void fill(float* to, int64_t row, int64_t column, int64_t count) const {
    const auto& values = e4m3_values();
    const uint8_t* from = payload + row * columns + column;
    const float factor = scale(row, column);
    for (int64_t i = 0; i < count; ++i) to[i] = values[from[i]] * factor;
  }
};

Quantized quantized(const at::Tensor& payload, const at::Tensor& scales) {
  return {static_cast<const uint8_t*>(payload.const_data_ptr()), payload.size(1), scales.const_data_ptr<float>(), scales.stride(0),
          scales.stride(1)};
}

template <typename From>
void quantize_by_rows(const From& from, int64_t M, int64_t K, bool power_of_two, const Out& out) {
  at::parallel_for(0, M, std::max<int64_t>(1, kNumberGrain / std::max<int64_t>(K, 1)), [&](int64_t first, int64_t last) {
    float x[kBlock];
    for (int64_t row = first; row < last; ++row) {
      for (int64_t column = 0; column < K; column += kBlock) {
        const int64_t count = std::min(kBlock, K - column);
        from.fill(x, row, column, count);
        quantize_row_block(x, row, column, count, power_of_two, out);
      }
    }
  });
}

Pair quantize_rows_cpu(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_rows", x_any);
  const at::Tensor x = x_any.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor payload = payload_like(x, {M, K}), scales = row_scales(M, K, x, true);
  on_numbers(x, [&](auto from) { quantize_by_rows(from, M, K, power_of_two, out_of(payload, scales)); });
  return {payload, scales};
}

Pair quantize_columns_cpu(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_columns", x_any);
  const at::Tensor x = x_any.contiguous();
  Pair result;
  on_numbers(x, [&](auto from) { result = columns_of(from, x.size(0), x.size(1), x, power_of_two); });
  return result;
}

Pair requantize_columns_cpu(const at::Tensor& payload_any, const at::Tensor& scales, bool power_of_two) {
  check_quantized("requantize_columns", payload_any, scales);
  const at::Tensor payload = payload_any.contiguous();
  return columns_of(quantized(payload, scales), payload.size(0), payload.size(1), payload, power_of_two);
}

Four quantize_both_cpu(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_both", x_any);
  const at::Tensor x = x_any.contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  const at::Tensor payload = payload_like(x, {M, K}), scales = row_scales(M, K, x, true);
  const at::Tensor payload_t = payload_like(x, {K, M}), scales_t = row_scales(K, M, x, true);
  const Out out = out_of(payload, scales), out_t = out_of(payload_t, scales_t);
  on_numbers(x, [&](auto from) {
    over_tiles({1, M, K}, [&](Tile& tile, int64_t, int64_t row, int64_t column) {
      tile.read(from, row, column, M, K);
      for (int64_t r = 0; r < tile.rows; ++r) quantize_row_block(tile.line(r), row + r, column, tile.columns, power_of_two, out);
      quantize_tile_columns(tile, power_of_two, out_t);
    });
  });
  return {payload, scales, payload_t, scales_t};
}

Four quantize_blocks_cpu(const at::Tensor& x_any, bool power_of_two, bool transposed) {
  const Stack stack = check_stack("quantize_blocks", x_any);
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
  float* scale_out = scales.mutable_data_ptr<float>();
  float* scale_out_t = scales_t.mutable_data_ptr<float>();
  on_numbers(x, [&](auto from) {
    over_tiles(stack, [&](Tile& tile, int64_t e, int64_t row, int64_t column) {
      tile.read(from, row, column, N, K, e * N);
      uint32_t largest = 0;
      for (int64_t r = 0; r < tile.rows; ++r) largest = std::max(largest, largest_of(tile.line(r), tile.columns));
      const float scale = block_scale(largest, power_of_two), inverse = block_inverse(scale);
      scale_out[(e * down + row / kBlock) * across + column / kBlock] = scale;
      for (int64_t r = 0; r < tile.rows; ++r) {
        uint8_t* code = tile.code + r * kBlock;
        convert(tile.line(r), inverse, code, tile.columns);
        std::copy_n(code, tile.columns, bytes(payload) + (e * N + row + r) * K + column);
      }
      if (transposed) {
        scale_out_t[(e * across + column / kBlock) * down + row / kBlock] = scale;
        tile.write_transposed(bytes(payload_t) + e * N * K, N);
      }
    });
  });
  return {payload, scales, payload_t, scales_t};
}

at::Tensor dequantize_rows_cpu(const at::Tensor& payload_any, const at::Tensor& scales, at::ScalarType dtype) {
  check_dequantize(payload_any, scales, dtype);
  const at::Tensor payload = payload_any.contiguous();
  const int64_t M = payload.size(0), K = payload.size(1);
  const at::Tensor x = at::empty({M, K}, payload.options().dtype(dtype));
  const Quantized from = quantized(payload, scales);
  const auto write = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    at::parallel_for(0, M, std::max<int64_t>(1, kNumberGrain / std::max<int64_t>(K, 1)), [&](int64_t first, int64_t last) {
      float block[kBlock];
      for (int64_t row = first; row < last; ++row) {
        for (int64_t column = 0; column < K; column += kBlock) {
          const int64_t count = std::min(kBlock, K - column);
          from.fill(block, row, column, count);
          T* to = out + row * K + column;
          for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(block[i] == block[i] ? block[i] : bits_float(0x7fc00000u));
        }
      }
    });
  };
  if (dtype == at::kFloat) {
    write(x.mutable_data_ptr<float>());
  } else {
    write(x.mutable_data_ptr<at::BFloat16>());
  }
  return x;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("quantize_rows", quantize_rows_cpu);
  m.impl("quantize_columns", quantize_columns_cpu);
  m.impl("quantize_both", quantize_both_cpu);
  m.impl("quantize_blocks", quantize_blocks_cpu);
  m.impl("dequantize_rows", dequantize_rows_cpu);
  m.impl("requantize_columns", requantize_columns_cpu);
}

}  // namespace r1mega
