// RMSNorm on Hopper. Bit for bit the plain-torch reference of r1mega/ops/rms_norm.py: the order of sums is in op.h, products and sums
// are never fused.
//
// A lane holds 8 neighbours, a warp a piece of 256 numbers; a row has a warp for every two, four or eight pieces, and stays in
// registers: one read, one write. The backward of bf16 rows is in backward.cuh; the one here, for all others, gives a block a group
// of 32 rows, whose part of grad_weight stays in registers too.

#include "op.h"

#include "../common/fp8.cuh"
#include "../quantize/op.h"
#include "eight.cuh"
#include "backward.cuh"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

namespace r1mega {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;

// The row's sum from its pieces' in shared memory, `written` of them, on every lane of a warp. Never -0.
template <typename A>
__device__ __forceinline__ A sum_of_pieces(const A* piece, int written) {
  const int lane = threadIdx.x;
  const A low = lane < written ? piece[lane] : A(0), high = lane + kWarp < written ? piece[lane + kWarp] : A(0);
  return add(warp_sum(add(low, high)), A(0));
}

struct Payload {
  uint8_t* codes;
  float* scales;
  int64_t padded;
  bool power_of_two;
};

// Block (32 lanes, warps of a row, rows); more than one row only where a row is one warp, which meets no barrier. A warp has every
// `warps`-th piece. `kQuantize`: `payload` instead of y. A processor's rows in flight are what its registers hold: four of 28
// pieces of bf16, where numbers stay in their words until they are used.
template <typename X, typename W, typename A, int kPieces, bool kAligned, bool kQuantize>
__global__ void __launch_bounds__(256, kAligned && sizeof(X) == 2 && sizeof(W) == 2 && kPieces == 4 ? 4 : 1) norm_kernel(
    const X* __restrict__ x, int64_t stride, const W* __restrict__ weight, X* __restrict__ y, A* __restrict__ rstd, int64_t rows,
    int width, A eps, Payload payload) {
  __shared__ A piece_sum[kMostPieces];
  constexpr bool kEarly = kPieces <= 4;  // weights before the sum, where registers hold both
  constexpr int kShare = kWarp / kPieces;  // lanes that get the sum of one piece
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t row = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  if (row >= rows) return;
  Eight<X> in[kPieces];
  Eight<W> factor[kPieces];
  int left[kPieces];
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
    const int column = (warp + n * warps) * kPiece + lane * kEight;
    left[n] = width - column;
    in[n].read(x + row * stride + column, left[n], kAligned);
  }
  const auto read_weight = [&] {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) factor[n].read(weight + width - left[n], left[n], kAligned);
  };
  if constexpr (kEarly) read_weight();
  A sum[kPieces];
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
    A square[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) square[j] = mul(in[n].wide(j), in[n].wide(j));
    sum[n] = sum_of_eight(square);
  }
  A total = fold<kWarp>(sum, lane, [](A a, A b) { return add(a, b); });
  if (warps > 1) {
    if (lane % kShare == 0) piece_sum[warp + lane / kShare * warps] = total;
    __syncthreads();
    total = sum_of_pieces(piece_sum, kPieces * warps);
  } else {
#pragma unroll
    for (int step = kWarp / 2; step >= kShare; step /= 2) total = add(total, __shfl_xor_sync(kAllLanes, total, step));
  }
  const A scale = divide(A(1), root(add(divide(total, static_cast<A>(width)), eps)));
  if (lane == 0 && warp == 0) rstd[row] = scale;
  if constexpr (!kEarly) read_weight();
  if constexpr (!kQuantize) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      Eight<X> out;
#pragma unroll
      for (int j = 0; j < kEight; ++j) narrow(mul(mul(in[n].wide(j), scale), static_cast<A>(factor[n].wide(j))), out[j]);
      out.write(y + row * width + width - left[n], left[n], kAligned);
    }
  } else {
    constexpr int kLanes = kWarp / 2, kOwn = kLanes / kPieces;  // lanes of a block of 128; those that get the peak of one piece
    A value[kPieces][kEight];
    uint32_t peak[kPieces] = {};
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        value[n][j] = mul(mul(in[n].wide(j), scale), static_cast<A>(factor[n].wide(j)));
        peak[n] = max(peak[n], magnitude(value[n][j]));
      }
    }
    // a lane has the scale of one piece; all get its inverse
    const uint32_t largest = fold<kLanes>(peak, lane, [](uint32_t a, uint32_t b) { return max(a, b); });
    const float of_block = block_scale(largest, payload.power_of_two), of_inverse = block_inverse(of_block);
    const int64_t first = (warp + lane % kLanes / kOwn * warps) * kPiece + lane / kLanes * kBlock;
    if (lane % kOwn == 0 && first < width) {
      float* scales = payload.scales + first / kBlock * payload.padded + row;
      *scales = of_block;
      if (row == rows - 1) {
        for (int64_t pad = row + 1; pad < payload.padded; ++pad) *++scales = 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const float inverse = __shfl_sync(kAllLanes, of_inverse, lane / kLanes * kLanes + n * kOwn);
      uint32_t word[2];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const A* four = value[n] + 4 * w;
        word[w] = codes4(four[0] * inverse, four[1] * inverse, four[2] * inverse, four[3] * inverse);
      }
      uint8_t* to = payload.codes + row * width + width - left[n];
      if constexpr (kAligned) {
        if (left[n] > 0) *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kEight; ++j) {
          if (j < left[n]) to[j] = static_cast<uint8_t>(word[j / 4] >> (j % 4 * 8));
        }
      }
    }
  }
}

// Block (32 lanes, warps of a row, slots): a group of 32 rows, 8 of them a slot or all of them the one slot's. grad_x, and the
// group's sum for grad_weight into `partial` [groups, width].
template <typename X, typename W, typename A, int kPieces, int kSlots>
__global__ void __launch_bounds__(1024) backward_kernel(
    const X* __restrict__ grad, int64_t grad_stride, const X* __restrict__ x, int64_t stride, const W* __restrict__ weight,
    const A* __restrict__ rstd, X* __restrict__ grad_x, A* __restrict__ partial, int64_t rows, int width, bool aligned) {
  static_assert(kSlots == 1 || kPieces == 1);
  constexpr int kCount = kRowGroup / kSlots;                    // rows of a slot
  constexpr int kSharedSum = kSlots == 1 ? 1 : 8 * kPiece;  // a row of at most 8 warps
  constexpr bool kKeep = kPieces == 1;  // the group's sum in registers; otherwise in `partial`, where the same thread adds to it
  __shared__ A piece_sum[2][kSlots][kMostPieces];
  __shared__ A shared_sum[kSharedSum];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, slot = threadIdx.z;
  const int64_t first = int64_t(blockIdx.x) * kRowGroup + slot * kCount;
  A* sum_out = partial + int64_t(blockIdx.x) * width;

  int column[kPieces];
  Eight<W> factor[kPieces];
  Eight<X> in[kPieces], of_y[kPieces], next_in[kPieces], next_of_y[kPieces];
  A run[kPieces][kEight] = {}, total[kEight] = {};
  A scale, next_scale;
  const auto read = [&](Eight<X>(&to)[kPieces], Eight<X>(&to_grad)[kPieces], int64_t row) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int left = row < rows ? width - column[n] : 0;
      to[n].read(x + row * stride + column[n], left, aligned);
      to_grad[n].read(grad + row * grad_stride + column[n], left, aligned);
    }
    return row < rows ? rstd[row] : A(0);
  };
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
    column[n] = (warp + n * warps) * kPiece + lane * kEight;
    factor[n].read(weight + column[n], width - column[n], aligned);
  }
  scale = read(in, of_y, first);
  for (int i = 0; i < kCount; ++i) {
    const int64_t row = first + i;
    if (i + 1 < kCount) next_scale = read(next_in, next_of_y, row + 1);  // on its way while this row is summed
    A sum[kPieces];
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      A part[kEight];
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        part[j] = mul(mul(widen(of_y[n][j]), static_cast<A>(widen(factor[n][j]))), mul(widen(in[n][j]), scale));
      }
      sum[n] = warp_sum(sum_of_eight(part));
    }
    A dot = add(sum[0], A(0));
    if (warps > 1) {
      A* own = piece_sum[i % 2][slot];  // two in turn: the barrier of the next row parts the readers of this from its next writers
      if (lane == 0) {
#pragma unroll
        for (int n = 0; n < kPieces; ++n) own[warp + n * warps] = sum[n];
      }
      __syncthreads();
      dot = sum_of_pieces(own, kPieces * warps);
    }
    const A mean = divide(dot, static_cast<A>(width));
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      Eight<X> out;
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        const A of = widen(of_y[n][j]), normed = mul(widen(in[n][j]), scale);
        run[n][j] = add(run[n][j], mul(of, normed));
        narrow(mul(sub(mul(of, static_cast<A>(widen(factor[n][j]))), mul(normed, mean)), scale), out[j]);
      }
      if (row < rows) out.write(grad_x + row * width + column[n], width - column[n], aligned);
    }
    if (i % kRowRun == kRowRun - 1) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        if constexpr (kKeep) {
#pragma unroll
          for (int j = 0; j < kEight; ++j) total[j] = add(total[j], run[n][j]), run[n][j] = A(0);
        } else {
          Eight<A> held;
          const int left = width - column[n];
          held.read(sum_out + column[n], i < kRowRun ? 0 : left, aligned);
#pragma unroll
          for (int j = 0; j < kEight; ++j) held[j] = add(held[j], run[n][j]), run[n][j] = A(0);
          held.write(sum_out + column[n], left, aligned);
        }
      }
    }
    scale = next_scale;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) in[n] = next_in[n], of_y[n] = next_of_y[n];
  }
  if constexpr (kKeep) {
    if constexpr (kSlots > 1) {
      for (int turn = 0; turn < kSlots; ++turn) {  // the slots one after the other
        if (slot == turn) {
#pragma unroll
          for (int j = 0; j < kEight; ++j) {
            A& held = shared_sum[(warp * kEight + j) * kWarp + lane];
            if (turn > 0) total[j] = add(held, total[j]);
            held = total[j];
          }
        }
        __syncthreads();
      }
      if (slot != kSlots - 1) return;
    }
    Eight<A> result;
#pragma unroll
    for (int j = 0; j < kEight; ++j) result[j] = total[j];
    result.write(sum_out + column[0], width - column[0], aligned);
  }
}

// grad_weight from the groups' sums. Block (32 columns, 32 lanes of groups).
template <typename A, typename W>
__global__ void __launch_bounds__(1024)
    sum_groups_kernel(const A* __restrict__ partial, int64_t groups, int width, W* __restrict__ grad_weight) {
  __shared__ A sum[kGroupLanes][kWarp];
  const int column = blockIdx.x * kWarp + threadIdx.x, lane = threadIdx.y;
  A own = A(0);
  if (column < width) {
#pragma unroll 8
    for (int64_t g = lane; g < groups; g += kGroupLanes) own = add(own, partial[g * width + column]);
  }
  sum[lane][threadIdx.x] = own;
  for (int half = kGroupLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) sum[lane][threadIdx.x] = add(sum[lane][threadIdx.x], sum[lane + half][threadIdx.x]);
  }
  if (lane == 0 && column < width) narrow(sum[0][threadIdx.x], grad_weight[column]);
}

// The weight in a dtype that kernels take beside x: x's, or fp32 (fp64 for fp64).
at::Tensor weight_for(const at::Tensor& x, const at::Tensor& weight) {
  if (x.scalar_type() == at::kDouble) return weight.to(at::kDouble).contiguous();
  const bool both = x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16;
  return (both ? weight : weight.to(at::kFloat)).contiguous();
}

// Calls `with(X, W, A)`: dtypes of x, of the weight and of sums.
template <typename With>
void on_dtypes(const at::Tensor& x, const at::Tensor& weight, With with) {
  if (x.scalar_type() == at::kDouble) {
    with(double{}, double{}, double{});
  } else if (x.scalar_type() == at::kFloat) {
    with(float{}, float{}, float{});
  } else if (weight.scalar_type() == at::kFloat) {
    with(__nv_bfloat16{}, float{}, float{});
  } else {
    with(__nv_bfloat16{}, __nv_bfloat16{}, float{});
  }
}

template <typename T>
const T* read_ptr(const at::Tensor& x) {
  return reinterpret_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* write_ptr(const at::Tensor& x) {
  return reinterpret_cast<T*>(x.mutable_data_ptr());
}

// Whether rows of `width` numbers, `stride` apart, are whole eights that 16-byte accesses fit.
template <typename T>
bool eights(const T* base, int64_t stride, int64_t width) {
  return width % kEight == 0 && fits16(base, stride);
}

// y or payload, and rstd.
template <bool kQuantize>
void norm(const at::Tensor& x, const at::Tensor& weight_any, const at::Tensor& y, const at::Tensor& rstd, double eps, Payload payload) {
  const at::Tensor weight = weight_for(x, weight_any);
  const int64_t rows = x.size(0), width = x.size(1), pieces = ceil_div(width, kPiece);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  on_dtypes(x, weight, [&](auto x_of, auto weight_of, auto sum_of) {
    using X = decltype(x_of);
    using W = decltype(weight_of);
    using A = decltype(sum_of);
    if constexpr (!kQuantize || sizeof(X) < 8) {
      const X* from = read_ptr<X>(x);
      const W* factor = read_ptr<W>(weight);
      const bool aligned = eights(from, x.stride(0), width) && eights(factor, width, width);
      const auto launch = [&](auto each, auto whole) {
        constexpr int kPieces = decltype(each)::value;
        const auto warps = static_cast<unsigned>(ceil_div(pieces, kPieces));
        const unsigned together = warps == 1 ? 4 : 1;
        const int64_t blocks = ceil_div(rows, together);
        TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "rms_norm: expected fewer than 2^31 rows, got ", rows);
        norm_kernel<X, W, A, kPieces, decltype(whole)::value, kQuantize>
            <<<static_cast<unsigned>(blocks), dim3(kWarp, warps, together), 0, stream>>>(
                from, x.stride(0), factor, kQuantize ? nullptr : write_ptr<X>(y), write_ptr<A>(rstd), rows, static_cast<int>(width),
                static_cast<A>(eps), payload);
      };
      if (!aligned) {
        launch(std::integral_constant<int, 8>{}, std::false_type{});
      } else if (pieces <= 2) {
        launch(std::integral_constant<int, 2>{}, std::true_type{});
      } else if (sizeof(X) == 2 && pieces <= 8) {  // a row a warp
        launch(std::integral_constant<int, 8>{}, std::true_type{});
      } else if (pieces <= 32) {
        launch(std::integral_constant<int, 4>{}, std::true_type{});
      } else {
        launch(std::integral_constant<int, 8>{}, std::true_type{});
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

Pair rms_norm_cuda(const at::Tensor& x_any, const at::Tensor& weight, double eps) {
  check_rms_norm("rms_norm", x_any, weight, true);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor y = at::empty(x_any.sizes(), x_any.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor rstd = rstd_like(x_any);
  if (x_any.numel() > 0) norm<false>(as_rows(x_any), weight, y, rstd, eps, {});
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_quantize_cuda(
    const at::Tensor& x_any, const at::Tensor& weight, double eps, bool power_of_two) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "rms_norm_quantize: expected x [M, D], got ", x_any.dim(), " dimensions");
  check_rms_norm("rms_norm_quantize", x_any, weight, false);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor x = as_rows(x_any), rstd = rstd_like(x);
  const int64_t rows = x.size(0), width = x.size(1);
  const at::Tensor payload = payload_like(x, {rows, width}), scales = row_scales(rows, width, x, false);
  if (rows > 0) {
    const Payload to{write_ptr<uint8_t>(payload), scales.mutable_data_ptr<float>(), padded_rows(rows), power_of_two};
    norm<true>(x, weight, payload, rstd, eps, to);
  }
  return {payload, scales, rstd};
}

Pair rms_norm_backward_cuda(const at::Tensor& grad_any, const at::Tensor& x_any, const at::Tensor& weight_any, const at::Tensor& rstd_any) {
  check_rms_norm_backward(grad_any, x_any, weight_any, rstd_any);
  const c10::cuda::CUDAGuard guard(x_any.device());
  const at::Tensor grad_x = at::empty(x_any.sizes(), x_any.options().memory_format(at::MemoryFormat::Contiguous));
  if (x_any.numel() == 0) return {grad_x, at::zeros(weight_any.sizes(), weight_any.options())};
  const at::Tensor grad = as_rows(grad_any), x = as_rows(x_any), rstd = rstd_any.contiguous(), weight = weight_for(x, weight_any);
  const int64_t rows = x.size(0), width = x.size(1), pieces = ceil_div(width, kPiece), groups = ceil_div(rows, kRowGroup);
  const at::Tensor partial = at::empty({groups, width}, rstd.options()), grad_weight = at::empty({width}, weight.options());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  TORCH_CHECK_VALUE(groups <= std::numeric_limits<int32_t>::max(), "rms_norm_backward: expected fewer than 2^36 rows, got ", rows);
  on_dtypes(x, weight, [&](auto x_of, auto weight_of, auto sum_of) {
    using X = decltype(x_of);
    using W = decltype(weight_of);
    using A = decltype(sum_of);
    const X* from_grad = read_ptr<X>(grad);
    const X* from = read_ptr<X>(x);
    const W* factor = read_ptr<W>(weight);
    const bool aligned =
        eights(from_grad, grad.stride(0), width) && eights(from, x.stride(0), width) && eights(factor, width, width);
    const auto launch = [&](auto each, auto slots) {
      constexpr int kPieces = decltype(each)::value, kSlots = decltype(slots)::value;
      const auto warps = static_cast<unsigned>(ceil_div(pieces, kPieces));
      backward_kernel<X, W, A, kPieces, kSlots><<<static_cast<unsigned>(groups), dim3(kWarp, warps, kSlots), 0, stream>>>(
          from_grad, grad.stride(0), from, x.stride(0), factor, read_ptr<A>(rstd), write_ptr<X>(grad_x), write_ptr<A>(partial), rows,
          static_cast<int>(width), aligned);
    };
    using One = std::integral_constant<int, 1>;
    using Runs = std::integral_constant<int, kRowRuns>;
    const bool whole = aligned && fits16(write_ptr<X>(grad_x), width);
    if (std::is_same_v<X, __nv_bfloat16> && whole && pieces <= 32) {
      if constexpr (std::is_same_v<X, __nv_bfloat16>) {
        const auto stream_rows = [&](auto slots) {
          constexpr int kSlots = decltype(slots)::value;
          const int64_t threads = kWarp * pieces * kSlots;
          const size_t bytes = stream_shared_bytes(threads, kSlots);
          int processors = 0, shared = 0;
          C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device()));
          C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, x.get_device()));
          // what a processor holds: registers for 1024 threads, and shared memory, of which 3 KB a block are not ours
          const int64_t each = std::clamp<int64_t>(shared / static_cast<int64_t>(bytes + 3072), 1, 1024 / threads);
          const auto kernel = backward_stream_kernel<W, kSlots>;
          C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
          const dim3 block(kWarp, static_cast<unsigned>(pieces), kSlots);
          kernel<<<grid_of(groups, each * processors), block, bytes, stream>>>(
              from_grad, grad.stride(0), from, x.stride(0), factor, read_ptr<A>(rstd), write_ptr<X>(grad_x), write_ptr<A>(partial),
              rows, groups, static_cast<int>(width));
        };
        pieces <= 8 ? stream_rows(Runs{}) : stream_rows(One{});
      }
    } else if (pieces <= 8) {
      launch(One{}, Runs{});
    } else if (pieces <= 32) {
      launch(One{}, One{});
    } else {
      launch(std::integral_constant<int, 2>{}, One{});
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    sum_groups_kernel<A, W><<<static_cast<unsigned>(ceil_div(width, kWarp)), dim3(kWarp, kGroupLanes), 0, stream>>>(
        read_ptr<A>(partial), groups, static_cast<int>(width), write_ptr<W>(grad_weight));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_x, grad_weight.to(weight_any.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("rms_norm", rms_norm_cuda);
  m.impl("rms_norm_backward", rms_norm_backward_cuda);
  m.impl("rms_norm_quantize", rms_norm_quantize_cuda);
}

}  // namespace r1mega
