// permute, unpermute and their backward passes on a CPU. permute, permute_probs and unpermute are bit for bit the plain-torch
// references of r1mega/ops/permute.py.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)); }

const int64_t* indices(const char* op, const char* of, const at::Tensor& values, int64_t below) {
  const int64_t* index = values.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_INDEX(index[i] >= -1 && index[i] < below, op, ": expected ", of, " from -1 to ", below - 1, ", got ", index[i]);
  }
  return index;
}

at::Tensor permute_cpu(const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows) {
  const MoveSizes sizes = check_tokens("permute", tokens_any, row_tokens_any, token_rows);
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const int64_t* source = indices("permute", "tokens", row_tokens, sizes.tokens);
  at::Tensor rows = at::empty({sizes.rows, sizes.hidden}, tokens.options());
  const int64_t bytes = sizes.hidden * static_cast<int64_t>(tokens.element_size());
  if (bytes == 0) return rows;
  const char* in = static_cast<const char*>(tokens.const_data_ptr());
  char* out = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, sizes.rows, grain(sizes.hidden), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (source[r] < 0) {
        std::memset(out + r * bytes, 0, bytes);
      } else {
        std::memcpy(out + r * bytes, in + source[r] * bytes, bytes);
      }
    }
  });
  return rows;
}

at::Tensor permute_probs_cpu(const at::Tensor& probs, const at::Tensor& row_tokens_any, const at::Tensor& row_experts_any) {
  check_permute_probs(probs, row_tokens_any, row_experts_any);
  const at::Tensor row_tokens = row_tokens_any.contiguous(), row_experts = row_experts_any.contiguous();
  const int64_t R = row_tokens.size(0), E = probs.size(1);
  const int64_t* token = indices("permute_probs", "tokens", row_tokens, probs.size(0));
  const int32_t* expert = row_experts.const_data_ptr<int32_t>();
  at::Tensor row_probs = at::empty({R}, probs.options());
  const auto bytes = static_cast<int64_t>(probs.element_size());
  const char* in = static_cast<const char*>(probs.const_data_ptr());
  char* out = static_cast<char*>(row_probs.mutable_data_ptr());
  for (int64_t r = 0; r < R; ++r) {
    if (token[r] < 0) {
      std::memset(out + r * bytes, 0, bytes);
      continue;
    }
    TORCH_CHECK_INDEX(expert[r] >= 0 && expert[r] < E, "permute_probs: expected experts from 0 to ", E - 1, ", got ", expert[r]);
    std::memcpy(out + r * bytes, in + (token[r] * probs.stride(0) + expert[r] * probs.stride(1)) * bytes, bytes);
  }
  return row_probs;
}

at::Tensor permute_probs_backward_cpu(
    const at::Tensor& grad_any, const at::Tensor& row_tokens_any, const at::Tensor& row_experts_any, int64_t T, int64_t E) {
  check_permute_probs_backward(grad_any, row_tokens_any, row_experts_any, T, E);
  const at::Tensor grad = grad_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const at::Tensor row_experts = row_experts_any.contiguous();
  const int64_t* token = indices("permute_probs_backward", "tokens", row_tokens, T);
  const int32_t* expert = row_experts.const_data_ptr<int32_t>();
  at::Tensor grad_probs = at::zeros({T, E}, grad.options());
  const auto bytes = static_cast<int64_t>(grad.element_size());
  const char* in = static_cast<const char*>(grad.const_data_ptr());
  char* out = static_cast<char*>(grad_probs.mutable_data_ptr());
  for (int64_t r = 0; r < row_tokens.size(0); ++r) {
    if (token[r] < 0) continue;
    TORCH_CHECK_INDEX(
        expert[r] >= 0 && expert[r] < E, "permute_probs_backward: expected experts from 0 to ", E - 1, ", got ", expert[r]);
    std::memcpy(out + (token[r] * E + expert[r]) * bytes, in + r * bytes, bytes);
  }
  return grad_probs;
}

at::Tensor unpermute_cpu(
    const at::Tensor& rows_any, const at::Tensor& token_rows_any, const at::Tensor& row_tokens,
    const std::optional<at::Tensor>& row_probs) {
  const auto [T, R, width, D] = check_rows("unpermute", rows_any, row_tokens, token_rows_any);
  if (row_probs) check_row_probs("unpermute", rows_any, *row_probs);
  const at::Tensor rows = rows_any.contiguous(), token_rows = token_rows_any.contiguous();
  const int64_t* rows_of = indices("unpermute", "rows", token_rows, R);
  at::Tensor tokens = at::empty({T, D}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute", [&, T = T, width = width, D = D] {
        using acc_t = at::opmath_type<scalar_t>;
        const at::Tensor weights = row_probs ? row_probs->to(c10::CppTypeToScalarType<acc_t>::value).contiguous() : at::Tensor();
        const acc_t* weight = row_probs ? weights.const_data_ptr<acc_t>() : nullptr;
        const scalar_t* in = rows.const_data_ptr<scalar_t>();
        scalar_t* out = tokens.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, T, grain(D * width), [&](int64_t first, int64_t last) {
          std::vector<acc_t> sum(D);
          for (int64_t t = first; t < last; ++t) {
            std::fill(sum.begin(), sum.end(), acc_t(0));
            for (int64_t k = 0; k < width; ++k) {
              const int64_t r = rows_of[t * width + k];
              if (r < 0) continue;
              const scalar_t* row = in + r * D;
              if (weight) {
                const acc_t w = weight[r];
                for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<acc_t>(row[d]) * w;
              } else {
                for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<acc_t>(row[d]);
              }
            }
            for (int64_t d = 0; d < D; ++d) out[t * D + d] = static_cast<scalar_t>(sum[d]);
          }
        });
      });
  return tokens;
}

std::tuple<at::Tensor, at::Tensor> unpermute_backward_cpu(
    const at::Tensor& grad_any, const at::Tensor& rows_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows,
    const at::Tensor& row_probs) {
  const auto [T, R, width, D] = check_unpermute_backward(grad_any, rows_any, row_tokens_any, token_rows, row_probs);
  const at::Tensor grad_tokens = grad_any.contiguous(), rows = rows_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const int64_t* source = indices("unpermute_backward", "tokens", row_tokens, T);
  at::Tensor grad_rows = at::empty({R, D}, rows.options()), dots;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute_backward", [&, R = R, D = D] {
    using acc_t = at::opmath_type<scalar_t>;
    const at::Tensor weights = row_probs.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
    dots = at::empty({R}, weights.options());
    const acc_t* weight = weights.const_data_ptr<acc_t>();
    acc_t* dot = dots.mutable_data_ptr<acc_t>();
    const scalar_t *grad_in = grad_tokens.const_data_ptr<scalar_t>(), *row_in = rows.const_data_ptr<scalar_t>();
    scalar_t* out = grad_rows.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, R, grain(D), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        scalar_t* to = out + r * D;
        if (source[r] < 0) {
          std::fill(to, to + D, scalar_t(0));
          dot[r] = 0;
          continue;
        }
        const scalar_t *grad = grad_in + source[r] * D, *row = row_in + r * D;
        const acc_t w = weight[r];
        constexpr int kLanes = 16;  // sums side by side: these vectorise, and their order is always the same
        acc_t sum[kLanes] = {};
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) {
          for (int i = 0; i < kLanes; ++i) {
            const auto g = static_cast<acc_t>(grad[d + i]);
            to[d + i] = static_cast<scalar_t>(g * w);
            sum[i] += g * static_cast<acc_t>(row[d + i]);
          }
        }
        for (; d < D; ++d) {
          const auto g = static_cast<acc_t>(grad[d]);
          to[d] = static_cast<scalar_t>(g * w);
          sum[d % kLanes] += g * static_cast<acc_t>(row[d]);
        }
        for (int half = kLanes / 2; half > 0; half /= 2) {
          for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
        }
        dot[r] = sum[0];
      }
    });
  });
  return {grad_rows, dots.to(row_probs.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("permute", permute_cpu);
  m.impl("permute_probs", permute_probs_cpu);
  m.impl("permute_probs_backward", permute_probs_backward_cpu);
  m.impl("unpermute", unpermute_cpu);
  m.impl("unpermute_backward", unpermute_backward_cpu);
}

}  // namespace r1mega
