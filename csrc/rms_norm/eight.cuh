// Eight neighbours of a row, and arithmetic that is rounded after each step and never fused.

#pragma once

#include "../common/device.cuh"

#include <cstdint>

namespace r1mega {
namespace {

constexpr int kEight = 8;

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(double x, float& to) { to = static_cast<float>(x); }

// Eight neighbours; 0 from the row's end on. `aligned`: rows are whole eights that 16-byte accesses fit; a constant where it matters,
// because loads that stand in branches of their own are waited for one by one.
template <typename T>
struct Eight {
  Vector<T, kVector<T>> part[kEight / kVector<T>];
  __device__ T& operator[](int j) { return part[j / kVector<T>].value[j % kVector<T>]; }
  __device__ const T& operator[](int j) const { return part[j / kVector<T>].value[j % kVector<T>]; }

  // number j as it is computed with; of bf16, from its word: one by one, each would take a register of its own from the start
  __device__ auto wide(int j) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t word;
      memcpy(&word, reinterpret_cast<const char*>(part) + j / 2 * 4, 4);
      return __uint_as_float(j % 2 ? word & 0xffff0000u : word << 16);
    } else {
      return widen((*this)[j]);
    }
  }

  __device__ void read(const T* from, int left, bool aligned) {
    if (aligned) {
#pragma unroll
      for (int v = 0; v < kEight / kVector<T>; ++v) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (left > 0) bits = *reinterpret_cast<const uint4*>(from + v * kVector<T>);
        memcpy(&part[v], &bits, sizeof(bits));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kEight; ++j) (*this)[j] = j < left ? from[j] : T(0.0f);
  }
  __device__ void write(T* to, int left, bool aligned) const {
    if (aligned) {
#pragma unroll
      for (int v = 0; v < kEight / kVector<T>; ++v) {
        if (left > 0) store16(to + v * kVector<T>, part[v]);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (j < left) to[j] = (*this)[j];
    }
  }
};

template <typename A>
__device__ __forceinline__ A sum_of_eight(const A (&a)[kEight]) {
  return add(add(add(a[0], a[4]), add(a[2], a[6])), add(add(a[1], a[5]), add(a[3], a[7])));
}

}  // namespace
}  // namespace r1mega
