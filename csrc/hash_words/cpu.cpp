// hash_words_ on a CPU: tiles in parallel, the words of one in order.

#include "op.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

namespace r1mega {
namespace {

void hash_words_cpu(at::Tensor& sums, const at::Tensor& words_any, int64_t first) {
  check_hash_words(sums, words_any, first);
  const at::Tensor words = words_any.contiguous();
  const int64_t end = first + words.size(0);
  if (end == first) return;
  const uint32_t* word = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  uint32_t* sum = reinterpret_cast<uint32_t*>(sums.mutable_data_ptr<int32_t>());
  const int64_t tiles = sums.size(1);
  at::parallel_for(first / kTile, (end + kTile - 1) / kTile, 8, [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile) {
      uint32_t one = 0, two = 0;
      for (int64_t i = std::max(first, tile * kTile); i < std::min(end, (tile + 1) * kTile); ++i) {
        one += first_hash(word[i - first], static_cast<uint32_t>(i));
        two += second_hash(word[i - first], static_cast<uint32_t>(i));
      }
      sum[tile] += one;
      sum[tiles + tile] += two;
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) { m.impl("hash_words_", hash_words_cpu); }

}  // namespace r1mega
