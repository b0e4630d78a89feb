// Block-scaled E4M3 as DeepSeek-V3 trains with it (arXiv 2412.19437, section 3.3), the same bits on every device.
//
//   scale = max(largest |x| of the block, 2^-100) / 448, rounded up to a power of two on request
//   payload = e4m3(x * (1 / scale)), to the nearest, ties to even, at most 448 in magnitude
//
// The largest magnitude is found among the bits of |x| as integers: NaN is above infinity there, so a block that holds either has a
// scale that is not finite, and its numbers are NaN when they are read back. NaN has one code here, whatever the device makes of one:
// 0x7fc00000 as a scale, 0x7f as a payload.

#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/bit_cast.h>

#include <cstdint>

#if defined(__CUDA_ARCH__)
#include <cuda_fp8.h>
#endif

namespace r1mega {

constexpr int64_t kBlock = 128;          // numbers a scale has along a blocked side
constexpr float kLargestE4M3 = 448.0f;
constexpr float kSmallestAmax = 0x1p-100f;

// Rows that memory holds of the scales of M rows of 1x128 blocks: [ceil(K/128), padded_rows(M)], one row's scales a column.
C10_HOST_DEVICE inline int64_t padded_rows(int64_t M) { return (M + 3) / 4 * 4; }

C10_HOST_DEVICE inline uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return c10::bit_cast<uint32_t>(x);
#endif
}

C10_HOST_DEVICE inline float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return c10::bit_cast<float>(bits);
#endif
}

// |x| as an integer that orders as |x| does, NaN above all; the largest of a block is the maximum of these.
C10_HOST_DEVICE inline uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

// The block's scale from the largest magnitude(). On a GPU without a branch: a block's scale is on the way of all that it has.
C10_HOST_DEVICE inline float block_scale(uint32_t largest, bool power_of_two) {
  const uint32_t smallest = float_bits(kSmallestAmax);
  const float amax = bits_float(largest > smallest ? largest : smallest);
#if defined(__CUDA_ARCH__)
  // the bits of a division for every finite amax here (all of them were tried), without its way out for what cannot be here
  constexpr float kPart = 1.0f / kLargestE4M3;
  const float near = __fmul_rn(amax, kPart), divided = __fmaf_rn(__fmaf_rn(-kLargestE4M3, near, amax), kPart, near);
  const float scale = largest < 0x7f800000u ? divided : amax;
#else
  const float scale = amax / kLargestE4M3;
#endif
  uint32_t bits = float_bits(scale);
  if (power_of_two) bits = (bits + 0x007fffffu) & 0x7f800000u;  // infinity stays
  return bits_float(largest > 0x7f800000u ? 0x7fc00000u : bits);
}

// 1 / scale of a block_scale(), rounded to the nearest; 0 of infinity.
C10_HOST_DEVICE inline float block_inverse(float scale) {
#if defined(__CUDA_ARCH__)
  // a division's own steps: neither a scale nor its inverse is a small number, so that one without a branch is enough
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(scale));
  const float exact = __fmaf_rn(near, __fmaf_rn(-scale, near, 1.0f), near);
  return scale < bits_float(0x7f800000u) ? exact : near;
#else
  return 1.0f / scale;
#endif
}

// The payload's byte of x in a block of this 1 / scale.
C10_HOST_DEVICE inline uint8_t to_e4m3(float x, float inverse_scale) {
  const float scaled = x * inverse_scale;
#if defined(__CUDA_ARCH__)
  return static_cast<uint8_t>(__nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3));
#else
  // without a branch, so that a loop over it is vectorised
  const uint32_t bits = float_bits(scaled), size = bits & 0x7fffffffu;
  const uint32_t held = size < 0x43e00000u ? size : 0x43e00000u;  // 448
  // a normal number: exponent counted from 7 instead of 127, the last of three bits rounded to even
  const uint32_t normal = (held - (120u << 23) + 0x7ffffu + ((held >> 20) & 1u)) >> 20;
  // one below 2^-6: the steps of fp32 at 2^14 are 2^-9, those of E4M3 there
  const uint32_t small = float_bits(bits_float(held) + 16384.0f) - float_bits(16384.0f);
  const uint32_t code = (held < (121u << 23) ? small : normal) | (bits >> 24 & 0x80u);
  return static_cast<uint8_t>(size > 0x7f800000u ? 0x7fu : code);
#endif
}

#if !defined(__CUDA_ARCH__)
// The number of a payload's byte, without a branch, so that a loop over it is vectorised.
inline float from_e4m3(uint8_t code) {
  const uint32_t size = code & 0x7fu, sign = static_cast<uint32_t>(code & 0x80u) << 24;
  // a normal number: exponent counted from 127 instead of 7; one below 2^-6 the same above 2^-6, of which that is taken away
  const uint32_t small = float_bits(bits_float((size << 20) + (121u << 23)) - 0x1p-6f), normal = (size << 20) + (120u << 23);
  const uint32_t bits = size < 8u ? small : normal;
  return bits_float(size == 0x7fu ? 0x7fc00000u : bits | sign);
}
#endif

}  // namespace r1mega
