// Zeros for padding rows, by the blocks of a kernel that gives a block to a token: each looks at every gridDim-th row from its own.

#pragma once

#include "../common/device.cuh"

namespace r1mega {

// row_tokens of a lane's row among the first that its block looks at: to be loaded early.
__device__ __forceinline__ int64_t first_seen(const int64_t* row_tokens, int64_t R) {
  const int64_t r = blockIdx.x + (threadIdx.x % kWarp) * static_cast<int64_t>(gridDim.x);
  return r < R ? row_tokens[r] : 0;
}

// Zeros to the padding rows of `rows` [R, pieces]; `seen`: from first_seen.
template <typename Unit>
__device__ __forceinline__ void clear_padding(Unit* rows, const int64_t* row_tokens, int64_t R, int64_t pieces, int64_t seen) {
  const int64_t step = gridDim.x;
  const int lane = threadIdx.x % kWarp;
  for (int64_t from = blockIdx.x; from < R; from += step * kWarp) {
    const int64_t r = from + lane * step;
    if (from != blockIdx.x) seen = r < R ? row_tokens[r] : 0;
    unsigned padding = __ballot_sync(kAllLanes, seen < 0);
    while (padding) {
      Unit* to = rows + (from + (__ffs(padding) - 1) * step) * pieces;
      padding &= padding - 1;
      for (int64_t p = threadIdx.x; p < pieces; p += blockDim.x) __stcs(to + p, Unit{});
    }
  }
}

}  // namespace r1mega
