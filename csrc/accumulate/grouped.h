// The Hopper kernel behind accumulate_grouped_, for the shapes that it takes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

// True where accumulate_grouped_wgmma takes these: a Hopper GPU, bf16 operands that lie contiguous, N and K multiples of 8, an `out` of
// some numbers.
bool fits_wgmma(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right);

void accumulate_grouped_wgmma(
    const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, const at::Tensor& ends, bool overwrite);

}  // namespace r1mega
