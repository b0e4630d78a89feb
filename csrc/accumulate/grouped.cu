// out[i] += left[rows of i]^T right[rows of i] on Hopper: wgmma on bf16, sums in registers in fp32, one read and one write of `out`.
//
// A cluster of two blocks makes 2 x 128 x 256 numbers of one expert: both take the same columns of `right`, of which each loads half
// and sends it to the other. In a block one thread keeps the stages of 64 batch rows full by the bulk copy engine, two warpgroups
// multiply. Both operands lie with the batch rows outermost: wgmma reads them transposed, nothing is copied for that. The sums go
// through shared memory to the copy engine, which adds them to `out` while the next tile is multiplied. A number of out is added to
// once, and its sum takes the batch rows in their order, so the same input gives the same bits.

#include "grouped.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>

#include <algorithm>
#include <cstdint>

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
constexpr int kOutRows = 64;      // rows of out that a warpgroup has
constexpr int kPiece = 32;        // columns of out in a 128-byte swizzled piece: 32 fp32
constexpr int kPieceBytes = kOutRows * kPiece * 4;
constexpr int kPiecesHeld = 2;    // pieces of a warpgroup's 64 x 256 sums that have room: one is written, one on its way to out
constexpr int kOutBytes = kMultipliers * kPiecesHeld * kPieceBytes;
constexpr int kSharedBytes = kStages * kStageBytes + kOutBytes + 1024;  // and room to start at a multiple of 1024
constexpr int kBand = 8;  // pairs of row tiles that are done together, so that what they share stays in the L2 cache

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni finished;\n"
      "bra.uni again;\n"
      "finished:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrive at the same barrier of a block of the cluster. It follows nothing that this thread wrote: what a stage was read by is wgmma,
// which has been waited for. (A release at the cluster's scope would be a fence of the whole GPU's memory, a microsecond a stage.)
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A box of kDepth rows by kAtom columns into this block's shared memory.
__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t* barrier, uint8_t* to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same into both blocks of the cluster, at the same place in each, and counted at each one's barrier.
__device__ __forceinline__ void load_box_for_both(const CUtensorMap& map, uint64_t* barrier, uint8_t* to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
      "[%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(static_cast<uint16_t>((1 << kCluster) - 1))
      : "memory");
}

// Adds a piece of 64 x kPiece sums in shared memory to out; what lies outside of out is left away.
__device__ __forceinline__ void add_piece(const CUtensorMap& map, const uint8_t* from, int column, int row) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}

// What wgmma is told of a matrix in shared memory whose batch rows are outermost (MN-major), swizzled by 128 bytes: 1024 bytes from
// 8 batch rows to the next 8, kAtomBytes from 64 columns to the next 64.
__device__ __forceinline__ uint64_t matrix_descriptor(const uint8_t* start) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | (uint64_t{1024 >> 4} << 32) | (uint64_t{kAtomBytes >> 4} << 16) | ((shared_address(start) & 0x3ffff) >> 4);
}

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
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, %0;" ::"n"(128 * kMultipliers) : "memory");
}

struct Tile {
  int expert, pair, column;  // pair: of kCluster row tiles; column: the first column of out
};

struct Shape {
  int experts, pairs, columns;  // pairs of row tiles and column tiles of an expert

  __device__ __forceinline__ int tiles() const { return pairs * columns; }

  __device__ __forceinline__ Tile tile(int64_t index) const {
    const int expert = static_cast<int>(index / tiles());
    const int inside = static_cast<int>(index % tiles());
    const int band = inside / (kBand * columns), width = min(kBand, pairs - band * kBand);
    const int rest = inside - band * kBand * columns;
    return {expert, band * kBand + rest % width, rest / width * kTileK};
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define R1MEGA_CLUSTER __cluster_dims__(kCluster, 1, 1)
#else
#define R1MEGA_CLUSTER
#endif

// Built for other chips it is empty, and fits_wgmma keeps it from them.
__global__ void R1MEGA_CLUSTER __launch_bounds__(kThreads, 1) grouped_kernel(
    const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right, const __grid_constant__ CUtensorMap out,
    const int32_t* __restrict__ ends, Shape shape, int N) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  __shared__ uint64_t full[kStages], empty[kStages];
  // the same offset in every block of the cluster: the swizzle repeats after 1024 bytes
  uint8_t* stages = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], kCluster * kMultipliers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_sync();

  const int64_t first = blockIdx.x / kCluster, step = gridDim.x / kCluster;
  const int64_t total = static_cast<int64_t>(shape.experts) * shape.tiles();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t phase = 0;
      for (int64_t index = first; index < total; index += step) {
        const Tile tile = shape.tile(index);
        const int begin = tile.expert ? ends[tile.expert - 1] : 0, end = ends[tile.expert];
        const int row_column = (tile.pair * kCluster + static_cast<int>(rank)) * kTileN;
        for (int row = begin; row < end; row += kDepth) {
          barrier_wait(&empty[stage], phase ^ 1);
          uint8_t* at = stages + stage * kStageBytes;
          barrier_expect(&full[stage], kStageBytes);
#pragma unroll
          for (int atom = 0; atom < kTileN / kAtom; ++atom)
            load_box(left, &full[stage], at + atom * kAtomBytes, row_column + atom * kAtom, row);
          constexpr int kOwn = kTileK / kAtom / kCluster;  // pieces of the shared side that this block loads
#pragma unroll
          for (int piece = 0; piece < kOwn; ++piece) {
            const int atom = static_cast<int>(rank) * kOwn + piece;
            load_box_for_both(right, &full[stage], at + kLeftBytes + atom * kAtomBytes, tile.column + atom * kAtom, row);
          }
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int part = group - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    int stage = 0, before = 0;
    uint32_t phase = 0;
    float sum[128];
    for (int64_t index = first; index < total; index += step) {
      const Tile tile = shape.tile(index);
      const int begin = tile.expert ? ends[tile.expert - 1] : 0, end = ends[tile.expert];
      if (begin >= end) continue;
      for (int row = begin; row < end; row += kDepth) {
        barrier_wait(&full[stage], phase);
        uint8_t* at = stages + stage * kStageBytes;
        if (end - row < kDepth) clear_rows(at, end - row);  // the rows of the next expert
        const uint64_t a = matrix_descriptor(at + part * kAtomBytes), b = matrix_descriptor(at + kLeftBytes);
#pragma unroll
        for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sum[i])::"memory");
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          constexpr int kAdvance = 16 * kAtom * 2 >> 4;  // 16 batch rows on
          multiply_add(sum, a + k * kAdvance, b + k * kAdvance, row > begin || k > 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (row > begin) {  // the stage before this one has been read to its end
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (threadIdx.x % 128 < kCluster) barrier_arrive_at(&empty[before], threadIdx.x % 128);
        }
        before = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sum[i])::"memory");
      if (threadIdx.x % 128 < kCluster) barrier_arrive_at(&empty[before], threadIdx.x % 128);

      // a warpgroup's 64 rows, a piece of columns after the other
      const int line = tile.expert * N + (tile.pair * kCluster + static_cast<int>(rank)) * kTileN + part * 64;
      const int own = warp * 16 + lane / 4;  // this thread's first row; the second is 8 further
#pragma unroll
      for (int piece = 0; piece < kTileK / kPiece; ++piece) {
        uint8_t* held = stages + kStages * kStageBytes + (part * kPiecesHeld + piece % kPiecesHeld) * kPieceBytes;
        // what lay here has been read
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPiecesHeld - 1) : "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(2 + part) : "memory");
#pragma unroll
        for (int j = 0; j < kPiece / 8; ++j) {
          const int i = (piece * (kPiece / 8) + j) * 4;
          // 16-byte parts of a row change places by the row's number, as the copy engine has them
          const int place = (j * 2 + lane % 4 / 2) ^ (lane / 4), inside = place * 16 + lane % 2 * 8;
          *reinterpret_cast<float2*>(held + own * 128 + inside) = float2{sum[i], sum[i + 1]};
          *reinterpret_cast<float2*>(held + (own + 8) * 128 + inside) = float2{sum[i + 2], sum[i + 3]};
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(2 + part) : "memory");
        if (threadIdx.x % 128 == 0) {
          add_piece(out, held, tile.column + piece * kPiece, line);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  cluster_sync();  // a block that has left could still be sent to
#endif
}

using Encode = CUresult (*)(
    CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    TORCH_CHECK(result == cudaDriverEntryPointSuccess, "accumulate_grouped_: expected a driver with cuTensorMapEncodeTiled, got none");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

CUtensorMap map_of(const at::Tensor& matrix, int64_t rows, int64_t columns, cuuint32_t box_rows, cuuint32_t box_columns) {
  CUtensorMap map;
  const bool wide = matrix.scalar_type() == at::kFloat;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * (wide ? 4 : 2)};
  const cuuint32_t box[] = {box_columns, box_rows}, steps[] = {1, 1};
  const CUresult result = encoder()(
      &map, wide ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(result == CUDA_SUCCESS, "accumulate_grouped_: expected a matrix that the copy engine takes, got ", matrix.sizes());
  return map;
}

int device_attribute(cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
  return value;
}

}  // namespace

bool fits_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  const auto aligned = [](const at::Tensor& one) {
    return one.scalar_type() == at::kBFloat16 && one.is_contiguous() && reinterpret_cast<uintptr_t>(one.data_ptr()) % 16 == 0 &&
        one.size(1) % 8 == 0;
  };
  const c10::cuda::CUDAGuard guard(out.device());
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 && aligned(left) && aligned(right) && out.is_contiguous() &&
      reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0 && out.size(0) * out.size(1) < (int64_t{1} << 31) &&
      left.size(1) % (kTileN * kCluster) == 0 && left.size(0) > 0 && left.size(0) < (int64_t{1} << 31) && right.size(1) > 0;
}

void accumulate_grouped_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends) {
  const int64_t N = left.size(1), K = right.size(1);
  const Shape shape{
      static_cast<int>(ends.size(0)), static_cast<int>(N / (kTileN * kCluster)), static_cast<int>((K + kTileK - 1) / kTileK)};
  const c10::cuda::CUDAGuard guard(out.device());
  C10_CUDA_CHECK(cudaFuncSetAttribute(grouped_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int64_t pairs = static_cast<int64_t>(shape.experts) * shape.pairs * shape.columns;
  const int most = device_attribute(cudaDevAttrMultiProcessorCount) / kCluster;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(pairs, most) * kCluster);
  if (blocks == 0) return;
  grouped_kernel<<<blocks, kThreads, kSharedBytes, c10::cuda::getCurrentCUDAStream()>>>(
      map_of(left, left.size(0), N, kDepth, kAtom), map_of(right, right.size(0), K, kDepth, kAtom),
      map_of(out, out.size(0) * N, K, kOutRows, kPiece), ends.const_data_ptr<int32_t>(), shape, static_cast<int>(N));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace r1mega
