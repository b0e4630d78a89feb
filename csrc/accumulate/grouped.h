// The Hopper kernel behind accumulate_grouped_, for the shapes that it takes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

// True where accumulate_grouped_wgmma takes these: bf16 operands that lie contiguous, and an `out` with a multiple of 256 rows an
// expert and a multiple of 8 columns.
bool fits_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

void accumulate_grouped_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends);

}  // namespace r1mega
