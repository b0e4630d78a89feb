// token_logprobs and token_logprobs_backward: checks, the size of pieces, and the walk over pieces of the vocabulary that all devices
// share. A device adds two kernels: one folds a piece of logits into each token's sums, one turns a piece into its gradient in place.
//
// The contract (formula, equations, accumulation) is the docstring of r1mega/ops/token_logprobs.py.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

namespace r1mega {

struct LogprobSizes {
  int64_t tokens;  // T
  int64_t hidden;  // D
};

inline LogprobSizes check_token_logprobs(
    const char* name, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, int64_t num_tokens,
    double scale) {
  TORCH_CHECK_VALUE(scale > 0, name, ": expected a scale above 0, got ", scale);
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1), name,
                    ": expected hidden [T, D] and weight [V, D], got ", hidden.sizes(), " and ", weight.sizes());
  const auto dtype = hidden.scalar_type();
  TORCH_CHECK_VALUE(
      weight.scalar_type() == dtype && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble), name,
      ": expected hidden and weight both of bfloat16, float32 or float64, got ", dtype, " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == at::kLong, name,
                    ": expected targets [", hidden.size(0), "] of int64, got ", targets.sizes(), " of ", targets.scalar_type());
  TORCH_CHECK_VALUE(num_tokens >= 1 && num_tokens <= weight.size(0), name, ": expected num_tokens from 1 to ", weight.size(0),
                    ", got ", num_tokens);
  TORCH_CHECK_VALUE(weight.device() == hidden.device() && targets.device() == hidden.device(), name, ": expected all on ",
                    hidden.device(), ", got ", weight.device(), " and ", targets.device());
  return {hidden.size(0), hidden.size(1)};
}

inline void check_token_gradients(const at::Tensor& hidden, std::initializer_list<at::Tensor> per_token) {
  const auto wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const at::Tensor& one : per_token) {
    TORCH_CHECK_VALUE(
        one.dim() == 1 && one.size(0) == hidden.size(0) && one.scalar_type() == wide && one.device() == hidden.device(),
        "token_logprobs_backward: expected gradients, log_sum and entropy [", hidden.size(0), "] of ", wide, " on ", hidden.device(),
        ", got ", one.sizes(), " of ", one.scalar_type(), " on ", one.device());
  }
}

// What the logits of one product are, and where they lie: columns `first` to `first + count` of the vocabulary, `stride` numbers a row.
struct Piece {
  void* logits;
  int64_t tokens, first, count, stride;
  bool is_first, is_last;
  double scale;  // what the logits are multiplied by: one over the temperature
};

// Columns of a piece: of at most `bytes`, at least 512, a multiple of 128, and all pieces about as wide.
inline int64_t piece_columns(int64_t tokens, int64_t vocabulary, int64_t bytes) {
  const int64_t most = std::max<int64_t>(512, bytes / std::max<int64_t>(1, 4 * tokens) / 128 * 128);
  const int64_t pieces = (vocabulary + most - 1) / most;
  return ((vocabulary + pieces - 1) / pieces + 127) / 128 * 128;
}

// Walks the vocabulary: `visit(piece, logits [T, count], rows of weight [count, D])`.
// A CPU multiplies bf16 in fp32, since its bf16 products are rounded.
template <typename Visit>
void for_each_piece(const at::Tensor& hidden, const at::Tensor& weight, int64_t num_tokens, double scale, int64_t bytes, Visit visit) {
  const auto wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t T = hidden.size(0), columns = piece_columns(T, num_tokens, bytes);
  const at::Tensor buffer = at::empty({T, columns}, hidden.options().dtype(wide));
  for (int64_t first = 0; first < num_tokens; first += columns) {
    const int64_t count = std::min(columns, num_tokens - first);
    at::Tensor logits = buffer.slice(1, 0, count);
    const at::Tensor rows = weight.slice(0, first, first + count).to(hidden.scalar_type());
    if (hidden.scalar_type() == at::kBFloat16) {
      at::mm_outf(hidden, rows.t(), at::kFloat, logits);
    } else {
      at::mm_out(logits, hidden, rows.t());
    }
    visit(Piece{buffer.data_ptr(), T, first, count, columns, first == 0, first + count == num_tokens, scale}, logits, rows);
  }
}

// `fold(piece, targets, state [4, T], logprobs, entropy, log_sum)`: state is the largest logit z, the sum of e^(z - largest), that of
// e^(z - largest) (z - largest) and the target's logit; the last piece writes the three results.
template <typename Fold>
std::tuple<at::Tensor, at::Tensor, at::Tensor> token_logprobs_of(
    const at::Tensor& hidden_any, const at::Tensor& weight_any, const at::Tensor& targets_any, int64_t num_tokens, double scale,
    int64_t bytes, Fold fold) {
  const int64_t T = check_token_logprobs("token_logprobs", hidden_any, weight_any, targets_any, num_tokens, scale).tokens;
  at::AutoDispatchBelowADInplaceOrView guard;
  const bool widened = hidden_any.is_cpu() && hidden_any.scalar_type() == at::kBFloat16;
  const at::Tensor hidden = hidden_any.to(widened ? at::kFloat : hidden_any.scalar_type()).contiguous();
  const at::Tensor weight = weight_any.contiguous(), targets = targets_any.contiguous();
  const auto numbers = hidden.options().dtype(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  at::Tensor logprobs = at::empty({T}, numbers), entropy = at::empty({T}, numbers), log_sum = at::empty({T}, numbers);
  if (T == 0) return {logprobs, entropy, log_sum};
  const at::Tensor state = at::empty({4, T}, numbers);
  for_each_piece(hidden, weight, num_tokens, scale, bytes, [&](const Piece& piece, const at::Tensor&, const at::Tensor&) {
    fold(piece, targets, state, logprobs, entropy, log_sum);
  });
  return {logprobs, entropy, log_sum};
}

// `turn(piece, targets, log_sum, entropy, grad_logprobs, grad_entropy)` writes the gradient over the logits, as numbers of hidden's
// type: bf16 ones lie at the start of each row.
template <typename Turn>
std::tuple<at::Tensor, at::Tensor> token_logprobs_gradients(
    const at::Tensor& grad_logprobs_any, const at::Tensor& grad_entropy_any, const at::Tensor& hidden_any, const at::Tensor& weight_any,
    const at::Tensor& targets_any, const at::Tensor& log_sum_any, const at::Tensor& entropy_any, int64_t num_tokens, double scale,
    int64_t bytes, Turn turn) {
  const auto [T, D] = check_token_logprobs("token_logprobs_backward", hidden_any, weight_any, targets_any, num_tokens, scale);
  check_token_gradients(hidden_any, {grad_logprobs_any, grad_entropy_any, log_sum_any, entropy_any});
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto given = hidden_any.scalar_type();
  const bool widened = hidden_any.is_cpu() && given == at::kBFloat16;
  const at::Tensor hidden = hidden_any.to(widened ? at::kFloat : given).contiguous(), weight = weight_any.contiguous();
  const at::Tensor targets = targets_any.contiguous(), log_sum = log_sum_any.contiguous(), entropy = entropy_any.contiguous();
  const at::Tensor grad_logprobs = grad_logprobs_any.contiguous(), grad_entropy = grad_entropy_any.contiguous();
  const auto kind = hidden.scalar_type();
  if (T == 0) return {at::zeros({T, D}, hidden_any.options()), at::zeros(weight.sizes(), weight.options())};
  at::Tensor grad_hidden = at::empty({T, D}, hidden.options().dtype(kind == at::kDouble ? at::kDouble : at::kFloat));
  at::Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  grad_weight.slice(0, num_tokens).zero_();
  for_each_piece(hidden, weight, num_tokens, scale, bytes, [&](const Piece& piece, const at::Tensor& logits, const at::Tensor& rows) {
    turn(piece, targets, log_sum, entropy, grad_logprobs, grad_entropy);
    at::Tensor grads = logits;  // [T, count]
    if (kind == at::kBFloat16) grads = logits.as_strided({T, piece.stride}, {piece.stride, 1}).view(kind).slice(1, 0, piece.count);
    // a piece of the vocabulary has rows of the weight's gradient to itself; the hidden states' is a sum over pieces, in fp32
    at::Tensor own = grad_weight.slice(0, piece.first, piece.first + piece.count);
    if (widened) {
      own.copy_(at::mm(grads.t(), hidden));
    } else {
      at::mm_out(own, grads.t(), hidden);
    }
    if (kind == at::kBFloat16 && piece.is_first) {
      at::mm_outf(grads, rows, at::kFloat, grad_hidden);
    } else if (kind == at::kBFloat16) {
      at::addmm_outf(grad_hidden, grads, rows, at::kFloat, 1, 1, grad_hidden);
    } else if (piece.is_first) {
      at::mm_out(grad_hidden, grads, rows);
    } else {
      at::addmm_out(grad_hidden, grad_hidden, grads, rows);
    }
  });
  return {grad_hidden.to(given), grad_weight};
}

}  // namespace r1mega
