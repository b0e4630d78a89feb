// permute_quantize on a CPU: each token is quantised once and copied to its rows.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/fp8.h"

namespace r1mega {
namespace {

std::tuple<at::Tensor, at::Tensor> permute_quantize_cpu(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows_any, bool power_of_two) {
  const auto [T, R, width, D] = check_permute_quantize(tokens_any, row_tokens_any, token_rows_any);
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const at::Tensor token_rows = token_rows_any.contiguous();
  const int64_t blocks = (D + kBlock - 1) / kBlock, R4 = (R + 3) / 4 * 4;
  at::Tensor payload = at::empty({R, D}, tokens.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scales = at::zeros({blocks, R4}, tokens.options().dtype(at::kFloat));
  auto* bytes_out = static_cast<uint8_t*>(payload.mutable_data_ptr());
  float* scales_out = scales.mutable_data_ptr<float>();
  const int64_t *source = row_tokens.const_data_ptr<int64_t>(), *rows_of = token_rows.const_data_ptr<int64_t>();

  for (int64_t r = 0; r < R; ++r) {
    if (source[r] >= 0) continue;
    std::fill_n(bytes_out + r * D, D, uint8_t(0));
    for (int64_t b = 0; b < blocks; ++b) scales_out[b * R4 + r] = block_scale(0, power_of_two);
  }
  AT_DISPATCH_FLOATING_TYPES_AND(
      at::kBFloat16, tokens.scalar_type(), "permute_quantize", [&, T = T, R = R, width = width, D = D] {
        const scalar_t* in = tokens.const_data_ptr<scalar_t>();
        at::parallel_for(0, T, std::max<int64_t>(1, 8192 / std::max<int64_t>(D, 1)), [&](int64_t first, int64_t last) {
          std::vector<uint8_t> bytes(D);
          std::vector<float> scale(blocks);
          for (int64_t t = first; t < last; ++t) {
            for (int64_t b = 0; b < blocks; ++b) {
              const int64_t from = b * kBlock, to = std::min(D, from + kBlock);
              uint32_t largest = 0;
              for (int64_t d = from; d < to; ++d) largest = std::max(largest, magnitude(static_cast<float>(in[t * D + d])));
              scale[b] = block_scale(largest, power_of_two);
              const float inverse = 1.0f / scale[b];
              for (int64_t d = from; d < to; ++d) bytes[d] = to_e4m3(static_cast<float>(in[t * D + d]), inverse);
            }
            for (int64_t k = 0; k < width; ++k) {
              const int64_t r = rows_of[t * width + k];
              TORCH_CHECK_INDEX(r >= -1 && r < R, "permute_quantize: expected rows from -1 to ", R - 1, ", got ", r);
              if (r < 0) continue;
              std::copy(bytes.begin(), bytes.end(), bytes_out + r * D);
              for (int64_t b = 0; b < blocks; ++b) scales_out[b * R4 + r] = scale[b];
            }
          }
        });
      });
  return {payload, scales.t().narrow(0, 0, R)};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) { m.impl("permute_quantize", permute_quantize_cpu); }

}  // namespace r1mega
