// The kernel of quantisation: tiles of 128 columns, by rows, by columns or as one block, from any source (source.cuh).
//
// A thread holds 8 rows of 16 bytes of x. The threads of a block cover 128 columns and, where columns are quantised, 128 rows: each
// number is read once, whatever is made of it. A transposed result is converted first and turned as bytes through 16 KB of shared
// memory, whose 8-byte units are swizzled so that neither side meets bank conflicts.

#pragma once

#include "op.h"
#include "source.cuh"

namespace r1mega {
namespace {

constexpr int kRows = 8;               // of a thread
constexpr int kSide = 128;             // of a tile
constexpr int kUnits = kSide / kRows;  // 8-byte units of a column of bytes

// One payload and its scales. Row-major payload of `rows` x `columns`; the scale of (row, block) in the row layout, or of a block.
struct Out {
  uint8_t* payload;
  float* scales;
  int64_t rows, columns;
  int aligned;  // bytes that a store may have
};

// The bytes of a thread's numbers in row i.
template <typename From>
__device__ __forceinline__ void store_row(
    const From& from, const typename From::Chunk& chunk, float inverse, const Out& out, int64_t row, int64_t column) {
  constexpr int kWords = From::kColumns / 4;
  uint32_t word[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    word[w] = codes4(
        from.value(chunk, 4 * w, 1.0f) * inverse, from.value(chunk, 4 * w + 1, 1.0f) * inverse,
        from.value(chunk, 4 * w + 2, 1.0f) * inverse, from.value(chunk, 4 * w + 3, 1.0f) * inverse);
  }
  uint8_t* to = out.payload + row * out.columns + column;
  if (out.aligned >= From::kColumns) {
    if (column >= out.columns) return;
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = word[0];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < From::kColumns; ++j) {
    if (column + j < out.columns) to[j] = static_cast<uint8_t>(word[j / 4] >> (j % 4 * 8));
  }
}

// A thread's peaks of 8 rows, folded over the lanes that share those rows: lane l gets the one of row l % 8.
template <typename From, int kLanes>
__device__ __forceinline__ uint32_t row_peak(uint32_t (&peak)[kRows], int lane) {
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const uint32_t mine = upper ? peak[k + half] : peak[k], other = upper ? peak[k] : peak[k + half];
      peak[k] = From::larger(mine, __shfl_xor_sync(kAllLanes, other, half));
    }
  }
#pragma unroll
  for (int step = kRows; step < kLanes; step *= 2) peak[0] = From::larger(peak[0], __shfl_xor_sync(kAllLanes, peak[0], step));
  return From::alone(peak[0]);
}

template <typename Word>
__device__ __forceinline__ void store_turned(const uint2* turned, int columns_of_chunk, const Out& out, int64_t row, int64_t column) {
  constexpr int kEach = kSide / sizeof(Word);  // words of a column
  for (int i = threadIdx.x; i < kSide * kEach; i += blockDim.x) {
    const int c = i / kEach, at = i % kEach * static_cast<int>(sizeof(Word));
    const int unit = (at / 8) ^ (c / columns_of_chunk % kUnits);
    if (column + c >= out.rows || row + at >= out.columns) continue;
    const char* from = reinterpret_cast<const char*>(turned + c * kUnits + unit) + at % 8;
    *reinterpret_cast<Word*>(out.payload + (column + c) * out.columns + row + at) = *reinterpret_cast<const Word*>(from);
  }
}

enum class Scales { kNone, kOfRows, kOfTile };

// kGroups x 8 rows and 128 columns a block. `kByRow`: what `out` gets; `kTurned`: whether `turned_out` gets the transpose.
template <typename From, Scales kByRow, bool kTurned, int kGroups>
__global__ void __launch_bounds__(kGroups* kSide / From::kColumns, 1024 / (kGroups * kSide / From::kColumns))
    quantize_kernel(From from, Stack stack, uint32_t down, uint32_t across, bool power_of_two, Out out, Out turned_out) {
  constexpr int kLanes = kSide / From::kColumns;  // threads of a row
  constexpr int kThreads = kLanes * kGroups;
  constexpr int kWarps = kThreads / kWarp;
  static_assert(!kTurned || kGroups == kUnits);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = threadIdx.x / kLanes;
  int64_t e = 0;
  uint32_t tile_row, tile_column;
  if constexpr (From::kStriped) {
    from.place(blockIdx.x, down, across, tile_row, tile_column);
  } else {
    e = blockIdx.x / (down * across), tile_row = blockIdx.x / across % down, tile_column = blockIdx.x % across;
  }
  const int64_t first_row = int64_t(tile_row) * kGroups * kRows, first_column = int64_t(tile_column) * kSide;
  const int64_t row = first_row + group * kRows, column = first_column + threadIdx.x % kLanes * From::kColumns;

  typename From::Chunk chunk[kRows];
  float factor[kRows];
  from.read(chunk, e * stack.rows + row, column, stack.rows - row);
#pragma unroll
  for (int i = 0; i < kRows; ++i) factor[i] = from.factor(row + i, column, row + i < stack.rows);

  [[maybe_unused]] uint32_t of_rows = 0;  // what lane l gets of row l % 8
  if constexpr (kByRow == Scales::kOfRows) {
    uint32_t peak[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      peak[i] = from.peak(chunk[i], 0, 1.0f);
#pragma unroll
      for (int p = 1; p < From::kPeaks; ++p) peak[i] = From::larger(peak[i], from.peak(chunk[i], p, 1.0f));
    }
    of_rows = row_peak<From, kLanes>(peak, lane);
  }
  [[maybe_unused]] const auto by_rows = [&] {
    const float scale = block_scale(of_rows, power_of_two);
    const float inverse = block_inverse(scale);
    const int64_t own = row + lane % kRows, padded = padded_rows(stack.rows);
    if (lane % kLanes < kRows && own < padded) out.scales[tile_column * padded + own] = own < stack.rows ? scale : 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float of_row = __shfl_sync(kAllLanes, inverse, lane / kRows * kRows + i);
      if (row + i < stack.rows) store_row(from, chunk[i], of_row, out, row + i, column);
    }
  };

  if constexpr (kByRow == Scales::kOfTile || kTurned) {
    uint32_t peaks[From::kPeaks];
#pragma unroll
    for (int p = 0; p < From::kPeaks; ++p) {
      peaks[p] = from.peak(chunk[0], p, factor[0]);
#pragma unroll
      for (int i = 1; i < kRows; ++i) peaks[p] = From::larger(peaks[p], from.peak(chunk[i], p, factor[i]));
    }
    float inverse[From::kColumns];
    if constexpr (kByRow == Scales::kOfTile) {
      __shared__ uint32_t partial[kWarps];
      uint32_t peak = peaks[0];
#pragma unroll
      for (int p = 1; p < From::kPeaks; ++p) peak = From::larger(peak, peaks[p]);
      peak = warp_max(From::alone(peak));
      if (lane == 0) partial[warp] = peak;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) peak = max(peak, partial[w]);
      const float scale = block_scale(peak, power_of_two);
      if (threadIdx.x == 0) {
        out.scales[blockIdx.x] = scale;
        if constexpr (kTurned) turned_out.scales[(e * across + tile_column) * down + tile_row] = scale;
      }
#pragma unroll
      for (int j = 0; j < From::kColumns; ++j) inverse[j] = block_inverse(scale);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row + i < stack.rows) store_row(from, chunk[i], inverse[0], out, e * stack.rows + row + i, column);
      }
    } else {
      __shared__ uint32_t partial[kWarps][kSide];
      __shared__ float shared_inverse[kSide];
      if constexpr (kLanes < kWarp) {
#pragma unroll
        for (int p = 0; p < From::kPeaks; ++p) peaks[p] = From::larger(peaks[p], __shfl_xor_sync(kAllLanes, peaks[p], kLanes));
      }
      const int own = threadIdx.x % kLanes * From::kColumns;
      if (lane < kLanes) {
#pragma unroll
        for (int j = 0; j < From::kColumns; ++j) partial[warp][own + j] = From::at(peaks, j);
      }
      if constexpr (kByRow == Scales::kOfRows) by_rows();  // here, where no register waits for the other warps' peaks
      __syncthreads();
      if (threadIdx.x < kSide) {
        uint32_t peak = partial[0][threadIdx.x];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) peak = max(peak, partial[w][threadIdx.x]);
        const float scale = block_scale(peak, power_of_two);
        shared_inverse[threadIdx.x] = block_inverse(scale);
        const int64_t k = first_column + threadIdx.x, padded = padded_rows(stack.columns);
        if (k < padded) turned_out.scales[tile_row * padded + k] = k < stack.columns ? scale : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < From::kColumns; ++j) inverse[j] = shared_inverse[own + j];
    }
    if constexpr (kTurned) {
      __shared__ __align__(16) uint2 turned[kSide * kUnits];
      const int own = threadIdx.x % kLanes * From::kColumns;
#pragma unroll
      for (int j = 0; j < From::kColumns; ++j) {
        const auto scaled = [&](int i) { return from.value(chunk[i], j, factor[i]) * inverse[j]; };
        const int c = own + j;
        turned[c * kUnits + (group ^ (c / From::kColumns % kUnits))] =
            make_uint2(codes4(scaled(0), scaled(1), scaled(2), scaled(3)), codes4(scaled(4), scaled(5), scaled(6), scaled(7)));
      }
      __syncthreads();
      const Out& to = turned_out;
      Out matrix{to.payload + e * to.rows * to.columns, nullptr, to.rows, to.columns, to.aligned};
      if (to.aligned >= 16) {
        // eight threads a column of 128 bytes; the swizzle swaps the two units of 16 bytes where its lowest bit is set
        for (int c = threadIdx.x / 8; c < kSide; c += kThreads / 8) {
          const int swizzle = c / From::kColumns % kUnits, part = threadIdx.x % 8;
          const uint4 both = *reinterpret_cast<const uint4*>(turned + c * kUnits + (2 * part ^ (swizzle & ~1)));
          const uint4 ordered = swizzle & 1 ? make_uint4(both.z, both.w, both.x, both.y) : both;
          const int64_t at = first_row + part * 16;
          if (first_column + c < matrix.rows && at < matrix.columns) {
            *reinterpret_cast<uint4*>(matrix.payload + (first_column + c) * matrix.columns + at) = ordered;
          }
        }
      } else if (to.aligned >= 4) {
        store_turned<uint32_t>(turned, From::kColumns, matrix, first_row, first_column);
      } else {
        store_turned<uint8_t>(turned, From::kColumns, matrix, first_row, first_column);
      }
    }
  } else {
    by_rows();
  }
}

// How many bytes a store into rows of `columns` bytes may have, at most 16.
int alignment(const at::Tensor& payload, int64_t columns) {
  const auto both = reinterpret_cast<uintptr_t>(payload.const_data_ptr()) | static_cast<uintptr_t>(columns);
  return both % 16 == 0 ? 16 : static_cast<int>(both & -both);
}

Out out_of(const at::Tensor& payload, const at::Tensor& scales) {
  const int64_t rows = payload.size(-2), columns = payload.size(-1);
  return {
      static_cast<uint8_t*>(payload.mutable_data_ptr()), scales.mutable_data_ptr<float>(), rows, columns, alignment(payload, columns)};
}

template <Scales kByRow, bool kTurned, typename From>
void launch(const From& from, const Stack& stack, bool power_of_two, const Out& out, const Out& turned) {
  constexpr int kGroups = kTurned || kByRow == Scales::kOfTile ? kUnits : 4;
  const int64_t down = ceil_div(stack.rows, kGroups * kRows), across = ceil_div(stack.columns, kSide);
  const int64_t tiles = stack.count * down * across;
  if (tiles == 0) return;
  TORCH_CHECK_VALUE(tiles <= std::numeric_limits<int32_t>::max(), "quantize: expected at most 2^31 - 1 tiles, got ", tiles);
  quantize_kernel<From, kByRow, kTurned, kGroups>
      <<<static_cast<unsigned>(tiles), kGroups * kSide / From::kColumns, 0, c10::cuda::getCurrentCUDAStream()>>>(
          from, stack, static_cast<uint32_t>(down), static_cast<uint32_t>(across), power_of_two, out, turned);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
Numbers<T> numbers(const at::Tensor& x) {
  const T* base = reinterpret_cast<const T*>(x.const_data_ptr());
  return {base, x.size(-1), fits16(base, x.size(-1))};
}

}  // namespace
}  // namespace r1mega
