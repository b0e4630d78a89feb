// hash_words_ on a GPU: a block has one tile, a thread four words at a time. Sums of integers are the same in any order.

#include "../common/device.cuh"
#include "op.h"

#include <torch/library.h>

namespace r1mega {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 4;

__global__ void __launch_bounds__(kThreads)
    hash(const int32_t* __restrict__ words, uint32_t* __restrict__ sums, int64_t first, int64_t end, int64_t tiles) {
  __shared__ uint32_t partial[2][kThreads / kWarp];
  const int64_t tile = first / kTile + blockIdx.x;
  const int64_t from = max(first, tile * kTile), to = min(end, (tile + 1) * kTile);
  const int32_t* mine = words + (from - first);
  const int count = static_cast<int>(to - from);
  // words before the first 16-byte boundary, then whole vectors, then the rest
  const int head = min(count, static_cast<int>((16 - reinterpret_cast<uintptr_t>(mine) % 16) % 16 / 4));
  const int vectors = (count - head) / kWide;
  const uint32_t index = static_cast<uint32_t>(from);
  uint32_t one = 0, two = 0;
  const auto add = [&](int at, int32_t word) {
    one += first_hash(static_cast<uint32_t>(word), index + at);
    two += second_hash(static_cast<uint32_t>(word), index + at);
  };
#pragma unroll 4
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    const auto four = load16(mine + head + v * kWide);
#pragma unroll
    for (int i = 0; i < kWide; ++i) add(head + v * kWide + i, four.value[i]);
  }
  if (static_cast<int>(threadIdx.x) < head) add(threadIdx.x, mine[threadIdx.x]);
  const int rest = head + vectors * kWide + threadIdx.x;
  if (rest < count) add(rest, mine[rest]);
  one = block_sum<kThreads>(one, partial[0]);
  two = block_sum<kThreads>(two, partial[1]);
  if (threadIdx.x == 0) {  // this launch's only block with this tile; launches on one stream follow one another
    sums[tile] += one;
    sums[tiles + tile] += two;
  }
}

void hash_words_cuda(at::Tensor& sums, const at::Tensor& words_any, int64_t first) {
  check_hash_words(sums, words_any, first);
  const at::Tensor words = words_any.contiguous();
  const int64_t end = first + words.size(0);
  if (end == first) return;
  const c10::cuda::CUDAGuard guard(words.device());
  const int64_t blocks = ceil_div(end, kTile) - first / kTile;
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "hash_words_: expected below 2^31 tiles, got ", blocks);
  hash<<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      words.const_data_ptr<int32_t>(), reinterpret_cast<uint32_t*>(sums.mutable_data_ptr<int32_t>()), first, end, sums.size(1));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("hash_words_", hash_words_cuda); }

}  // namespace r1mega
