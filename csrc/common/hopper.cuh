// What the kernels of Hopper's own instructions share: barriers in shared memory, the copy engine, clusters, wgmma's bookkeeping, the
// order of tiles, and the way of a warpgroup's sums into a stack of fp32 matrices.
//
// The functions of a GPU compile for 9.0a alone: a kernel's body stands under __CUDA_ARCH_FEAT_SM90_ALL.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define R1MEGA_CLUSTER(count) __cluster_dims__(count, 1, 1)
#else
#define R1MEGA_CLUSTER(count)
#endif

namespace r1mega {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory

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
// which has been waited for, and loads whose numbers are there. (A release at the cluster's scope would be a fence of the whole GPU's
// memory, a microsecond a stage.)
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

// Of `full` and `empty` barriers, before any is used; by all threads of all blocks of the cluster.
template <int kStages>
__device__ __forceinline__ void init_stages(uint64_t* full, uint64_t* empty, uint32_t readers) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&full[stage], 1);
      barrier_init(&empty[stage], readers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Of some of a block's warps; 0 is __syncthreads'.
__device__ __forceinline__ void sync_threads(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

// ---- the copy engine

// A box of a matrix, from `column` and `row`, into this block's shared memory; what lies outside of the matrix is 0.
__device__ __forceinline__ void load_box(const CUtensorMap& map, uint64_t* barrier, uint8_t* to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same into every block of a cluster of kBlocks, at the same place in each, and counted at each one's barrier.
template <int kBlocks>
__device__ __forceinline__ void load_box_for_all(const CUtensorMap& map, uint64_t* barrier, uint8_t* to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
      "[%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
      : "memory");
}

// What this thread wrote to shared memory is seen by the copy engine and by wgmma.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma

// What wgmma is told of a matrix in shared memory that is swizzled by 128 bytes: `stride` bytes from 8 rows of 128 bytes to the next
// 8; `leading` bytes from a swizzled piece to the next where the summed dimension is outermost (without meaning where it is innermost
// and 128 bytes wide).
__device__ __forceinline__ uint64_t matrix_descriptor(const uint8_t* start, uint32_t stride, uint32_t leading) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | (uint64_t{stride >> 4} << 32) | (uint64_t{leading >> 4} << 16) | ((shared_address(start) & 0x3ffff) >> 4);
}

// Registers of wgmma are its own from here on, or are ours again: the compiler moves no use of them past this.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// ---- tiles of a stack of matrices out [experts, N, K]

struct Tile {
  int expert, row, column;  // of out: the first that a cluster makes
};

// Tiles of kClusterRows x kClusterColumns, expert by expert. Of one expert, kBand rows of tiles are done together, so that what they
// share stays in the L2 cache.
template <int kClusterRows, int kClusterColumns>
struct TileOrder {
  static constexpr int kBand = 8;
  int experts, rows, columns;  // rows and columns of tiles of an expert

  static TileOrder of(int64_t experts, int64_t N, int64_t K) {
    return {static_cast<int>(experts), static_cast<int>((N + kClusterRows - 1) / kClusterRows),
            static_cast<int>((K + kClusterColumns - 1) / kClusterColumns)};
  }

  // In int64: whether the others may be trusted.
  static int64_t count(int64_t experts, int64_t N, int64_t K) {
    return experts * ((N + kClusterRows - 1) / kClusterRows) * ((K + kClusterColumns - 1) / kClusterColumns);
  }

  __host__ __device__ __forceinline__ int total() const { return experts * rows * columns; }

  __device__ __forceinline__ Tile tile(int index) const {
    const int expert = index / (rows * columns), inside = index % (rows * columns);
    const int band = inside / (kBand * columns), width = min(kBand, rows - band * kBand);
    const int rest = inside - band * kBand * columns;
    return {expert, (band * kBand + rest % width) * kClusterRows, rest / width * kClusterColumns};
  }
};

// ---- sums to out, in pieces of kPieceRows x kPieceColumns fp32: 128 bytes a row, swizzled

constexpr int kPieceRows = 64, kPieceColumns = 32;
constexpr int kPieceBytes = kPieceRows * kPieceColumns * 4;
constexpr int kPiecesHeld = 2;  // pieces that a warpgroup has room for: one is written, one on its way to out

// What lies outside of out is left away.
__device__ __forceinline__ void add_piece(const CUtensorMap& out, const uint8_t* from, int column, int row, int expert) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&out),
               "r"(shared_address(from)), "r"(column), "r"(row), "r"(expert)
               : "memory");
}

__device__ __forceinline__ void store_piece(const CUtensorMap& out, const uint8_t* from, int column, int row, int expert) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&out),
               "r"(shared_address(from)), "r"(column), "r"(row), "r"(expert)
               : "memory");
}

// A warpgroup's sums as wgmma leaves them, 64 rows by 2 kCount columns from `row` and `column`, are added to out or, with `overwrite`,
// put there. `held`: kPiecesHeld pieces of the warpgroup's own; `barrier`: its own too. The pieces may still be on their way.
template <int kCount>
__device__ __forceinline__ void sums_to_out(
    const CUtensorMap& out, const float (&sum)[kCount], uint8_t* held, int barrier, int column, int row, int expert, bool overwrite) {
  constexpr int kPieces = kCount / 16;
  static_assert(kPieces % kPiecesHeld == 0);  // so that every call begins with the piece that has been on its way for longest
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 % 4 * 16 + lane / 4;  // this thread's first row; the second is 8 further
  const bool leads = threadIdx.x % 128 == 0;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    uint8_t* at = held + piece % kPiecesHeld * kPieceBytes;
    if (leads) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPiecesHeld - 1) : "memory");  // what lay here has been read
    sync_threads(barrier, 128);
#pragma unroll
    for (int j = 0; j < kPieceColumns / 8; ++j) {
      const int i = piece * 16 + j * 4;
      // 16-byte parts of a row change places by the row's number, as the copy engine has them
      const int place = (j * 2 + lane % 4 / 2) ^ (lane / 4), inside = place * 16 + lane % 2 * 8;
      *reinterpret_cast<float2*>(at + own * 128 + inside) = float2{sum[i], sum[i + 1]};
      *reinterpret_cast<float2*>(at + (own + 8) * 128 + inside) = float2{sum[i + 2], sum[i + 3]};
    }
    fence_shared();
    sync_threads(barrier, 128);
    if (leads) {
      const int from = column + piece * kPieceColumns;
      if (overwrite) {
        store_piece(out, at, from, row, expert);
      } else {
        add_piece(out, at, from, row, expert);
      }
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

// The same of kColumns zeros a row, which are put there: one piece goes to many places. It takes the last of `held`, as sums_to_out
// would.
template <int kColumns>
__device__ __forceinline__ void zeros_to_out(const CUtensorMap& out, uint8_t* held, int barrier, int column, int row, int expert) {
  uint8_t* at = held + (kPiecesHeld - 1) * kPieceBytes;
  const int thread = threadIdx.x % 128;
  if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  sync_threads(barrier, 128);
#pragma unroll
  for (int i = 0; i < kPieceBytes / 16 / 128; ++i) *reinterpret_cast<uint4*>(at + (i * 128 + thread) * 16) = uint4{};
  fence_shared();
  sync_threads(barrier, 128);
  if (thread != 0) return;
  for (int piece = 0; piece < kColumns / kPieceColumns; ++piece) store_piece(out, at, column + piece * kPieceColumns, row, expert);
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// A warpgroup's first thread, before its block ends.
__device__ __forceinline__ void wait_for_sums() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What a block of kRows x kColumns will add to comes into the L2 cache while it multiplies: memory is then busy all the time, and the
// additions do not wait for it. Called for each of a tile's `steps` stages; the last ones bring a few pieces each.
template <int kRows, int kColumns>
__device__ __forceinline__ void prefetch_out(const CUtensorMap& out, int step, int steps, int column, int row, int expert) {
  constexpr int kAcross = kColumns / kPieceColumns, kPieces = kRows / kPieceRows * kAcross;
  const int each = steps < kPieces ? (kPieces + steps - 1) / steps : 1, first = (step - max(0, steps - kPieces)) * each;
  if (first < 0) return;
  for (int piece = first; piece < min(first + each, kPieces); ++piece) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&out),
                 "r"(column + piece % kAcross * kPieceColumns), "r"(row + piece / kAcross * kPieceRows), "r"(expert)
                 : "memory");
  }
}

// ---- on the host

using EncodeTiled = CUresult (*)(
    CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    TORCH_CHECK(result == cudaDriverEntryPointSuccess, "r1mega: expected a driver with cuTensorMapEncodeTiled, got none");
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

// How the copy engine sees memory: `sizes` from the innermost dimension on, `strides` in bytes of all but that one, `box` what one
// copy moves. A box that is 128 bytes wide is swizzled, another not.
template <size_t kDims>
CUtensorMap tensor_map(
    const void* memory, CUtensorMapDataType type, int64_t number_bytes, const std::array<int64_t, kDims>& sizes,
    const std::array<int64_t, kDims - 1>& strides, const std::array<uint32_t, kDims>& box) {
  CUtensorMap map;
  cuuint64_t size[kDims], stride[kDims];
  cuuint32_t boxes[kDims], steps[kDims];
  for (size_t i = 0; i < kDims; ++i) size[i] = sizes[i], boxes[i] = box[i], steps[i] = 1;
  for (size_t i = 0; i + 1 < kDims; ++i) stride[i] = strides[i];
  const CUresult result = encode_tiled()(
      &map, type, kDims, const_cast<void*>(memory), size, stride, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box[0] * number_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(result == CUDA_SUCCESS, "r1mega: expected memory that the copy engine takes, got ", sizes[0], " numbers in a row of ",
              sizes[1], " rows, error ", static_cast<int>(result));
  return map;
}

// Pieces of a contiguous out [e, N, K].
inline CUtensorMap out_map(const at::Tensor& out) {
  const int64_t e = out.size(0), N = out.size(1), K = out.size(2);
  return tensor_map<3>(
      out.const_data_ptr(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, {K, N, e}, {K * 4, N * K * 4},
      {static_cast<uint32_t>(kPieceColumns), static_cast<uint32_t>(kPieceRows), 1});
}

inline bool aligned16(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 16 == 0; }

// True where out_map takes it.
inline bool fits_out_map(const at::Tensor& out) {
  const int64_t e = out.size(0), N = out.size(1), K = out.size(2);
  return out.is_contiguous() && aligned16(out.const_data_ptr()) && out.numel() > 0 && K % 4 == 0 &&
      std::max({e, N, K}) < (int64_t{1} << 31) && N * K * 4 < (int64_t{1} << 40);
}

inline int device_attribute(cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
  return value;
}

inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

// Blocks of a kernel whose clusters of `cluster` blocks take tile after tile.
inline unsigned persistent_blocks(int64_t tiles, int cluster) {
  return static_cast<unsigned>(std::min<int64_t>(tiles, device_attribute(cudaDevAttrMultiProcessorCount) / cluster) * cluster);
}

}  // namespace r1mega
