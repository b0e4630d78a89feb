// route and route_backward: what the kernels of all devices are called with, the checks and the order of scores that they share.
//
// The contract (formulas, ties, NaN) is the docstring of r1mega/ops/route.py.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "../common/fp8.h"

namespace r1mega {

enum class Score { kSigmoid, kSoftmax, kTopkSoftmax };

struct RouteSizes {
  int64_t tokens;       // T
  int64_t experts;      // E
  int64_t groups;       // G, at least 1
  int64_t kept;         // groups that a token's experts come from
  int64_t group_size;   // E / G
  int64_t group_best;   // experts of a group whose scores are the group's
  Score score;
};

inline Score score_of(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(
      name == "sigmoid" || name == "softmax" || name == "topk_softmax", op,
      ": expected a score_function sigmoid, softmax or topk_softmax, got ", name);
  return name == "sigmoid" ? Score::kSigmoid : name == "softmax" ? Score::kSoftmax : Score::kTopkSoftmax;
}

inline void check_logits(const char* op, const at::Tensor& logits, int64_t top_k) {
  TORCH_CHECK_VALUE(logits.dim() == 2, op, ": expected logits [T, E], got ", logits.dim(), " dimensions");
  const at::ScalarType type = logits.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kDouble, op,
      ": expected logits of float32, bfloat16 or float64, got ", type);
  TORCH_CHECK_VALUE(
      top_k >= 1 && top_k <= logits.size(1), op, ": expected a top_k from 1 to the experts, ", logits.size(1), ", got ", top_k);
}

inline RouteSizes check_route(
    const at::Tensor& logits, const std::optional<at::Tensor>& bias, int64_t top_k, int64_t num_groups, int64_t topk_groups,
    std::string_view score_function) {
  check_logits("route", logits, top_k);
  RouteSizes sizes{logits.size(0), logits.size(1), 1, 1, logits.size(1), 1, score_of("route", score_function)};
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(sizes.score == Score::kSigmoid, "route: expected no bias beside ", score_function, ", got one");
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == sizes.experts && bias->is_floating_point(), "route: expected a bias [", sizes.experts,
        "] of a floating type, got ", bias->sizes(), " of ", bias->scalar_type());
    TORCH_CHECK_VALUE(
        bias->device() == logits.device(), "route: expected the bias on ", logits.device(), ", got ", bias->device());
  }
  TORCH_CHECK_VALUE(num_groups >= 0, "route: expected num_groups of at least 0, got ", num_groups);
  if (num_groups <= 1) return sizes;
  TORCH_CHECK_VALUE(
      sizes.experts % num_groups == 0, "route: expected num_groups that divides the experts, ", sizes.experts, ", got ",
      num_groups);
  TORCH_CHECK_VALUE(
      topk_groups >= 1 && topk_groups <= num_groups, "route: expected topk_groups from 1 to num_groups, ", num_groups, ", got ",
      topk_groups);
  sizes.groups = num_groups, sizes.kept = topk_groups, sizes.group_size = sizes.experts / num_groups;
  TORCH_CHECK_VALUE(
      top_k >= topk_groups && top_k <= topk_groups * sizes.group_size,
      "route: expected a top_k from topk_groups to their experts, ", topk_groups, " to ", topk_groups * sizes.group_size, ", got ", top_k);
  sizes.group_best = top_k / topk_groups;
  return sizes;
}

inline Score check_route_backward(
    const at::Tensor& grad_probs, const at::Tensor& logits, const at::Tensor& routing_map, std::string_view score_function,
    int64_t top_k) {
  check_logits("route_backward", logits, top_k);
  TORCH_CHECK_VALUE(
      grad_probs.sizes() == logits.sizes() && grad_probs.scalar_type() == logits.scalar_type() &&
          grad_probs.device() == logits.device(),
      "route_backward: expected grad_probs like logits, ", logits.sizes(), " of ", logits.scalar_type(), ", got ",
      grad_probs.sizes(), " of ", grad_probs.scalar_type());
  TORCH_CHECK_VALUE(
      routing_map.sizes() == logits.sizes() && routing_map.scalar_type() == at::kBool && routing_map.device() == logits.device(),
      "route_backward: expected routing_map of bool, ", logits.sizes(), ", got ", routing_map.sizes(), " of ",
      routing_map.scalar_type());
  return score_of("route_backward", score_function);
}

// A score as an unsigned integer that orders as a stable descending sort takes it: NaN above all, -0 as 0. No score's is 0, which
// stands for "not to be chosen".
constexpr uint32_t kNanKey = 0xffffffffu;

C10_HOST_DEVICE inline uint32_t order_key(float score) {
  const uint32_t bits = float_bits(score + 0.0f);  // -0 + 0 is 0
  if ((bits & 0x7fffffffu) > 0x7f800000u) return kNanKey;
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// The score of an order_key; NaN of kNanKey.
C10_HOST_DEVICE inline float key_score(uint32_t key) { return bits_float((key & 0x80000000u) ? key ^ 0x80000000u : ~key); }

}  // namespace r1mega
