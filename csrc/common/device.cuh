// What the kernels of a GPU share: 16-byte loads and stores, sums over a warp and a block in one order, the launch around a kernel.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace r1mega {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The lane pattern of a sum is fixed, so that the same input gives the same bits.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// kCount numbers of each lane, combined over kLanes neighbouring lanes: each gets the result for one number, the one of
// lane % kLanes / (kLanes / kCount). Halves first, as a butterfly over each number would, of which this is the part that is needed.
template <int kLanes, int kCount, typename T, typename Combine>
__device__ __forceinline__ T fold(T (&number)[kCount], int lane, Combine combine) {
  static_assert(kCount <= kLanes);
  int step = kLanes / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const T mine = upper ? number[k + half] : number[k], other = upper ? number[k] : number[k + half];
      number[k] = combine(mine, __shfl_xor_sync(kAllLanes, other, step));
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) number[0] = combine(number[0], __shfl_xor_sync(kAllLanes, number[0], step));
  return number[0];
}

// The sum over a block of kThreads, on every thread. `partial`: shared memory of kThreads / 32 values that nobody else uses until
// all threads have come back from here; a block that calls twice needs two of them or a barrier in between.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = partial[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total += partial[warp];
  return total;
}

// kBytes in one access: an array that a thread loads and stores as a whole. The address is a multiple of kBytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T value[kCount];
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // numbers of a 16-byte access

template <typename T>
__device__ __forceinline__ Vector<T, kVector<T>> load16(const T* from) {
  return *reinterpret_cast<const Vector<T, kVector<T>>*>(from);
}

template <typename T>
__device__ __forceinline__ void store16(T* to, const Vector<T, kVector<T>>& values) {
  *reinterpret_cast<Vector<T, kVector<T>>*>(to) = values;
}

// True where rows of `width` numbers from `base` can be read 16 bytes at a time.
template <typename T>
bool fits16(const T* base, int64_t width) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && width % kVector<T> == 0;
}

// Blocks of a grid, at least one; grids go on in strides of gridDim, so that any count of items fits.
inline unsigned grid_of(int64_t items, int64_t most = std::numeric_limits<int32_t>::max()) {
  return static_cast<unsigned>(std::clamp<int64_t>(items, 1, most));
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace r1mega
