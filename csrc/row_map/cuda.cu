// row_map on a GPU, in two launches and without a sort.
//
//   mark     for each word of 32 tokens and each expert the 32 bits of who chose it; for each span of tokens their number
//   number   each block sums the spans before its own (the first row of its tokens) and all spans (the first row of an expert), and
//            turns its words, so that a thread has 32 experts of a token: it goes from one that is set to the next; the row is that
//            base plus the bits of the expert before the token's, the slot the bits of the token before the expert's
//
// A span is a multiple of 128 tokens, and there are at most kMostSpans, so that the sums stay small for any number of tokens.
// All numbers are integers: the same bits each time. Rows outside [0, R) and slots outside the width, which a broken promise can
// ask for, are not written.

#include "op.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../common/device.cuh"

namespace r1mega {
namespace {

constexpr int kWords = 4;                    // words of a tile
constexpr int kTile = kWords * kWarp;        // tokens that a block works on at a time
constexpr int64_t kMostSpans = 128;          // about one a processor
constexpr int kExperts = 4;                  // of a thread of `mark`
constexpr int kNumberThreads = 1024;
constexpr int64_t kMostExperts = 4096;       // what a block's shared memory holds

// Four routing-map bytes of a token from expert e; kWhole: E is a multiple of four and the map aligned, so they are one access.
template <bool kWhole>
__device__ __forceinline__ uint32_t four_of(const uint8_t* row, int64_t e, int64_t E) {
  if constexpr (kWhole) {
    return e < E ? __ldcs(reinterpret_cast<const uint32_t*>(row + e)) : 0u;
  } else {
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < kExperts; ++i) four |= e + i < E ? static_cast<uint32_t>(row[e + i] != 0) << (8 * i) : 0u;
    return four;
  }
}

// Grid (spans, experts / 128), block (32, kWords): a warp a word.
template <bool kWhole>
__global__ void __launch_bounds__(kTile) mark_kernel(
    const uint8_t* __restrict__ map, uint32_t* __restrict__ masks, int32_t* __restrict__ counts, int64_t T, int64_t E,
    int64_t span) {
  __shared__ int32_t partial[kWords][kWarp * kExperts];
  const int lane = threadIdx.x, word = threadIdx.y;
  const int64_t e = (static_cast<int64_t>(blockIdx.y) * kWarp + lane) * kExperts;
  const int64_t first = blockIdx.x * span, last = min(T, first + span);
  int32_t count[kExperts] = {};
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t from = tile + word * kWarp;
    if (from >= last) break;
    // Byte j of eight[i / 8] gathers expert j's bits of eight tokens; the four words are then turned, byte by byte.
    uint32_t eight[kWarp / 8] = {}, mask[kExperts];
#pragma unroll
    for (int i = 0; i < kWarp; ++i) {
      const uint32_t four = from + i < last ? four_of<kWhole>(map + (from + i) * E, e, E) : 0u;
      eight[i / 8] |= (four & 0x01010101u) << (i % 8);
    }
    const uint32_t low01 = __byte_perm(eight[0], eight[1], 0x5140), low23 = __byte_perm(eight[2], eight[3], 0x5140);
    const uint32_t high01 = __byte_perm(eight[0], eight[1], 0x7362), high23 = __byte_perm(eight[2], eight[3], 0x7362);
    mask[0] = __byte_perm(low01, low23, 0x5410), mask[1] = __byte_perm(low01, low23, 0x7632);
    mask[2] = __byte_perm(high01, high23, 0x5410), mask[3] = __byte_perm(high01, high23, 0x7632);
#pragma unroll
    for (int j = 0; j < kExperts; ++j) {
      if (e + j < E) masks[from / kWarp * E + e + j] = mask[j];
      count[j] += __popc(mask[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kExperts; ++j) partial[word][lane * kExperts + j] = count[j];
  __syncthreads();
  const int own = word * kWarp + lane;  // kTile threads, as many experts
  const int64_t expert = static_cast<int64_t>(blockIdx.y) * kWarp * kExperts + own;
  if (expert < E) {
    int32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) total += partial[w][own];
    counts[blockIdx.x * E + expert] = total;
  }
}
static_assert(kTile == kWarp * kExperts, "the last step of mark has a thread an expert");

// The sum of `value` over the threads before this one; `total`: over all. Shared memory of 33 numbers.
__device__ __forceinline__ int64_t scan(int64_t value, int64_t* shared, int64_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) shared[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int64_t of_warps = shared[lane];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, of_warps, step);
      if (lane >= step) of_warps += before;
    }
    shared[lane] = of_warps;
  }
  __syncthreads();
  const int64_t before = (warp ? shared[warp - 1] : 0) + sum - value;
  *total = shared[kWarp - 1];
  __syncthreads();  // the next call writes there
  return before;
}
static_assert(kNumberThreads == kWarp * kWarp, "scan has a lane of one warp for each warp");

// A square of 32 x 32 bits, a row a lane, with rows and columns exchanged.
__device__ __forceinline__ uint32_t turned(uint32_t row, int lane) {
  uint32_t low = 0x0000ffffu;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, row, step);
    row = lane & step ? (row & ~low) | ((other >> step) & low) : (row & low) | ((other & low) << step);
    low ^= low << (step / 2);
  }
  return row;
}

struct Outputs {
  int64_t* counts;
  int32_t* ends;
  int32_t* row_experts;
  int64_t* row_tokens;
  int64_t* token_rows;
};

// A multiple of `multiple`; both are below 2^31.
__device__ __forceinline__ int64_t filled_up(uint32_t count, uint32_t multiple) {
  return multiple == 1 ? count : (count + multiple - 1) / multiple * multiple;
}

// A block a span. Rows are unsigned: start < 2^31 and fewer than 2^31 tokens before one of an expert do not wrap around.
__global__ void __launch_bounds__(kNumberThreads) number_kernel(
    const uint32_t* __restrict__ masks, const int32_t* __restrict__ span_counts, Outputs out, int64_t T, int64_t E, int64_t R,
    int64_t width, int64_t multiple, int64_t span, int64_t spans) {
  extern __shared__ uint32_t shared[];
  uint32_t* next = shared;          // [E]: the row of the next token
  uint32_t* totals = next + E;      // [E]: rows of all tokens
  uint32_t* tile_mask = totals + E; // [kWords, E]
  uint32_t* tile_row = tile_mask + kWords * E;
  uint32_t* token_mask = tile_row + kWords * E;  // [kTile, groups]: 32 experts of a token
  __shared__ int64_t partial[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kWarps = kNumberThreads / kWarp;
  const int64_t first = blockIdx.x * span, last = min(T, first + span);

  // Masks of a tile lie one behind the other; the first tile's are on their way while spans are summed.
  const auto masks_of = [&](int64_t tile) { return min(static_cast<int64_t>(kWords), (last - tile + kWarp - 1) / kWarp) * E; };
  const uint32_t early = first < last && threadIdx.x < masks_of(first) ? masks[first / kWarp * E + threadIdx.x] : 0u;
  for (int64_t e = threadIdx.x; e < E; e += kNumberThreads) next[e] = totals[e] = 0;
  __syncthreads();
  // Warps share the sums over spans: each takes 32 experts and every `parts`-th span.
  const int groups = static_cast<int>((E + kWarp - 1) / kWarp), parts = max(1, kWarps / max(groups, 1));
  for (int work = warp; work < groups * parts; work += kWarps) {
    const int64_t e = work % groups * kWarp + lane;
    uint32_t before = 0, total = 0;
    if (e < E) {
#pragma unroll 16
      for (int64_t s = work / groups; s < spans; s += parts) {
        const uint32_t count = span_counts[s * E + e];
        total += count;
        before += s < blockIdx.x ? count : 0u;
      }
      atomicAdd(next + e, before);
      atomicAdd(totals + e, total);
    }
  }
  __syncthreads();

  int64_t start = 0;  // of the experts of this round
  for (int64_t round = 0; round < E; round += kNumberThreads) {
    const int64_t e = round + threadIdx.x;
    const int64_t count = e < E ? totals[e] : 0, filled = filled_up(static_cast<uint32_t>(count), static_cast<uint32_t>(multiple));
    int64_t all;
    const int64_t begin = min(R, start + scan(filled, partial, &all)), end = min(R, begin + filled);
    if (e < E) {
      next[e] += static_cast<uint32_t>(begin);
      if (blockIdx.x == 0) {
        out.counts[e] = count;
        out.ends[e] = static_cast<int32_t>(end);
      }
      // padding of this expert: one block has it
      if (static_cast<unsigned>(e) % gridDim.x == blockIdx.x) {
        for (int64_t r = begin + count; r < end; ++r) {
          out.row_experts[r] = static_cast<int32_t>(e);
          out.row_tokens[r] = -1;
        }
      }
    }
    start += all;
  }
  for (int64_t r = start + blockIdx.x * static_cast<int64_t>(kNumberThreads) + threadIdx.x; r < R;
       r += gridDim.x * static_cast<int64_t>(kNumberThreads)) {
    out.row_experts[r] = -1;
    out.row_tokens[r] = -1;
  }

  // Lanes that share a token, a power of two: one for each of its groups of 32 experts, or all.
  const int each = groups <= 1 ? 1 : groups >= kWarp ? kWarp : 1 << (32 - __clz(groups - 1));
  const int own = lane & (each - 1);
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t there = masks_of(tile), end = min(last, tile + kTile);
    __syncthreads();  // `next` is there, and the last tile is done with
    for (int64_t i = threadIdx.x; i < kWords * E; i += kNumberThreads) {
      tile_mask[i] = i >= there ? 0u : tile == first && i < kNumberThreads ? early : masks[tile / kWarp * E + i];
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < E; e += kNumberThreads) {
      uint32_t row = next[e];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        tile_row[w * E + e] = row;
        row += __popc(tile_mask[w * E + e]);
      }
      next[e] = row;
    }
    for (int square = warp; square < kWords * groups; square += kWarps) {
      const int w = square / groups, group = square % groups, e = group * kWarp + lane;
      token_mask[(w * kWarp + lane) * groups + group] = turned(e < E ? tile_mask[w * E + e] : 0u, lane);
    }
    __syncthreads();
    for (int64_t t_of_warp = tile + warp * (kWarp / each); t_of_warp < end; t_of_warp += kWarps * (kWarp / each)) {
      const int64_t t = t_of_warp + lane / each;
      const int place = static_cast<int>(t - tile), word = place / kWarp;
      const uint32_t earlier = (1u << (place % kWarp)) - 1u;
      int64_t* slots = out.token_rows + t * width;
      int taken = 0;
      for (int round = 0; round < groups; round += each) {
        const int group = round + own;
        uint32_t bits = t < end && group < groups ? token_mask[place * groups + group] : 0u;
        const int count = __popc(bits);
        int through = count;
        for (int step = 1; step < each; step *= 2) {
          const int before = __shfl_up_sync(kAllLanes, through, step, each);
          if (own >= step) through += before;
        }
        int64_t slot = taken + through - count;
        taken += __shfl_sync(kAllLanes, through, each - 1, each);
        for (; bits; bits &= bits - 1, ++slot) {
          const int e = group * kWarp + __ffs(bits) - 1;
          const int64_t r = tile_row[word * E + e] + __popc(tile_mask[word * E + e] & earlier);
          if (r < R) {
            out.row_tokens[r] = t;
            out.row_experts[r] = e;
          }
          if (slot < width) slots[slot] = r < R ? r : -1;
        }
      }
      for (int64_t slot = t < end ? taken + own : width; slot < width; slot += each) slots[slot] = -1;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_map_cuda(
    const at::Tensor& map_any, int64_t num_rows, int64_t width, int64_t multiple) {
  const auto [T, E] = check_row_map(map_any, num_rows, width, multiple);
  TORCH_CHECK_VALUE(E <= kMostExperts, "row_map: expected at most ", kMostExperts, " experts on a GPU, got ", E);
  const c10::cuda::CUDAGuard guard(map_any.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor map = map_any.contiguous();
  const auto longs = map.options().dtype(at::kLong), ints = map.options().dtype(at::kInt);
  at::Tensor counts = at::empty({E}, longs), ends = at::empty({E}, ints);
  at::Tensor row_experts = at::empty({num_rows}, ints), row_tokens = at::empty({num_rows}, longs);
  at::Tensor token_rows = at::empty({T, width}, longs);

  const int64_t tiles = ceil_div(T, kTile), span = std::max<int64_t>(1, ceil_div(tiles, kMostSpans)) * kTile;
  const int64_t spans = ceil_div(T, span);
  at::Tensor masks = at::empty({ceil_div(T, kWarp), E}, ints), span_counts = at::empty({spans, E}, ints);
  const auto* chosen = reinterpret_cast<const uint8_t*>(map.const_data_ptr());
  auto* words = reinterpret_cast<uint32_t*>(masks.mutable_data_ptr<int32_t>());
  if (T > 0 && E > 0) {
    const dim3 grid(static_cast<unsigned>(spans), static_cast<unsigned>(ceil_div(E, kWarp * kExperts))), block(kWarp, kWords);
    const bool whole = E % kExperts == 0 && reinterpret_cast<uintptr_t>(chosen) % kExperts == 0;
    auto* kernel = whole ? mark_kernel<true> : mark_kernel<false>;
    kernel<<<grid, block, 0, stream>>>(chosen, words, span_counts.mutable_data_ptr<int32_t>(), T, E, span);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto bytes = static_cast<int>(((2 + 2 * kWords) * E + kTile * ceil_div(E, kWarp)) * sizeof(uint32_t));
  C10_CUDA_CHECK(cudaFuncSetAttribute(number_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const Outputs out{
      counts.mutable_data_ptr<int64_t>(), ends.mutable_data_ptr<int32_t>(), row_experts.mutable_data_ptr<int32_t>(),
      row_tokens.mutable_data_ptr<int64_t>(), token_rows.mutable_data_ptr<int64_t>()};
  number_kernel<<<grid_of(spans), kNumberThreads, bytes, stream>>>(
      words, span_counts.const_data_ptr<int32_t>(), out, T, E, num_rows, width, multiple, span, spans);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {counts, ends, row_experts, row_tokens, token_rows};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("row_map", row_map_cuda); }

}  // namespace r1mega
