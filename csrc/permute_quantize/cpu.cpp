// permute_quantize and its relatives on a CPU: by rows, each token is quantised once and copied to its rows; by columns, tiles of
// 128 rows are gathered, each of which is quantised as any matrix.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../quantize/tile.h"

namespace r1mega {
namespace {

std::tuple<at::Tensor, at::Tensor> permute_quantize_cpu(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows_any, bool power_of_two) {
  const auto [T, R, width, D] = check_permute_quantize("permute_quantize", tokens_any, row_tokens_any, token_rows_any);
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const at::Tensor token_rows = token_rows_any.contiguous();
  const int64_t blocks = blocks_of(D), R4 = padded_rows(R);
  const at::Tensor payload = payload_like(tokens, {R, D}), scales = row_scales(R, D, tokens, true);
  auto* bytes_out = bytes(payload);
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
          std::vector<uint8_t> codes(D);
          std::vector<float> scale(blocks);
          for (int64_t t = first; t < last; ++t) {
            for (int64_t b = 0; b < blocks; ++b) {
              const int64_t from = b * kBlock, to = std::min(D, from + kBlock);
              uint32_t largest = 0;
              for (int64_t d = from; d < to; ++d) largest = std::max(largest, magnitude(static_cast<float>(in[t * D + d])));
              scale[b] = block_scale(largest, power_of_two);
              const float inverse = block_inverse(scale[b]);
              for (int64_t d = from; d < to; ++d) codes[d] = to_e4m3(static_cast<float>(in[t * D + d]), inverse);
            }
            for (int64_t k = 0; k < width; ++k) {
              const int64_t r = rows_of[t * width + k];
              TORCH_CHECK_INDEX(r >= -1 && r < R, "permute_quantize: expected rows from -1 to ", R - 1, ", got ", r);
              if (r < 0) continue;
              std::copy(codes.begin(), codes.end(), bytes_out + r * D);
              for (int64_t b = 0; b < blocks; ++b) scales_out[b * R4 + r] = scale[b];
            }
          }
        });
      });
  return {payload, scales};
}

// Numbers of the token of a row; of padding, zeros.
template <typename T>
struct Gathered {
  Numbers<T> tokens;
  const int64_t* row_tokens;
  void fill(float* to, int64_t row, int64_t column, int64_t count) const {
    if (row_tokens[row] < 0) {
      std::fill_n(to, count, 0.0f);
    } else {
      tokens.fill(to, row_tokens[row], column, count);
    }
  }
};

std::tuple<at::Tensor, at::Tensor> permute_quantize_columns_cpu(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows, bool power_of_two) {
  const MoveSizes sizes = check_permute_quantize("permute_quantize_columns", tokens_any, row_tokens_any, token_rows);
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const int64_t* source = row_tokens.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < sizes.rows; ++r) {
    TORCH_CHECK_INDEX(
        source[r] >= -1 && source[r] < sizes.tokens, "permute_quantize_columns: expected tokens from -1 to ", sizes.tokens - 1,
        ", got ", source[r]);
  }
  std::tuple<at::Tensor, at::Tensor> result;
  on_numbers(tokens, [&](auto numbers) {
    result = columns_of(Gathered{numbers, source}, sizes.rows, sizes.hidden, tokens, power_of_two);
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> permute_quantize_both_cpu(
    const at::Tensor& tokens, const at::Tensor& row_tokens, const at::Tensor& token_rows, bool power_of_two) {
  return std::tuple_cat(
      permute_quantize_cpu(tokens, row_tokens, token_rows, power_of_two),
      permute_quantize_columns_cpu(tokens, row_tokens, token_rows, power_of_two));
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("permute_quantize", permute_quantize_cpu);
  m.impl("permute_quantize_columns", permute_quantize_columns_cpu);
  m.impl("permute_quantize_both", permute_quantize_both_cpu);
}

}  // namespace r1mega
