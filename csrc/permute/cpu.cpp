// permute and unpermute on a CPU: the readable kernels. Bit for bit the plain-torch reference of r1mega/ops/permute.py.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> permute_cpu(
    const at::Tensor& tokens_any, const at::Tensor& probs_any, const at::Tensor& map_any, int64_t num_rows, int64_t width) {
  const auto [T, D, E] = check_permute(tokens_any, probs_any, map_any, num_rows, width);
  const at::Tensor tokens = tokens_any.contiguous(), probs = probs_any.contiguous(), map = map_any.contiguous();
  const auto longs = map.options().dtype(at::kLong);
  at::Tensor counts = at::full({E}, 0, longs);
  const bool* chosen = map.const_data_ptr<bool>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t total = 0, most = 0;
  for (int64_t t = 0; t < T; ++t) {
    int64_t own = 0;
    for (int64_t e = 0; e < E; ++e) {
      count[e] += chosen[t * E + e];
      own += chosen[t * E + e];
    }
    total += own;
    most = std::max(most, own);
  }
  TORCH_CHECK_VALUE(total == num_rows, "permute: expected as many rows as routing_map chooses, ", total, ", got ", num_rows);
  TORCH_CHECK_VALUE(most <= width, "permute: expected a width of at least a token's rows, ", most, ", got ", width);

  at::Tensor rows = at::empty({num_rows, D}, tokens.options());
  at::Tensor row_probs = at::empty({num_rows}, probs.options());
  at::Tensor row_tokens = at::empty({num_rows}, longs);
  at::Tensor token_rows = at::full({T, width}, -1, longs);
  std::vector<int64_t> next(E, 0);  // the row that the next token of an expert gets
  for (int64_t e = 1; e < E; ++e) next[e] = next[e - 1] + count[e - 1];
  int64_t* source = row_tokens.mutable_data_ptr<int64_t>();
  int64_t* back = token_rows.mutable_data_ptr<int64_t>();
  const auto prob_bytes = static_cast<int64_t>(probs.element_size());
  const char* prob_in = static_cast<const char*>(probs.const_data_ptr());
  char* prob_out = static_cast<char*>(row_probs.mutable_data_ptr());
  for (int64_t t = 0; t < T; ++t) {
    int64_t slot = t * width;
    for (int64_t e = 0; e < E; ++e) {
      if (!chosen[t * E + e]) continue;
      const int64_t row = next[e]++;
      source[row] = t;
      back[slot++] = row;
      std::memcpy(prob_out + row * prob_bytes, prob_in + (t * E + e) * prob_bytes, prob_bytes);
    }
  }
  const int64_t row_bytes = D * static_cast<int64_t>(tokens.element_size());
  if (row_bytes == 0) return {rows, row_probs, counts, row_tokens, token_rows};
  const char* in = static_cast<const char*>(tokens.const_data_ptr());
  char* out = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(D, 1)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) std::memcpy(out + row * row_bytes, in + source[row] * row_bytes, row_bytes);
  });
  return {rows, row_probs, counts, row_tokens, token_rows};
}

at::Tensor unpermute_cpu(const at::Tensor& rows_any, const at::Tensor& token_rows_any, const at::Tensor& row_tokens) {
  check_unpermute(rows_any, token_rows_any, row_tokens);
  const at::Tensor rows = rows_any.contiguous(), token_rows = token_rows_any.contiguous();
  const int64_t R = rows.size(0), D = rows.size(1), T = token_rows.size(0), width = token_rows.size(1);
  const int64_t* back = token_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < T * width; ++i) {
    TORCH_CHECK_INDEX(back[i] >= -1 && back[i] < R, "unpermute: expected rows from -1 to ", R - 1, ", got ", back[i]);
  }
  at::Tensor tokens = at::empty({T, D}, rows.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "unpermute", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* in = rows.const_data_ptr<scalar_t>();
    scalar_t* out = tokens.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(D * width, 1));
    at::parallel_for(0, T, grain, [&](int64_t first, int64_t last) {
      std::vector<acc_t> sum(D);
      for (int64_t t = first; t < last; ++t) {
        std::fill(sum.begin(), sum.end(), acc_t(0));
        for (int64_t k = 0; k < width; ++k) {
          const int64_t row = back[t * width + k];
          if (row < 0) continue;
          for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<acc_t>(in[row * D + d]);
        }
        for (int64_t d = 0; d < D; ++d) out[t * D + d] = static_cast<scalar_t>(sum[d]);
      }
    });
  });
  return tokens;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("permute", permute_cpu);
  m.impl("unpermute", unpermute_cpu);
}

}  // namespace r1mega
