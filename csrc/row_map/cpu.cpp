// row_map on a CPU: each thread counts its span of tokens, the counts are summed in order, each thread numbers its span.

#include "op.h"

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

constexpr int64_t kSpan = 512;  // tokens a thread takes at least

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_map_cpu(
    const at::Tensor& map_any, int64_t num_rows, int64_t width, int64_t multiple) {
  const auto [T, E] = check_row_map(map_any, num_rows, width, multiple);
  const at::Tensor map = map_any.contiguous();
  const bool* chosen = map.const_data_ptr<bool>();
  const int64_t threads = at::get_num_threads();
  const int64_t span = std::max(kSpan, (T + threads - 1) / threads), spans = (T + span - 1) / span;

  std::vector<int64_t> next(spans * E, 0);  // [spans, E]: first the chosen tokens of a span, then the row of its next one
  std::vector<int64_t> most(spans, 0);      // most rows of a token
  at::parallel_for(0, spans, 1, [&, T = T, E = E](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      int64_t* count = next.data() + s * E;
      for (int64_t t = s * span; t < std::min(T, (s + 1) * span); ++t) {
        int64_t own = 0;
        for (int64_t e = 0; e < E; ++e) {
          count[e] += chosen[t * E + e];
          own += chosen[t * E + e];
        }
        most[s] = std::max(most[s], own);
      }
    }
  });

  const auto longs = map.options().dtype(at::kLong), ints = map.options().dtype(at::kInt);
  at::Tensor counts = at::empty({E}, longs), ends = at::empty({E}, ints);
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int32_t* end = ends.mutable_data_ptr<int32_t>();
  int64_t start = 0, total = 0;
  std::vector<int64_t> starts(E);
  for (int64_t e = 0; e < E; ++e) {
    int64_t row = start;
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t own = next[s * E + e];
      next[s * E + e] = row;
      row += own;
    }
    count[e] = row - start;
    total += count[e];
    starts[e] = start;
    start += padded(count[e], multiple);
    end[e] = static_cast<int32_t>(std::min(start, num_rows));
  }
  if (multiple == 1) {
    TORCH_CHECK_VALUE(total == num_rows, "row_map: expected as many rows as routing_map chooses, ", total, ", got ", num_rows);
  }
  TORCH_CHECK_VALUE(
      start <= num_rows, "row_map: expected at least ", start, " rows for multiples of ", multiple, ", got ", num_rows);
  const int64_t widest = spans ? *std::max_element(most.begin(), most.end()) : 0;
  TORCH_CHECK_VALUE(widest <= width, "row_map: expected a width of at least a token's rows, ", widest, ", got ", width);

  at::Tensor row_experts = at::full({num_rows}, -1, ints), row_tokens = at::full({num_rows}, -1, longs);
  at::Tensor token_rows = at::full({T, width}, -1, longs);
  int32_t* expert_of = row_experts.mutable_data_ptr<int32_t>();
  int64_t* token_of = row_tokens.mutable_data_ptr<int64_t>();
  int64_t* rows_of = token_rows.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < E; ++e) std::fill(expert_of + starts[e], expert_of + end[e], static_cast<int32_t>(e));
  at::parallel_for(0, spans, 1, [&, T = T, E = E](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      int64_t* row = next.data() + s * E;
      for (int64_t t = s * span; t < std::min(T, (s + 1) * span); ++t) {
        int64_t* slot = rows_of + t * width;
        const auto take = [&](int64_t e) {
          if (!chosen[t * E + e]) return;
          token_of[row[e]] = t;
          *slot++ = row[e]++;
        };
        int64_t e = 0;
        for (; e + 8 <= E; e += 8) {  // most are not chosen: eight are passed over at once
          uint64_t eight;
          std::memcpy(&eight, chosen + t * E + e, 8);
          if (eight == 0) continue;
          for (int64_t i = e; i < e + 8; ++i) take(i);
        }
        for (; e < E; ++e) take(e);
      }
    }
  });
  return {counts, ends, row_experts, row_tokens, token_rows};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) { m.impl("row_map", row_map_cpu); }

}  // namespace r1mega
