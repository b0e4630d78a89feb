// Quantisation to block-scaled E4M3 on a CPU: the readable kernels. Bit for bit the plain-torch reference of r1mega/ops/quantize.py.

#include "op.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr int64_t kGrain = 32768;  // numbers a thread takes at least

uint8_t* bytes(const at::Tensor& payload) { return static_cast<uint8_t*>(payload.mutable_data_ptr()); }

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

// Where numbers come from: `fill` writes `count` of a row, from `column` on, as fp32.
template <typename T>
struct Numbers {
  const T* x;
  int64_t columns;
  void fill(float* to, int64_t row, int64_t column, int64_t count) const {
    const T* from = x + row * columns + column;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  }
};

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

// Calls `with` on the numbers of x, which is contiguous.
template <typename With>
void on_numbers(const at::Tensor& x, With with) {
  if (x.scalar_type() == at::kFloat) {
    with(Numbers<float>{x.const_data_ptr<float>(), x.size(-1)});
  } else {
    with(Numbers<at::BFloat16>{x.const_data_ptr<at::BFloat16>(), x.size(-1)});
  }
}

uint32_t largest_of(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(x[i]));
  return largest;
}

void convert(const float* x, float inverse, uint8_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_e4m3(x[i], inverse);
}

// Where a matrix's results go: row-major payload [rows, columns] and the scales of row r's block b at r + b * padded.
struct Out {
  uint8_t* payload;
  float* scales;
  int64_t columns, padded;
};

Out out_of(const at::Tensor& payload, const at::Tensor& scales) {
  return {bytes(payload), scales.mutable_data_ptr<float>(), payload.size(1), padded_rows(payload.size(0))};
}

void quantize_row_block(const float* x, int64_t row, int64_t column, int64_t count, bool power_of_two, const Out& out) {
  const float scale = block_scale(largest_of(x, count), power_of_two);
  out.scales[column / kBlock * out.padded + row] = scale;
  convert(x, 1.0f / scale, out.payload + row * out.columns + column, count);
}

// At most 128 x 128 numbers of a matrix as fp32, and room for their bytes.
struct Tile {
  float x[kBlock * kBlock];
  uint8_t code[kBlock * kBlock];
  int64_t row, column, rows, columns;
  const float* line(int64_t r) const { return x + r * kBlock; }

  template <typename From>
  void read(const From& from, int64_t first_row, int64_t first_column, int64_t num_rows, int64_t num_columns, int64_t skip = 0) {
    row = first_row, column = first_column;
    rows = std::min(kBlock, num_rows - row), columns = std::min(kBlock, num_columns - column);
    for (int64_t r = 0; r < rows; ++r) from.fill(x + r * kBlock, skip + row + r, column, columns);
  }

  // the bytes, transposed, to `to`: row `column` of a matrix of `width` columns, from column `row` on
  void write_transposed(uint8_t* to, int64_t width) const {
    constexpr int64_t kStep = 16;  // rows and columns at a time, so that both sides stay in the nearest cache
    for (int64_t c0 = 0; c0 < columns; c0 += kStep) {
      for (int64_t r0 = 0; r0 < rows; r0 += kStep) {
        const int64_t c1 = std::min(c0 + kStep, columns), r1 = std::min(r0 + kStep, rows);
        for (int64_t c = c0; c < c1; ++c) {
          uint8_t* line_out = to + (column + c) * width + row;
          for (int64_t r = r0; r < r1; ++r) line_out[r] = code[r * kBlock + c];
        }
      }
    }
  }
};

void quantize_tile_columns(Tile& tile, bool power_of_two, const Out& out) {
  uint32_t largest[kBlock] = {};
  float inverse[kBlock];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* line = tile.line(r);
    for (int64_t c = 0; c < tile.columns; ++c) largest[c] = std::max(largest[c], magnitude(line[c]));
  }
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float scale = block_scale(largest[c], power_of_two);
    out.scales[tile.row / kBlock * out.padded + tile.column + c] = scale;
    inverse[c] = 1.0f / scale;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* line = tile.line(r);
    uint8_t* code = tile.code + r * kBlock;
    for (int64_t c = 0; c < tile.columns; ++c) code[c] = to_e4m3(line[c], inverse[c]);
  }
  tile.write_transposed(out.payload, out.columns);
}

// `work(tile, index of the tile's matrix, row and column of its first number)` over all tiles of `stack`.
template <typename Work>
void over_tiles(const Stack& stack, Work work) {
  const int64_t across = blocks_of(stack.columns), down = blocks_of(stack.rows);
  at::parallel_for(0, stack.count * down * across, std::max<int64_t>(1, kGrain / (kBlock * kBlock)), [&](int64_t first, int64_t last) {
    const auto tile = std::make_unique<Tile>();
    for (int64_t i = first; i < last; ++i) work(*tile, i / (down * across), i / across % down * kBlock, i % across * kBlock);
  });
}

template <typename From>
void quantize_by_rows(const From& from, int64_t M, int64_t K, bool power_of_two, const Out& out) {
  at::parallel_for(0, M, std::max<int64_t>(1, kGrain / std::max<int64_t>(K, 1)), [&](int64_t first, int64_t last) {
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

template <typename From>
Pair columns_of(const From& from, const at::Tensor& like, bool power_of_two) {
  const int64_t M = like.size(0), K = like.size(1);
  const at::Tensor payload = payload_like(like, {K, M}), scales = row_scales(K, M, like, true);
  const Out out = out_of(payload, scales);
  over_tiles({1, M, K}, [&](Tile& tile, int64_t, int64_t row, int64_t column) {
    tile.read(from, row, column, M, K);
    quantize_tile_columns(tile, power_of_two, out);
  });
  return {payload, scales};
}

Pair quantize_columns_cpu(const at::Tensor& x_any, bool power_of_two) {
  check_matrix("quantize_columns", x_any);
  const at::Tensor x = x_any.contiguous();
  Pair result;
  on_numbers(x, [&](auto from) { result = columns_of(from, x, power_of_two); });
  return result;
}

Pair requantize_columns_cpu(const at::Tensor& payload_any, const at::Tensor& scales, bool power_of_two) {
  check_quantized("requantize_columns", payload_any, scales);
  const at::Tensor payload = payload_any.contiguous();
  return columns_of(quantized(payload, scales), payload, power_of_two);
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
      const float scale = block_scale(largest, power_of_two), inverse = 1.0f / scale;
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
    at::parallel_for(0, M, std::max<int64_t>(1, kGrain / std::max<int64_t>(K, 1)), [&](int64_t first, int64_t last) {
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
