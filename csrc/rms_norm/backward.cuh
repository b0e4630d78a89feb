// The backward of RMSNorm for bf16 rows of up to 32 pieces that 16-byte accesses fit: rows come through shared memory, steps ahead.
//
// A thread copies what it reads itself, so copies need no barrier; that keeps tens of KB on their way for each processor whatever
// the threads wait for. A step is two rows of each slot, which share shuffles and a barrier of the slot's own. Blocks stay and go on
// from group to group, and the copies of the next group start before this one ends.

#pragma once

#include "../common/device.cuh"
#include "eight.cuh"
#include "op.h"

namespace r1mega {
namespace {

constexpr int kStepRows = 2;  // of a slot
constexpr int kDepth = 3;     // steps that shared memory holds

// 16 bytes to shared memory, zeros unless `inside`; done after wait_copies.
__device__ __forceinline__ void copy16(uint4* to, const void* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// All but the last kLater closed groups of copies of this thread are done.
template <int kLater>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLater) : "memory");
}
// A barrier of `threads` threads, whole warps; number 0 is the block's own.
__device__ __forceinline__ void barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

inline size_t stream_shared_bytes(int64_t threads, int slots) {
  const int64_t copies = kDepth * kStepRows * 2 * threads * 16, runs = slots == 1 ? 0 : threads * kEight * 4;
  return static_cast<size_t>(copies + runs);
}

// Block (32 lanes, a warp for each piece of the row, slots); a slot has 8 rows of each group of 32, or the one slot all of them.
template <typename W, int kSlots>
__global__ void __launch_bounds__(1024) backward_stream_kernel(
    const __nv_bfloat16* __restrict__ grad, int64_t grad_stride, const __nv_bfloat16* __restrict__ x, int64_t stride,
    const W* __restrict__ weight, const float* __restrict__ rstd, __nv_bfloat16* __restrict__ grad_x, float* __restrict__ partial,
    int64_t rows, int64_t groups, int width) {
  using X = __nv_bfloat16;
  static_assert(kSlots == 1 || kSlots == kRowRuns);
  constexpr int kCount = kRowGroup / kSlots;     // rows of a slot in a group
  constexpr int kSteps = kCount / kStepRows;     // of a group
  constexpr int kRunSteps = kRowRun / kStepRows; // of a run
  constexpr int kHalf = kWarp / kStepRows;       // lanes that get the sum of one row
  static_assert(kStepRows == 2 && kEight * sizeof(X) == sizeof(uint4));
  extern __shared__ uint4 copied[];  // [kDepth, kStepRows, 2, threads]: x and grad of a row
  __shared__ float piece_sum[2][kSlots][kStepRows][kWarp];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, slot = threadIdx.z;
  const int threads = kWarp * warps * kSlots, own = (slot * warps + warp) * kWarp + lane;
  float* runs = reinterpret_cast<float*>(copied + kDepth * kStepRows * 2 * threads);  // [kSlots, threads of a slot * 8]
  const int column = warp * kPiece + lane * kEight, left = width - column;
  const int64_t own_groups = blockIdx.x < groups ? (groups - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  const int steps = static_cast<int>(own_groups * kSteps);  // fewer than 2^31 groups over all processors

  const auto row_of = [&](int step) {
    return (blockIdx.x + static_cast<int64_t>(step / kSteps) * gridDim.x) * kRowGroup + slot * kCount + step % kSteps * kStepRows;
  };
  const auto place = [&](int step, int r, int which) {
    return copied + ((step % kDepth * kStepRows + r) * 2 + which) * threads + own;
  };
  const auto copy_step = [&](int step) {
    if (step < steps) {
      const int64_t row = row_of(step);
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const bool inside = row + r < rows && left > 0;
        copy16(place(step, r, 0), inside ? x + (row + r) * stride + column : x, inside);
        copy16(place(step, r, 1), inside ? grad + (row + r) * grad_stride + column : grad, inside);
      }
    }
    close_copies();  // also an empty one, so that wait_copies counts steps
  };
  const auto opened = [&](int step, int r, int which) {
    Eight<X> eight;
    const uint4 bits = *place(step, r, which);
    memcpy(&eight, &bits, sizeof(bits));
    return eight;
  };

#pragma unroll
  for (int step = 0; step < kDepth - 1; ++step) copy_step(step);
  Eight<W> factor;
  factor.read(weight + column, left, true);
  float run[kEight] = {}, total[kEight] = {}, scale[kStepRows], next_scale[kStepRows];
  const auto read_scales = [&](int step) {
    const int64_t row = row_of(step);
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) next_scale[r] = step < steps && row + r < rows ? rstd[row + r] : 0.0f;
  };
  read_scales(0);
  for (int step = 0; step < steps; ++step) {
    copy_step(step + kDepth - 1);  // where the last step's rows were, which this thread has used up
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) scale[r] = next_scale[r];
    read_scales(step + 1);
    wait_copies<kDepth - 1>();
    float sum[kStepRows], dot[kStepRows];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      const Eight<X> in = opened(step, r, 0), of_y = opened(step, r, 1);
      float part[kEight];
#pragma unroll
      for (int j = 0; j < kEight; ++j) part[j] = mul(mul(widen(of_y[j]), widen(factor[j])), mul(widen(in[j]), scale[r]));
      sum[r] = sum_of_eight(part);
    }
    float folded = fold<kWarp>(sum, lane, [](float a, float b) { return add(a, b); });
    if (warps > 1) {
      auto& own_sum = piece_sum[step % 2][slot];  // two in turn: the next step's barrier parts its readers from its next writers
      if (lane % kHalf == 0) own_sum[lane / kHalf][warp] = folded;
      barrier(slot + 1, kWarp * warps);
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) sum[r] = lane < warps ? own_sum[r][lane] : 0.0f;
      folded = fold<kWarp>(sum, lane, [](float a, float b) { return add(a, b); });
    }
    const float mean = divide(add(folded, 0.0f), static_cast<float>(width));  // never of -0
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) dot[r] = __shfl_sync(kAllLanes, mean, r * kHalf);
    const int64_t row = row_of(step);
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      const Eight<X> in = opened(step, r, 0), of_y = opened(step, r, 1);
      Eight<X> out;
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const float of = widen(of_y[j]), normed = mul(widen(in[j]), scale[r]);
        run[j] = add(run[j], mul(of, normed));
        narrow(mul(sub(mul(of, widen(factor[j])), mul(normed, dot[r])), scale[r]), out[j]);
      }
      out.write(grad_x + (row + r) * width + column, row + r < rows ? left : 0, true);
    }
    if constexpr (kSlots == 1) {
      if (step % kRunSteps == kRunSteps - 1) {
#pragma unroll
        for (int j = 0; j < kEight; ++j) total[j] = add(total[j], run[j]), run[j] = 0.0f;
      }
    }
    if (step % kSteps != kSteps - 1) continue;
    float* sum_out = partial + row / kRowGroup * width;
    if constexpr (kSlots == 1) {
      Eight<float> result;
#pragma unroll
      for (int j = 0; j < kEight; ++j) result[j] = total[j], total[j] = 0.0f;
      result.write(sum_out + column, left, true);
    } else {
      // the slots' runs one after the other: a thread has two columns
      const int columns = kPiece * warps;
      Eight<float> result;
#pragma unroll
      for (int j = 0; j < kEight; ++j) result[j] = run[j], run[j] = 0.0f;
      __syncthreads();  // the last group's runs are read
      result.write(runs + slot * columns + column, kEight, true);
      __syncthreads();
      const float2* two = reinterpret_cast<const float2*>(runs) + own;
      float2 of_group = two[0];
#pragma unroll
      for (int s = 1; s < kSlots; ++s) {
        const float2 more = two[s * (columns / 2)];
        of_group = make_float2(add(of_group.x, more.x), add(of_group.y, more.y));
      }
      if (2 * own < width) *reinterpret_cast<float2*>(sum_out + 2 * own) = of_group;
    }
  }
}

}  // namespace
}  // namespace r1mega
