// route and route_backward on a CPU. The contract: r1mega/ops/route.py.
//
// Scores come from torch's vectorised sigmoid and softmax, so that a choice within rounding of a tie is the reference's too; the rest
// is one pass over the tokens. Best experts are kept sorted while a token's scores go by: most are below the worst of them and cost
// one comparison.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

// Whether a comes before b in a descending order in which NaN is the largest.
template <typename T>
inline bool above(T a, T b) {
  return a > b || (a != a && b == b);
}

// The best `size` of the scores seen, sorted, the earlier one first where two are equal.
template <typename T>
struct Best {
  std::vector<T> score;
  std::vector<int64_t> index;
  int64_t size = 0, held = 0;

  void start(int64_t wanted) {
    size = wanted, held = 0;
    if (static_cast<int64_t>(score.size()) < size) score.resize(size), index.resize(size);
  }

  void see(T value, int64_t from) {
    if (held == size) {
      if (value <= score[size - 1] || !above(value, score[size - 1])) return;
    } else {
      ++held;
    }
    int64_t place = held - 1;
    for (; place > 0 && above(value, score[place - 1]); --place) {
      score[place] = score[place - 1];
      index[place] = index[place - 1];
    }
    score[place] = value;
    index[place] = from;
  }
};

// What one thread needs for its tokens.
template <typename T>
struct Chooser {
  const RouteSizes& sizes;
  int64_t top_k;
  Best<T> experts, groups, members;
  std::vector<char> kept;

  Chooser(const RouteSizes& sizes, int64_t top_k) : sizes(sizes), top_k(top_k), kept(sizes.groups, 1) {}

  // The token's experts by `choice`, best first, in `experts`. `group_scores`: what groups are scored by.
  void choose(const T* choice, const T* group_scores) {
    const int64_t size = sizes.group_size;
    if (sizes.kept < sizes.groups) {
      groups.start(sizes.kept);
      for (int64_t g = 0; g < sizes.groups; ++g) {
        members.start(sizes.group_best);
        for (int64_t i = g * size; i < (g + 1) * size; ++i) members.see(group_scores[i], i);
        T sum = members.score[0];
        for (int64_t n = 1; n < sizes.group_best; ++n) sum += members.score[n];
        groups.see(sum, g);
      }
      std::fill(kept.begin(), kept.end(), 0);
      for (int64_t g = 0; g < sizes.kept; ++g) kept[groups.index[g]] = 1;
    }
    experts.start(top_k);
    for (int64_t g = 0; g < sizes.groups; ++g) {
      if (!kept[g]) continue;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) experts.see(choice[e], e);
    }
  }
};

// Values of the chosen experts, in place: scores to probabilities, in the order of the choice.
template <typename T>
void to_probs(Score score, T* value, int64_t top_k, T scale) {
  if (score == Score::kTopkSoftmax) {
    T most = value[0], sum = 0;  // the first is the largest
    for (int64_t k = 0; k < top_k; ++k) sum += value[k] = std::exp(value[k] - most);
    for (int64_t k = 0; k < top_k; ++k) value[k] = value[k] / sum;
  } else if (score == Score::kSigmoid && top_k > 1) {
    T sum = value[0];
    for (int64_t k = 1; k < top_k; ++k) sum += value[k];
    const T total = sum + static_cast<T>(1e-20);
    for (int64_t k = 0; k < top_k; ++k) value[k] = value[k] / total;
  }
  for (int64_t k = 0; k < top_k; ++k) value[k] *= scale;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_cpu(
    const at::Tensor& logits_any, const std::optional<at::Tensor>& bias_any, int64_t top_k, int64_t num_groups, int64_t topk_groups,
    std::string_view score_function, double scale) {
  const RouteSizes sizes = check_route(logits_any, bias_any, top_k, num_groups, topk_groups, score_function);
  const int64_t T = sizes.tokens, E = sizes.experts;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const at::ScalarType wide = logits_any.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor logits = logits_any.to(wide).contiguous();
  const at::Tensor scores = sizes.score == Score::kSigmoid ? at::sigmoid(logits)
      : sizes.score == Score::kSoftmax                     ? at::softmax(logits, -1)
                                                           : logits;
  const at::Tensor bias = bias_any.has_value() ? bias_any->to(wide).contiguous() : at::Tensor();
  at::Tensor probs = at::empty({T, E}, logits_any.options());
  at::Tensor map = at::empty({T, E}, logits.options().dtype(at::kBool));
  at::Tensor counts = at::empty({E}, logits.options().dtype(at::kLong)), offsets = at::empty_like(counts);
  bool* chosen = map.mutable_data_ptr<bool>();
  const int64_t threads = at::get_num_threads();
  std::vector<int64_t> count(threads * E, 0);  // a row a thread

  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, logits_any.scalar_type(), "route", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const acc_t* score = scores.const_data_ptr<acc_t>();
    const acc_t* logit = logits.const_data_ptr<acc_t>();
    const acc_t* added = bias.defined() ? bias.const_data_ptr<acc_t>() : nullptr;
    scalar_t* prob = probs.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, std::max<int64_t>(1, kGrain / E), [&](int64_t first, int64_t last) {
      Chooser<acc_t> chooser(sizes, top_k);
      std::vector<acc_t> biased(E), value(top_k);
      int64_t* own = count.data() + at::get_thread_num() * E;
      for (int64_t t = first; t < last; ++t) {
        const acc_t* row = score + t * E;
        const acc_t* choice = sizes.score == Score::kSoftmax ? logit + t * E : row;
        if (added) {
          for (int64_t e = 0; e < E; ++e) biased[e] = row[e] + added[e];
          choice = biased.data();
        }
        chooser.choose(choice, sizes.score == Score::kSoftmax ? row : choice);
        const int64_t* expert = chooser.experts.index.data();
        for (int64_t k = 0; k < top_k; ++k) value[k] = row[expert[k]];
        to_probs<acc_t>(sizes.score, value.data(), top_k, static_cast<acc_t>(scale));
        std::memset(static_cast<void*>(prob + t * E), 0, E * sizeof(scalar_t));
        std::memset(chosen + t * E, 0, E);
        for (int64_t k = 0; k < top_k; ++k) {
          prob[t * E + expert[k]] = static_cast<scalar_t>(value[k]);
          chosen[t * E + expert[k]] = true;
          ++own[expert[k]];
        }
      }
    });
  });

  int64_t* total = counts.mutable_data_ptr<int64_t>();
  int64_t* end = offsets.mutable_data_ptr<int64_t>();
  int64_t before = 0;
  for (int64_t e = 0; e < E; ++e) {
    total[e] = 0;
    for (int64_t thread = 0; thread < threads; ++thread) total[e] += count[thread * E + e];
    end[e] = before += total[e];
  }
  return {probs, map, counts, offsets};
}

// The gradient of one token's logits at its chosen experts; `grad`: of their probabilities, scale included; `value`: their logits.
template <typename T>
void chosen_gradient(Score score, const T* grad, T* value, int64_t count, bool normalised) {
  if (score == Score::kTopkSoftmax) {
    T most = -std::numeric_limits<T>::infinity(), sum = 0, dot = 0;
    for (int64_t k = 0; k < count; ++k) most = value[k] > most ? value[k] : most;
    for (int64_t k = 0; k < count; ++k) sum += value[k] = std::exp(value[k] - most);
    for (int64_t k = 0; k < count; ++k) dot += grad[k] * (value[k] /= sum);
    for (int64_t k = 0; k < count; ++k) value[k] *= grad[k] - dot;
    return;
  }
  T total = 0, dot = 0;
  for (int64_t k = 0; k < count; ++k) total += value[k] = 1 / (1 + std::exp(-value[k]));
  total += static_cast<T>(1e-20);
  for (int64_t k = 0; k < count; ++k) dot += grad[k] * (value[k] / total);
  for (int64_t k = 0; k < count; ++k) {
    const T of_score = normalised ? (grad[k] - dot) / total : grad[k];
    value[k] = of_score * (1 - value[k]) * value[k];
  }
}

at::Tensor route_backward_cpu(
    const at::Tensor& grad_any, const at::Tensor& logits_any, const at::Tensor& map_any, std::string_view score_function,
    int64_t top_k, double scale) {
  const Score score = check_route_backward(grad_any, logits_any, map_any, score_function, top_k);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const at::Tensor grad = grad_any.contiguous(), logits = logits_any.contiguous(), map = map_any.contiguous();
  const int64_t T = logits.size(0), E = logits.size(1);
  const at::ScalarType wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor all = score == Score::kSoftmax ? at::softmax(logits.to(wide), -1) : at::Tensor();
  at::Tensor out = at::empty({T, E}, logits.options());
  const bool* chosen = map.const_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, logits.scalar_type(), "route_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* grad_in = grad.const_data_ptr<scalar_t>();
    const scalar_t* logit = logits.const_data_ptr<scalar_t>();
    const acc_t* probability = all.defined() ? all.const_data_ptr<acc_t>() : nullptr;
    const acc_t factor = static_cast<acc_t>(scale);
    scalar_t* grad_out = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, std::max<int64_t>(1, kGrain / E), [&](int64_t first, int64_t last) {
      std::vector<int64_t> expert(E);
      std::vector<acc_t> given(E), value(E);
      for (int64_t t = first; t < last; ++t) {
        int64_t count = 0;
        for (int64_t e = 0; e < E; ++e) {  // no branch: which experts are chosen cannot be foreseen
          expert[count] = e;
          count += chosen[t * E + e];
        }
        for (int64_t k = 0; k < count; ++k) {
          given[k] = static_cast<acc_t>(grad_in[t * E + expert[k]]) * factor;
          value[k] = static_cast<acc_t>(logit[t * E + expert[k]]);
        }
        scalar_t* row = grad_out + t * E;
        if (probability) {
          const acc_t* p = probability + t * E;
          acc_t dot = 0;
          for (int64_t k = 0; k < count; ++k) dot += given[k] * p[expert[k]];
          for (int64_t e = 0; e < E; ++e) row[e] = static_cast<scalar_t>(-dot * p[e]);
          for (int64_t k = 0; k < count; ++k) row[expert[k]] = static_cast<scalar_t>((given[k] - dot) * p[expert[k]]);
          continue;
        }
        std::memset(static_cast<void*>(row), 0, E * sizeof(scalar_t));
        chosen_gradient<acc_t>(score, given.data(), value.data(), count, top_k > 1);
        for (int64_t k = 0; k < count; ++k) row[expert[k]] = static_cast<scalar_t>(value[k]);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1mega, CPU, m) {
  m.impl("route", route_cpu);
  m.impl("route_backward", route_backward_cpu);
}

}  // namespace r1mega
