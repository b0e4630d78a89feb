// Bytes of E4M3 on a GPU; see fp8.h.

#pragma once

#include <cuda_fp8.h>

#include "device.cuh"
#include "fp8.h"

namespace r1mega {

// Four numbers, divided by their scales already, as bytes in the order of memory.
__device__ __forceinline__ uint32_t codes4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

}  // namespace r1mega
