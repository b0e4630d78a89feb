// The Hopper kernel behind accumulate_grouped_quantized_, for what it takes.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace r1mega {

// A payload [M, R], contiguous, and its scales: memory [R / 128, padded_rows(M)].
struct Operand {
  at::Tensor payload, scales;
};

// True where accumulate_quantized_wgmma takes these: a Hopper GPU, payloads, scales and out that begin at multiples of 16 bytes, K a
// multiple of 4, some rows of the batch and some numbers of out. N is any.
bool fits_quantized_wgmma(const at::Tensor& out, const Operand& left, const Operand& right);

void accumulate_quantized_wgmma(const at::Tensor& out, const Operand& left, const Operand& right, const at::Tensor& ends, bool overwrite);

}  // namespace r1mega
