// route and route_backward on a CPU. The contract: r1mega/ops/route.py.
//
// Scores come from torch's vectorised sigmoid and softmax, so that a choice within rounding of a tie is the reference's too; the
// rest is one pass over the tokens. A token's experts are taken one by one, each the largest of integers that order as the scores do:
// loops without branches, of as many numbers at once as the processor has.

#include "op.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <c10/util/bit_cast.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

namespace r1mega {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

// Integer loops run on whatever vectors the processor has; their results do not depend on it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define R1MEGA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define R1MEGA_CLONES
#endif
#define R1MEGA_INLINE inline __attribute__((always_inline))

// A score as a signed integer that orders as a stable descending sort takes it: NaN above all, -0 as 0. No score's is the lowest.
R1MEGA_INLINE int32_t to_key(float score) {
  const int32_t bits = c10::bit_cast<int32_t>(score + 0.0f);  // -0 + 0 is 0
  return score != score ? std::numeric_limits<int32_t>::max() : bits ^ ((bits >> 31) & std::numeric_limits<int32_t>::max());
}
R1MEGA_INLINE int64_t to_key(double score) {
  const int64_t bits = c10::bit_cast<int64_t>(score + 0.0);
  return score != score ? std::numeric_limits<int64_t>::max() : bits ^ ((bits >> 63) & std::numeric_limits<int64_t>::max());
}
R1MEGA_INLINE float to_score(int32_t key) {
  return c10::bit_cast<float>(key ^ ((key >> 31) & std::numeric_limits<int32_t>::max()));
}
R1MEGA_INLINE double to_score(int64_t key) {
  return c10::bit_cast<double>(key ^ ((key >> 63) & std::numeric_limits<int64_t>::max()));
}

// Takes the best key out of `key` and returns its place: of equal ones, the first.
template <typename Key>
R1MEGA_INLINE int32_t take_best(Key* key, int32_t count) {
  Key most = key[0];
  for (int32_t i = 1; i < count; ++i) most = key[i] > most ? key[i] : most;
  int32_t place = count;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t here = key[i] == most ? i : count;
    place = here < place ? here : place;
  }
  key[place] = std::numeric_limits<Key>::lowest();
  return place;
}

// The sum of the `best` largest scores of a group, largest first.
template <typename T, typename Key>
R1MEGA_INLINE T group_score(const Key* key, int32_t size, int32_t best, Key* spare) {
  constexpr Key kLowest = std::numeric_limits<Key>::lowest();
  if (best <= 2) {
    Key first = kLowest, second = kLowest;
    for (int32_t i = 0; i < size; ++i) {
      const Key lower = key[i] < first ? key[i] : first;
      first = key[i] > first ? key[i] : first;
      second = lower > second ? lower : second;
    }
    return best == 1 ? to_score(first) : to_score(first) + to_score(second);
  }
  std::copy(key, key + size, spare);
  T sum = to_score(key[take_best(spare, size)]);
  for (int32_t n = 1; n < best; ++n) sum += to_score(key[take_best(spare, size)]);
  return sum;
}

// What one thread needs for its tokens. T: float or double; Key: the integer of its size.
template <typename T, typename Key>
struct Room {
  std::vector<Key> key, open, group;    // of experts; of those that can be chosen; of groups
  std::vector<int32_t> kept, expert;    // groups that are kept, in their order; a token's experts, best first
  explicit Room(const RouteSizes& sizes, int64_t top_k)
      : key(sizes.experts), open(sizes.experts), group(sizes.groups), kept(sizes.groups), expert(top_k) {}
};

// A token's experts, best first, into room.expert. `choice`: what experts are compared by, but for the bias; `of_group`: what their
// groups are.
template <typename T, typename Key>
R1MEGA_INLINE void choose(
    const RouteSizes& sizes, int32_t top_k, const T* choice, const T* of_group, const T* bias, Room<T, Key>& room) {
  const auto E = static_cast<int32_t>(sizes.experts), G = static_cast<int32_t>(sizes.groups);
  const auto size = static_cast<int32_t>(sizes.group_size), kept = static_cast<int32_t>(sizes.kept);
  Key *key = room.key.data(), *open = room.open.data(), *group = room.group.data();
  int32_t* order = room.kept.data();
  const auto to_keys = [&](const T* score) __attribute__((always_inline)) {
    if (bias)
      for (int32_t e = 0; e < E; ++e) key[e] = to_key(score[e] + bias[e]);
    else
      for (int32_t e = 0; e < E; ++e) key[e] = to_key(score[e]);
  };
  if (kept == G) {
    to_keys(choice);
    std::copy(key, key + E, open);
    for (int32_t k = 0; k < top_k; ++k) room.expert[k] = take_best(open, E);
    return;
  }
  to_keys(of_group);
  for (int32_t g = 0; g < G; ++g)
    group[g] = to_key(group_score<T>(key + g * size, size, static_cast<int32_t>(sizes.group_best), open));
  for (int32_t g = 0, next = 0; g < G; ++g) {
    int32_t better = 0;  // no branch: which groups are kept cannot be foreseen
    for (int32_t other = 0; other < G; ++other) better += (group[other] > group[g]) | ((group[other] == group[g]) & (other < g));
    order[next] = g;
    next += better < kept;
    if (next == kept) break;
  }
  if (of_group != choice) to_keys(choice);
  for (int32_t g = 0; g < kept; ++g) std::copy(key + order[g] * size, key + (order[g] + 1) * size, open + g * size);
  for (int32_t k = 0; k < top_k; ++k) {
    const int32_t place = take_best(open, kept * size);
    room.expert[k] = order[place / size] * size + place % size;
  }
}

using Room32 = Room<float, int32_t>;
using Room64 = Room<double, int64_t>;

R1MEGA_CLONES void choose_row(
    const RouteSizes& sizes, int32_t top_k, const float* choice, const float* of_group, const float* bias, Room32& room) {
  choose(sizes, top_k, choice, of_group, bias, room);
}

void choose_row(
    const RouteSizes& sizes, int32_t top_k, const double* choice, const double* of_group, const double* bias, Room64& room) {
  choose(sizes, top_k, choice, of_group, bias, room);
}

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
      std::conditional_t<std::is_same_v<acc_t, double>, Room64, Room32> room(sizes, top_k);
      std::vector<acc_t> value(top_k);
      int64_t* own = count.data() + at::get_thread_num() * E;
      for (int64_t t = first; t < last; ++t) {
        const acc_t* row = score + t * E;
        const acc_t* choice = sizes.score == Score::kSoftmax ? logit + t * E : row;
        choose_row(sizes, static_cast<int32_t>(top_k), choice, row, added, room);
        const int32_t* expert = room.expert.data();
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

// Where a row of the map is true; how often.
int64_t find_chosen(const bool* row, int64_t E, int64_t* expert) {
  int64_t count = 0, e = 0;
  for (; e + 8 <= E; e += 8) {  // most of eight are false
    uint64_t word;
    std::memcpy(&word, row + e, 8);
    if (word == 0) continue;
    for (int64_t i = e; i < e + 8; ++i) {
      expert[count] = i;
      count += row[i];
    }
  }
  for (; e < E; ++e) {
    expert[count] = e;
    count += row[e];
  }
  return count;
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
      std::vector<int64_t> expert(E + 1);  // one more is written to than is found
      std::vector<acc_t> given(E), value(E);
      for (int64_t t = first; t < last; ++t) {
        const int64_t count = find_chosen(chosen + t * E, E, expert.data());
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
