// Quantisation on a CPU, tile by tile: what the kernels of quantisation share with those that quantise what they make.

#pragma once

#include "op.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <memory>
#include <tuple>

namespace r1mega {
namespace {

constexpr int64_t kNumberGrain = 32768;  // numbers a thread takes at least

inline uint8_t* bytes(const at::Tensor& payload) { return static_cast<uint8_t*>(payload.mutable_data_ptr()); }

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

// Calls `with` on the numbers of x, which is contiguous.
template <typename With>
void on_numbers(const at::Tensor& x, With with) {
  if (x.scalar_type() == at::kFloat) {
    with(Numbers<float>{x.const_data_ptr<float>(), x.size(-1)});
  } else {
    with(Numbers<at::BFloat16>{x.const_data_ptr<at::BFloat16>(), x.size(-1)});
  }
}

inline uint32_t largest_of(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(x[i]));
  return largest;
}

inline void convert(const float* x, float inverse, uint8_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_e4m3(x[i], inverse);
}

// Where a matrix's results go: row-major payload [rows, columns] and the scales of row r's block b at r + b * padded.
struct Out {
  uint8_t* payload;
  float* scales;
  int64_t columns, padded;
};

inline Out out_of(const at::Tensor& payload, const at::Tensor& scales) {
  return {bytes(payload), scales.mutable_data_ptr<float>(), payload.size(1), padded_rows(payload.size(0))};
}

inline void quantize_row_block(const float* x, int64_t row, int64_t column, int64_t count, bool power_of_two, const Out& out) {
  const float scale = block_scale(largest_of(x, count), power_of_two);
  out.scales[column / kBlock * out.padded + row] = scale;
  convert(x, block_inverse(scale), out.payload + row * out.columns + column, count);
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

inline void quantize_tile_columns(Tile& tile, bool power_of_two, const Out& out) {
  uint32_t largest[kBlock] = {};
  float inverse[kBlock];
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* line = tile.line(r);
    for (int64_t c = 0; c < tile.columns; ++c) largest[c] = std::max(largest[c], magnitude(line[c]));
  }
  for (int64_t c = 0; c < tile.columns; ++c) {
    const float scale = block_scale(largest[c], power_of_two);
    out.scales[tile.row / kBlock * out.padded + tile.column + c] = scale;
    inverse[c] = block_inverse(scale);
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
  constexpr int64_t kGrain = std::max<int64_t>(1, kNumberGrain / (kBlock * kBlock));
  at::parallel_for(0, stack.count * down * across, kGrain, [&](int64_t first, int64_t last) {
    const auto tile = std::make_unique<Tile>();
    for (int64_t i = first; i < last; ++i) work(*tile, i / (down * across), i / across % down * kBlock, i % across * kBlock);
  });
}

// [M, K] from `from` by columns: payload [K, M] and its scales.
template <typename From>
std::tuple<at::Tensor, at::Tensor> columns_of(const From& from, int64_t M, int64_t K, const at::Tensor& like, bool power_of_two) {
  const at::Tensor payload = payload_like(like, {K, M}), scales = row_scales(K, M, like, true);
  const Out out = out_of(payload, scales);
  over_tiles({1, M, K}, [&](Tile& tile, int64_t, int64_t row, int64_t column) {
    tile.read(from, row, column, M, K);
    quantize_tile_columns(tile, power_of_two, out);
  });
  return {payload, scales};
}

}  // namespace
}  // namespace r1mega
