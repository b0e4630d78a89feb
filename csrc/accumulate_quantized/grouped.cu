// out[i] += left . right of expert i's rows on Hopper, from block-scaled E4M3: wgmma on FP8, its sums taken to fp32 each 128 rows.
//
// Hopper's tensor cores keep about 14 bits of a sum of FP8 products (DeepSeek-V3, arXiv 2412.19437, 3.3.2), so a stage is one block of
// 128 rows: its products are summed by wgmma, multiplied by both sides' scales and added to totals in registers. Two warpgroups
// multiply, each 128 x 128 of a block's 256 x 128 numbers as two halves of 64 rows, one after the other: while one warpgroup takes its
// sums over, the tensor cores work for the other. (To make them take turns, by a first wait or by barriers, was measured: slower.)
//
// A cluster of two blocks takes the same 256 rows of left, of which each loads half and sends it to the other, and neighbouring columns.
// A number of out is written once, and its sum takes the blocks of rows in their order, so the same input gives the same bits.

#include "grouped.h"

#include "../common/fp8.h"
#include "../common/hopper.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace r1mega {
namespace {

constexpr int kTileN = 256;  // rows of out that a block makes, and of left
constexpr int kTileK = 128;  // columns of out that a block makes: rows of right
constexpr int kDepth = 128;  // rows of the batch of a stage: a block of one scale, 128 bytes, a row of the swizzle
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr int kLeftBytes = kTileN * kDepth;
constexpr int kRightBytes = kTileK * kDepth;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kScaleBytes = kTileK * 4;  // right's scales of a stage
constexpr int kThreads = 384;            // a warpgroup that loads, two that multiply
constexpr int kMultipliers = 2;
constexpr int kHalves = kTileN / kMultipliers / 64;  // of a warpgroup's rows: what one wgmma has
constexpr int kWarps = kMultipliers * 4;

// Places in shared memory, which begins at a multiple of 1024: the swizzle repeats after that.
constexpr int kPiecesAt = kStages * kStageBytes;
constexpr int kScalesAt = kPiecesAt + kMultipliers * kPiecesHeld * kPieceBytes;
constexpr int kBarriersAt = kScalesAt + kStages * kScaleBytes;
constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
static_assert(kDepth == kBlock && kSharedBytes <= 227 << 10);

using Order = TileOrder<kTileN, kTileK * kCluster>;

// A row of 128 bytes is as deep as a stage: 1024 bytes from 8 rows to the next 8.
__device__ __forceinline__ uint64_t matrix(const uint8_t* start) { return matrix_descriptor(start, 1024, 16); }

// d = or, with `accumulate`, += left [64, 32] right [128, 32]^T.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t left, uint64_t right, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, keep, 1, 1;\n"
      "}\n"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(left), "l"(right), "r"(static_cast<int32_t>(accumulate)));
}

// What a cluster does next: a tile of out and the blocks of its expert's rows.
struct Work {
  Tile tile;
  int first, last;
};

__device__ __forceinline__ Work work_of(const Order& order, const int32_t* ends, int index) {
  const Tile tile = order.tile(index);
  return {tile, tile.expert ? ends[tile.expert - 1] / kDepth : 0, ends[tile.expert] / kDepth};
}

// Left's scales of a block, [R / 128, stride] in memory: a thread has those of its two rows of each half.
struct LeftScales {
  const float* __restrict__ from;
  int64_t stride;
  int N;

  __device__ __forceinline__ void load(float (&to)[2 * kHalves], int row, int block) const {
    const float* line = from + block * stride;
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int own = row + i / 2 * 64 + i % 2 * 8;
      to[i] = own < N ? line[own] : 0.0f;
    }
  }
};

constexpr int kEarly = 4;  // of 16 pairs of columns: their scales are in registers before the sums are there, so that nothing waits

// total += (scale of the row * scale of the column) * sums of a block, for the 64 rows of a half.
__device__ __forceinline__ void take_over(
    float (&total)[64], const float (&sum)[64], float upper, float lower, const float2 (&early)[kEarly], const float2* scales) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {  // 8 columns, of which a thread has two
    const float2 right = j < kEarly ? early[j] : scales[j * 4];
    total[j * 4] = fmaf(upper * right.x, sum[j * 4], total[j * 4]);
    total[j * 4 + 1] = fmaf(upper * right.y, sum[j * 4 + 1], total[j * 4 + 1]);
    total[j * 4 + 2] = fmaf(lower * right.x, sum[j * 4 + 2], total[j * 4 + 2]);
    total[j * 4 + 3] = fmaf(lower * right.y, sum[j * 4 + 3], total[j * 4 + 3]);
  }
}

// Built for other chips it is empty, and fits_quantized_wgmma keeps it from them.
__global__ void R1MEGA_CLUSTER(kCluster) __launch_bounds__(kThreads, 1) quantized_kernel(
    const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
    const __grid_constant__ CUtensorMap right_scales, const __grid_constant__ CUtensorMap out, LeftScales left_scales,
    const int32_t* __restrict__ ends, Order order, bool overwrite) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  if (shared_address(memory) % 1024 != 0) __trap();
  uint64_t *full = reinterpret_cast<uint64_t*>(memory + kBarriersAt), *empty = full + kStages;
  const int rank = static_cast<int>(cluster_rank());
  init_stages<kStages>(full, empty, kCluster * kWarps);
  cluster_sync();

  const int first = blockIdx.x / kCluster, step = gridDim.x / kCluster, total = order.total();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = first; index < total; index += step) {
        const Work work = work_of(order, ends, index);
        const int column = work.tile.column + rank * kTileK;
        constexpr int kOwn = kTileN / kCluster;  // rows of left that this block loads
        for (int block = work.first; block < work.last; ++block) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* at = memory + stage * kStageBytes;
          barrier_expect(&full[stage], kStageBytes + kScaleBytes);
          load_box_for_all<kCluster>(
              left, &full[stage], at + rank * kOwn * kDepth, block * kDepth, work.tile.row + rank * kOwn);
          load_box(right, &full[stage], at + kLeftBytes, block * kDepth, column);
          load_box(right_scales, &full[stage], memory + kScalesAt + stage * kScaleBytes, column, block);
          if (!overwrite)
            prefetch_out<kTileN, kTileK>(
                out, block - work.first, work.last - work.first, column, work.tile.row, work.tile.expert);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int part = group - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int own = part * 64 * kHalves + warp * 16 + lane / 4;  // of a tile's rows, this thread's first
    uint8_t* held = memory + kPiecesAt + part * kPiecesHeld * kPieceBytes;
    int stage = 0;
    uint32_t phase = 0;
    float sum[64], totals[kHalves][64], coming[2 * kHalves];

    Work work;
    int index = first;
    // The next tile that has anything to do, and the scales of its first block: they arrive while the last one is written.
    const auto seek = [&] {
      for (; index < total; index += step) {
        work = work_of(order, ends, index);
        if (work.first < work.last) left_scales.load(coming, work.tile.row + own, work.first);
        if (work.first < work.last || overwrite) return;
      }
    };
    seek();
    while (index < total) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 64; ++i) totals[half][i] = 0.0f;
      }
      for (int block = work.first; block < work.last; ++block) {
        float scales[2 * kHalves];
#pragma unroll
        for (int i = 0; i < 2 * kHalves; ++i) scales[i] = coming[i];
        if (block + 1 < work.last) left_scales.load(coming, work.tile.row + own, block + 1);
        barrier_wait(&full[stage], phase);
        const uint8_t* at = memory + stage * kStageBytes;
        const uint64_t a = matrix(at + part * kHalves * 64 * kDepth), b = matrix(at + kLeftBytes);
        const auto* columns = reinterpret_cast<const float2*>(memory + kScalesAt + stage * kScaleBytes) + lane % 4;
        float2 early[kEarly];
#pragma unroll
        for (int j = 0; j < kEarly; ++j) early[j] = columns[j * 4];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          hold(sum);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kDepth / 32; ++k)
            multiply(sum, a + (half * 64 * kDepth + k * 32 >> 4), b + (k * 32 >> 4), k > 0);
          wgmma_commit();
          wgmma_wait<0>();
          hold(sum);
          take_over(totals[half], sum, scales[half * 2], scales[half * 2 + 1], early, columns);
        }
        if (lane < kCluster) barrier_arrive_at(&empty[stage], lane);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      const Tile tile = work.tile;
      index += step;
      seek();
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        sums_to_out(
            out, totals[half], held, 2 + part, tile.column + rank * kTileK, tile.row + (part * kHalves + half) * 64, tile.expert,
            overwrite);
    }
    if (threadIdx.x % 128 == 0) wait_for_sums();
  }
  cluster_sync();  // a block that has left could still be sent to
#endif
}

// Of a contiguous [M, R], pieces of 128 rows and a stage's depth.
CUtensorMap operand_map(const at::Tensor& payload) {
  const int64_t M = payload.size(0), R = payload.size(1);
  return tensor_map<2>(payload.const_data_ptr(), CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, {R, M}, {R}, {kDepth, 128});
}

}  // namespace

bool fits_quantized_wgmma(const at::Tensor& out, const Operand& left, const Operand& right) {
  const auto fits = [](const Operand& one) {
    return one.payload.is_contiguous() && aligned16(one.payload.const_data_ptr()) && aligned16(one.scales.const_data_ptr()) &&
        one.payload.size(1) > 0 && one.payload.size(1) < (int64_t{1} << 31);
  };
  const c10::cuda::CUDAGuard guard(out.device());
  return is_hopper() && fits(left) && fits(right) && fits_out_map(out) &&
      Order::count(out.size(0), out.size(1), out.size(2)) < (int64_t{1} << 30);
}

void accumulate_quantized_wgmma(
    const at::Tensor& out, const Operand& left, const Operand& right, const at::Tensor& ends, bool overwrite) {
  const c10::cuda::CUDAGuard guard(out.device());
  const int64_t N = out.size(1), K = out.size(2), blocks = right.payload.size(1) / kBlock;
  const Order order = Order::of(out.size(0), N, K);
  const CUtensorMap scales = tensor_map<2>(
      right.scales.const_data_ptr(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, {K, blocks}, {padded_rows(K) * 4}, {kTileK, 1});
  C10_CUDA_CHECK(cudaFuncSetAttribute(quantized_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  quantized_kernel<<<persistent_blocks(order.total(), kCluster), kThreads, kSharedBytes, c10::cuda::getCurrentCUDAStream()>>>(
      operand_map(left.payload), operand_map(right.payload), scales, out_map(out),
      LeftScales{left.scales.const_data_ptr<float>(), padded_rows(N), static_cast<int>(N)}, ends.const_data_ptr<int32_t>(), order,
      overwrite);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r1mega
