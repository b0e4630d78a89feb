// What route's kernels share on a GPU: a lane's experts in registers, their loads, the choice of a kernel by type and size.

#pragma once

#include <initializer_list>

#include "../common/device.cuh"
#include "op.h"

namespace r1mega {

constexpr int64_t kMostExperts = 1024, kMostChosen = 32, kMostGroups = 32;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The numbers of one access of at most 16 bytes, of kOwn neighbours.
template <typename T, int kOwn>
constexpr int kAtOnce = (kOwn & -kOwn) < kVector<T> ? (kOwn & -kOwn) : kVector<T>;

// kOwn neighbours, of which `held` are there, as they lie in memory; `absent` for the others. With `vector`, no access is in part.
template <typename T, int kOwn>
__device__ __forceinline__ void load_own(const T* from, int held, bool vector, T absent, T (&value)[kOwn]) {
  constexpr int kStep = kAtOnce<T, kOwn>;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) value[j] = absent;
  if (vector) {
#pragma unroll
    for (int j = 0; j < kOwn; j += kStep) {
      if (j >= held) continue;
      const auto part = *reinterpret_cast<const Vector<T, kStep>*>(from + j);
#pragma unroll
      for (int i = 0; i < kStep; ++i) value[j + i] = part.value[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (j < held) value[j] = from[j];
  }
}

inline void check_device(const char* op, const at::Tensor& logits, int64_t top_k, int64_t groups) {
  TORCH_CHECK_VALUE(
      logits.scalar_type() != at::kDouble, op, ": expected logits of float32 or bfloat16 on a GPU, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(
      logits.size(1) <= kMostExperts && top_k <= kMostChosen && groups <= kMostGroups, op, ": expected on a GPU at most ",
      kMostExperts, " experts, a top_k of ", kMostChosen, " and ", kMostGroups, " groups, got ", logits.size(1), ", ", top_k,
      " and ", groups);
}

// Calls `run` with T and the experts of a lane as constants: one of kMore, or rounded up to a power of two.
template <int... kMore, typename Run>
void with_types(at::ScalarType type, int64_t own, Run run) {
  const auto sized = [&](auto zero) {
    using T = decltype(zero);
    if (((own == kMore && (run.template operator()<T, kMore>(), true)) || ...)) return;
    if (own <= 1) return run.template operator()<T, 1>();
    if (own <= 2) return run.template operator()<T, 2>();
    if (own <= 4) return run.template operator()<T, 4>();
    if (own <= 8) return run.template operator()<T, 8>();
    if (own <= 16) return run.template operator()<T, 16>();
    if (own <= 32) return run.template operator()<T, 32>();
    return run.template operator()<T, 64>();  // a number of groups that is not a power of two leaves lanes idle
  };
  if (type == at::kFloat) return sized(float{});
  sized(__nv_bfloat16{});
}

// Whether pieces of `piece` experts (a power of two) are there whole or not at all in groups of `size`, and their addresses fit.
inline bool moves_whole(int piece, int64_t size, std::initializer_list<const void*> tensors) {
  if (size % piece != 0) return false;
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
  return true;
}

// Blocks of `warps` warps for a warp a token, at most `most` a processor; they go on in strides.
inline unsigned num_blocks(int64_t tokens, int warps, int most) {
  int device = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return grid_of(ceil_div(tokens, warps), int64_t(most) * processors);
}

}  // namespace r1mega
