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
  m.def(
      "permute(Tensor tokens, Tensor probs, Tensor routing_map, SymInt num_rows, SymInt width) "
      "-> (Tensor rows, Tensor row_probs, Tensor counts, Tensor row_tokens, Tensor token_rows)");
  m.def("unpermute(Tensor rows, Tensor token_rows, Tensor row_tokens) -> Tensor tokens");
}
