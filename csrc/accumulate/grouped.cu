// out[i] += left[rows of i]^T right[rows of i] on Hopper: wgmma on bf16, sums in registers in fp32, one read and one write of `out`.
//
// A cluster of two blocks makes 2 x 128 x 256 numbers of one expert: both take the same columns of `right`, of which each loads half
// and sends it to the other. In a block one thread keeps the stages of 64 batch rows full by the bulk copy engine, two warpgroups
// multiply. Both operands lie with the batch rows outermost: wgmma reads them transposed, nothing is copied for that. The sums go
// through shared memory to the copy engine, which adds them to `out`, or puts them there, while the next tile is multiplied. A number
// of out is written once, and its sum takes the batch rows in their order, so the same input gives the same bits.

#include "grouped.h"

#include "../common/hopper.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace r1mega {
namespace {

constexpr int kTileN = 128;   // rows of out that a block makes: columns of left
constexpr int kTileK = 256;   // columns of out that a block makes: columns of right
constexpr int kDepth = 64;    // batch rows of a stage
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr int kAtom = 64;     // columns of a 128-byte swizzled piece: 64 bf16
constexpr int kAtomBytes = kDepth * kAtom * 2;
constexpr int kLeftBytes = kTileN / kAtom * kAtomBytes;
constexpr int kRightBytes = kTileK / kAtom * kAtomBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kThreads = 384;  // a warpgroup that loads, two that multiply
constexpr int kMultipliers = 2;
constexpr int kOutBytes = kMultipliers * kPiecesHeld * kPieceBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kOutBytes + 1024;  // and room to start at a multiple of 1024

using Order = TileOrder<kTileN * kCluster, kTileK>;

// A swizzled piece has 1024 bytes from 8 batch rows to the next 8.
__device__ __forceinline__ uint64_t matrix(const uint8_t* start) { return matrix_descriptor(start, 1024, kAtomBytes); }

__device__ __forceinline__ void multiply_add(float (&d)[128], uint64_t left, uint64_t right, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred keep;\n"
      "setp.ne.b32 keep, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, keep, 1, 1, 1, 1;\n"
      "}\n"
      :
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(left), "l"(right), "r"(static_cast<int32_t>(accumulate)));
}

// Zeros in place of a stage's batch rows from `first` on, by both warpgroups that multiply. A batch row of a piece is 128 bytes,
// which the swizzle permutes among themselves.
__device__ __forceinline__ void clear_rows(uint8_t* stage, int first) {
  constexpr int kPieces = kStageBytes / kAtomBytes, kParts = kAtom * 2 / 16;
  const int rows = kDepth - first;
  for (int i = threadIdx.x - 128; i < kPieces * rows * kParts; i += 128 * kMultipliers) {
    const int piece = i / (rows * kParts), rest = i % (rows * kParts);
    *reinterpret_cast<uint4*>(stage + piece * kAtomBytes + (first + rest / kParts) * kAtom * 2 + rest % kParts * 16) = uint4{};
  }
  fence_shared();
  sync_threads(1, 128 * kMultipliers);
}

// Built for other chips it is empty, and fits_wgmma keeps it from them.
__global__ void R1MEGA_CLUSTER(kCluster) __launch_bounds__(kThreads, 1) grouped_kernel(
    const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right, const __grid_constant__ CUtensorMap out,
    const int32_t* __restrict__ ends, Order order, bool overwrite) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  __shared__ uint64_t full[kStages], empty[kStages];
  // the same offset in every block of the cluster: the swizzle repeats after 1024 bytes
  uint8_t* stages = raw + (-shared_address(raw) & 1023);
  const int rank = static_cast<int>(cluster_rank());
  init_stages<kStages>(full, empty, kCluster * kMultipliers);
  cluster_sync();

  const int first = blockIdx.x / kCluster, step = gridDim.x / kCluster, total = order.total();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int index = first; index < total; index += step) {
        const Tile tile = order.tile(index);
        const int begin = tile.expert ? ends[tile.expert - 1] : 0, end = ends[tile.expert], steps = (end - begin + kDepth - 1) / kDepth;
        const int own = tile.row + rank * kTileN;
        for (int i = 0; i < steps; ++i) {
          const int row = begin + i * kDepth;
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* at = stages + stage * kStageBytes;
          barrier_expect(&full[stage], kStageBytes);
#pragma unroll
          for (int atom = 0; atom < kTileN / kAtom; ++atom)
            load_box(left, &full[stage], at + atom * kAtomBytes, own + atom * kAtom, row);
          constexpr int kOwn = kTileK / kAtom / kCluster;  // pieces of the shared side that this block loads
#pragma unroll
          for (int piece = 0; piece < kOwn; ++piece) {
            const int atom = rank * kOwn + piece;
            load_box_for_all<kCluster>(right, &full[stage], at + kLeftBytes + atom * kAtomBytes, tile.column + atom * kAtom, row);
          }
          if (!overwrite) prefetch_out<kTileN, kTileK>(out, i, steps, tile.column, own, tile.expert);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int part = group - 1;
    uint8_t* held = stages + kStages * kStageBytes + part * kPiecesHeld * kPieceBytes;
    int stage = 0, before = 0;
    uint32_t phase = 0;
    float sum[128];
    for (int index = first; index < total; index += step) {
      const Tile tile = order.tile(index);
      const int begin = tile.expert ? ends[tile.expert - 1] : 0, end = ends[tile.expert];
      const int own = tile.row + rank * kTileN + part * kPieceRows;
      if (begin >= end) {  // not through `sum`: the compiler then waits for each wgmma
        if (overwrite) zeros_to_out<kTileK>(out, held, 2 + part, tile.column, own, tile.expert);
        continue;
      }
      for (int row = begin; row < end; row += kDepth) {
        barrier_wait(&full[stage], phase);
        uint8_t* at = stages + stage * kStageBytes;
        if (end - row < kDepth) clear_rows(at, end - row);  // the rows of the next expert
        const uint64_t a = matrix(at + part * kAtomBytes), b = matrix(at + kLeftBytes);
        hold(sum);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          constexpr int kAdvance = 16 * kAtom * 2 >> 4;  // 16 batch rows on
          multiply_add(sum, a + k * kAdvance, b + k * kAdvance, row > begin || k > 0);
        }
        wgmma_commit();
        if (row > begin) {  // the stage before this one has been read to its end
          wgmma_wait<1>();
          if (threadIdx.x % 128 < kCluster) barrier_arrive_at(&empty[before], threadIdx.x % 128);
        }
        before = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      hold(sum);
      if (threadIdx.x % 128 < kCluster) barrier_arrive_at(&empty[before], threadIdx.x % 128);
      sums_to_out(out, sum, held, 2 + part, tile.column, own, tile.expert, overwrite);
    }
    if (threadIdx.x % 128 == 0) wait_for_sums();
  }
  cluster_sync();  // a block that has left could still be sent to
#endif
}

// Of a contiguous [rows, columns], pieces of kDepth rows and kAtom columns.
CUtensorMap operand_map(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  return tensor_map<2>(matrix.const_data_ptr(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, {columns, rows}, {columns * 2}, {kAtom, kDepth});
}

}  // namespace

bool fits_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  const auto fits = [](const at::Tensor& one) {
    return one.scalar_type() == at::kBFloat16 && one.is_contiguous() && aligned16(one.const_data_ptr()) && one.size(1) % 8 == 0 &&
        one.size(0) > 0 && one.size(0) < (int64_t{1} << 31);
  };
  const c10::cuda::CUDAGuard guard(out.device());
  return is_hopper() && fits(left) && fits(right) && fits_out_map(out) &&
      Order::count(out.size(0), out.size(1), out.size(2)) < (int64_t{1} << 30);
}

void accumulate_grouped_wgmma(
    const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends, bool overwrite) {
  const c10::cuda::CUDAGuard guard(out.device());
  const Order order = Order::of(out.size(0), out.size(1), out.size(2));
  C10_CUDA_CHECK(cudaFuncSetAttribute(grouped_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  grouped_kernel<<<persistent_blocks(order.total(), kCluster), kThreads, kSharedBytes, c10::cuda::getCurrentCUDAStream()>>>(
      operand_map(left), operand_map(right), out_map(out), ends.const_data_ptr<int32_t>(), order, overwrite);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r1mega
