// Every op's schema: the index of our kernels. The text of each stands in its Python file too (r1mega/ops/), which defines it where
// this library is not built; a test compares the two.

#include <torch/library.h>

#if __has_include("r1mega_build.h")
#include "r1mega_build.h"  // setup.py's
#else
#define R1MEGA_BUILD ""
#endif

// What this library was built for, read from the file by r1mega/ops/build.py before anything is loaded.
extern "C" __attribute__((used, visibility("default"))) const char r1mega_build[] = "r1mega-build:" R1MEGA_BUILD ";";

TORCH_LIBRARY(r1mega, m) {
  m.def("accumulate_product_(Tensor(a!) out, Tensor left, Tensor right, bool overwrite=False) -> ()");
  m.def("accumulate_grouped_(Tensor(a!) out, Tensor left, Tensor right, Tensor ends, bool overwrite=False) -> ()");
  m.def(
      "accumulate_grouped_quantized_(Tensor(a!) out, Tensor left, Tensor left_scales, Tensor right, Tensor right_scales, "
      "Tensor ends, bool overwrite=False) "
      "-> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
      "Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, float? grad_scale) "
      "-> ()");
  m.def("cross_entropy(Tensor logits, Tensor targets, SymInt first) -> (Tensor log_sum, Tensor target)");
  m.def("cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor log_sum, Tensor grad, SymInt first) -> ()");
  m.def("hash_words_(Tensor(a!) sums, Tensor words, int first) -> ()");
  m.def(
      "mla_rope(Tensor query, Tensor key_value, Tensor shared_key, Tensor cos, Tensor sin, SymInt nope) "
      "-> (Tensor turned_query, Tensor key, Tensor value)");
  m.def(
      "mla_rope_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, Tensor sin, SymInt nope) "
      "-> (Tensor grad_query, Tensor grad_key_value, Tensor grad_shared_key)");
  m.def("permute(Tensor tokens, Tensor row_tokens, Tensor token_rows) -> Tensor rows");
  m.def("permute_probs(Tensor probs, Tensor row_tokens, Tensor row_experts) -> Tensor row_probs");
  m.def(
      "permute_probs_backward(Tensor grad_row_probs, Tensor row_tokens, Tensor row_experts, SymInt num_tokens, "
      "SymInt num_experts) "
      "-> Tensor grad_probs");
  m.def("unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens, Tensor? row_probs=None) -> Tensor tokens");
  m.def(
      "unpermute_backward(Tensor grad_tokens, Tensor rows, Tensor row_tokens, Tensor token_rows, Tensor row_probs) "
      "-> (Tensor grad_rows, Tensor grad_row_probs)");
  m.def(
      "permute_quantize(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
      "-> (Tensor payload, Tensor scales)");
  m.def(
      "permute_quantize_columns(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
      "-> (Tensor payload_t, Tensor scales_t)");
  m.def(
      "permute_quantize_both(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
      "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)");
  m.def("quantize_rows(Tensor x, bool power_of_two) -> (Tensor payload, Tensor scales)");
  m.def("quantize_columns(Tensor x, bool power_of_two) -> (Tensor payload_t, Tensor scales_t)");
  m.def("quantize_both(Tensor x, bool power_of_two) -> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)");
  m.def(
      "quantize_blocks(Tensor x, bool power_of_two, bool transposed) "
      "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t)");
  m.def("dequantize_rows(Tensor payload, Tensor scales, ScalarType dtype) -> Tensor x");
  m.def("requantize_columns(Tensor payload, Tensor scales, bool power_of_two) -> (Tensor payload_t, Tensor scales_t)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("rms_norm_quantize(Tensor x, Tensor weight, float eps, bool power_of_two) -> (Tensor payload, Tensor scales, Tensor rstd)");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, int num_groups, int topk_groups, str score_function, float scale) "
      "-> (Tensor probs, Tensor routing_map, Tensor counts, Tensor offsets)");
  m.def(
      "route_backward(Tensor grad_probs, Tensor logits, Tensor routing_map, str score_function, int top_k, float scale) "
      "-> Tensor");
  m.def(
      "row_map(Tensor routing_map, SymInt num_rows, SymInt width, SymInt multiple) "
      "-> (Tensor counts, Tensor ends, Tensor row_experts, Tensor row_tokens, Tensor token_rows)");
  m.def("swiglu(Tensor hidden, Tensor? probs) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor hidden, Tensor? probs) -> (Tensor grad_hidden, Tensor grad_probs)");
  m.def(
      "swiglu_quantize(Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) "
      "-> (Tensor payload, Tensor scales)");
  m.def(
      "swiglu_backward_quantize(Tensor grad, Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) "
      "-> (Tensor grad_hidden, Tensor payload, Tensor scales, Tensor grad_probs, Tensor activation)");
  m.def(
      "swiglu_backward_quantize_columns(Tensor grad, Tensor hidden, Tensor? hidden_scales, Tensor? probs, bool power_of_two) "
      "-> (Tensor payload, Tensor scales, Tensor payload_t, Tensor scales_t, Tensor activation_t, Tensor activation_scales_t, "
      "Tensor grad_probs)");
  m.def(
      "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, int num_tokens, float scale) "
      "-> (Tensor logprobs, Tensor entropy, Tensor log_sum)");
  m.def(
      "token_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor log_sum, Tensor entropy, int num_tokens, float scale) "
      "-> (Tensor grad_hidden, Tensor grad_weight)");
}
