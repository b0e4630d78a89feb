// accumulate_product_ and accumulate_grouped_ on a CPU: torch's products, added in place.

#include "op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <torch/library.h>

namespace r1mega {
namespace {

// bf16 operands are widened, so that no product is rounded before it is added; they are M (N + K) numbers, the work is M N K.
void add_product(at::Tensor out, const at::Tensor& left, const at::Tensor& right, bool overwrite) {
  if (out.numel() == 0) return;
  if (left.size(0) == 0) {
    if (overwrite) out.zero_();
    return;
  }
  const at::Tensor left_t = left.to(at::kFloat).t(), wide = right.to(at::kFloat);
  at::addmm_out(out, out, left_t, wide, overwrite ? 0 : 1);  // at 0 what lies in out is not read
}

void accumulate_product_cpu(at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool overwrite) {
  check_accumulate_product(out, left, right);
  at::AutoDispatchBelowADInplaceOrView guard;
  add_product(out, left, right, overwrite);
}

void accumulate_grouped_cpu(
    at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends_any, bool overwrite) {
  const auto [experts, rows, N, K] = check_accumulate_grouped(out, left, right, ends_any);
  at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor ends = ends_any.contiguous();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  int64_t first = 0;
  for (int64_t i = 0; i < experts; ++i) {  // before anything is added: a refused call has changed nothing
    TORCH_CHECK_VALUE(end[i] >= first && end[i] <= rows, "accumulate_grouped_: expected ends from ", first, " to ", rows,
                      " for expert ", i, ", got ", end[i]);
    first = end[i];
  }
  first = 0;
  for (int64_t i = 0; i < experts; ++i) {
    add_product(out.select(0, i), left.slice(0, first, end[i]), right.slice(0, first, end[i]), overwrite);
    first = end[i];
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("accumulate_product_", accumulate_product_cpu);
  m.impl("accumulate_grouped_", accumulate_grouped_cpu);
}

}  // namespace r1mega
