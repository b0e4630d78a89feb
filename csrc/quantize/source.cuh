// What the kernels of quantisation read: numbers of bf16 or fp32, or payloads with their scales. csrc/permute_quantize has
// another source, numbers of rows that are gathered.

#pragma once

#include "../common/fp8.cuh"

#include <cstdint>

namespace r1mega {
namespace {

// Where numbers come from: a chunk is what a thread reads of a row, kColumns numbers, 0 where there are none; `read` fills those of
// kRows rows, of which `left` are there, and has all their loads on the way before it waits for one. `peak` words hold magnitudes
// as bits, one or two to a word, that `larger` compares; `alone` opens a word's largest, `at` the one of column j. `kStriped`: the
// source says which tile a block has (`place`); otherwise tiles of a row are neighbours.
template <typename T>
struct Numbers {
  static constexpr int kColumns = kVector<T>, kPeaks = 4;
  static constexpr bool kStriped = false;
  static constexpr bool kHalves = sizeof(T) == 2;
  struct Chunk {
    uint32_t word[4];
  };
  const T* x;
  int64_t columns;
  bool aligned;

  template <int kRows>
  __device__ void read(Chunk (&chunk)[kRows], int64_t row, int64_t column, int64_t left) const {
    const T* from = x + row * columns + column;
    if (aligned) {
      if (column >= columns) left = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        set(chunk[i], i < left ? __ldcs(reinterpret_cast<const uint4*>(from + i * columns)) : make_uint4(0, 0, 0, 0));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) read_some(chunk[i], from + i * columns, i < left ? columns - column : 0);
    }
  }
  static __device__ void set(Chunk& chunk, uint4 words) {
    chunk.word[0] = words.x, chunk.word[1] = words.y, chunk.word[2] = words.z, chunk.word[3] = words.w;
  }
  // the first of `left` numbers, one by one
  static __device__ void read_some(Chunk& chunk, const T* from, int64_t left) {
    alignas(16) T numbers[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) numbers[j] = j < left ? from[j] : T(0.0f);
#pragma unroll
    for (int w = 0; w < 4; ++w) chunk.word[w] = reinterpret_cast<const uint32_t*>(numbers)[w];
  }
  __device__ uint32_t peak(const Chunk& chunk, int p, float) const {
    return chunk.word[p] & (kHalves ? 0x7fff7fffu : 0x7fffffffu);
  }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (kHalves) return __vmaxu2(a, b);
    return max(a, b);
  }
  static __device__ uint32_t alone(uint32_t word) {
    if constexpr (kHalves) return max(word << 16, word & 0xffff0000u);
    return word;
  }
  static __device__ uint32_t at(const uint32_t (&peaks)[kPeaks], int j) {
    if constexpr (kHalves) return j % 2 ? peaks[j / 2] & 0xffff0000u : peaks[j / 2] << 16;
    return peaks[j];
  }
  __device__ float value(const Chunk& chunk, int j, float) const {
    if constexpr (kHalves) return __uint_as_float(j % 2 ? chunk.word[j / 2] & 0xffff0000u : chunk.word[j / 2] << 16);
    return __uint_as_float(chunk.word[j]);
  }
  __device__ float factor(int64_t, int64_t, bool) const { return 1.0f; }
};

struct Quantized {
  static constexpr int kColumns = 8, kPeaks = 8;
  static constexpr bool kStriped = false;
  struct Chunk {
    uint32_t word[2];
  };
  const uint8_t* payload;
  int64_t columns;
  bool aligned;
  const float* scales;
  int64_t row_stride, block_stride;

  template <int kRows>
  __device__ void read(Chunk (&chunk)[kRows], int64_t row, int64_t column, int64_t left) const {
    const uint8_t* from = payload + row * columns + column;
    if (aligned) {
      if (column >= columns) left = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint2 words = i < left ? __ldcs(reinterpret_cast<const uint2*>(from + i * columns)) : make_uint2(0, 0);
        chunk[i].word[0] = words.x, chunk[i].word[1] = words.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        chunk[i].word[0] = chunk[i].word[1] = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (i >= left || column + j >= columns) continue;
          chunk[i].word[j / 4] |= static_cast<uint32_t>(from[i * columns + j]) << (j % 4 * 8);
        }
      }
    }
  }
  __device__ float value(const Chunk& chunk, int j, float factor) const {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(chunk.word[j / 4] >> (j / 2 % 2 * 16));
    const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    return __fmul_rn(j % 2 ? both.y : both.x, factor);
  }
  __device__ uint32_t peak(const Chunk& chunk, int j, float factor) const { return magnitude(value(chunk, j, factor)); }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
  static __device__ uint32_t alone(uint32_t word) { return word; }
  static __device__ uint32_t at(const uint32_t (&peaks)[kPeaks], int j) { return peaks[j]; }
  __device__ float factor(int64_t row, int64_t column, bool inside) const {
    return inside && column < columns ? scales[row * row_stride + column / kBlock * block_stride] : 0.0f;
  }
};

}  // namespace
}  // namespace r1mega
