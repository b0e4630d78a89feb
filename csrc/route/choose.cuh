// The choice of the largest scores by a warp, kOwn neighbouring ones a lane, compared as integers (order_key).
//
// Each lane sorts its own once; the largest of the warp's heads is one redux, and the lanes that have it take it off: after `count`
// rounds it is the least key chosen, and what is chosen follows by one comparison a score. Only where more scores than places have
// that key are they ranked by index.

#pragma once

#include "../common/device.cuh"
#include "op.h"

namespace r1mega {

template <int kOwn>
constexpr bool kFew = kOwn <= 8;  // a lane's scores are sorted

template <int kOwn>
using Mask = std::conditional_t<(kOwn > 32), uint64_t, uint32_t>;

// The largest key of those that are not in `out`.
template <int kOwn>
__device__ __forceinline__ uint32_t best_of(const uint32_t (&key)[kOwn], Mask<kOwn> out) {
  uint32_t best = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) best = max(best, (out >> j) & 1 ? 0u : key[j]);
  return best;
}

// `out` and the first key of this size that is not in it.
template <int kOwn>
__device__ __forceinline__ Mask<kOwn> with_first(const uint32_t (&key)[kOwn], uint32_t size, Mask<kOwn> out) {
  Mask<kOwn> found = 0;
#pragma unroll
  for (int j = kOwn - 1; j >= 0; --j)
    if (key[j] == size && !((out >> j) & 1)) found = Mask<kOwn>(1) << j;
  return out | found;
}

template <typename M>
__device__ __forceinline__ int num_bits(M mask) {
  if constexpr (sizeof(M) == 8) return __popcll(mask);
  return __popc(mask);
}

// order_key of a score that is not NaN.
__device__ __forceinline__ uint32_t number_key(float score) {
  const uint32_t bits = float_bits(score + 0.0f);  // -0 + 0 is 0
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// A lane's keys to be taken largest first. `head`: the largest of those left, 0 when none is.
template <int kOwn>
struct Queue {
  static constexpr int kSlots = !kFew<kOwn> || kOwn == 1 ? kOwn : kOwn == 2 ? 2 : kOwn <= 4 ? 4 : 8;
  uint32_t slot[kSlots];  // sorted where they are few: the head first
  Mask<kOwn> out = 0;     // else: those that were taken
  uint32_t head;

  __device__ __forceinline__ explicit Queue(const uint32_t (&key)[kOwn]) {
#pragma unroll
    for (int j = 0; j < kSlots; ++j) slot[j] = j < kOwn ? key[j] : 0u;
    if constexpr (kFew<kOwn>) {
      // A bitonic network: runs of `size` are in falling and rising order in turn. Slots that are 0 for good fold away.
#pragma unroll
      for (int size = 2; size <= kSlots; size *= 2) {
#pragma unroll
        for (int step = size / 2; step > 0; step /= 2) {
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if ((j & step) != 0) continue;
            const uint32_t more = max(slot[j], slot[j | step]), less = min(slot[j], slot[j | step]);
            slot[j] = (j & size) == 0 ? more : less;
            slot[j | step] = (j & size) == 0 ? less : more;
          }
        }
      }
      head = slot[0];
    } else {
      head = best_of<kOwn>(slot, out);
    }
  }

  // Takes the head off.
  __device__ __forceinline__ void take() {
    if constexpr (kFew<kOwn>) {
#pragma unroll
      for (int j = 0; j + 1 < kSlots; ++j) slot[j] = slot[j + 1];
      slot[kSlots - 1] = 0;
      head = slot[0];
    } else {
      out = with_first<kOwn>(slot, head, out);
      head = best_of<kOwn>(slot, out);
    }
  }
};

// The sum of the `count` best keys' scores among `lanes` neighbours (a power of two), best first; on each of them.
template <int kOwn>
__device__ __forceinline__ float group_score(Queue<kOwn> queue, int lanes, int count) {
  if (count <= 2) {
    uint32_t first = queue.head;
    queue.take();
    uint32_t second = queue.head;
    for (int step = 1; step < lanes; step *= 2) {
      const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, step);
      const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, step);
      second = max(min(first, other_first), max(second, other_second));
      first = max(first, other_first);
    }
    return count == 1 ? key_score(first) : key_score(first) + key_score(second);
  }
  const int lane = threadIdx.x % kWarp;
  const unsigned mine = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1) << (lane & ~(lanes - 1));
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) {
    uint32_t most = queue.head;
    for (int step = 1; step < lanes; step *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, step));
    const unsigned having = __ballot_sync(kAllLanes, queue.head == most) & mine;
    sum = n == 0 ? key_score(most) : sum + key_score(most);
    if (lane == __ffs(having) - 1) queue.take();
  }
  return sum;
}

// Which of a lane's keys are among the `count` largest of all lanes' (there are so many that are not 0); of equal ones those of the
// lower lanes, and in a lane the first.
template <int kOwn>
__device__ __forceinline__ Mask<kOwn> choose(const uint32_t (&key)[kOwn], Queue<kOwn> queue, bool open, int count) {
  if (!open) queue.head = 0;
  uint32_t least;  // of the keys chosen, in the end
  int taken = 0;
  do {
    least = __reduce_max_sync(kAllLanes, queue.head);
    const bool mine = queue.head == least;
    taken += __popc(__ballot_sync(kAllLanes, mine));
    if (mine) queue.take();
  } while (taken < count);

  Mask<kOwn> chosen = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) chosen |= key[j] >= least ? Mask<kOwn>(1) << j : Mask<kOwn>(0);
  if (!open) chosen = 0;
  if (taken == count && !__any_sync(kAllLanes, queue.head == least)) return chosen;

  Mask<kOwn> equal = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) equal |= key[j] == least ? Mask<kOwn>(1) << j : Mask<kOwn>(0);
  equal &= chosen;
  chosen ^= equal;
  const int lane = threadIdx.x % kWarp, own = num_bits(equal);
  int up_to = own;  // equal ones of this lane and those before
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, up_to, step);
    if (lane >= step) up_to += lower;
  }
  int places = count - warp_sum(num_bits(chosen)) - (up_to - own);
  for (; equal != 0 && places > 0; equal &= equal - 1, --places) chosen |= equal & (~equal + 1);
  return chosen;
}

}  // namespace r1mega
