// swiglu_backward_quantize_columns on Hopper: what swiglu_backward_quantize makes, but for the second use of its bf16 results,
// which are never written: they are quantised by columns and transposed where they are made.
//
// A block has 128 rows of 128 columns of gate, of up and of the gradient. First a thread takes 8 neighbours of a row at a time: it
// computes their gradients and activation, quantises the gradients by rows (16 lanes have a block of 128), and puts all three in
// bf16 into shared memory, 96 KB. Then a warp takes 8 columns of one of the three, all rows of them: a lane has 16 rows of two
// columns, so that eight lanes find a column's scale among themselves and write its 128 bytes, 16 each. Units of 16 bytes of shared
// memory are swizzled by the row's sixteen: both sides meet every bank once.
//
// A probability's gradient is a sum over all columns: blocks leave their part of it in [F / 128, R], which a second kernel sums in
// order.

#include <torch/library.h>

#include <tuple>

#include "device.cuh"

namespace r1mega {
namespace {

constexpr int kThreads = 512;
constexpr int kSide = 128;                    // rows and columns of a block
constexpr int kPass = kThreads / kLanes;      // rows that a block takes at once
constexpr int kRun = 16;                      // rows of a lane when columns are quantised
constexpr int kRuns = kSide / kRun;           // lanes that share a column
constexpr int kResults = 3;                   // gradients of gate and up, activation
constexpr int64_t kMostDown = 65535;          // blocks of a grid's second side
constexpr int kSumThreads = 128;              // of a block that sums the parts
static_assert(kThreads / kWarp == kLanes, "a warp takes one group of each result");
static_assert(kThreads >= 3 * kSide);

struct Shared {
  uint4 result[kResults][kSide][kLanes];  // in bf16; unit c of row r at c ^ r / kRun
  float given[3][kSide];                  // of rows: scales of gate and up, probability
  float made[3][kSide];                   // of rows: scales of the gradients of gate and up, sum for the probability
};

// Where a transpose goes: [columns, R] bytes and the scale of (column, tile) at tile * columns + column.
struct Turned {
  uint8_t* payload;
  float* scales;
  int64_t columns;
};

struct Results {
  uint8_t* payload;  // [R, 2F]
  float* scales;     // [2F / 128, R4]
  Turned grad, activation;
  float* parts;      // [F / 128, R], or nullptr
};

// As magnitude(), of eight numbers: the larger of two floats, NaN where one is, has the bits of their larger magnitude.
__device__ __forceinline__ uint32_t largest_of(const float (&x)[kGroup]) {
  float largest = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < kGroup; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(x[i])));
  return magnitude(largest);
}

// T: hidden's type, bf16, or bytes that have scales. kWide: a transpose's rows are whole sixteens.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) columns_kernel(
    const at::BFloat16* __restrict__ grad, const T* __restrict__ hidden, Scales hidden_scales, const float* __restrict__ probs,
    Results out, int64_t R, uint32_t F, bool power_of_two) {
  constexpr int kAtOnce = sizeof(T) == 1 ? 2 : 1;  // rows that a thread takes together: as many as 64 registers hold
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int lane = threadIdx.x % kWarp, unit = threadIdx.x % kLanes, own_row = threadIdx.x / kLanes;
  const uint32_t across = gridDim.x, tile_column = blockIdx.x, tile_row = blockIdx.z * gridDim.y + blockIdx.y;
  const int64_t first_row = int64_t(tile_row) * kSide;
  if (first_row >= R) return;
  const int rows = static_cast<int>(min(R - first_row, int64_t(kSide)));

  const int which_given = threadIdx.x / kSide, given_row = threadIdx.x % kSide;  // one a thread, none for the last
  if (which_given < 3) {
    float value = 1.0f;
    if (given_row < rows) {
      if (which_given < 2) value = hidden_scales.at(first_row + given_row, which_given * across + tile_column);
      if (which_given == 2 && probs) value = probs[first_row + given_row];
    }
    shared.given[which_given][given_row] = value;
  }
  __syncthreads();

  // from here on, numbers that fit 32 bits: a block's rows have fewer than 2^31 bytes
  const at::BFloat16* of_grad = grad + first_row * F + tile_column * kSide;
  const T* of_gate = hidden + first_row * 2 * F + tile_column * kSide;
  const T* of_up = of_gate + F;
  uint8_t* payload = out.payload + first_row * 2 * F + tile_column * kSide;
#pragma unroll
  for (int pass = 0; pass < kSide / kPass; pass += kAtOnce) {
    uint4 own[kAtOnce];
    Raw<T> gate[kAtOnce], up[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const uint32_t r = (pass + u) * kPass + own_row, at = r * F + unit * kGroup, at_hidden = at + r * F;
      const bool there = first_row + r < R;
      own[u] = there ? read_group(of_grad + at) : uint4{};
      gate[u] = there ? read_group(of_gate + at_hidden) : Raw<T>{};
      up[u] = there ? read_group(of_up + at_hidden) : Raw<T>{};
    }
    float to_gate[kAtOnce][kGroup], to_up[kAtOnce][kGroup], sum[kAtOnce] = {};
    uint32_t peak[2 * kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int r = (pass + u) * kPass + own_row, swizzled = unit ^ (r / kRun);
      const float prob = shared.given[2][r];
      float grads[kGroup], again[kGroup];
      widen(own[u], 1.0f, grads);
      widen(gate[u], shared.given[0][r], to_gate[u]);
      widen(up[u], shared.given[1][r], to_up[u]);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const auto g = gradients<float>(grads[i], to_gate[u][i], to_up[u][i], prob, near_sigmoid(to_gate[u][i]));
        to_gate[u][i] = g.gate;
        to_up[u][i] = g.up;
        again[i] = g.activation;
        sum[u] += g.prob;
      }
      shared.result[0][r][swizzled] = in_bf16(to_gate[u]);
      shared.result[1][r][swizzled] = in_bf16(to_up[u]);
      shared.result[2][r][swizzled] = in_bf16(again);
      peak[2 * u] = largest_of(to_gate[u]);
      peak[2 * u + 1] = largest_of(to_up[u]);
    }
    // a lane gets the largest of one of the blocks, and all lanes its inverse
    constexpr int kOwn = kLanes / (2 * kAtOnce);
    const uint32_t largest = fold<kLanes>(peak, lane, [](uint32_t a, uint32_t b) { return max(a, b); });
    const float scale = block_scale(largest, power_of_two), inverse = block_inverse(scale);
    const int block = unit / kOwn;
    if (unit % kOwn == 0) shared.made[block % 2][(pass + block / 2) * kPass + own_row] = scale;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float gate_inverse = __shfl_sync(kAllLanes, inverse, lane / kLanes * kLanes + 2 * u * kOwn);
      const float up_inverse = __shfl_sync(kAllLanes, inverse, lane / kLanes * kLanes + (2 * u + 1) * kOwn);
      const uint32_t r = (pass + u) * kPass + own_row;
      if (first_row + r < R) {
        uint8_t* to = payload + (2 * r * F + unit * kGroup);
        *reinterpret_cast<uint2*>(to) = codes8(to_gate[u], gate_inverse);
        *reinterpret_cast<uint2*>(to + F) = codes8(to_up[u], up_inverse);
      }
    }
    const float total = fold<kLanes>(sum, lane, [](float a, float b) { return a + b; });
    constexpr int kOwnSum = kLanes / kAtOnce;
    if (unit % kOwnSum == 0) shared.made[2][(pass + unit / kOwnSum) * kPass + own_row] = total;
  }
  __syncthreads();

  // what rows have, a line each
  const int64_t padded = padded_rows(R);
  if (which_given < 2) {
    const bool there = given_row < rows;
    if (first_row + given_row < padded) {
      out.scales[(which_given * across + tile_column) * padded + first_row + given_row] =
          there ? shared.made[which_given][given_row] : 0.0f;
    }
  } else if (which_given == 2 && out.parts && given_row < rows) {
    out.parts[tile_column * R + first_row + given_row] = shared.made[2][given_row];
  }

  // columns: of the warp's 8, a lane has two, and one of kRuns runs of rows
  const int group = threadIdx.x / kWarp, run = lane % kRuns, two = lane / kRuns;
#pragma unroll
  for (int which = 0; which < kResults; ++which) {
    const auto* from = reinterpret_cast<const uint32_t*>(&shared.result[which][run * kRun][group ^ run]) + two;
    uint32_t word[kRun], peak = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) word[i] = from[i * kLanes * 4];
#pragma unroll
    for (int i = 0; i < kRun; ++i) peak = __vmaxu2(peak, word[i] & 0x7fff7fffu);
#pragma unroll
    for (int step = kRuns / 2; step > 0; step /= 2) peak = __vmaxu2(peak, __shfl_xor_sync(kAllLanes, peak, step));
    // lanes of an even run have the first column's scale, the others the second's
    const float scale = block_scale(run % 2 ? peak & 0xffff0000u : peak << 16, power_of_two), inverse = block_inverse(scale);
    const Turned& to = which == 2 ? out.activation : out.grad;
    const int64_t column = (which == 1 ? F : 0) + tile_column * kSide + group * kGroup + two * 2;
    if (run < 2) to.scales[tile_row * to.columns + column + run] = scale;
    uint8_t* line = to.payload + column * R + first_row + run * kRun;
#pragma unroll
    for (int half = 0; half < 2; ++half, line += R) {
      const float of_column = __shfl_sync(kAllLanes, inverse, two * kRuns + half);
      uint32_t bytes[kRun / 4];
#pragma unroll
      for (int i = 0; i < kRun / 4; ++i) {
        const auto scaled = [&](int j) {
          return __uint_as_float(half ? word[4 * i + j] & 0xffff0000u : word[4 * i + j] << 16) * of_column;
        };
        bytes[i] = codes4(scaled(0), scaled(1), scaled(2), scaled(3));
      }
      if constexpr (kWide) {
        if (run * kRun < rows) *reinterpret_cast<uint4*>(line) = {bytes[0], bytes[1], bytes[2], bytes[3]};
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (run * kRun + i < rows) line[i] = static_cast<uint8_t>(bytes[i / 4] >> (i % 4 * 8));
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(
    const float* __restrict__ parts, float* __restrict__ grad_probs, int64_t R, int64_t across) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; row < R; row += step) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < across; ++part) sum += parts[part * R + row];
    grad_probs[row] = sum;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
swiglu_backward_quantize_columns_cuda(
    const at::Tensor& grad_any, const at::Tensor& hidden_any, const std::optional<at::Tensor>& hidden_scales,
    const std::optional<at::Tensor>& probs_any, bool power_of_two) {
  constexpr const char* op = "swiglu_backward_quantize_columns";
  const auto [R, F] = check_swiglu_backward_quantize(op, grad_any, hidden_any, hidden_scales, probs_any);
  const c10::cuda::CUDAGuard guard(hidden_any.device());
  const at::Tensor grad = aligned(grad_any), hidden = aligned(hidden_any);
  const auto probs = probs_as(probs_any, at::kFloat);
  std::optional<at::Tensor> grad_probs;
  if (probs) grad_probs = at::empty({R}, probs->options());
  const at::Tensor payload = payload_like(hidden, {R, 2 * F}), scales = row_scales(R, 2 * F, hidden, false);
  const at::Tensor payload_t = payload_like(hidden, {2 * F, R}), scales_t = row_scales(2 * F, R, hidden, false);
  const at::Tensor activation_t = payload_like(hidden, {F, R}), activation_scales_t = row_scales(F, R, hidden, false);
  const int64_t across = F / kSide, down = ceil_div(R, kSide);
  TORCH_CHECK_VALUE(F < int64_t(1) << 21, op, ": expected F below 2^21, got ", F);
  if (down > 0 && across > 0) {
    const int64_t layers = ceil_div(down, kMostDown);
    const dim3 grid(across, ceil_div(down, layers), layers);  // numbers that all threads of a block see in the same registers
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const bool one = across == 1;  // its part is the sum
    const at::Tensor parts = !grad_probs || one ? at::Tensor() : at::empty({across, R}, probs->options());
    const auto turned = [](const at::Tensor& payload, const at::Tensor& scales) {
      return Turned{static_cast<uint8_t*>(payload.mutable_data_ptr()), scales.mutable_data_ptr<float>(), payload.size(0)};
    };
    const Results out{
        static_cast<uint8_t*>(payload.mutable_data_ptr()),
        scales.mutable_data_ptr<float>(),
        turned(payload_t, scales_t),
        turned(activation_t, activation_scales_t),
        !grad_probs ? nullptr : (one ? *grad_probs : parts).mutable_data_ptr<float>()};
    const auto launch = [&, R = R, F = F](auto* in) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
      const auto kernel = R % kRun == 0 ? columns_kernel<T, true> : columns_kernel<T, false>;
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
      kernel<<<grid, kThreads, sizeof(Shared), stream>>>(
          grad.const_data_ptr<at::BFloat16>(), in, scales_of(hidden_scales), pointer<float>(probs), out, R,
          static_cast<uint32_t>(F), power_of_two);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    hidden_scales ? launch(static_cast<const uint8_t*>(hidden.const_data_ptr())) : launch(hidden.const_data_ptr<at::BFloat16>());
    if (parts.defined()) {
      sum_parts_kernel<<<grid_of(ceil_div(R, kSumThreads)), kSumThreads, 0, stream>>>(
          parts.const_data_ptr<float>(), grad_probs->mutable_data_ptr<float>(), R, across);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } else if (grad_probs) {
    grad_probs->zero_();
  }
  return {payload, scales, payload_t, scales_t, activation_t, activation_scales_t, grad_probs_as(grad_probs, probs_any, hidden)};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) { m.impl("swiglu_backward_quantize_columns", swiglu_backward_quantize_columns_cuda); }

}  // namespace r1mega
