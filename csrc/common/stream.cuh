// 16-byte accesses past the caches, for what a kernel reads or writes once: rows of experts are many times the L2.

#pragma once

#include "device.cuh"

namespace r1mega {

template <typename T>
__device__ __forceinline__ Vector<T, kVector<T>> load16_once(const T* from) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  Vector<T, kVector<T>> values;
  static_assert(sizeof(values) == sizeof(bits));
  memcpy(&values, &bits, sizeof(bits));
  return values;
}

template <typename T>
__device__ __forceinline__ void store16_once(T* to, const Vector<T, kVector<T>>& values) {
  uint4 bits;
  static_assert(sizeof(values) == sizeof(bits));
  memcpy(&bits, &values, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(to), bits);
}

// A block's threads for `pieces` of a row, `each` a thread in flight: whole warps, at most `most`.
inline int threads_for(int64_t pieces, int each, int most) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(ceil_div(pieces, each), kWarp) * kWarp, kWarp, most));
}

}  // namespace r1mega
