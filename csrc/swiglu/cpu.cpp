// swiglu on a CPU: forward, backward, and both with the results quantised. Rows are computed in fp32 (fp64 for fp64) whatever they
// are stored in; no sum depends on how wide the processor's registers are.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/wide.h"
#include "../quantize/tile.h"

namespace r1mega {

constexpr int64_t kSums = 16;  // sums of a row that run side by side, then are added in order

R1MEGA_WIDE void swiglu_row(
    const float* __restrict__ gate, const float* __restrict__ up, float prob, float* __restrict__ out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i] * prob;
}

R1MEGA_WIDE float swiglu_backward_row(
    const float* __restrict__ grad, const float* __restrict__ gate, const float* __restrict__ up, float prob,
    float* __restrict__ grad_gate, float* __restrict__ grad_up, int64_t width) {
  float sums[kSums] = {};
  const int64_t whole = width / kSums * kSums;
  for (int64_t first = 0; first < width; first += kSums) {
    const int64_t count = first < whole ? kSums : width - whole;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = first + j;
      const float sigmoid = 1.0f / (1.0f + exp_of(-gate[i])), silu = gate[i] * sigmoid;
      const float scaled = grad[i] * prob;
      grad_up[i] = scaled * silu;
      grad_gate[i] = scaled * up[i] * (sigmoid * (1.0f + gate[i] * (1.0f - sigmoid)));
      sums[j] += grad[i] * (silu * up[i]);
    }
  }
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  return total;
}

// Of fp64, which is there for gradient checks
void swiglu_row(const double* gate, const double* up, double prob, double* out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = gate[i] / (1.0 + exp_of(-gate[i])) * up[i] * prob;
}

double swiglu_backward_row(
    const double* grad, const double* gate, const double* up, double prob, double* grad_gate, double* grad_up, int64_t width) {
  double total = 0.0;
  for (int64_t i = 0; i < width; ++i) {
    const double sigmoid = 1.0 / (1.0 + exp_of(-gate[i])), silu = gate[i] * sigmoid;
    grad_up[i] = grad[i] * prob * silu;
    grad_gate[i] = grad[i] * prob * up[i] * (sigmoid * (1.0 + gate[i] * (1.0 - sigmoid)));
    total += grad[i] * (silu * up[i]);
  }
  return total;
}

namespace {

constexpr int64_t kGrain = 8192;  // elements a thread takes at least

int64_t grain_of(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)); }

at::Tensor swiglu_cpu(const at::Tensor& hidden_any, const std::optional<at::Tensor>& probs_any) {
  const auto [R, F] = check_swiglu(hidden_any, probs_any);
  const at::Tensor hidden = hidden_any.contiguous();
  at::Tensor out = at::empty({R, F}, hidden.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "swiglu", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto probs = probs_as(probs_any, c10::CppTypeToScalarType<acc_t>::value);
    const acc_t* prob = probs ? probs->const_data_ptr<acc_t>() : nullptr;
    const scalar_t* in = hidden.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, R, grain_of(F), [&, F = F](int64_t first, int64_t last) {
      std::vector<acc_t> buffer(std::is_same_v<acc_t, scalar_t> ? 0 : 3 * F);
      for (int64_t row = first; row < last; ++row) {
        const acc_t* gate = widened(in + row * 2 * F, buffer.data(), 2 * F);
        acc_t* result = place_for(to + row * F, buffer.data() + 2 * F);
        swiglu_row(gate, gate + F, prob ? prob[row] : acc_t(1), result, F);
        narrow(result, to + row * F, F);
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_cpu(
    const at::Tensor& grad_any, const at::Tensor& hidden_any, const std::optional<at::Tensor>& probs_any) {
  const auto [R, F] = check_swiglu_backward(grad_any, hidden_any, probs_any);
  const at::Tensor grad = grad_any.contiguous(), hidden = hidden_any.contiguous();
  at::Tensor grad_hidden = at::empty({R, 2 * F}, hidden.options());
  std::optional<at::Tensor> grad_probs;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "swiglu_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto probs = probs_as(probs_any, c10::CppTypeToScalarType<acc_t>::value);
    if (probs) grad_probs = at::empty({R}, probs->options());
    const acc_t* prob = probs ? probs->const_data_ptr<acc_t>() : nullptr;
    acc_t* of_prob = probs ? grad_probs->mutable_data_ptr<acc_t>() : nullptr;
    const scalar_t *in = hidden.const_data_ptr<scalar_t>(), *from = grad.const_data_ptr<scalar_t>();
    scalar_t* to = grad_hidden.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, R, grain_of(F), [&, F = F](int64_t first, int64_t last) {
      std::vector<acc_t> buffer(std::is_same_v<acc_t, scalar_t> ? 0 : 5 * F);
      for (int64_t row = first; row < last; ++row) {
        const acc_t* gate = widened(in + row * 2 * F, buffer.data(), 2 * F);
        const acc_t* own = widened(from + row * F, buffer.data() + 2 * F, F);
        acc_t* result = place_for(to + row * 2 * F, buffer.data() + 3 * F);
        const acc_t total = swiglu_backward_row(own, gate, gate + F, prob ? prob[row] : acc_t(1), result, result + F, F);
        if (of_prob) of_prob[row] = total;
        narrow(result, to + row * 2 * F, 2 * F);
      }
    });
  });
  return {grad_hidden, grad_probs_as(grad_probs, probs_any, hidden)};
}

// Rows of hidden in fp32, from bf16 or from E4M3 and its scales.
class HiddenRows {
 public:
  HiddenRows(const at::Tensor& hidden, const std::optional<at::Tensor>& scales) : hidden_(hidden.contiguous()) {
    if (scales) scales_ = scales->contiguous();
  }

  const float* row(int64_t index, float* buffer) const {
    const int64_t width = hidden_.size(1);
    if (!scales_.defined()) return widened(hidden_.const_data_ptr<at::BFloat16>() + index * width, buffer, width);
    const at::Float8_e4m3fn* payload = hidden_.const_data_ptr<at::Float8_e4m3fn>() + index * width;
    const float* scales = scales_.const_data_ptr<float>() + index * (width / kBlock);
    for (int64_t i = 0; i < width; ++i) buffer[i] = static_cast<float>(payload[i]) * scales[i / kBlock];
    return buffer;
  }

 private:
  at::Tensor hidden_, scales_;
};

// A row in 1x128 blocks.
void quantize_row(const float* row, int64_t index, int64_t width, bool power_of_two, const Out& out) {
  for (int64_t column = 0; column < width; column += kBlock) {
    quantize_row_block(row + column, index, column, kBlock, power_of_two, out);
  }
}

std::tuple<at::Tensor, at::Tensor> swiglu_quantize_cpu(
    const at::Tensor& hidden, const std::optional<at::Tensor>& hidden_scales, const std::optional<at::Tensor>& probs_any,
    bool power_of_two) {
  const auto [R, F] = check_swiglu_quantize("swiglu_quantize", hidden, hidden_scales, probs_any);
  const HiddenRows rows(hidden, hidden_scales);
  const auto probs = probs_as(probs_any, at::kFloat);
  const float* prob = probs ? probs->const_data_ptr<float>() : nullptr;
  const at::Tensor payload = payload_like(hidden, {R, F}), scales = row_scales(R, F, hidden, true);
  const Out out = out_of(payload, scales);
  at::parallel_for(0, R, grain_of(F), [&, F = F](int64_t first, int64_t last) {
    std::vector<float> buffer(3 * F);
    float* result = buffer.data() + 2 * F;
    for (int64_t row = first; row < last; ++row) {
      const float* gate = rows.row(row, buffer.data());
      swiglu_row(gate, gate + F, prob ? prob[row] : 1.0f, result, F);
      quantize_row(result, row, F, power_of_two, out);
    }
  });
  return {payload, scales};
}

// The backward pass of rows, one after the other: what both of its ops have in common.
class BackwardRows {
 public:
  BackwardRows(
      const at::Tensor& grad, const at::Tensor& hidden, const std::optional<at::Tensor>& hidden_scales,
      const std::optional<at::Tensor>& probs)
      : width_(grad.size(1)), grad_(grad.contiguous()), hidden_(hidden, hidden_scales), probs_(probs_as(probs, at::kFloat)) {
    if (probs_) grad_probs_ = at::empty(probs_->sizes(), probs_->options());
  }

  // Into grad_hidden [2F] and activation [F], from buffer [3F], all of fp32; the gradient of the row's probability stays here.
  void row(int64_t index, float* buffer, float* grad_hidden, float* activation) const {
    const float* gate = hidden_.row(index, buffer);
    const float* own = widened(grad_.const_data_ptr<at::BFloat16>() + index * width_, buffer + 2 * width_, width_);
    const float prob = probs_ ? probs_->const_data_ptr<float>()[index] : 1.0f;
    swiglu_row(gate, gate + width_, prob, activation, width_);
    const float total = swiglu_backward_row(own, gate, gate + width_, prob, grad_hidden, grad_hidden + width_, width_);
    if (grad_probs_) grad_probs_->mutable_data_ptr<float>()[index] = total;
  }

  const std::optional<at::Tensor>& grad_probs() const { return grad_probs_; }

 private:
  int64_t width_;
  at::Tensor grad_;
  HiddenRows hidden_;
  std::optional<at::Tensor> probs_, grad_probs_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> swiglu_backward_quantize_cpu(
    const at::Tensor& grad, const at::Tensor& hidden, const std::optional<at::Tensor>& hidden_scales,
    const std::optional<at::Tensor>& probs, bool power_of_two) {
  const auto [R, F] = check_swiglu_backward_quantize("swiglu_backward_quantize", grad, hidden, hidden_scales, probs);
  const BackwardRows rows(grad, hidden, hidden_scales, probs);
  const at::Tensor grad_hidden = at::empty({R, 2 * F}, grad.options()), activation = at::empty({R, F}, grad.options());
  const at::Tensor payload = payload_like(hidden, {R, 2 * F}), scales = row_scales(R, 2 * F, hidden, true);
  const Out out = out_of(payload, scales);
  at::BFloat16 *to = grad_hidden.mutable_data_ptr<at::BFloat16>(), *again = activation.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, R, grain_of(F), [&, F = F](int64_t first, int64_t last) {
    std::vector<float> buffer(6 * F);
    float *result = buffer.data() + 3 * F, *recomputed = result + 2 * F;
    for (int64_t row = first; row < last; ++row) {
      rows.row(row, buffer.data(), result, recomputed);
      narrow(recomputed, again + row * F, F);
      narrow(result, to + row * 2 * F, 2 * F);
      quantize_row(result, row, 2 * F, power_of_two, out);
    }
  });
  return {grad_hidden, payload, scales, grad_probs_as(rows.grad_probs(), probs, hidden), activation};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> swiglu_backward_quantize_columns_cpu(
    const at::Tensor& grad, const at::Tensor& hidden, const std::optional<at::Tensor>& hidden_scales,
    const std::optional<at::Tensor>& probs, bool power_of_two) {
  const auto [R, F] = check_swiglu_backward_quantize("swiglu_backward_quantize_columns", grad, hidden, hidden_scales, probs);
  const BackwardRows rows(grad, hidden, hidden_scales, probs);
  const at::Tensor payload = payload_like(hidden, {R, 2 * F}), scales = row_scales(R, 2 * F, hidden, true);
  const at::Tensor payload_t = payload_like(hidden, {2 * F, R}), scales_t = row_scales(2 * F, R, hidden, true);
  const at::Tensor activation_t = payload_like(hidden, {F, R}), activation_scales_t = row_scales(F, R, hidden, true);
  const Out out = out_of(payload, scales), out_t = out_of(payload_t, scales_t);
  const Out activation_out = out_of(activation_t, activation_scales_t);
  at::parallel_for(0, blocks_of(R), 1, [&, R = R, F = F](int64_t first_tile, int64_t last_tile) {
    std::vector<float> buffer(6 * F);
    std::vector<at::BFloat16> held(kBlock * 3 * F);  // 128 rows of gradient and activation, rounded as they are elsewhere
    const auto tile = std::make_unique<Tile>();
    float *result = buffer.data() + 3 * F, *recomputed = result + 2 * F;
    for (int64_t first = first_tile * kBlock; first < std::min(R, last_tile * kBlock); first += kBlock) {
      for (int64_t row = first; row < std::min(R, first + kBlock); ++row) {
        rows.row(row, buffer.data(), result, recomputed);
        quantize_row(result, row, 2 * F, power_of_two, out);
        narrow(result, held.data() + (row - first) * 3 * F, 3 * F);
      }
      for (int64_t column = 0; column < 3 * F; column += kBlock) {
        const bool of_grad = column < 2 * F;
        const Numbers<at::BFloat16> from{held.data() + (of_grad ? 0 : 2 * F), 3 * F};
        tile->read(from, first, of_grad ? column : column - 2 * F, R, of_grad ? 2 * F : F, -first);
        quantize_tile_columns(*tile, power_of_two, of_grad ? out_t : activation_out);
      }
    }
  });
  const at::Tensor grad_probs = grad_probs_as(rows.grad_probs(), probs, hidden);
  return {payload, scales, payload_t, scales_t, activation_t, activation_scales_t, grad_probs};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("swiglu", swiglu_cpu);
  m.impl("swiglu_backward", swiglu_backward_cpu);
  m.impl("swiglu_quantize", swiglu_quantize_cpu);
  m.impl("swiglu_backward_quantize", swiglu_backward_quantize_cpu);
  m.impl("swiglu_backward_quantize_columns", swiglu_backward_quantize_columns_cpu);
}

}  // namespace r1mega
