// Every op's schema: the index of our kernels. The text of each stands in its Python file too (r1mega/ops/), which defines it where
// this library is not built; a test compares the two.

#include <torch/library.h>

TORCH_LIBRARY(r1mega, m) {
  m.def(
      "permute(Tensor tokens, Tensor probs, Tensor routing_map, SymInt num_rows, SymInt width) "
      "-> (Tensor rows, Tensor row_probs, Tensor counts, Tensor row_tokens, Tensor token_rows)");
  m.def("unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens) -> Tensor tokens");
  m.def("accumulate_product_(Tensor(a!) out, Tensor left, Tensor right) -> ()");
  m.def("accumulate_grouped_(Tensor(a!) out, Tensor left, Tensor right, Tensor ends) -> ()");
  m.def(
      "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, int num_tokens) "
      "-> (Tensor logprobs, Tensor entropy, Tensor log_sum)");
  m.def(
      "token_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor log_sum, Tensor entropy, int num_tokens) -> (Tensor grad_hidden, Tensor grad_weight)");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
      "Tensor step, float lr, float beta1, float beta2, float eps, float weight_decay, float? grad_scale) -> ()");
}
