// What the kernels of swiglu on a GPU share: its formulas, and how they read hidden.

#pragma once

#include "op.h"

#include <type_traits>

#include "../common/fp8.cuh"

namespace r1mega {
namespace {

constexpr int kGroup = 8;                // numbers of a group in the kernels that quantise
constexpr int kLanes = kBlock / kGroup;  // threads that share a scale

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
// within two units in the last place; x over infinity, or over what is near it, is 0, and infinity over infinity NaN
__device__ __forceinline__ float over(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double over(double x, double y) { return x / y; }

template <typename acc_t>
__device__ __forceinline__ acc_t activation(acc_t gate, acc_t up, acc_t prob) {
  return over(gate, acc_t(1) + exponential(-gate)) * up * prob;
}

template <typename acc_t>
__device__ __forceinline__ acc_t sigmoid_of(acc_t gate) {
  return over(acc_t(1), acc_t(1) + exponential(-gate));
}

// The same in four instructions, for what is rounded to bf16 or E4M3. Its relative error is 2^-22 times |gate|, or 2^-22.
__device__ __forceinline__ float near_sigmoid(float gate) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

template <typename acc_t>
struct Gradients {
  acc_t gate, up, prob, activation;
};

template <typename acc_t>
__device__ __forceinline__ Gradients<acc_t> gradients(acc_t grad, acc_t gate, acc_t up, acc_t prob, acc_t sigmoid) {
  const acc_t silu = gate * sigmoid, scaled = grad * prob, product = silu * up;
  const acc_t slope = sigmoid * (acc_t(1) + gate * (acc_t(1) - sigmoid));
  return {scaled * up * slope, scaled * silu, grad * product, product * prob};
}

// Eight numbers of bf16, or as many bytes of E4M3, as one access brings them: in words, which are opened where they are used.
template <typename T>
using Raw = std::conditional_t<sizeof(T) == 1, uint2, uint4>;

template <typename T>
__device__ __forceinline__ Raw<T> read_group(const T* from) {
  return *reinterpret_cast<const Raw<T>*>(from);
}

__device__ __forceinline__ void widen(const uint4& from, float, float (&to)[kGroup]) {
  const uint32_t word[] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) to[i] = __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
}

__device__ __forceinline__ void widen(const uint2& from, float scale, float (&to)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; i += 2) {
    const auto both = static_cast<__nv_fp8x2_storage_t>((i < 4 ? from.x : from.y) >> (i % 4 * 8));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(both, __NV_E4M3)));
    to[i] = pair.x * scale;
    to[i + 1] = pair.y * scale;
  }
}

__device__ __forceinline__ uint4 in_bf16(const float (&x)[kGroup]) {
  const auto pair = [&](int i) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x[i], x[i + 1]);
    return *reinterpret_cast<const uint32_t*>(&both);
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// Where hidden's scales are, if it has any.
struct Scales {
  const float* base;
  int64_t row_stride, block_stride;
  __device__ __forceinline__ float at(int64_t row, int64_t block) const {
    return base ? base[row * row_stride + block * block_stride] : 1.0f;
  }
};

// The bytes of a group's numbers.
__device__ __forceinline__ uint2 codes8(const float (&numbers)[kGroup], float inverse) {
  const auto scaled = [&](int i) { return numbers[i] * inverse; };
  return {codes4(scaled(0), scaled(1), scaled(2), scaled(3)), codes4(scaled(4), scaled(5), scaled(6), scaled(7))};
}

template <typename acc_t>
const acc_t* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<acc_t>() : nullptr;
}

// Rows of any base address as the kernels read them: 16 bytes at a time.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

Scales scales_of(const std::optional<at::Tensor>& scales) {
  if (!scales) return {nullptr, 0, 0};
  return {scales->const_data_ptr<float>(), scales->stride(0), scales->stride(1)};
}

}  // namespace
}  // namespace r1mega
