// accumulate_grouped_quantized_ on a CPU: some blocks of rows at a time are read back into fp32 and multiplied by torch.

#include "op.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/wide.h"

namespace r1mega {
namespace {

constexpr int64_t kRowsAtOnce = 8 * kBlock;  // of the batch: what is read back stays small beside out

R1MEGA_WIDE void read_back(const uint8_t* codes, float scale, float* to) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = from_e4m3(codes[i]) * scale;
}

// Columns `first` to `last` of a payload times their scales, [M, last - first] in fp32.
at::Tensor read_back(const at::Tensor& payload, const at::Tensor& scales, int64_t first, int64_t last) {
  const int64_t M = payload.size(0), R = payload.size(1), columns = last - first;
  at::Tensor wide = at::empty({M, columns}, payload.options().dtype(at::kFloat));
  const auto* codes = static_cast<const uint8_t*>(payload.const_data_ptr());
  const float* scale = scales.const_data_ptr<float>();
  const int64_t down = scales.stride(0), across = scales.stride(1);
  float* to = wide.mutable_data_ptr<float>();
  at::parallel_for(0, M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = first; at < last; at += kBlock)
        read_back(codes + row * R + at, scale[row * down + at / kBlock * across], to + row * columns + at - first);
    }
  });
  return wide;
}

void accumulate_quantized_cpu(
    at::Tensor& out, const at::Tensor& left_any, const at::Tensor& left_scales, const at::Tensor& right_any,
    const at::Tensor& right_scales, const at::Tensor& ends_any, bool overwrite) {
  const auto [experts, R, N, K] = check_accumulate_quantized(out, left_any, left_scales, right_any, right_scales, ends_any);
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor left = left_any.contiguous(), right = right_any.contiguous(), ends = ends_any.contiguous();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  int64_t first = 0;
  for (int64_t i = 0; i < experts; ++i) {  // before anything is added: a refused call has changed nothing
    TORCH_CHECK_VALUE(end[i] >= first && end[i] <= R && end[i] % kBlock == 0,
                      "accumulate_grouped_quantized_: expected ends of multiples of ", kBlock, " from ", first, " to ", R,
                      " for expert ", i, ", got ", end[i]);
    first = end[i];
  }
  if (out.numel() == 0) return;
  first = 0;
  for (int64_t i = 0; i < experts; ++i) {
    at::Tensor own = out.select(0, i);
    if (overwrite && first == end[i]) own.zero_();
    bool fresh = overwrite;
    for (; first < end[i]; first += kRowsAtOnce) {
      const int64_t last = std::min<int64_t>(first + kRowsAtOnce, end[i]);
      const at::Tensor rows = read_back(left, left_scales, first, last), others = read_back(right, right_scales, first, last).t();
      at::addmm_out(own, own, rows, others, fresh ? 0 : 1);  // at 0 what lies in out is not read
      fresh = false;
    }
    first = end[i];
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) { m.impl("accumulate_grouped_quantized_", accumulate_quantized_cpu); }

}  // namespace r1mega
