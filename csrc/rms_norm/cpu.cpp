// RMSNorm on a CPU: the readable kernels. Bit for bit the plain-torch reference of r1mega/ops/rms_norm.py.

#include "op.h"

#include "../common/fp8.h"
#include "../quantize/op.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

// Loops of a row are compiled for AVX2 too. It has no fused multiply-add (that is a set of its own): the bits are the same.
#if defined(__x86_64__) && defined(__GNUC__)
#define R1MEGA_WIDE __attribute__((target("avx2")))
#define R1MEGA_HAS_WIDE (__builtin_cpu_supports("avx2"))
#else
#define R1MEGA_WIDE
#define R1MEGA_HAS_WIDE false
#endif
#define R1MEGA_INLINE inline __attribute__((always_inline))

namespace r1mega {
namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
constexpr int64_t kGrain = 32768;  // numbers a thread takes at least

R1MEGA_INLINE float widen(float x) { return x; }
R1MEGA_INLINE double widen(double x) { return x; }
R1MEGA_INLINE float widen(at::BFloat16 x) { return bits_float(static_cast<uint32_t>(x.x) << 16); }
R1MEGA_INLINE void narrow(float x, float* to) { *to = x; }
R1MEGA_INLINE void narrow(double x, double* to) { *to = x; }
R1MEGA_INLINE void narrow(float x, at::BFloat16* to) {  // to the nearest, ties to even; without a branch
  const uint32_t bits = float_bits(x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  to->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded >> 16);
}

// The sum of `of(i)` over a row in the order that op.h says.
template <typename A, typename Of>
R1MEGA_INLINE A row_sum(int64_t width, Of of) {
  A total[kMostPieces];
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * kPiece, count = std::min<int64_t>(kPiece, width - first);
    A part[kPiece], four[kPiece / 2], two[kPiece / 4], one[kPiece / 8];
    for (int64_t i = 0; i < count; ++i) part[i] = of(first + i);
    const int64_t eights = (count + 7) / 8;
    for (int64_t i = count; i < eights * 8; ++i) part[i] = A(0);
    for (int64_t i = 0; i < eights; ++i) {
      for (int j = 0; j < 4; ++j) four[i * 4 + j] = part[i * 8 + j] + part[i * 8 + 4 + j];
    }
    for (int64_t i = 0; i < eights; ++i) {
      for (int j = 0; j < 2; ++j) two[i * 2 + j] = four[i * 4 + j] + four[i * 4 + 2 + j];
    }
    for (int64_t i = 0; i < eights; ++i) one[i] = two[i * 2] + two[i * 2 + 1];
    for (int64_t i = eights; i < kPiece / 8; ++i) one[i] = A(0);
    for (int half = 16; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) one[i] += one[i + half];
    }
    total[piece] = one[0];
  }
  int64_t most = 1;
  while (most < pieces) most *= 2;
  for (int64_t i = pieces; i < most; ++i) total[i] = A(0);
  for (int64_t half = most / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) total[i] += total[i + half];
  }
  return total[0] + A(0);  // never -0
}

template <typename A, typename T>
R1MEGA_INLINE A row_rstd(const T* x, int64_t width, A eps) {
  const A squares = row_sum<A>(width, [x](int64_t i) { return widen(x[i]) * widen(x[i]); });
  return A(1) / std::sqrt(squares / static_cast<A>(width) + eps);
}

template <typename A, typename T>
R1MEGA_INLINE void norm_rows(
    const T* x, int64_t stride, const A* weight, T* y, A* rstd, int64_t first, int64_t last, int64_t width, A eps) {
  for (int64_t r = first; r < last; ++r) {
    const T* in = x + r * stride;
    T* out = y + r * width;
    const A scale = rstd[r] = row_rstd<A>(in, width, eps);
    for (int64_t i = 0; i < width; ++i) narrow(widen(in[i]) * scale * weight[i], out + i);
  }
}

// Rows of one group: grad_x, and the group's sum for grad_weight into `partial`.
template <typename A, typename T>
R1MEGA_INLINE void backward_rows(
    const T* grad, int64_t grad_stride, const T* x, int64_t stride, const A* weight, const A* rstd, T* grad_x, A* __restrict__ partial,
    A* __restrict__ run, int64_t first, int64_t last, int64_t width) {
  std::fill_n(partial, width, A(0));
  for (int64_t start = first; start < last; start += kRowRun) {
    std::fill_n(run, width, A(0));
    for (int64_t r = start; r < std::min(last, start + kRowRun); ++r) {
      const T* g = grad + r * grad_stride;
      const T* in = x + r * stride;
      T* out = grad_x + r * width;
      const A scale = rstd[r];
      const A dot = row_sum<A>(width, [=](int64_t i) { return (widen(g[i]) * weight[i]) * (widen(in[i]) * scale); });
      const A mean = dot / static_cast<A>(width);
      for (int64_t i = 0; i < width; ++i) {
        const A normed = widen(in[i]) * scale, of_y = widen(g[i]);
        run[i] += of_y * normed;
        narrow((of_y * weight[i] - normed * mean) * scale, out + i);
      }
    }
    for (int64_t i = 0; i < width; ++i) partial[i] += run[i];
  }
}

// The norm of rows in fp32 and its 1x128 quantisation.
template <typename T>
R1MEGA_INLINE void quantize_normed_rows(
    const T* x, int64_t stride, const float* weight, uint8_t* payload, float* scales, float* rstd, int64_t first, int64_t last,
    int64_t width, int64_t padded, float eps, bool power_of_two) {
  float y[kBlock];
  for (int64_t r = first; r < last; ++r) {
    const float scale = rstd[r] = row_rstd<float>(x + r * stride, width, eps);
    for (int64_t column = 0; column < width; column += kBlock) {
      const int64_t count = std::min(kBlock, width - column);
      const T* in = x + r * stride + column;
      uint32_t largest = 0;
      for (int64_t i = 0; i < count; ++i) y[i] = widen(in[i]) * scale * weight[column + i];
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, magnitude(y[i]));
      const float of_block = block_scale(largest, power_of_two), inverse = block_inverse(of_block);
      scales[column / kBlock * padded + r] = of_block;
      uint8_t* out = payload + r * width + column;
      for (int64_t i = 0; i < count; ++i) out[i] = to_e4m3(y[i], inverse);
    }
  }
}

// Each in two: as the compiler's flags say, and for AVX2.
template <typename... Args>
void norm(Args... args) { norm_rows(args...); }
template <typename... Args>
R1MEGA_WIDE void norm_wide(Args... args) { norm_rows(args...); }
template <typename... Args>
void back(Args... args) { backward_rows(args...); }
template <typename... Args>
R1MEGA_WIDE void back_wide(Args... args) { backward_rows(args...); }
template <typename... Args>
void quantize_normed(Args... args) { quantize_normed_rows(args...); }
template <typename... Args>
R1MEGA_WIDE void quantize_normed_wide(Args... args) { quantize_normed_rows(args...); }

// Calls `with(T of x, A of sums)`.
template <typename With>
void on_dtype(const at::Tensor& x, With with) {
  if (x.scalar_type() == at::kDouble) {
    with(double{}, double{});
  } else if (x.scalar_type() == at::kFloat) {
    with(float{}, float{});
  } else {
    with(at::BFloat16{}, float{});
  }
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / width); }

Pair rms_norm_cpu(const at::Tensor& x_any, const at::Tensor& weight_any, double eps) {
  check_rms_norm("rms_norm", x_any, weight_any, true);
  at::Tensor y = at::empty(x_any.sizes(), x_any.options().memory_format(at::MemoryFormat::Contiguous)), rstd = rstd_like(x_any);
  if (x_any.numel() == 0) return {y, rstd};
  const at::Tensor x = as_rows(x_any), weight = weight_any.to(rstd.scalar_type()).contiguous();
  const int64_t width = x.size(1);
  on_dtype(x, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    at::parallel_for(0, x.size(0), grain(width), [&](int64_t first, int64_t last) {
      const auto run = R1MEGA_HAS_WIDE ? norm_wide<const T*, int64_t, const A*, T*, A*, int64_t, int64_t, int64_t, A>
                                       : norm<const T*, int64_t, const A*, T*, A*, int64_t, int64_t, int64_t, A>;
      run(x.const_data_ptr<T>(), x.stride(0), weight.const_data_ptr<A>(), y.mutable_data_ptr<T>(), rstd.mutable_data_ptr<A>(), first,
          last, width, static_cast<A>(eps));
    });
  });
  return {y, rstd};
}

// Sums of groups, [groups, width], in the order of op.h.
template <typename A>
void sum_groups(const A* partial, int64_t groups, int64_t width, A* sum) {
  std::vector<A> lanes(kGroupLanes * width, A(0));
  for (int64_t g = 0; g < groups; ++g) {
    A* lane = lanes.data() + g % kGroupLanes * width;
    for (int64_t i = 0; i < width; ++i) lane[i] += partial[g * width + i];
  }
  for (int64_t half = kGroupLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half * width; ++i) lanes[i] += lanes[half * width + i];
  }
  std::copy_n(lanes.data(), width, sum);
}

Pair rms_norm_backward_cpu(const at::Tensor& grad_any, const at::Tensor& x_any, const at::Tensor& weight_any, const at::Tensor& rstd_any) {
  check_rms_norm_backward(grad_any, x_any, weight_any, rstd_any);
  at::Tensor grad_x = at::empty(x_any.sizes(), x_any.options().memory_format(at::MemoryFormat::Contiguous));
  if (x_any.numel() == 0) return {grad_x, at::zeros(weight_any.sizes(), weight_any.options())};
  const at::Tensor grad = as_rows(grad_any), x = as_rows(x_any), rstd = rstd_any.contiguous();
  const at::Tensor weight = weight_any.to(rstd.scalar_type()).contiguous();
  const int64_t rows = x.size(0), width = x.size(1), groups = (rows + kRowGroup - 1) / kRowGroup;
  const at::Tensor partial = at::empty({groups, width}, rstd.options()), sum = at::empty({width}, rstd.options());
  on_dtype(x, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    at::parallel_for(0, groups, std::max<int64_t>(1, grain(width) / kRowGroup), [&](int64_t first, int64_t last) {
      std::vector<A> run(width);
      const auto one =
          R1MEGA_HAS_WIDE
              ? back_wide<const T*, int64_t, const T*, int64_t, const A*, const A*, T*, A*, A*, int64_t, int64_t, int64_t>
              : back<const T*, int64_t, const T*, int64_t, const A*, const A*, T*, A*, A*, int64_t, int64_t, int64_t>;
      for (int64_t g = first; g < last; ++g) {
        one(grad.const_data_ptr<T>(), grad.stride(0), x.const_data_ptr<T>(), x.stride(0), weight.const_data_ptr<A>(),
            rstd.const_data_ptr<A>(), grad_x.mutable_data_ptr<T>(), partial.mutable_data_ptr<A>() + g * width, run.data(),
            g * kRowGroup, std::min(rows, (g + 1) * kRowGroup), width);
      }
    });
    sum_groups(partial.const_data_ptr<A>(), groups, width, sum.mutable_data_ptr<A>());
  });
  return {grad_x, sum.to(weight_any.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_quantize_cpu(
    const at::Tensor& x_any, const at::Tensor& weight_any, double eps, bool power_of_two) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "rms_norm_quantize: expected x [M, D], got ", x_any.dim(), " dimensions");
  check_rms_norm("rms_norm_quantize", x_any, weight_any, false);
  const at::Tensor x = as_rows(x_any), weight = weight_any.to(at::kFloat).contiguous();
  const int64_t rows = x.size(0), width = x.size(1);
  const at::Tensor payload = payload_like(x, {rows, width}), scales = row_scales(rows, width, x, true), rstd = rstd_like(x);
  on_dtype(x, [&](auto t, auto) {
    using T = decltype(t);
    if constexpr (sizeof(T) < 8) {
      at::parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) {
        const auto run =
            R1MEGA_HAS_WIDE
                ? quantize_normed_wide<
                      const T*, int64_t, const float*, uint8_t*, float*, float*, int64_t, int64_t, int64_t, int64_t, float, bool>
                : quantize_normed<
                      const T*, int64_t, const float*, uint8_t*, float*, float*, int64_t, int64_t, int64_t, int64_t, float, bool>;
        run(x.const_data_ptr<T>(), x.stride(0), weight.const_data_ptr<float>(), static_cast<uint8_t*>(payload.mutable_data_ptr()),
            scales.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), first, last, width, padded_rows(rows),
            static_cast<float>(eps), power_of_two);
      });
    }
  });
  return {payload, scales, rstd};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
  m.impl("rms_norm_quantize", rms_norm_quantize_cpu);
}

}  // namespace r1mega
