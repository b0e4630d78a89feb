// Every op's schema: the index of our kernels. The text of each stands in its Python file too (r1mega/ops/), which defines it where
// this library is not built; a test compares the two.

#include <torch/library.h>

TORCH_LIBRARY(r1mega, m) {
  m.def(
      "row_map(Tensor routing_map, SymInt num_rows, SymInt width, SymInt multiple) "
      "-> (Tensor counts, Tensor ends, Tensor row_experts, Tensor row_tokens, Tensor token_rows)");
  m.def("permute(Tensor tokens, Tensor row_tokens, Tensor token_rows) -> Tensor rows");
  m.def("permute_probs(Tensor probs, Tensor row_tokens, Tensor row_experts) -> Tensor row_probs");
  m.def(
      "permute_probs_backward(Tensor grad_row_probs, Tensor row_tokens, Tensor row_experts, SymInt num_tokens, SymInt num_experts) "
      "-> Tensor grad_probs");
  m.def(
      "permute_quantize(Tensor tokens, Tensor row_tokens, Tensor token_rows, bool power_of_two) "
      "-> (Tensor payload, Tensor scales)");
  m.def("unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens, Tensor? row_probs=None) -> Tensor tokens");
  m.def(
      "unpermute_backward(Tensor grad_tokens, Tensor rows, Tensor row_tokens, Tensor token_rows, Tensor row_probs) "
      "-> (Tensor grad_rows, Tensor grad_row_probs)");
}
