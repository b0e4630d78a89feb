// Eight neighbours of a row, and arithmetic that is rounded after each step and never fused.

#pragma once

#include "../common/device.cuh"

#include <cstdint>
#include <type_traits>

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
__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Eight neighbours; 0 from the row's end on. `aligned`: rows are whole eights that 16-byte accesses fit. Numbers of bf16 stay two to a
// register until they are used.
template <typename T>
struct Eight {
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;
  static constexpr bool kHalves = sizeof(T) == 2;
  static constexpr int kCount = kHalves ? kEight / 2 : kEight;
  using Held = std::conditional_t<kHalves, uint32_t, T>;
  Held held[kCount];

  __device__ Wide operator[](int j) const {
    if constexpr (kHalves) return j % 2 ? high_half(held[j / 2]) : low_half(held[j / 2]);
    else return held[j];
  }
  static __device__ Eight of(const Wide (&value)[kEight]) {
    Eight result;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kHalves) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(value[2 * j], value[2 * j + 1]);
        result.held[j] = static_cast<uint32_t>(__bfloat16_as_ushort(two.y)) << 16 | __bfloat16_as_ushort(two.x);
      } else {
        result.held[j] = value[j];
      }
    }
    return result;
  }
  __device__ void read(const T* from, int left, bool aligned) {
    if (aligned && left > 0) {
#pragma unroll
      for (int v = 0; v < kCount / kVector<Held>; ++v) {
        const auto part = load16(reinterpret_cast<const Held*>(from) + v * kVector<Held>);
#pragma unroll
        for (int j = 0; j < kVector<Held>; ++j) held[v * kVector<Held> + j] = part.value[j];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kHalves) {
        const auto half = [&](int i) { return i < left ? uint32_t(__bfloat16_as_ushort(from[i])) : 0u; };
        held[j] = half(2 * j) | half(2 * j + 1) << 16;
      } else {
        held[j] = j < left ? from[j] : T(0);
      }
    }
  }
  __device__ void write(T* to, int left, bool aligned) const {
    if (aligned && left > 0) {
#pragma unroll
      for (int v = 0; v < kCount / kVector<Held>; ++v) {
        Vector<Held, kVector<Held>> part;
#pragma unroll
        for (int j = 0; j < kVector<Held>; ++j) part.value[j] = held[v * kVector<Held> + j];
        store16(reinterpret_cast<Held*>(to) + v * kVector<Held>, part);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      if (j < left) narrow((*this)[j], to[j]);  // exact: it was rounded to T before
    }
  }
};

template <typename A>
__device__ __forceinline__ A sum_of_eight(const A (&a)[kEight]) {
  return add(add(add(a[0], a[4]), add(a[2], a[6])), add(add(a[1], a[5]), add(a[3], a[7])));
}

}  // namespace
}  // namespace r1mega
