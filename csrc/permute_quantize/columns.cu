// permute_quantize_columns and permute_quantize_both on a GPU: the kernel of quantisation (csrc/quantize/kernel.cuh) over rows that
// are gathered while they are read.
//
// A row's number is read as often as its token has rows, mostly from the L2: blocks go down all rows of a stripe of columns before
// they go on to the next stripe, and a stripe is as wide as lets its share of the tokens stay there.

#include "op.h"

#include <torch/library.h>

#include <tuple>

#include "../quantize/kernel.cuh"

namespace r1mega {
namespace {

constexpr int64_t kHeld = 8 << 20;  // bytes of a stripe of the tokens, beside what is being written to the same L2

// Numbers of the token of a row; of padding, zeros. `stripe`: tiles of 128 columns.
template <typename T>
struct Gathered : Numbers<T> {
  static constexpr bool kStriped = true;
  const int64_t* __restrict__ row_tokens;
  int64_t num_tokens;
  uint32_t stripe;

  __device__ void place(uint32_t index, uint32_t down, uint32_t across, uint32_t& tile_row, uint32_t& tile_column) const {
    const uint32_t first = index / (down * stripe) * stripe, wide = min(stripe, across - first), rest = index - first * down;
    tile_row = rest / wide;
    tile_column = first + rest % wide;
  }
  template <int kCount>
  __device__ void read(typename Numbers<T>::Chunk (&chunk)[kCount], int64_t row, int64_t column, int64_t left) const {
    int64_t token[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) token[i] = i < left ? row_tokens[row + i] : -1;
    const T* from = this->x + column;
    const int64_t there = this->columns - column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (token[i] >= num_tokens) token[i] = -1;
    }
    if (this->aligned) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto* words = reinterpret_cast<const uint4*>(from + token[i] * this->columns);
        this->set(chunk[i], token[i] >= 0 && there > 0 ? __ldg(words) : make_uint4(0, 0, 0, 0));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) this->read_some(chunk[i], from + token[i] * this->columns, token[i] >= 0 ? there : 0);
    }
  }
};

// Launches `with` on the source of these tokens' rows.
template <typename With>
void on_gathered(const at::Tensor& tokens, const at::Tensor& row_tokens, With with) {
  const auto make = [&](auto number) {
    using T = decltype(number);
    const int64_t T_size = tokens.size(0), across = ceil_div(tokens.size(1), kSide);
    const int64_t tile = std::max<int64_t>(1, T_size) * kSide * static_cast<int64_t>(sizeof(T));
    const auto stripe = static_cast<uint32_t>(std::clamp<int64_t>(kHeld / tile, 1, std::max<int64_t>(across, 1)));
    with(Gathered<T>{numbers<T>(tokens), row_tokens.const_data_ptr<int64_t>(), T_size, stripe});
  };
  tokens.scalar_type() == at::kFloat ? make(float{}) : make(__nv_bfloat16{});
}

std::tuple<at::Tensor, at::Tensor> permute_quantize_columns_cuda(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows, bool power_of_two) {
  const MoveSizes sizes = check_permute_quantize("permute_quantize_columns", tokens_any, row_tokens_any, token_rows);
  const c10::cuda::CUDAGuard guard(tokens_any.device());
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const int64_t R = sizes.rows, D = sizes.hidden;
  const at::Tensor payload_t = payload_like(tokens, {D, R}), scales_t = row_scales(D, R, tokens, false);
  on_gathered(tokens, row_tokens, [&](const auto& from) {
    launch<Scales::kNone, true>(from, {1, R, D}, power_of_two, {}, out_of(payload_t, scales_t));
  });
  return {payload_t, scales_t};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> permute_quantize_both_cuda(
    const at::Tensor& tokens_any, const at::Tensor& row_tokens_any, const at::Tensor& token_rows, bool power_of_two) {
  const MoveSizes sizes = check_permute_quantize("permute_quantize_both", tokens_any, row_tokens_any, token_rows);
  const c10::cuda::CUDAGuard guard(tokens_any.device());
  const at::Tensor tokens = tokens_any.contiguous(), row_tokens = row_tokens_any.contiguous();
  const int64_t R = sizes.rows, D = sizes.hidden;
  const at::Tensor payload = payload_like(tokens, {R, D}), scales = row_scales(R, D, tokens, false);
  const at::Tensor payload_t = payload_like(tokens, {D, R}), scales_t = row_scales(D, R, tokens, false);
  on_gathered(tokens, row_tokens, [&](const auto& from) {
    launch<Scales::kOfRows, true>(from, {1, R, D}, power_of_two, out_of(payload, scales), out_of(payload_t, scales_t));
  });
  return {payload, scales, payload_t, scales_t};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CUDA, m) {
  m.impl("permute_quantize_columns", permute_quantize_columns_cuda);
  m.impl("permute_quantize_both", permute_quantize_both_cuda);
}

}  // namespace r1mega
