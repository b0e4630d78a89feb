// mla_rope and its backward: what the kernels of all devices are called with, and the checks that they share.
//
// The contract (formula, order, rounding) is the docstring of r1mega/ops/mla_rope.py. Sizes and strides are int64 throughout.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>

#include <cstdint>

namespace r1mega {

struct RopeSizes {
  int64_t sequence, batch;           // S, B
  int64_t query_heads, key_heads;    // H of either; one of them may be 0
  int64_t nope, rope, value;         // widths of a head's parts
  C10_HOST_DEVICE int64_t tokens() const { return sequence * batch; }
  C10_HOST_DEVICE int64_t half() const { return rope / 2; }
  C10_HOST_DEVICE int64_t query_width() const { return nope + rope; }
  C10_HOST_DEVICE int64_t both_width() const { return nope + value; }
};

// Where a token's heads are: numbers from one to the next along S, B and H, 0 where there is one. The last dimension is dense.
struct RopeStrides {
  int64_t sequence, batch, head;
  explicit RopeStrides(const at::Tensor& t) : sequence(along(t, 0)), batch(along(t, 1)), head(t.dim() == 4 ? along(t, 2) : 0) {}

 private:
  static int64_t along(const at::Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : 0; }
};

inline at::Tensor dense_last(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline void check_angles(const char* op, const at::Tensor& first, const at::Tensor& cos, const at::Tensor& sin, int64_t sequence) {
  TORCH_CHECK_VALUE(
      cos.dim() == 2 && cos.size(0) == sequence && sin.sizes() == cos.sizes(), op, ": expected cos and sin [", sequence,
      ", rope / 2], got ", cos.sizes(), " and ", sin.sizes());
  const auto wanted = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(
      cos.scalar_type() == wanted && sin.scalar_type() == wanted, op, ": expected cos and sin of ", wanted, ", got ",
      cos.scalar_type(), " and ", sin.scalar_type());
}

inline void check_together(const char* op, const at::Tensor& first, const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      other.device() == first.device(), op, ": expected all tensors on ", first.device(), ", got one on ", other.device());
}

inline RopeSizes check_mla_rope(
    const at::Tensor& query, const at::Tensor& key_value, const at::Tensor& shared_key, const at::Tensor& cos,
    const at::Tensor& sin, int64_t nope) {
  constexpr const char* op = "mla_rope";
  TORCH_CHECK_VALUE(query.dim() == 4, op, ": expected query [S, B, H, nope + rope], got ", query.dim(), " dimensions");
  TORCH_CHECK_VALUE(key_value.dim() == 4, op, ": expected key_value [S, B, H, nope + v], got ", key_value.dim(), " dimensions");
  const int64_t S = query.size(0), B = query.size(1);
  TORCH_CHECK_VALUE(
      key_value.size(0) == S && key_value.size(1) == B, op, ": expected key_value of query's tokens [", S, ", ", B, "], got ",
      key_value.sizes());
  check_angles(op, query, cos, sin, S);
  const int64_t rope = 2 * cos.size(1);
  TORCH_CHECK_VALUE(
      nope >= 0 && query.size(3) == nope + rope, op, ": expected query heads of nope + rope, ", nope, " + ", rope, ", got ",
      query.size(3));
  TORCH_CHECK_VALUE(
      key_value.size(3) >= nope, op, ": expected key_value heads of nope + v, at least ", nope, ", got ", key_value.size(3));
  TORCH_CHECK_VALUE(
      shared_key.dim() == 3 && shared_key.size(0) == S && shared_key.size(1) == B && shared_key.size(2) == rope, op,
      ": expected shared_key [", S, ", ", B, ", ", rope, "], got ", shared_key.sizes());
  for (const at::Tensor* other : {&key_value, &shared_key}) {
    TORCH_CHECK_VALUE(
        other->scalar_type() == query.scalar_type(), op, ": expected query, key_value and shared_key of one dtype, got ",
        query.scalar_type(), " and ", other->scalar_type());
  }
  for (const at::Tensor* other : {&key_value, &shared_key, &cos, &sin}) check_together(op, query, *other);
  return {S, B, query.size(2), key_value.size(2), nope, rope, key_value.size(3) - nope};
}

inline RopeSizes check_mla_rope_backward(
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value, const at::Tensor& cos,
    const at::Tensor& sin, int64_t nope) {
  constexpr const char* op = "mla_rope_backward";
  TORCH_CHECK_VALUE(
      grad_query.dim() == 4 && grad_key.dim() == 4 && grad_value.dim() == 4, op,
      ": expected grad_query, grad_key and grad_value [S, B, H, width], got ", grad_query.dim(), ", ", grad_key.dim(), " and ",
      grad_value.dim(), " dimensions");
  const int64_t S = grad_query.size(0), B = grad_query.size(1), H = grad_key.size(2);
  check_angles(op, grad_query, cos, sin, S);
  const int64_t rope = 2 * cos.size(1);
  TORCH_CHECK_VALUE(
      nope >= 0 && grad_query.size(3) == nope + rope && grad_key.size(3) == nope + rope, op,
      ": expected gradients of query and key of width nope + rope, ", nope, " + ", rope, ", got ", grad_query.size(3), " and ",
      grad_key.size(3));
  TORCH_CHECK_VALUE(
      grad_key.size(0) == S && grad_key.size(1) == B && grad_value.size(0) == S && grad_value.size(1) == B &&
          grad_value.size(2) == H,
      op, ": expected gradients of the same tokens and heads, got ", grad_query.sizes(), ", ", grad_key.sizes(), " and ",
      grad_value.sizes());
  for (const at::Tensor* other : {&grad_key, &grad_value}) {
    TORCH_CHECK_VALUE(
        other->scalar_type() == grad_query.scalar_type(), op, ": expected gradients of one dtype, got ", grad_query.scalar_type(),
        " and ", other->scalar_type());
  }
  for (const at::Tensor* other : {&grad_key, &grad_value, &cos, &sin}) check_together(op, grad_query, *other);
  return {S, B, grad_query.size(2), H, nope, rope, grad_value.size(3)};
}

}  // namespace r1mega
